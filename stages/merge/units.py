"""Unit of merge: one output file."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.headers import write_header
from stages.checkpoint.reader import TORCH_DTYPES, TensorReader
from stages.checkpoint.schemes import WEIGHT
from stages.checkpoint.weighted_sum import merge_rows
from stages.contracts.layer_plan import DROPPED, LayerPlan
from stages.contracts.paths import CHECKPOINT_DIR, TENSORS_FILE
from stages.contracts.tensors import TensorRow, read_tensors
from stages.contracts.units import Job, UnitResult
from stages.io.files import DigestingFile, write_file
from stages.merge.blocks import ComputedMean, Mean, PlainMean, Stretch, write_means
from stages.merge.layout import OutputFile, OutputTensor, output_files
from stages.merge.planned_layer import PlannedLayer, slots_of
from stages.merge.requantise import PackedSlots
from stages.merge.slots import ExpertTensors
from stages.merge.spec import MergeArgs, MergeFacts, PackedAnew

_COPIED_DTYPES = {
    "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Numbers that can be NaN and that no supported model computes with. What is in no table (U16, F4, ...) is bytes."""


def _copied(row: TensorRow, dtype: torch.dtype, source: TensorReader, place: str, may_be_infinite: bool) -> Mean:
    """A tensor as it is stored; one that was packed and is written as plain numbers, as its values."""
    if not row.part and source.checkpoint.tensors[row.name].packing is not None:
        return ComputedMean(((source.read(one), 1.0) for one in (row.name,)), 1, dtype, place)
    entry = source.checkpoint.raw_tensors[row.name]
    stretch = Stretch(source.checkpoint.folder / entry.file, entry.begin, entry.num_bytes)
    return PlainMean([(stretch, 1.0)], dtype, place, may_be_infinite)


def _means(tensor: OutputTensor, packed: PackedSlots, layers: Mapping[int, PlannedLayer]) -> Iterator[Mean]:
    """The bytes of an output tensor, one mean after another."""
    row, source = tensor.source, packed.source
    dtype, place = (TORCH_DTYPES | _COPIED_DTYPES).get(tensor.dtype, torch.uint8), source.place(row.name)
    if tensor.rule == "copy" and not _is_replaced(tensor, layers):
        yield _copied(row, dtype, source, place, may_be_infinite=not row.parameter)
        return
    assert tensor.layer is not None
    layer = layers[tensor.layer]
    plan = layer.plan
    if tensor.rule == "expert_map":
        if DROPPED in plan.slot_E:
            raise ValueError(
                f"{place}: the layer plan drops experts, which no tied export can express; set export.formats "
                f"to [stock], or mend the method"
            )
        yield ComputedMean([(torch.from_numpy(plan.slot_E.astype("int64")), 1.0)], 1, dtype, place)
    elif row.part and tensor.rule != "router":
        yield from packed.means(tensor, layer)
    elif row.parameter in plan.replaced:
        solved = (layer.replaced(one, tensor.slot, tensor.shape).to(dtype) for one in (row.parameter,))
        yield ComputedMean(((values, 1.0) for values in solved), 1, dtype, place)
    elif tensor.rule != "router" and row.expert_axis in (None, 0):
        experts = ExpertTensors(row, source, dtype, place, tensor.written)
        for slot in slots_of(tensor, plan):
            yield from experts.means(slot)
    else:
        assert row.expert_axis is not None
        rows = merge_rows(source.read(row.name).to(dtype), row.expert_axis, _combinations(tensor, plan, place), place)
        yield ComputedMean([(rows, 1.0)], 1, dtype, place)


def _is_replaced(tensor: OutputTensor, layers: Mapping[int, PlannedLayer]) -> bool:
    """Whether the layer's plan has other values for a tensor that is no expert's, such as a shared expert's."""
    row = tensor.source
    if row.role != "copy" or tensor.layer is None or tensor.layer not in layers or not row.parameter:
        return False
    return row.parameter in layers[tensor.layer].plan.replaced


