"""Perplexity as papers state it: sliding windows, bits per byte; and texts that are in calibration, too."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, write_run_file
from tests.tiny import load, logits

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
TEXTS = REPOSITORY / "examples" / "text"
LENGTH, STRIDE, WINDOWS = 64, 24, 9


def documents(name: str, count: int) -> list[str]:
    """Stretches of 600 characters."""
    text = "".join(json.loads(line)["text"] for line in (TEXTS / name).read_text().splitlines())
    return [text[600 * number :][:600] for number in range(count)]


def write_documents(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def run(folder: Path, evaluation: list[str], calibration: list[str], **settings: Any) -> FinishedRun:
    """One target of the example, its weights in bfloat16."""
    folder.mkdir(exist_ok=True)
    common = {"num_sequences": 4, "sequence_length": LENGTH}
    values = {
        "calibration": {"data": write_documents(folder / "calibration.jsonl", calibration), **common},
        "evaluation": {"data": write_documents(folder / "evaluation.jsonl", evaluation), **common},
        "clustering.num_experts": [4], "export": {"formats": ["stock"]}, "resources.layers_per_shard": 3, **settings,
    }  # fmt: skip
    return FinishedRun.of(write_run_file(folder, EXAMPLE, Path("unused"), values))


def by_hand(text: str, num_windows: int) -> tuple[float, int, int]:
    """Sum of losses, predictions and bytes of a window at a time: the last of WINDOWS may end with the text."""
    tokenizer, model = AutoTokenizer.from_pretrained(EXAMPLE), load(EXAMPLE)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    total, count, predicted = 0.0, 0, []
    for number in range(num_windows):
        begin = number * STRIDE
        window = ids[begin : begin + LENGTH]
        first = 1 if number == 0 else LENGTH - STRIDE
        losses = torch.nn.functional.cross_entropy(logits(model, window[None])[0, :-1].float(), window[1:], reduction="none")
        total += losses[first - 1 :].double().sum().item()
        count += len(losses[first - 1 :])
        predicted += window[first:].tolist()
    return total, count, len(tokenizer.decode(predicted).encode())


@pytest.mark.parametrize("ends_with_the_text", [False, True])
def test_sliding_windows_give_the_perplexity_and_bits_per_byte_of_a_loop_over_the_joined_text(
    tmp_path: Path, ends_with_the_text: bool
) -> None:
    texts = documents("heldout-fiction.jsonl", 2)
    texts[0] = "Caf\xe9 \u4e16\u754c " + texts[0]
    joined = "\n\n".join(texts)
    if ends_with_the_text:
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
        joined = tokenizer.decode(tokenizer(joined)["input_ids"][: LENGTH + (WINDOWS - 1) * STRIDE - 10])
        texts = [joined]
    settings = {
        "evaluation.num_sequences": WINDOWS,
        "evaluation.perplexity": {"stride": STRIDE},
        "evaluation.tokens_per_shard": 128,
    }
    done = run(tmp_path, texts, documents("calibration-fiction.jsonl", 8), **settings)
    source = done.report["models"][0]
    total, count, num_bytes = by_hand(joined, WINDOWS)
    assert source["num_predictions"] == count
    assert count == LENGTH - 1 + (WINDOWS - 1) * STRIDE - (10 if ends_with_the_text else 0)
    assert source["loss"] == pytest.approx(total / count, rel=2e-3), "bfloat16 in batches"
    assert source["bits_per_byte"] == pytest.approx(source["loss"] * count / math.log(2) / num_bytes, rel=1e-9)
    merged = done.report["models"][1]
    assert merged["bits_per_byte"] > source["bits_per_byte"]
    assert done.report["overlap"] == {"num_documents": WINDOWS, "num_in_calibration": 0}
    assert done.report["warnings"] == []


def test_documents_that_are_in_both_texts_are_a_warning_that_names_how_many(tmp_path: Path) -> None:
    known, new = documents("calibration-fiction.jsonl", 8), documents("heldout-fiction.jsonl", 8)
    many = {"evaluation.num_sequences": 16, "calibration.num_sequences": 20}  # of every document one at least is drawn
    done = run(tmp_path, [*new[:4], *known[:3]], known, **many)
    assert done.report["overlap"] == {"num_documents": 7, "num_in_calibration": 3}
    assert done.report["warnings"] == [
        "evaluation: 3 of its 7 documents are in the calibration text, too, so its scores say less of new text; give texts "
        "that "
        "have no document in common"
    ]


def test_token_ids_have_no_bytes_and_no_order_to_slide_over(tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 4096, (8, LENGTH)))
    done = run(tmp_path, ["unused"], documents("calibration-fiction.jsonl", 8), **{"evaluation.data": str(ids)})
    assert [model["bits_per_byte"] for model in done.report["models"]] == [None, None]
