"""Names, sizes and files of a target, known from shapes alone."""

from dataclasses import replace
from typing import Any

import pytest

from stages.contracts.tensors import TensorRow
from stages.merge.layout import OutputFile, output_files

NUM_EXPERTS = 4
BIG = 10**9


def row(name: str, file: str, shape: list[int], role: str = "copy", dtype: str = "F32", **more: Any) -> TensorRow:
    """A row of `tensors.arrow`."""
    empty = {"layer": None, "expert": None, "expert_axis": None, "template": None, "scheme": "", "num_bytes": 0}
    empty |= {"neuron_axis": None, "neuron_order": "", "part": "", "values": name, "values_template": more.get("template")}
    empty |= {"values_shape": tuple(shape), "like": ""}
    columns = {"name": name, "file": file, "dtype": dtype, "shape": tuple(shape), "role": role, "parameter": name}
    return TensorRow(**{**columns, **empty, **more})


def expert(layer: int, index: int, file: str) -> TensorRow:
    template = f"layers.{layer}.experts.{{}}.w1.weight"
    name = template.format(index)
    return row(name, file, [8, 4], "expert", layer=layer, expert=index, template=template)


def rows() -> list[TensorRow]:
    """Two MoE layers: one with a tensor an expert, over two files, one with fused experts."""
    return [
        row("embed.weight", "a", [10, 4]),
        row("layers.0.router.weight", "a", [4, 4], "router", layer=0, expert_axis=0),
        *(expert(0, index, "a" if index < 2 else "b") for index in range(NUM_EXPERTS)),
        row("layers.1.router.weight", "c", [4, 4], "router", layer=1, expert_axis=0),
        row(
            "layers.1.experts.down_proj", "c", [2, 4, 6], "fused_expert", dtype="BF16", layer=1, expert_axis=1,
        ),
    ]  # fmt: skip


def shapes(files: list[OutputFile]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for file in files for tensor in file.tensors}


def test_stock_shortens_experts_and_router_and_keeps_the_first_names() -> None:
    files = output_files(rows(), NUM_EXPERTS, {0: 3, 1: 3}, "stock", BIG)
    assert shapes(files) == {
        "embed.weight": (10, 4),
        "layers.0.router.weight": (3, 4),
        "layers.0.experts.0.w1.weight": (8, 4),
        "layers.0.experts.1.w1.weight": (8, 4),
        "layers.0.experts.2.w1.weight": (8, 4),
        "layers.1.router.weight": (3, 4),
        "layers.1.experts.down_proj": (2, 3, 6),
    }
    assert [tensor.slot for file in files for tensor in file.tensors if tensor.rule == "expert"] == [0, 1, 2]


def test_tied_keeps_the_router_and_adds_one_map_a_layer() -> None:
    found = shapes(output_files(rows(), NUM_EXPERTS, {0: 1, 1: 2}, "tied", BIG))
    assert found == {
        "embed.weight": (10, 4),
        "layers.0.router.weight": (4, 4),
        "layers.0.experts.0.w1.weight": (8, 4),
        "layers.0.experts.expert_map": (4,),
        "layers.1.router.weight": (4, 4),
        "layers.1.experts.down_proj": (2, 2, 6),
        "layers.1.experts.expert_map": (4,),
    }


def test_with_all_experts_stock_has_the_sources_tensors_file_by_file() -> None:
    files = output_files(rows(), NUM_EXPERTS, {0: 4, 1: 4}, "stock", BIG)
    assert [file.source_file for file in files] == ["a", "b", "c"]
    for file in files:
        source = [row for row in rows() if row.file == file.source_file]
        found = {(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors}
        assert found == {(row.name, row.dtype, row.shape) for row in source}


def test_a_file_whose_experts_are_all_merged_away_is_not_written() -> None:
    files = output_files(rows(), NUM_EXPERTS, {0: 2, 1: 2}, "stock", BIG)
    assert [(file.name, file.source_file) for file in files] == [
        ("model-00001-of-00002.safetensors", "a"),
        ("model-00002-of-00002.safetensors", "c"),
    ]


def test_one_file_has_the_name_of_a_single_file() -> None:
    (file,) = output_files([replace(one, file="a") for one in rows()], NUM_EXPERTS, {0: 2, 1: 2}, "tied", BIG)
    assert file.name == "model.safetensors"


@pytest.mark.parametrize("bound", [1, 130, 300, 500])
def test_files_larger_than_the_bound_are_split_and_no_tensor_is_lost(bound: int) -> None:
    whole = output_files(rows(), NUM_EXPERTS, {0: 3, 1: 3}, "tied", BIG)
    files = output_files(rows(), NUM_EXPERTS, {0: 3, 1: 3}, "tied", bound)
    assert all(file.num_bytes <= bound or len(file.tensors) == 1 for file in files)
    assert all(file.tensors for file in files)
    assert [tensor for file in files for tensor in file.tensors] == [tensor for file in whole for tensor in file.tensors]
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]


@pytest.mark.parametrize("export_format", ["tied", "stock"])
def test_every_tensor_begins_at_a_multiple_of_its_item_size(export_format: str) -> None:
    odd = [row("odd.weight", "a", [3], dtype="BF16"), *(replace(one, file="a") for one in rows())]
    size = {"I64": 8, "F32": 4, "BF16": 2}
    for file in output_files(odd, NUM_EXPERTS, {0: 3, 1: 3}, export_format, BIG):
        position = 0
        for tensor in file.tensors:
            assert position % size[tensor.dtype] == 0, tensor.name
            position += tensor.num_bytes
        assert position == file.num_bytes


def test_sizes_of_dtypes_narrower_than_a_byte_are_rounded_up() -> None:
    (file,) = output_files([row("scales", "a", [3], dtype="F4"), row("x", "a", [2], dtype="BF16")], 2, {}, "stock", BIG)
    assert [tensor.num_bytes for tensor in file.tensors] == [4, 2]
