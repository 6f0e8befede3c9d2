"""The perplexity that a run reports is that of a plain transformers evaluation of the very same tokens."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contracts.tokens import read_tokens
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, write_run_file
from tests.tiny import FAMILIES, load


def whole_model_loss(folder: Path, done: FinishedRun, dtype: torch.dtype, **options: bool) -> float:
    """Mean of transformers' own loss over the run's token shards, a sequence at a time."""
    model = load(folder, dtype=dtype, **options)
    assert done.config.evaluation is not None
    shards = sorted((done.run_dir / done.part("prepare", "evaluation").dir).glob("tokens-*.arrow"))
    ids = torch.from_numpy(np.concatenate([read_tokens(path) for path in shards]))
    assert len(shards) > 1
    assert len(ids) == done.config.evaluation.num_sequences
    with torch.inference_mode():
        losses = [model(input_ids=one[None], labels=one[None]).loss.double().item() for one in ids]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_of_every_model_is_that_of_whole_model_losses(
    family: str, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run(family)
    source, *targets = done.report["models"]
    assert len(targets) == 4
    for model in (source, *targets):
        tied = {"trust_remote_code": True} if model["format"] == "tied" else {}
        loss = whole_model_loss(done.run_dir / model["path"], done, torch.float32, **tied)
        assert model["loss"] == pytest.approx(loss, rel=1e-5), model["name"]
        assert model["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5), model["name"]
        assert model["num_predictions"] == 8 * 31
    half = [model["perplexity"] for model in targets if model["num_experts"] == FAMILIES[family].num_experts // 2]
    assert all(abs(value / source["perplexity"] - 1) > 1e-3 for value in half), "merging changes nothing here"


def test_the_report_states_sizes_and_the_gap_between_tied_and_stock(finished_run: Callable[[str], FinishedRun]) -> None:
    done = finished_run("mixtral")
    models = {model["name"]: model for model in done.report["models"]}
    for name, model in models.items():
        folder = done.run_dir / model["path"]
        tied = {"trust_remote_code": True} if model["format"] == "tied" else {}
        loaded = load(folder, **tied)
        assert model["parameters"] == sum(parameter.numel() for parameter in loaded.parameters()), name
        state = loaded.state_dict().values()
        assert model["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in state), name
    gaps = {gap["target"]: gap["perplexity_gap"] for gap in done.report["tied_stock_gaps"]}
    half = [models[f"tiny-mixtral-3e-{export_format}"]["perplexity"] for export_format in ("stock", "tied")]
    assert gaps == {"6e": 0.0, "3e": half[0] - half[1]}


def test_the_trained_example_reads_text_and_loses_little_by_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fifth of the example's text; its weights are bfloat16, and 4 of 8 experts speak worse English than 6."""
    monkeypatch.chdir(REPOSITORY)
    settings = {
        "calibration": {"data": ["examples/text/calibration-fiction.jsonl"], "num_sequences": 16, "sequence_length": 128},
        "evaluation": {
            "data": ["examples/text/heldout-fiction.jsonl", "examples/text/heldout-scripture.jsonl"],
            "num_sequences": 16, "sequence_length": 128, "tokens_per_shard": 1024, "tokens_per_micro_batch": 512,
        },
        "clustering.num_experts": [6, 4],
        "export.max_file_bytes": "5 GB",
    }  # fmt: skip
    done = FinishedRun.of(write_run_file(tmp_path, Path("examples/tiny-mixtral"), Path("unused"), settings))
    perplexity = {model["name"].removeprefix("tiny-mixtral"): model["perplexity"] for model in done.report["models"]}
    plain = math.exp(whole_model_loss(done.source, done, load(done.source).dtype))
    assert perplexity[""] == pytest.approx(plain, rel=2e-3)
    assert perplexity[""] < 100, "the example is trained: its vocabulary has 4,096 tokens"
    assert perplexity[""] < perplexity["-6e-tied"] < perplexity["-4e-tied"]
    assert perplexity["-6e-tied"] < 1.5 * perplexity[""]
    for target in done.view.targets:
        folder = done.model(target.part)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (done.source / name).read_bytes()
