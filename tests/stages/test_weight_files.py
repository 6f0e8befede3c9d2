"""Weight files as they come: files that nothing reads, tensors that no model loads, dtypes that no arithmetic knows."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.commands.inspect import inspect_model, shown_facts
from pipeline.errors import RunFailed
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.merge import units as merge_units
from stages.model.survey import survey_checkpoint
from tests.runs import aligned, read_config, read_tensors, rewrite, run_all, streamed_logits, tensor_bytes, token_ids
from tests.tiny import NUM_EXPERTS, build, load, logits, save

INDEX = "model.safetensors.index.json"
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32), tmp_path_factory.mktemp("weights") / "source")


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def shown(source: Path) -> str:
    """What `inspect` prints."""
    return "\n".join(line for line in shown_facts(inspect_model(str(source), None)) if isinstance(line, str))


def test_a_single_file_comes_before_an_index_beside_it_as_in_transformers(source: Path, tmp_path: Path) -> None:
    other = build("mixtral", torch.float32, seed=5)
    save(other, tmp_path / "other", max_shard_size="1GB")
    shards = sorted(path.name for path in source.glob("model-*.safetensors"))
    shutil.copy(tmp_path / "other" / "model.safetensors", source / "model.safetensors")
    path, ids = token_ids(tmp_path)
    whole = aligned(load(source))
    assert torch.equal(logits(whole, ids), logits(aligned(other), ids)), "transformers reads the single file"
    assert torch.equal(streamed_logits(Checkpoint(source), 3, ids), logits(whole, ids))
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock"])
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(tmp_path / "other")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["plan"]["ignored_files"] == [INDEX, *shards]
    assert f"not read     {INDEX}, {', '.join(shards)}: model.safetensors comes first, as in transformers" in shown(source)


def test_weights_of_another_name_are_refused_rather_than_overlooked(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**read_config(source), "transformers_weights": "x.safetensors"}))
    with pytest.raises(InputError, match=r"config\.json: transformers_weights is 'x\.safetensors', but weights are read only"):
        _ = Checkpoint(source).tensors


@pytest.mark.parametrize("metadata", [{"total_size": 3, "x": [1]}, None, {}])
def test_what_an_index_says_of_itself_need_not_be_true(metadata: Any, source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    assert len(Checkpoint(source).tensors) == len(index["weight_map"])


@pytest.mark.parametrize("metadata", [[1], 7, {"x": float("nan")}, {"x": "\ud800"}], ids=["list", "number", "NaN", "half"])
def test_an_index_whose_metadata_no_export_could_hold_is_refused_first(metadata: Any, source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    with pytest.raises(InputError, match=rf"{INDEX}: metadata must be an object of numbers and text that JSON can hold"):
        _ = Checkpoint(source).tensors


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_rotary_frequencies_in_layers_are_ignored_and_copied(family: str, tmp_path: Path) -> None:
    source = save(build(family, torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    before = logits(load(source), ids)
    extra = {INV_FREQ.format(layer): torch.arange(4.0) for layer in range(3)}
    rewrite(source, {**read_tensors(source), **extra})
    assert torch.equal(logits(load(source), ids), before)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"])
    for export in exports.values():
        assert extra.keys() <= read_tensors(export).keys()
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
    plan = json.loads((tmp_path / "run" / "report.json").read_text())["plan"]
    assert plan["unloaded_tensors"] == 3
    assert plan["first_unloaded_tensor"] == f"{source / 'model.safetensors'}: tensor {INV_FREQ.format(0)}"
    assert f"not loaded   {plan['first_unloaded_tensor']} and 2 more: transformers does not use this" in shown(source)


def test_what_transformers_only_reports_is_copied_outside_of_the_experts(source: Path, tmp_path: Path) -> None:
    extra = {"model.layers.1.self_attn.k_scale": torch.ones(1), "spare.weight": torch.ones(3, 3)}
    rewrite(source, {**read_tensors(source), **extra})
    path, _ = token_ids(tmp_path)
    export = run_all(source, tmp_path / "run", path, [4], ["stock"])["4e-stock"]
    assert extra.keys() <= read_tensors(export).keys()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
        "model.layers.1.block_sparse_moe.experts.8.w1.scale",
        "model.layers.1.shared_expert_gate.weight",
        "encoder.experts.0.weight",
    ],
)
def test_what_looks_like_experts_or_routers_is_refused(name: str, source: Path) -> None:
    rewrite(source, {**read_tensors(source), name: torch.ones(NUM_EXPERTS)})
    with pytest.raises(InputError, match=rf"tensor {name} is no part of MixtralForCausalLM; config and weights do not belong"):
        survey_checkpoint(str(source))


@pytest.mark.parametrize("index", ["x", "05", "\u0663", "-1", "8"])
def test_an_expert_without_a_proper_number_is_refused(index: str, source: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    tensors = read_tensors(source)
    tensors[name.format(index)] = tensors.pop(name.format(3))
    rewrite(source, tensors)
    with pytest.raises(
        InputError,
        match=r"needs one tensor for each of 8 experts but 8 are there .*; missing experts: 3; download the checkpoint again$",
    ):
        survey_checkpoint(str(source))


def bad_copies(tensors: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    changed = {**tensors, name: tensors.get(name, torch.zeros(4, 4)).clone()}
    changed[name].view(-1)[5] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_copy_that_is_not_finite_reaches_no_model(name: str, value: float, source: Path, tmp_path: Path) -> None:
    rewrite(source, bad_copies(read_tensors(source), name, value))
    path, _ = token_ids(tmp_path)
    with pytest.raises((InputError, RunFailed), match=rf"model\.safetensors: tensor {name} holds NaN or infinity; download"):
        run_all(source, tmp_path / "run", path, [4], ["tied"])
    assert not (tmp_path / "run" / "models").exists()
    assert not [*(tmp_path / "run").glob("merge-*/checkpoint/*")]


def test_a_mask_that_nothing_loads_may_be_infinite_but_not_nan(source: Path, tmp_path: Path) -> None:
    path, _ = token_ids(tmp_path)
    rewrite(source, bad_copies(read_tensors(source), "mask", float("-inf")))
    assert "mask" in read_tensors(run_all(source, tmp_path / "run", path, [4], ["tied"])["4e-tied"])
    rewrite(source, bad_copies(read_tensors(source), "mask", float("nan")))
    with pytest.raises((InputError, RunFailed), match=r"model\.safetensors: tensor mask holds NaN; download"):
        run_all(source, tmp_path / "run2", path, [4], ["tied"])


ODD = {
    "U16": 2, "U32": 4, "U64": 8, "I8": 1, "BOOL": 1, "C64": 8, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F4": 0.5, "F6_E2M3": 0.75,
    "F6_E3M2": 0.75,
}  # fmt: skip


def test_every_dtype_of_the_format_is_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    """One tensor of each, a file of their own, beside an empty one; their bytes differ."""
    header, data = {}, b""
    for dtype, size in ODD.items():
        shape = [0, 4] if dtype == "I8" else [4, 6]
        num_bytes = int(np.prod(shape) * size)
        header[f"odd.{dtype}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + num_bytes]}
        data += bytes(1 if dtype == "BOOL" else 1 + (n + len(data)) % 60 for n in range(num_bytes))
    text = json.dumps(header).encode()
    (source / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(header, "odd.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    path, _ = token_ids(tmp_path)
    for export in run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"]).values():
        raw = Checkpoint(export).raw_tensors
        for name, fields in header.items():
            begin, end = fields["data_offsets"]
            entry = raw[name]
            assert (entry.dtype, list(entry.shape)) == (fields["dtype"], fields["shape"])
            written = (export / entry.file).read_bytes()[entry.begin : entry.begin + entry.num_bytes]
            assert written == data[begin:end], name
            with safe_open(export / entry.file, "pt") as file:
                assert name in file.keys()  # noqa: SIM118


def test_experts_of_two_dtypes_are_refused(source: Path) -> None:
    tensors = read_tensors(source)
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    rewrite(source, {**tensors, name: tensors[name].half()})
    with pytest.raises(InputError, match=r"experts of .*down_proj differ in shape .* or dtype \['F16', 'F32'\]"):
        survey_checkpoint(str(source))


def test_a_target_is_laid_out_once_for_all_of_its_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process: the layout of a large model takes 0.3 s, and it has a hundred files or more."""
    counts: Counter[str] = Counter()
    merge_units._laid_out.cache_clear()

    def counting(rows: list[dict[str, Any]], num_experts: int, num_merged: Any, export_format: str, *more: Any) -> Any:
        counts[f"{min(num_merged.values())} {export_format}"] += 1
        return laid_out(rows, num_experts, num_merged, export_format, *more)

    laid_out = merge_units.output_files
    monkeypatch.setattr(merge_units, "output_files", counting)
    path, _ = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [5, 4], ["stock", "tied"])
    assert min(len([*export.glob("*.safetensors")]) for export in exports.values()) > 1
    assert counts == {"5 stock": 1, "5 tied": 1, "4 stock": 1, "4 tied": 1}


