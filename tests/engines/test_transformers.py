"""What users of transformers do with exports: caches, device maps, saving again, quantising, training adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.conftest import REPOSITORY
from tests.runs import aligned, run_all, token_ids
from tests.tiny import NUM_EXPERTS, build, load, logits, save

FORMATS = ["stock", "tied"]
IDS = torch.arange(3, 99).view(2, 48) % 96 + 3


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    source = save(build("mixtral", torch.float32), root / "tiny")
    path, _ = token_ids(root)
    made = run_all(source, root / "run", path, [NUM_EXPERTS // 2], FORMATS)
    return {name.rpartition("-")[2]: folder for name, folder in made.items()}


def load_export(folder: Path, **options: object) -> PreTrainedModel:
    return aligned(load(folder, trust_remote_code=folder.name.endswith("tied"), **options))


def greedy(model: PreTrainedModel, **options: object) -> torch.Tensor:
    return model.generate(IDS[:, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False, **options)[:, 16:]


@pytest.mark.parametrize("kind", FORMATS)
def test_caches_of_both_kinds_give_the_tokens_of_no_cache(kind: str, exports: dict[str, Path]) -> None:
    model = load_export(exports[kind])
    due = greedy(model, use_cache=False)
    assert due.shape == (2, 16) and len(set(due.flatten().tolist())) > 2
    for cache in ("dynamic", "static"):
        assert torch.equal(greedy(model, cache_implementation=cache), due), cache


@pytest.mark.parametrize("kind", FORMATS)
def test_a_device_map_loads_the_same_model(kind: str, exports: dict[str, Path], tmp_path: Path) -> None:
    due = logits(load_export(exports[kind]), IDS)
    assert torch.equal(logits(load_export(exports[kind], device_map="auto"), IDS), due)
    little = {"cpu": "200KB"}  # what does not fit stays on disk, and is read when its layer runs
    split = load(exports[kind], trust_remote_code=True, device_map="auto", max_memory=little, offload_folder=tmp_path)
    assert set(map(str, split.hf_device_map.values())) == {"cpu", "disk"}
    torch.testing.assert_close(logits(split, IDS), due)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_transformers_saves_again_is_the_same_model(kind: str, exports: dict[str, Path], tmp_path: Path) -> None:
    model = load_export(exports[kind])
    again = tmp_path / exports[kind].name
    model.save_pretrained(again)
    assert torch.equal(logits(load_export(again), IDS), logits(model, IDS))


@pytest.mark.parametrize("kind", FORMATS)
def test_torchao_rounds_weights_to_whole_numbers(kind: str, exports: dict[str, Path]) -> None:
    """In a process of its own, which alone has torchao on its path: wherever it is installed, transformers loads it at once,
    which costs every process time and lines on standard error."""
    torchao = Path(sys.prefix) / "torchao"
    if not torchao.is_dir():
        pytest.skip(f"torchao is not in {torchao}, where `make install` puts it")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.torchao_rounding", str(exports[kind])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(torchao)))},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_adapter_of_a_stock_export_learns(exports: dict[str, Path]) -> None:
    model = load_export(exports["stock"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapters = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    trained = get_peft_model(model, adapters)
    optimiser = torch.optim.SGD([one for one in trained.parameters() if one.requires_grad], lr=0.5)
    first = trained(IDS, labels=IDS).loss
    first.backward()
    moved = [name for name, one in trained.named_parameters() if one.grad is not None and one.grad.abs().max() > 0]
    assert any(".experts." in name for name in moved) and any(".q_proj." in name for name in moved)
    assert all("lora_" in name for name in moved)
    optimiser.step()
    with torch.no_grad():
        assert trained(IDS, labels=IDS).loss < first
    plain = trained.unload()
    assert all(torch.equal(one, before[name]) for name, one in plain.named_parameters())
