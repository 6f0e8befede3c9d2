"""Unit of merge: one output file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.headers import TensorEntry, write_header
from stages.checkpoint.reader import TORCH_DTYPES, TensorReader
from stages.contracts.arrow import Array
from stages.contracts.dendrogram import read_labels
from stages.contracts.evidence import LayerEvidence, read_evidence
from stages.contracts.paths import CHECKPOINT_DIR, TENSORS_FILE, labels_file
from stages.contracts.tensors import TensorRow, read_tensors
from stages.contracts.units import Job, UnitResult
from stages.io.files import DigestingFile, write_file
from stages.merge.blocks import ComputedMean, Mean, PlainMean, Stretch, write_means
from stages.merge.layout import OutputFile, OutputTensor, output_files
from stages.merge.shares import METHODS, ROUTERS, Shares, shares_by_cluster
from stages.merge.spec import MergeArgs, MergeFacts
from stages.merge.weights import merge_rows

_COPIED_DTYPES = {
    "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Numbers that can be NaN and that no supported model computes with. What is in no table (U16, F4, ...) is bytes."""


@dataclass(frozen=True)
class LayerMerge:
    """What a layer's tensors are merged by; read when the first of them is reached."""

    calibrate_dir: Path
    cluster_dir: Path
    layer: int
    num_merged: int
    method: str
    router: str

    @cached_property
    def _evidence(self) -> LayerEvidence:
        return read_evidence(self.calibrate_dir, self.layer)

    @cached_property
    def labels_E(self) -> Array:
        """Cluster of every source expert."""
        return read_labels(labels_file(self.cluster_dir, self.layer), self.num_merged)

    @cached_property
    def experts(self) -> list[Shares]:
        """Members and shares of every merged expert."""
        return shares_by_cluster(METHODS[self.method](self._evidence), self.labels_E)[0]

    @cached_property
    def unweighted(self) -> list[int]:
        """Merged experts whose members were never routed to."""
        return shares_by_cluster(METHODS[self.method](self._evidence), self.labels_E)[1]

    @cached_property
    def rows(self) -> list[Shares]:
        """Members and shares of every combined router row."""
        return ROUTERS[self.router](self._evidence, self.labels_E)


def _stretch(entry: TensorEntry, source: TensorReader, expert: int | None = None) -> Stretch:
    """Where a tensor of plain numbers lies, or one expert's slice of it along axis 0."""
    path = source.checkpoint.folder / entry.file
    if expert is None:
        return Stretch(path, entry.begin, entry.num_bytes)
    num_bytes = entry.num_bytes // entry.shape[0]
    return Stretch(path, entry.begin + expert * num_bytes, num_bytes)


def _mean(
    members: list[tuple[str, float]], dtype: torch.dtype, source: TensorReader, place: str, may_be_infinite: bool = False
) -> Mean:
    """The weighted sum of tensors, by name."""
    entries = [source.checkpoint.tensors[name] for name, _ in members]
    if entries[0].packing is None:
        stretches = [(_stretch(entry, source), share) for entry, (_, share) in zip(entries, members, strict=True)]
        return PlainMean(stretches, dtype, place, may_be_infinite)
    return ComputedMean(((source.read(name), share) for name, share in members), len(members), dtype, place)


def _fused_means(name: str, clusters: list[Shares], dtype: torch.dtype, source: TensorReader, place: str) -> Iterator[Mean]:
    """The weighted sum of each cluster's experts in a fused tensor, whose first axis is theirs."""
    entry = source.checkpoint.tensors[name]
    for cluster in clusters:
        if entry.packing is None:
            yield PlainMean([(_stretch(entry, source, expert), share) for expert, share in cluster], dtype, place)
        else:
            experts = ((source.slices(name)[expert : expert + 1], share) for expert, share in cluster)
            yield ComputedMean(experts, len(cluster), dtype, place)


