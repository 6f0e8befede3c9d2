"""Quantised in, quantised out: kept experts keep their packed bytes, new ones are packed in the source's scheme."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.assemble.config import target_config
from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TensorReader
from stages.contracts.errors import InputError
from tests.quantised import FP4, FP8_BLOCK, INT_GROUP, RAGGED_BLOCK, SCHEMES, checkpoint, mxfp4_checkpoint
from tests.runs import read_config, read_tensors, rewrite, run_all, tensor_bytes, token_ids
from tests.tiny import load, logits

WRITTEN = [name for name in SCHEMES if name not in ("gptq", "awq")]
LOADED = ["fp8-block", "fp8-tensor", "fp8-channel", "int4", "mxfp4-rows"]
"""What transformers 5.23 loads. It refuses blocks that do not divide a matrix, zero points and experts of whole bytes, forgets
the scale of the whole tensor for experts in NVFP4 (of any checkpoint, the source too), and does not know ModelOpt."""
BLOCKS = {"fp8-block": FP8_BLOCK, "fp8-ragged": RAGGED_BLOCK}
PRUNE: dict[str, Any] = {"method": "f_prune", "num_experts": [4]}


def values(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint's tensors stand for, as this program reads them."""
    with TensorReader(Checkpoint(folder)) as reader:
        return {name: reader.read(name).float() for name in reader.checkpoint.tensors}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_the_formulas(scheme: str, tmp_path: Path) -> None:
    packed, plain = checkpoint(scheme, tmp_path)
    found, due = values(packed), read_tensors(plain)
    assert list(found) == list(Checkpoint(packed).tensors) and set(found) == set(due)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, due[name].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_and_whole_exports_keep_every_byte(scheme: str, tmp_path: Path) -> None:
    packed, _ = checkpoint(scheme, tmp_path)
    path, _ = token_ids(tmp_path)
    exports = run_all(packed, tmp_path / "run", path, [8, 4], ["stock"], clustering={**PRUNE, "num_experts": [8, 4]})
    source, whole, pruned = (tensor_bytes(folder) for folder in (packed, exports["8e-stock"], exports["4e-stock"]))
    assert whole == source
    assert read_config(exports["8e-stock"])["quantization_config"] == read_config(packed)["quantization_config"]
    for name, content in pruned.items():
        module, dot, rest = name.partition(".experts.")
        if dot:
            _, _, own = rest.partition(".")
            assert content in [source[f"{module}.experts.{expert}.{own}"] for expert in range(8)], name
        elif not name.endswith("mlp.gate.weight"):
            assert content == source[name], name
    experts = [sum(len(one) for name, one in found.items() if ".experts." in name) for found in (pruned, source)]
    assert 2 * experts[0] == experts[1]


def nearest(values_RC: Tensor, grid: Tensor, scales_RC: Tensor) -> Tensor:
    """The least distance of each value to a number of the grid times its scale."""
    return (grid * scales_RC[..., None] - values_RC[..., None]).abs().amin(-1)


