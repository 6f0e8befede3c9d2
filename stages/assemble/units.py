"""The unit of assemble, which completes the folder of one target."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from stages.assemble.card import model_card
from stages.assemble.config import target_config
from stages.assemble.spec import AssembleArgs, AssembleFacts
from stages.checkpoint.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint
from stages.checkpoint.headers import TensorEntry, read_header
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.units import Job, UnitResult
from stages.io.files import WrittenFile, link_or_copy, write_bytes, write_json
from stages.io.untrusted import read_small
from stages.model.adapter import AdaptedModel, auto_classes
from stages.model.completeness import check_complete
from stages.model.model_config import writable
from stages.model.tied import MODELING_FILE, modeling_source

CARD_FILE = "README.md"
SOURCE_CARD_FILE = "SOURCE_README.md"


def assemble_unit(job: Job[AssembleArgs]) -> UnitResult[AssembleFacts]:
    """Write the remaining files of a target's folder and check that transformers would load it.

    Raises InputError when the written checkpoint does not fill its model.
    """
    args = job.args
    source = Checkpoint(args.model)
    folder = job.part_dir / CHECKPOINT_DIR
    written: list[WrittenFile] = []
    for name, digest in args.files.items():
        merged = job.run_dir / args.merge_dir / CHECKPOINT_DIR / name
        link_or_copy(merged, folder / name)
        written.append(WrittenFile(folder / name, merged.stat().st_size, digest))
    tensors = [entry for name in args.files for entry in read_header(folder / name).entries]
    written += _write_config(source, folder, args, {entry.name for entry in tensors})
    written += [_copy(source.folder, name, folder) for name in source.side_files.kept]
    if list(args.files) != [SINGLE_FILE]:
        written.append(write_json(folder / INDEX_FILE, _index(source, tensors)))
    target = Checkpoint(folder)
    check_complete(AdaptedModel(target))
    num_parameters = sum(one.num_elements for one in target.tensors.values() if not one.name.endswith(".expert_map"))
    facts = AssembleFacts(num_parameters, target.total_bytes, tuple(source.side_files.left))
    card = model_card(args.card, args.format, facts, _source_card(source))
    written.append(write_bytes(folder / CARD_FILE, card.encode()))
    return UnitResult(facts, written)


def _write_config(source: Checkpoint, folder: Path, args: AssembleArgs, names: set[str]) -> Sequence[WrittenFile]:
    classes = auto_classes(source) if args.format == "tied" else {}
    config = target_config(
        source.config,
        args.architecture,
        classes,
        args.num_merged,
        args.format,
        args.value_dtype,
        source.raw_tensors,
        names,
        args.merges_mtp,
        args.num_neurons,
    )
    written = write_json(folder / CONFIG_FILE, writable(config))
    if args.format != "tied":
        return [written]
    return [written, write_bytes(folder / MODELING_FILE, modeling_source(config).encode())]


def _copy(source: Path, name: str, folder: Path) -> WrittenFile:
    """Copy a side file. It is read with the bounds under which it was found and checked.
    The source's card gets another name."""
    return write_bytes(folder / (SOURCE_CARD_FILE if name == CARD_FILE else name), read_small(source / name))


def _source_card(source: Checkpoint) -> str:
    if CARD_FILE not in source.side_files.kept:
        return ""
    return read_small(source.folder / CARD_FILE).decode("utf-8", "replace")


def _index(source: Checkpoint, tensors: list[TensorEntry]) -> dict[str, JsonValue]:
    metadata: dict[str, JsonValue] = dict(source.index.get("metadata") or {})
    metadata["total_size"] = sum(entry.num_bytes for entry in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(entry.num_elements for entry in tensors)
    weight_map: dict[str, JsonValue] = {entry.name: entry.file for entry in sorted(tensors, key=lambda e: e.name)}
    return {"metadata": metadata, "weight_map": weight_map}