def _sources(tensor: OutputTensor, layers: Mapping[int, LayerMerge]) -> list[str]:
    """Names of the source's tensors that go into an output tensor; each of their bytes is read once."""
    if tensor.rule == "expert_map":
        return []
    if tensor.rule != "expert":
        return [tensor.source.name]
    assert tensor.layer is not None and tensor.cluster is not None and tensor.source.template is not None
    return [tensor.source.template.format(member) for member, _ in layers[tensor.layer].experts[tensor.cluster]]


def _means(tensor: OutputTensor, source: TensorReader, layers: Mapping[int, LayerMerge]) -> Iterator[Mean]:
    """The bytes of an output tensor, one mean after another."""
    row = tensor.source
    dtype, place = (TORCH_DTYPES | _COPIED_DTYPES).get(tensor.dtype, torch.uint8), source.place(row.name)
    if tensor.rule == "copy":
        yield _mean([(row.name, 1.0)], dtype, source, place, may_be_infinite=not row.parameter)
        return
    assert tensor.layer is not None
    layer = layers[tensor.layer]
    if tensor.rule == "expert_map":
        yield ComputedMean([(torch.from_numpy(layer.labels_E.astype("int64")), 1.0)], 1, dtype, place)
    elif tensor.rule == "expert":
        assert tensor.cluster is not None
        shares = [share for _, share in layer.experts[tensor.cluster]]
        yield _mean(list(zip(_sources(tensor, layers), shares, strict=True)), dtype, source, place)
    elif tensor.rule == "fused_expert" and row.expert_axis == 0:
        yield from _fused_means(row.name, layer.experts, dtype, source, place)
    else:
        assert row.expert_axis is not None
        clusters = layer.rows if tensor.rule == "router" else layer.experts
        merged = merge_rows(source.read(row.name).to(dtype), row.expert_axis, clusters, place)
        yield ComputedMean([(merged, 1.0)], 1, dtype, place)


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
) -> tuple[Checkpoint, list[OutputFile]]:
    """The checkpoint and a target's files, kept for the target's next file.

    One target is kept: the driver hands out the files of one after those of another.
    """
    checkpoint, rows = _surveyed(model, survey_dir)
    return checkpoint, output_files(rows, num_experts, dict(num_merged), export_format, max_file_bytes, value_dtype)


def merge_unit(job: Job[MergeArgs]) -> UnitResult[MergeFacts]:
    """Write one output file under its final name."""
    args = job.args
    torch.set_num_threads(args.num_threads)
    checkpoint, files = _laid_out(
        args.model, job.run_dir / args.survey_dir, args.num_experts, tuple(args.num_merged.items()), args.format,
        args.max_file_bytes, args.value_dtype,
    )  # fmt: skip
    file = files[args.file]
    layers = {
        layer: LayerMerge(
            job.run_dir / args.calibrate_dir, job.run_dir / args.cluster_dir, layer, count, args.method, args.router
        )
        for layer, count in args.num_merged.items()
    }
    metadata = checkpoint.headers[file.source_file].metadata
    with TensorReader(checkpoint) as source:

        def write(out: DigestingFile) -> None:
            write_header(out, ((t.name, t.dtype, t.shape, t.num_bytes) for t in file.tensors), metadata)
            write_means(out, (mean for tensor in file.tensors for mean in _means(tensor, source, layers)))

        written = write_file(job.part_dir / CHECKPOINT_DIR / file.name, write)
    touched = sorted({t.layer for t in file.tensors if t.layer is not None and t.rule in ("expert", "fused_expert")})
    unweighted = {layer: tuple(layers[layer].unweighted) for layer in touched if layers[layer].unweighted}
    num_read = sum(checkpoint.tensors[name].stored_bytes for tensor in file.tensors for name in _sources(tensor, layers))
    return UnitResult(MergeFacts(len(file.tensors), unweighted), (written,), bytes_read=num_read)
