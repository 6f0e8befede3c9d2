"""`init`: a run file that editors and the program accept, fitted to the model and to what it can run on."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from pipeline import machine
from pipeline.commands.init import fit_workers, init
from pipeline.commands.plan import plan_run
from pipeline.config import load_config
from pipeline.machine import Machines, Node, this_machine
from stages.contracts.errors import InputError
from stages.registry import RECOMMENDED
from tests.conftest import REPOSITORY
from tests.tiny import build, save, save_token_ids

GB = 10**9
LAPTOP = Machines("this machine", (Node(8, 16 * GB),))
EXAMPLE = str(REPOSITORY / "examples" / "tiny-mixtral")
TEXT = str(REPOSITORY / "examples" / "text" / "heldout-fiction.jsonl")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_what_it_writes_plans_and_has_a_valid_schema(family: str, tmp_path: Path) -> None:
    """deepseek_v3 chooses among groups of experts, so not every number can be stock."""
    ids = str(save_token_ids(tmp_path / "ids.npy"))
    path = tmp_path / "run.yaml"
    source = save(build(family, torch.bfloat16), tmp_path / "source")
    lines = init(str(source), None, path, [ids], [ids], RECOMMENDED, LAPTOP, is_forced=False)
    assert any(line == f"next: hcsmoe plan {path}" for line in lines)
    text = path.read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=hcsmoe.schema.json"
    values = yaml.safe_load(text)
    jsonschema.Draft202012Validator(json.loads((tmp_path / "hcsmoe.schema.json").read_text())).validate(values)
    assert values["clustering"] == {"targets": [4]} and values["variants"] == [RECOMMENDED]
    short = {f"{one}.{name}": value for one in ("calibration", "evaluation") for name, value in
             (("num_sequences", 8), ("sequence_length", 32))}  # fmt: skip
    planned = plan_run(load_config(path, [f"run_dir={tmp_path / 'run'}", *(f"{k}={v}" for k, v in short.items())]))
    assert [one.num_experts for one in planned.checkpoints] == [4]


def test_without_texts_it_says_what_to_fill_in(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = init(EXAMPLE, None, path, [], [], "hc-smoe", LAPTOP, is_forced=False)
    assert "next: name your text in calibration.data, which is calibration.jsonl now" in lines
    assert "\n# evaluation:\n#   data: [heldout.jsonl]\n" in path.read_text()
    assert load_config(path, []).evaluation is None
    with pytest.raises(InputError, match=r"calibration.jsonl"):
        plan_run(load_config(path, [f"run_dir={tmp_path / 'run'}"]))


def test_a_file_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"run.yaml exists; give another --output, or --force"):
        init(EXAMPLE, None, path, [TEXT], [], "hc-smoe", LAPTOP, is_forced=False)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    init(EXAMPLE, None, path, [TEXT], [], "hc-smoe", LAPTOP, is_forced=True)
    assert load_config(path, []).model == EXAMPLE
    with pytest.raises(InputError, match="--method: there is no preset named x; known presets: best, "):
        init(EXAMPLE, None, tmp_path / "other.yaml", [TEXT], [], "x", LAPTOP, is_forced=False)
    assert not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("nodes", "layer_gb", "expected"),
    [
        ([Node(8, 16 * GB)], 1, (8, 1, 0, 1.0)),  # 12.8 / 8 - 0.6
        ([Node(8, 16 * GB)], 5, (2, 4, 0, 5.8)),  # 12.8 / 2 - 0.6
        ([Node(8, 16 * GB)], 20, (1, 8, 0, 12.2)),
        ([Node(32, 200 * GB, 4, "H100", 80 * GB)], 5, (4, 8, 1, 64.0)),
        ([Node(2, 4 * GB), Node(16, 64 * GB, 2, "A10G", None)], 5, (2, 8, 1, 8.589934592)),
        ([Node(64, 500 * GB, 8, "H100", 80 * GB), Node(16, 64 * GB, 1, "L4", 24 * GB)], 5, (1, 16, 1, 19.2)),
    ],
)
def test_workers_fit_the_smallest_machine(nodes: list[Node], layer_gb: float, expected: tuple[int, int, int, float]) -> None:
    fit = fit_workers(Machines("x", tuple(nodes)), int(layer_gb * GB))
    assert (fit.num_workers, fit.num_cpus, fit.num_gpus) == expected[:3]
    assert fit.worker_memory == pytest.approx(expected[3] * GB, rel=1e-9)
    assert (fit.lacking_bytes > 0) == (layer_gb * GB > fit.worker_memory)


def test_a_layer_that_fits_nowhere_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    init(EXAMPLE, None, path, [TEXT], [], "hc-smoe", Machines("this machine", (Node(1, GB),)), is_forced=False)
    assert "which is more than there is" not in path.read_text()
    init(EXAMPLE, None, path, [TEXT], [], "hc-smoe", Machines("this machine", (Node(1, 10**7),)), is_forced=True)
    assert "which is more than there is: find more memory" in path.read_text()


def test_this_machine_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'NVIDIA A100, 81920\\nNVIDIA L4, 23034\\n'\n")
    smi.chmod(0o755)
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (limit, tmp_path / "none"))
    found = this_machine()
    assert (found.memory_bytes, found.num_gpus, found.gpu_name, found.gpu_bytes) == (10**6, 2, "NVIDIA A100", 23034 << 20)
    smi.write_text("#!/bin/sh\nexit 9\n")
    limit.write_text("max\n")
    assert this_machine().num_gpus == 0 and this_machine().memory_bytes > 10**9