def test_two_files_whose_names_differ_in_case_alone(source: Path, tmp_path: Path) -> None:
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    first, second, *_ = sorted(set(weight_map.values()))
    (source / first).rename(source / "weights.safetensors")
    (source / second).rename(source / "Weights.safetensors")
    renamed = {first: "weights.safetensors", second: "Weights.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": {name: renamed.get(f, f) for name, f in weight_map.items()}}))
    path, _ = token_ids(tmp_path)
    export = run_all(source, tmp_path / "run", path, [NUM_EXPERTS], ["stock"])[f"{NUM_EXPERTS}e-stock"]
    assert tensor_bytes(export) == tensor_bytes(source)
    names = [file.name.lower() for file in export.iterdir()]
    assert len(set(names)) == len(names)


def test_float16_experts_at_the_end_of_their_range_merge(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float16), tmp_path / "source")
    tensors = read_tensors(source)
    for name in list(tensors):
        if ".experts." in name and name.endswith("w2.weight"):
            tensors[name][0, 0] = torch.finfo(torch.float16).max
    save_dir = rewrite(source, tensors)
    path, _ = token_ids(tmp_path)
    export = run_all(save_dir, tmp_path / "run", path, [4], ["stock"])["4e-stock"]
    merged = [tensor for name, tensor in read_tensors(export).items() if name.endswith("w2.weight")]
    assert all(tensor[0, 0] == torch.finfo(torch.float16).max for tensor in merged)


def test_save_file_and_the_reader_agree_on_an_empty_expert_axis(source: Path) -> None:
    tensors = read_tensors(source)
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(0, 32)
    rewrite(source, {})
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.block_sparse_moe\.gate\.weight has shape \[0, 32\]"):
        survey_checkpoint(str(source))
