"""Targets by memory: the cache against a real forward, the largest target against a search through all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checks import check
from pipeline.commands.fits import Fit, fits_of
from pipeline.commands.inspect import inspect_model
from pipeline.commands.plan import plan_run
from pipeline.config import read_config
from pipeline.run.view import RunView
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.inspection import CacheSize, TargetSize
from stages.contracts.settings import RunConfig
from stages.contracts.target_settings import WidthTarget
from stages.model.inspect import CARDS, fitting_cards
from stages.model.kv_cache import kv_cache_bytes
from tests.runs import token_ids
from tests.tiny import NUM_EXPERTS, build, save

CHOOSE = {"mode": "sequential", "neurons": "choose", "width_multiple": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral with 8 experts, top-2."""
    return save(build("mixtral", torch.bfloat16), tmp_path_factory.mktemp("fit") / "source")


def run_of(source: Path, target: Any, **changes: Any) -> RunConfig:
    path, _ = token_ids(source.parent)
    text = {"data": str(path), "num_sequences": 4, "sequence_length": 16}
    values: dict[str, Any] = {"model": str(source), "run_dir": str(source.parent / "run"), "calibration": text}
    return read_config({**values, "clustering": {"targets": [target], **changes.pop("clustering", {})}, **changes})


def floats_in(value: Any) -> int:
    """Bytes of all floating-point tensors in an object."""
    if isinstance(value, Tensor):
        return value.nbytes if value.is_floating_point() else 0
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(floats_in, inside))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v32", "qwen3_next", "jamba"])
def test_the_cache_is_as_large_as_the_one_that_transformers_fills(family: str, tmp_path: Path) -> None:
    """Grouped heads; windows; latents and an index beside them; linear attention; state spaces."""
    model = build(family, torch.bfloat16).eval()
    ids = torch.randint(3, 90, (3, 11))
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    folder = save(model, tmp_path / "source")
    assert kv_cache_bytes(Checkpoint(folder), context=11, batch=3) == sum(floats_in(vars(layer)) for layer in cache.layers)


def test_the_cache_by_its_formula(source: Path, tmp_path: Path) -> None:
    """Keys and values of each token and layer, up to the window where there is one."""
    config = build("mixtral", torch.bfloat16).config
    per_token = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
    assert kv_cache_bytes(Checkpoint(source), 1000, 7) == config.num_hidden_layers * per_token * 1000 * 7
    model = build("gpt_oss", torch.bfloat16)
    windows = [16 if kind == "sliding_attention" else 1000 for kind in model.config.layer_types]
    assert model.config.sliding_window == 16 and len(set(windows)) == 2
    per_token = 2 * model.config.num_key_value_heads * model.config.head_dim * 2
    assert kv_cache_bytes(Checkpoint(save(model, tmp_path / "source")), 1000, 2) == 2 * per_token * sum(windows)


NUM_NEURONS = 48
WAYS: dict[str, tuple[Mapping[int, Any], dict[str, Any], dict[str, Any]]] = {
    "stock": ({r: r for r in range(2, 6)}, {}, {"export": {"formats": ["stock"]}}),
    "both": ({r: r for r in range(5, 8)}, {}, {}),
    "slim": (
        {r: r for r in (4, 6, 7)}, {}, {"clustering": {"method": "slim"}, "refit": CHOOSE, "export": {"formats": ["stock"]}},
    ),
    "width": (
        {kept: {"experts": NUM_EXPERTS, "width": kept / NUM_NEURONS} for kept in (32, 40, 48)}, {"keep": "width"},
        {"refit": CHOOSE, "export": {"formats": ["stock"]}},
    ),
}  # fmt: skip
"""Neighbouring targets by what is kept, settings of the target by memory, and of the run. Slim's keep 24, 32 and 40 neurons."""


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_that_fits_is_found(way: str, source: Path) -> None:
    """A memory of just a size, and one byte less than the next size, give the target of that size."""
    targets, asks, settings = WAYS[way]
    cache = kv_cache_bytes(Checkpoint(source), 100, 2)
    sizes = {
        kept: max(one.num_bytes for one in plan_run(run_of(source, target, **dict(settings))).checkpoints)
        for kept, target in targets.items()
    }
    for (kept, size), next_size in zip(sizes.items(), [*list(sizes.values())[1:], None], strict=True):
        for memory in [size] if next_size is None else [size, next_size - 1]:
            target = {"memory": memory + cache, "context": 100, "batch": 2, **asks}
            checked = check(run_of(source, target, **dict(settings)), source)
            (found,) = checked.config.clustering.num_experts
            if way == "width" and kept < NUM_NEURONS:
                assert found == WidthTarget(experts=NUM_EXPERTS, width=kept / NUM_NEURONS)
            else:
                assert found == (NUM_EXPERTS if way == "width" else kept)
            assert "of weights beside" in checked.remarks[0]
    if way == "stock":
        message = r"memory is \d+.*, but 2 experts a layer, the least, take .* use at least \d+ MB, or a shorter context"
        with pytest.raises(InputError, match=message):
            check(run_of(source, {"memory": sizes[2] + cache - 1, "context": 100, "batch": 2}, **dict(settings)), source)


def test_a_run_by_memory_has_the_keys_of_the_run_by_number(source: Path) -> None:
    half = max(one.num_bytes for one in plan_run(run_of(source, 4)).checkpoints)
    cache = kv_cache_bytes(Checkpoint(source), 8192, 1)

    def keys(target: Any) -> list[str]:
        checked = check(run_of(source, target))
        return [part.key for part in RunView(checked.config, checked.inputs).all_parts()]

    assert keys({"memory": half + cache}) == keys(4)


def test_plan_says_without_a_run_file_what_fits(source: Path) -> None:
    cache = kv_cache_bytes(Checkpoint(source), 64, 1)
    facts = inspect_model(str(source), None)
    assert facts.model is not None
    sizes = {one.num_experts: one for one in facts.model.targets}
    found = fits_of(str(source), None, str(sizes[5].tied + cache), 64, 1)
    stock, tied = found["experts, stock"], found["experts, tied"]
    assert isinstance(stock, Fit) and isinstance(tied, Fit)
    assert (tied.target, tied.weights_bytes, tied.cache_bytes) == (5, sizes[5].tied, cache)
    assert (stock.target, stock.weights_bytes) == (5, sizes[5].stock)
    for memory, message in (("1 kB", "the least, take"), ("much", "--memory, --context or --batch: .*'much' is not a size")):
        with pytest.raises(InputError, match=message):
            if isinstance(why := fits_of(str(source), None, memory, 64, 1)["experts, stock"], str):
                raise InputError(why)


def test_cards_hold_what_a_search_finds(source: Path) -> None:
    gigabyte = 10**9
    targets = [TargetSize(r, 10 * r * gigabyte, 9 * r * gigabyte if r > 2 else None) for r in range(8, 0, -1)]
    found = {card.name: (card.tied, card.stock) for card in fitting_cards(targets, 2 * gigabyte)}
    for name, size in CARDS.items():
        room = (0.9 * size - 2) * gigabyte
        tied = [r for r in range(1, 9) if 10 * r * gigabyte <= room]
        stock = [r for r in range(3, 9) if 9 * r * gigabyte <= room]
        assert found[name] == (max(tied, default=None), max(stock, default=None))
    assert found["T4, RTX 4080"] == (1, None) and found["H200"] == (8, 8)
    facts = inspect_model(str(source), None, 64, 3)
    assert facts.model is not None
    assert facts.model.cache == CacheSize(64, 3, kv_cache_bytes(Checkpoint(source), 64, 3))
