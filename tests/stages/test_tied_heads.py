"""Which matrix is the head: reported numbers are those of the checkpoint as `from_pretrained` loads it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.layer_shard import LayerShard
from stages.model.survey import survey
from tests.runs import read_config, read_tensors, rewrite, run_all, token_ids
from tests.tiny import build, load, logits, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[dict[str, Tensor]], object]


def _unchanged(tensors: dict[str, Tensor]) -> None:
    pass


def _equal(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def _no_head(tensors: dict[str, Tensor]) -> None:
    del tensors[HEAD]


def _no_embedding(tensors: dict[str, Tensor]) -> None:
    del tensors[EMBEDDING]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_positions.weight"] = torch.ones(64, 32)


# The config's flag (None: absent), what is done to the tensors, and whether head and embedding are one then.
CASES: dict[str, tuple[bool | None, Change, bool]] = {
    "tied, with a head of its own": (True, _unchanged, False),
    "tied, with an equal head": (True, _equal, True),
    "tied, without a head": (True, _no_head, True),
    "tied, without an embedding": (True, _no_embedding, True),
    "not tied, with an equal head": (False, _equal, False),
    "no flag, with a head": (None, _unchanged, False),
    "an embedding that the model has not": (True, _extra, False),
}
REFUSED: dict[str, tuple[bool | None, Change, str]] = {
    "not tied, without a head": (False, _no_head, "no tensor fills lm_head.weight with 0 values"),
    "no flag, without a head": (None, _no_head, "no tensor fills lm_head.weight with 0 values"),
    "not tied, without an embedding": (False, _no_embedding, "no tensor fills model.embed_tokens.weight with 0 values"),
    "tied, without either": (
        True,
        lambda tensors: (_no_head(tensors), _no_embedding(tensors)),
        "vocab_size is 128",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32), tmp_path_factory.mktemp("whole") / "source")


def changed(whole: Path, folder: Path, flag: bool | None, change: Change) -> Path:
    shutil.copytree(whole, folder)
    tensors, config = read_tensors(folder), read_config(folder)
    change(tensors)
    config.pop("tie_word_embeddings")
    return rewrite(folder, tensors, config if flag is None else {**config, "tie_word_embeddings": flag})


def perplexity(folder: Path, ids: Tensor, is_tied: bool = False) -> float:
    """Of the checkpoint as any user loads it."""
    found = logits(load(folder, trust_remote_code=is_tied), ids)[:, :-1].double()
    return math.exp(functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("case", CASES)
def test_reported_numbers_are_those_of_the_checkpoint_as_transformers_loads_it(case: str, whole: Path, tmp_path: Path) -> None:
    flag, change, is_one = CASES[case]
    source = changed(whole, tmp_path / "source", flag, change)
    path, ids = token_ids(tmp_path)
    evaluation = {"data": str(path), "num_sequences": 4, "sequence_length": 16, "tokens_per_micro_batch": 64}
    folders = run_all(source, tmp_path / "run", path, [4], ["stock", "tied"], evaluation=evaluation)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    reported = {model["name"].removeprefix("source-"): model["perplexity"] for model in report["models"]}
    assert reported["source"] == pytest.approx(perplexity(source, ids), rel=1e-6)
    for name, folder in folders.items():
        assert reported[name] == pytest.approx(perplexity(folder, ids, name == "4e-tied"), rel=1e-6)
        assert read_config(folder).get("tie_word_embeddings") == flag
        assert {EMBEDDING, HEAD} & set(read_tensors(folder)) == {EMBEDDING, HEAD} & set(read_tensors(source))
    model = load(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_one


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_draw_at_random_is_refused(case: str, whole: Path, tmp_path: Path) -> None:
    flag, change, said = REFUSED[case]
    source = changed(whole, tmp_path / "source", flag, change)
    with pytest.raises(InputError, match=said):
        survey(Checkpoint(source))


def test_a_shard_reads_the_head_only_where_it_is_needed(whole: Path, tmp_path: Path) -> None:
    """Calibrate never asks for logits; it needs the head's tensor only where that is the embedding."""
    held = {}
    for case in ("tied, with a head of its own", "tied, without a head", "tied, without an embedding"):
        flag, change, _ = CASES[case]
        source = Checkpoint(changed(whole, tmp_path / case, flag, change))
        shard = LayerShard(source, 0, 1, num_threads=1, has_head=False)
        assert not shard.model.get_input_embeddings().weight.is_meta
        held[case] = shard.bytes_read
    assert len(set(held.values())) == 1