def spread(scales: Tensor, shape: torch.Size, scheme: str) -> Tensor:
    """Scales of blocks, for every value."""
    sizes = BLOCKS[scheme] if scheme in BLOCKS else [size // count for size, count in zip(shape, scales.shape, strict=True)]
    return scales.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[: shape[0], : shape[1]]


def largest(values_RC: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude in each block."""
    rows, columns = values_RC.shape
    return torch.stack(
        [
            torch.stack([values_RC[i : i + block[0], j : j + block[1]].abs().max() for j in range(0, columns, block[1])])
            for i in range(0, rows, block[0])
        ]
    )


FP8_GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)


def rule(scheme: str, values_RC: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scales that the scheme's rule gives for some values, those that were stored, and the grid of its numbers."""
    if "fp8" in scheme:
        scales = parts.get("weight_scale_inv", parts.get("weight_scale"))
        assert scales is not None
        rows, columns = values_RC.shape
        block = {**BLOCKS, "fp8-tensor": (rows, columns), "modelopt-fp8": (rows, columns), "fp8-channel": (1, columns)}[scheme]
        due = (largest(values_RC, block) / 448).to(scales.dtype)
        return due.float(), scales.float().reshape(due.shape), FP8_GRID
    if scheme == "int8":  # a scale for each row takes the largest value to 127.5, half of all 255 steps
        due = (2 * largest(values_RC, (1, values_RC.shape[1])) / 255).bfloat16().float()
        return due, parts["weight_scale"].float(), torch.arange(-128.0, 128)
    if scheme == "mxfp4-rows":
        mantissa, exponent = torch.frexp(largest(values_RC, (1, 32)))  # mantissa in [0.5, 1)
        due = torch.exp2((exponent - 1 - 2 + (mantissa >= 0.875)).float())
        return due, torch.exp2(parts["weight_scale"].float() - 127), FP4
    if scheme in ("int4", "int4-zeros", "int8-groups"):
        lowest, highest = values_RC.unflatten(1, (-1, INT_GROUP)).aminmax(dim=-1)
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
        reach = 2 * torch.maximum(-lowest, highest) if scheme == "int4" else highest - lowest
        steps = 255 if scheme == "int8-groups" else 15
        return (reach / steps).bfloat16().float(), parts["weight_scale"].float(), torch.arange(-8.0, 8)
    divisor = parts["weight_global_scale"] if scheme == "nvfp4" else 1 / parts["weight_scale_2"]
    due = (divisor * largest(values_RC, (1, 16)) / 6).to(torch.float8_e4m3fn).float()
    assert float(divisor) <= 448 * 6 / float(values_RC.abs().max()) * 1.0001
    return due / divisor, parts["weight_scale"].float() / divisor, FP4


@pytest.mark.parametrize("scheme", WRITTEN)
def test_merged_experts_are_packed_anew_by_the_rule_of_the_scheme(scheme: str, tmp_path: Path) -> None:
    packed, _ = checkpoint(scheme, tmp_path)
    path, ids = token_ids(tmp_path)
    folder = run_all(packed, tmp_path / "run", path, [4], ["stock"])["4e-stock"]
    exact = run_all(packed, tmp_path / "exact", path, [4], ["stock"], export={"dtype": "float32"})["4e-stock"]
    stored, source, due, found = read_tensors(folder), read_tensors(packed), read_tensors(exact), values(folder)
    assert set(found) == set(due)
    assert read_config(folder)["quantization_config"] == read_config(packed)["quantization_config"]
    sizes = [sum(one.nbytes for name, one in tensors.items() if ".experts." in name) for tensors in (stored, source)]
    assert sizes[0] <= 0.55 * sizes[1]
    copies = {tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in source.values()}
    num_merged = 0
    for name, tensor in due.items():
        if ".experts." not in name:
            continue
        module = name.removesuffix("weight")
        parts = {key.removeprefix(module): one for key, one in stored.items() if key.startswith(module)}
        numbers = next(parts[key] for key in ("weight", "weight_packed") if key in parts)
        if numbers.contiguous().view(-1).view(torch.uint8).numpy().tobytes() in copies:
            assert torch.equal(found[name], tensor), "an expert that is kept"
            continue
        num_merged += 1
        made, scales, grid = rule(scheme, tensor, parts)
        torch.testing.assert_close(scales, made, rtol=1e-6, atol=0)
        whole = spread(scales, tensor.shape, scheme)
        error = (found[name] - tensor).abs()
        if (
            "weight_zero_point" in parts
        ):  # any grid that a zero point moves: at most half a step, and half a step of the zero point
            # with 255 steps, what rounding the scale to bfloat16 moves the outermost numbers by comes on top
            assert (error <= (1.6 if scheme == "int8-groups" else 1.01) * whole).all()
        else:
            torch.testing.assert_close(error, nearest(tensor, grid, whole), rtol=1e-3, atol=float(1e-6 * tensor.abs().max()))
    assert num_merged
    (model,) = (one for one in json.loads((tmp_path / "run" / "report.json").read_text())["models"] if one["format"] == "stock")
    for layer, error in model["packing_errors"].items():
        new = [
            (found[name], tensor)
            for name, tensor in due.items()
            if f"layers.{layer}.mlp.experts." in name and not torch.equal(found[name], tensor)
        ]
        changed = sum(float((ours - exactly).double().square().sum()) for ours, exactly in new)
        assert error == pytest.approx((changed / sum(float(one.double().square().sum()) for _, one in new)) ** 0.5, rel=1e-5)
    assert set(model["packing_errors"]) == {"0", "2"}
    assert torch.isfinite(logits(load(exact), ids)).all()


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_no_new_experts_in_schemes_that_are_fitted_to_data(scheme: str, tmp_path: Path) -> None:
    packed, plain = checkpoint(scheme, tmp_path)
    path, _ = token_ids(tmp_path)
    refits: dict[str, Any] = {"clustering": PRUNE, "refit": {"mode": "sequential"}}
    for number, changes in enumerate(({}, refits)):
        with pytest.raises(InputError, match=f"quantised by {scheme}, in which new experts cannot be .*; choose") as caught:
            run_all(packed, tmp_path / f"run-{number}", path, [4], ["stock"], **changes)
        assert "\n" not in str(caught.value) and not (tmp_path / f"run-{number}" / "models").exists()
    exports = [
        run_all(folder, tmp_path / f"run-{folder.name}", path, [4], ["stock"], export={"dtype": "bfloat16"})["4e-stock"]
        for folder in (packed, plain)
    ]
    ours, due = map(read_tensors, exports)
    assert all(torch.equal(tensor, due[name].to(tensor.dtype)) for name, tensor in ours.items() if ".experts." in name)


@pytest.mark.parametrize("scheme", [*LOADED, "mxfp4"])
@pytest.mark.parametrize("target", ["4e-stock", "4e-tied"])
def test_transformers_computes_with_the_values_that_we_read(
    scheme: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantiser in ("finegrained_fp8", "mxfp4"):  # both ask for a library that they use on a GPU only
        monkeypatch.setattr(f"transformers.quantizers.quantizer_{quantiser}.is_accelerate_available", lambda: True)
    packed, _ = mxfp4_checkpoint(tmp_path) if scheme == "mxfp4" else checkpoint(scheme, tmp_path)
    path, ids = token_ids(tmp_path)
    formats = [target.removeprefix("4e-")]
    folder = run_all(packed, tmp_path / "run", path, [4], formats)[target]
    as_values = run_all(packed, tmp_path / "values", path, [4], formats, export={"dtype": "float32"})[target]
    stored = {name: tensor.bfloat16() for name, tensor in values(folder).items() if not name.endswith("expert_map")}
    maps = {name: tensor for name, tensor in read_tensors(folder).items() if name.endswith("expert_map")}
    reference = rewrite(as_values, {**stored, **maps}, {**read_config(as_values), "dtype": "bfloat16"})
    theirs = logits(load(folder, trust_remote_code=True, dtype=torch.bfloat16), ids)
    assert torch.equal(theirs, logits(load(reference, trust_remote_code=True, dtype=torch.bfloat16), ids))


@pytest.mark.parametrize("scheme", [*WRITTEN, "mxfp4"])
def test_experts_with_fewer_neurons_are_packed_too(scheme: str, tmp_path: Path) -> None:
    path, _ = token_ids(tmp_path)
    slim: dict[str, Any] = {"preset": "slim", "name": "slim", "refit": {"width_multiple": 16}}
    if scheme == "mxfp4":
        packed, _ = mxfp4_checkpoint(tmp_path, intermediate_size=64)
    else:
        packed, _ = checkpoint(scheme, tmp_path, moe_intermediate_size=64)
    if scheme == "fp8-ragged":  # 64 rows in three blocks
        with pytest.raises(
            InputError, match=r"32 of 64 neurons do not divide into the blocks of fp8; set refit.width_multiple"
        ):
            run_all(packed, tmp_path / "run", path, [4], ["stock"], variants=[slim])
        assert not [*(tmp_path / "run").glob("calibrate-*/layer*")]
        return
    folder = run_all(packed, tmp_path / "run", path, [4], ["stock"], variants=[slim])["slim-4e-stock"]
    exact = run_all(packed, tmp_path / "exact", path, [4], ["stock"], variants=[slim], export={"dtype": "float32"})[
        "slim-4e-stock"
    ]
    found, due = values(folder), read_tensors(exact)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in due.items()}
    for name in (name for name in due if ".experts." in name):
        assert float((found[name] - due[name]).norm()) <= 0.2 * float(due[name].norm()), name
    sizes = [sum(one.nbytes for name, one in read_tensors(one).items() if ".experts." in name) for one in (folder, packed)]
    assert sizes[0] <= 0.6 * sizes[1]


def test_lists_of_modules_name_only_what_is_there() -> None:
    section = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.experts.7.down_proj", "re:.*gate", "model.layers.3", "h.3"],
    }
    config = {"model_type": "qwen3_moe", "num_experts": 8, "quantization_config": section}
    source = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]
    names = ["lm_head.weight", *source, "model.layers.3.norm.weight"]
    edited = target_config(config, "Qwen3Moe", {}, {0: 4}, "stock", "source", names, names[:5])
    assert edited["quantization_config"] == {**section, "modules_to_not_convert": ["lm_head", "re:.*gate", "h.3"]}
    plain = target_config(config, "Qwen3Moe", {}, {0: 4}, "stock", "bfloat16", names, names[:5])
    assert "quantization_config" not in plain


