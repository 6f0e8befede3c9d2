"""Answers of all models to the same prompts: those of transformers, side by side, with a warning where an export goes round."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from stages.contracts.errors import InputError
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, write_run_file
from tests.tiny import load

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
TEXTS = REPOSITORY / "examples" / "text"
PROMPTS = ["In the beginning", "The captain looked at the sea and said"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}<think>{% endfor %}"


def run_file(folder: Path, model: Path = EXAMPLE, **settings: Any) -> Path:
    common = {"num_sequences": 4, "sequence_length": 64}
    values = {
        "calibration": {"data": str(TEXTS / "calibration-fiction.jsonl"), **common},
        "evaluation": {"data": str(TEXTS / "heldout-fiction.jsonl"), "generate": PROMPTS, "max_new_tokens": 40, **common},
        "clustering.num_experts": [2], "resources.layers_per_shard": 3, **settings,
    }  # fmt: skip
    return write_run_file(folder, model, Path("unused"), values)


def greedy(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int, end: int | None) -> list[int]:
    """The most probable token again and again, without a cache."""
    new: list[int] = []
    while len(new) < num_tokens and (not new or new[-1] != end):
        with torch.inference_mode():
            new.append(
                int(model(torch.cat([ids, torch.tensor(new, dtype=torch.long)])[None], use_cache=False).logits[0, -1].argmax())
            )
    return new


def test_every_model_answers_as_transformers_would_and_the_report_has_them_side_by_side(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLE, model)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    load(EXAMPLE, dtype=torch.float32).save_pretrained(model)
    done = FinishedRun.of(run_file(tmp_path, model))
    generation = done.report["generation"]
    assert generation["uses_chat_template"] is False
    assert [one["prompt"] for one in generation["prompts"]] == PROMPTS
    rows = done.report["models"]
    for number, row in enumerate(rows):
        trusted = {"trust_remote_code": True} if row["format"] == "tied" else {}
        whole = load(done.run_dir / row["path"], **trusted)
        for prompt in generation["prompts"]:
            answer = prompt["answers"][number]
            assert answer["model"] == row["name"]
            due = greedy(whole, torch.tensor(tokenizer(prompt["prompt"])["input_ids"]), 40, tokenizer.eos_token_id)
            assert answer["text"] == tokenizer.decode(due, skip_special_tokens=True)
            assert answer["num_tokens"] == len(due)
            assert answer["has_ended"] == (due[-1] == tokenizer.eos_token_id)
    texts = {answer["text"] for prompt in generation["prompts"] for answer in prompt["answers"]}
    assert len(texts) > 3, "merging to two experts changes what is said"
    again = FinishedRun.of(done.run_file, ["evaluation.max_new_tokens=8"])
    assert {unit.name for unit in again.recorder.units if unit.stage == "evaluate"} == {"answers"}, "perplexity is kept"
    assert again.report["generation"]["prompts"][0]["answers"][0]["num_tokens"] <= 8


def test_a_model_that_goes_round_or_never_stops_thinking_is_a_warning(tmp_path: Path) -> None:
    """Its chat template begins a thought, which a model that has never seen one does not end."""
    model = tmp_path / "model"
    shutil.copytree(EXAMPLE, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    done = FinishedRun.of(run_file(tmp_path, model, **{"evaluation.max_new_tokens": 200}))
    generation = done.report["generation"]
    assert generation["uses_chat_template"] is True
    answers = [answer for prompt in generation["prompts"] for answer in prompt["answers"]]
    assert all(answer["is_endless_thought"] != answer["has_ended"] for answer in answers), "the template begins a thought"
    for name, what in (("is_loop", "repeat themselves"), ("is_endless_thought", "think without an end")):
        for row in range(1, 3):
            found = [one["answers"][row] for one in generation["prompts"] if not one["answers"][0][name]]
            count = sum(answer[name] for answer in found)
            line = f"{done.report['models'][row]['name']}: {count} of 2 answers {what} where the source's do not"
            assert (line in done.report["warnings"]) == (count > 0)
    assert any(answer["is_loop"] for answer in answers), "two experts of eight speak in circles"


def test_a_model_that_no_worker_can_hold_whole_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"evaluation\.generate needs a whole model in one worker, .* but resources\.worker_memory"
    ):
        FinishedRun.of(run_file(tmp_path, **{"resources.worker_memory": "12 MB"}))