def _combinations(tensor: OutputTensor, plan: LayerPlan, place: str) -> Iterator[Sequence[tuple[int, float]]]:
    """What each slot's row of a router, or its slice of a tensor whose experts do not lie together, is added up from."""
    for slot in plan.slots:
        if tensor.rule == "router":
            assert slot.row is not None, place
            yield slot.row.parts
        elif slot.is_joined or any(member.neurons is not None or member.places is not None for member in slot.members):
            raise ValueError(
                f"{place}: the layer plan chooses neurons, but the experts are not along its first axis; report the family"
            )
        else:
            yield [(member.expert, member.weight) for member in slot.members]


def _bytes_read(tensor: OutputTensor, source: TensorReader, layers: Mapping[int, PlannedLayer]) -> int:
    """Bytes of the source that go into an output tensor. A slot that is packed anew counts once, with its numbers."""
    row, tensors = tensor.source, source.checkpoint.tensors
    if tensor.rule == "expert_map":
        return 0
    if tensor.rule == "copy" and _is_replaced(tensor, layers):
        return 0
    if tensor.rule in ("copy", "router"):
        return row.num_bytes if row.part else tensors[row.name].stored_bytes
    assert tensor.layer is not None
    plan = layers[tensor.layer].plan
    if row.part not in ("", WEIGHT):
        return 0
    if row.parameter in plan.replaced:
        return 0
    members = [member.expert for slot in slots_of(tensor, plan) for member in slot.members]
    if row.values_template is not None:
        return sum(tensors[row.values_template.format(expert)].stored_bytes for expert in members)
    return tensors[row.values].stored_bytes * len(set(members)) // plan.num_experts


@lru_cache(maxsize=1)
def _surveyed(model: str, survey_dir: Path) -> tuple[Checkpoint, list[TensorRow]]:
    """The checkpoint and its tensors, kept for the next file: DeepSeek-V3's 90,000 headers take 1.5 s to read.

    A changed checkpoint has another survey: the name of its directory holds the digest of what it was made from.
    """
    return Checkpoint(model), read_tensors(survey_dir / TENSORS_FILE)


@lru_cache(maxsize=1)
def _laid_out(
    model: str,
    survey_dir: Path,
    num_experts: int,
    num_merged: tuple[tuple[int, int], ...],
    export_format: str,
    max_file_bytes: int,
    value_dtype: str,
    merges_mtp: bool,
    num_neurons: int | None,
) -> tuple[Checkpoint, list[OutputFile]]:
    """The checkpoint and a target's files, kept for the target's next file.

    One target is kept: the driver hands out the files of one after those of another.
    """
    checkpoint, rows = _surveyed(model, survey_dir)
    files = output_files(
        rows, num_experts, dict(num_merged), export_format, max_file_bytes, value_dtype, merges_mtp, num_neurons
    )
    return checkpoint, files


def merge_unit(job: Job[MergeArgs]) -> UnitResult[MergeFacts]:
    """Write one output file under its final name."""
    args = job.args
    torch.set_num_threads(args.num_threads)
    checkpoint, files = _laid_out(
        args.model, job.run_dir / args.survey_dir, args.num_experts, tuple(args.num_merged.items()), args.format,
        args.max_file_bytes, args.value_dtype, args.mtp_plan_dir is not None, args.num_neurons,
    )  # fmt: skip
    file = files[args.file]
    layers = {layer: PlannedLayer(job.run_dir / args.plan_dir, layer) for layer in args.num_merged}
    if args.mtp_plan_dir is not None:
        numbers = {tensor.source.layer for tensor in file.tensors if tensor.source.role == "mtp"} - {None}
        layers |= {layer: PlannedLayer(job.run_dir / args.mtp_plan_dir, layer) for layer in numbers if layer is not None}
    metadata = checkpoint.headers[file.source_file].metadata
    with TensorReader(checkpoint) as source:
        packed = PackedSlots(source)

        def write(out: DigestingFile) -> None:
            write_header(out, ((t.name, t.dtype, t.shape, t.num_bytes) for t in file.tensors), metadata)
            write_means(out, (mean for tensor in file.tensors for mean in _means(tensor, packed, layers)))

        written = write_file(job.part_dir / CHECKPOINT_DIR / file.name, write)
        num_read = sum(_bytes_read(tensor, source, layers) for tensor in file.tensors)
    anew = tuple(PackedAnew(layer, found.values, found.error) for layer, found in sorted(packed.errors.items()))
    return UnitResult(MergeFacts(len(file.tensors), anew), (written,), bytes_read=num_read)