def test_merged_experts_in_mxfp4(tmp_path: Path) -> None:
    packed, _ = mxfp4_checkpoint(tmp_path)
    path, _ = token_ids(tmp_path)
    folder = run_all(packed, tmp_path / "run", path, [4], ["stock"])["4e-stock"]
    exact = run_all(packed, tmp_path / "exact", path, [4], ["stock"], export={"dtype": "float32"})["4e-stock"]
    stored, source, due, found = read_tensors(folder), read_tensors(packed), read_tensors(exact), values(folder)
    sizes = [sum(one.nbytes for name, one in tensors.items() if ".experts." in name) for tensors in (stored, source)]
    assert sizes[0] <= 0.55 * sizes[1]
    num_new = 0
    for name in (name for name in due if name.endswith(("gate_up_proj", "down_proj"))):
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        assert 2 * blocks.nbytes == source[f"{name}_blocks"].nbytes
        for slot in range(4):
            kept = [expert for expert in range(8) if torch.equal(blocks[slot], source[f"{name}_blocks"][expert])]
            if kept:
                assert torch.equal(scales[slot], source[f"{name}_scales"][kept[0]])
                continue
            num_new += 1
            rows = due[name][slot].T
            mantissa, exponent = torch.frexp(rows.unflatten(1, (-1, 32)).abs().amax(-1))  # mantissa in [0.5, 1)
            assert torch.equal(scales[slot].int(), 127 + exponent - 1 - 2 + (mantissa >= 0.875).int())
            whole = torch.exp2(scales[slot].float() - 127).repeat_interleave(32, 1)
            error = (found[name][slot].T - rows).abs()
            torch.testing.assert_close(error, nearest(rows, FP4, whole), rtol=1e-3, atol=1e-7)
    assert num_new
