"""`init`: writes a commented run file that fits a model and the machines that a run could use."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml
from rich import filesize

from pipeline.commands.schema import run_file_schema
from pipeline.config import config_of
from pipeline.hub import headers_of
from pipeline.imports import resolve
from pipeline.machine import Machines, Node
from pipeline.run.variants import presets
from pipeline.yaml_files import parse_yaml
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.naming import model_name
from stages.contracts.partition import held_bytes
from stages.contracts.survey import Survey
from stages.contracts.tensors import TensorRow
from stages.contracts.text_settings import Calibration
from stages.io.files import write_bytes
from stages.model.families import stock_targets

SCHEMA_FILE = "hcsmoe.schema.json"
_PROCESS_BYTES = 600_000_000
"""A Python process with torch."""
_USABLE = 0.8
"""Share of a machine's or GPU's memory that workers may fill; the rest is the system's and the allocator's."""
_MAX_LENGTH = 2048
_COLUMNS = 100
_NO_TEXT = "calibration.jsonl"


@dataclass(frozen=True)
class Fit:
    """Resources of workers that fit some machines. num_workers: on the smallest machine. lacking_bytes: by how much a worker of
    it is too small for a single layer; 0 if it is not."""

    num_workers: int
    num_cpus: int
    num_gpus: int
    worker_memory: int
    lacking_bytes: int


def fit_workers(machines: Machines, layer_bytes: int) -> Fit:
    """Workers for the smallest machine that counts, each of which holds at least one layer (layer_bytes with activations).

    With GPUs: a worker each. Else as many workers as there are CPUs, but fewer with more threads where memory is short.
    """
    smallest = machines.workhorse
    if smallest.num_gpus:
        memory = _gpu_share(smallest)
        threads = max(1, smallest.num_cpus // smallest.num_gpus)
        return Fit(smallest.num_gpus, threads, 1, memory, max(0, layer_bytes - memory))
    usable = int(_USABLE * smallest.memory_bytes)
    num_workers = max(1, min(smallest.num_cpus, usable // (layer_bytes + _PROCESS_BYTES)))
    memory = max(usable // num_workers - _PROCESS_BYTES, 1)
    return Fit(num_workers, max(1, smallest.num_cpus // num_workers), 0, memory, max(0, layer_bytes - memory))


def _gpu_share(node: Node) -> int:
    """Memory for a worker on a GPU. Of a GPU whose memory is unknown the default of `resources.worker_memory`."""
    return int(_USABLE * node.gpu_bytes) if node.gpu_bytes else 8 << 30


def init(
    model: str, revision: str | None, run_file: Path, data: Sequence[str], evaluation: Sequence[str], method: str,
    machines: Machines, is_forced: bool,
) -> list[str]:  # fmt: skip
    """Write a run file, and beside it the JSON schema that it names. Returns lines that say what to do next.

    is_forced: replace an existing run file. Raises InputError for a model that is not supported, an unknown method, and a run
    file that exists.
    """
    if method not in presets():
        raise InputError(f"--method: there is no preset named {method}; known presets: {', '.join(sorted(presets()))}")
    if os.path.lexists(run_file) and not is_forced:
        raise InputError(f"{run_file} exists; give another --output, or --force to replace it")
    with headers_of(model, revision) as folder:
        surveyed = resolve("stages.model.survey:survey_checkpoint")(str(folder))
        survey, _ = cast(tuple[Survey, Sequence[TensorRow]], surveyed)
        stock = stock_targets(Checkpoint(folder).config, model)
    text = _run_file(model, revision, survey, stock, data, evaluation, method, machines)
    config_of(parse_yaml(text, "the new run file"), {}, "the new run file")
    write_bytes(run_file.parent / SCHEMA_FILE, json.dumps(run_file_schema(), indent=2).encode() + b"\n")
    write_bytes(run_file, text.encode())
    lines = [f"{run_file}  fitted to {machines}"]
    lines += [f"{run_file.parent / SCHEMA_FILE}  for editors that complete and check YAML"]
    lines += [] if data else [f"next: name your text in calibration.data, which is {_NO_TEXT} now"]
    return [*lines, f"next: hcsmoe plan {run_file}", f"then: hcsmoe run {run_file}"]


def _run_file(
    model: str, revision: str | None, survey: Survey, stock: Sequence[int], data: Sequence[str], evaluation: Sequence[str],
    method: str, machines: Machines,
) -> str:  # fmt: skip
    length = min(_MAX_LENGTH, survey.max_positions or _MAX_LENGTH)
    text = Calibration(data=tuple(data) or (_NO_TEXT,), sequence_length=length)
    layer_bytes = max(held_bytes(survey, (layer, layer + 1), text) for layer in range(survey.num_layers))
    fit = fit_workers(machines, layer_bytes)
    kept = max((r for r in stock if r <= survey.num_experts / 2), default=min(stock))
    if fit.lacking_bytes:
        room = f"A worker needs {filesize.decimal(layer_bytes)} for one layer, which is more than there is: find more memory."
    else:
        room = f"Of a worker: memory for weights and activations, of which one layer takes {filesize.decimal(layer_bytes)}."
    gpus = f"\n  num_gpus: {fit.num_gpus}" if fit.num_gpus else ""
    return f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
# Written by `hcsmoe init` for {machines}.
# {survey.architecture}: {survey.num_layers} layers, {len(survey.moe_layers)} with {survey.num_experts} experts, of which a \
token uses {survey.top_k}; {filesize.decimal(survey.total_bytes)}.
# `hcsmoe plan` checks this file and says what a run needs; `hcsmoe run` runs it, and continues where it was stopped.
model: {_flow(model)}
{f"revision: {_flow(revision)}" if revision else "# revision: main  # branch, tag or commit of a model of the hub"}
run_dir: {_flow(f"runs/{model_name(model)}")}  # all results; on storage that every node reaches

# Text that shows which experts matter: broad, and like what the model is for. Files of text, JSON or Parquet; a dataset of the
# hub; or domains, {{code: ..., prose: ...}}. More sequences are better, and take longer in proportion.
calibration:
  data: {_flow(list(data) or [_NO_TEXT])}
  num_sequences: 128
  sequence_length: {length}

# Experts that each layer keeps: {kept} is {kept / survey.num_experts:.0%} of them. Several targets share one calibration; \
{{share: 0.75}} is a target, too.
# `hcsmoe inspect` lists what each number weighs.
clustering:
  targets: [{kept}]

# One or more of:
{_wrapped(sorted(presets()))}
variants: [{method}]

# stock: the source's own architecture, for any engine. tied: closer to the source without a refit; for transformers only.
export:
  formats: [stock]

# Perplexity of the model, and of what is made of it, on text that neither has been fitted to.
{_evaluation(evaluation, length)}

# {room} Changes no result.
resources:
  worker_memory: {max(1, fit.worker_memory // 10**6)} MB
  num_cpus: {fit.num_cpus}{gpus}
"""


def _evaluation(data: Sequence[str], length: int) -> str:
    lines = ("evaluation:", f"  data: {_flow(list(data) or ['heldout.jsonl'])}", f"  sequence_length: {length}")
    return "\n".join(lines if data else (f"# {line}" for line in lines))


def _wrapped(names: Sequence[str]) -> str:
    return textwrap.fill(", ".join(names), _COLUMNS, initial_indent="#   ", subsequent_indent="#   ", break_on_hyphens=False)


def _flow(value: object) -> str:
    """A value as YAML in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
