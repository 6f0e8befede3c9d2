"""Task files of every kind of request, over data that lies beside them: `python -m tests.harness_tasks FOLDER`.

They need lm-evaluation-harness, and no network.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

WORDS = (
    "ship",
    "captain",
    "river",
    "mountain",
    "letter",
    "garden",
    "winter",
    "brother",
    "window",
    "silver",
    "morning",
    "horse",
)
LOCAL = ("tiny_choice", "tiny_word", "tiny_rolling", "tiny_answer")
"""One of each kind: multiple choice, log-likelihood, rolling log-likelihood, generated text."""

_CODE = """
def raises(doc, results):
    raise ValueError("this task is broken")


def mute(doc):
    if "letter" in doc["word"]:
        raise KeyError("no question")
    return doc["question"]
"""


def _documents() -> list[dict[str, Any]]:
    return [
        {
            "question": f"The {word} was {'very ' * (number % 4)}old. After the {WORDS[number - 1]} he looked at",
            "choices": [word, f"the {WORDS[(number + 3) % len(WORDS)]} and went away", "a" if number % 2 else "him"],
            "label": number % 3,
            "word": f" {word}",
            "page": f"The {word} and the {WORDS[number - 1]}. " * (1 + 3 * (number % 3)) + "He said nothing.",
        }
        for number, word in enumerate(WORDS)
    ]


def _task(name: str, data: Path, **values: Any) -> dict[str, Any]:
    files = {"train": str(data), "test": str(data)}
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
        "training_split": "train", "fewshot_split": "train", "metadata": {"version": 1.0}, **values,
    }  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """Write the tasks LOCAL and others: the group `tiny_group` of the first two, `tiny_broken`, whose metric raises,
    `tiny_mute`, whose sixth question raises, `tiny_long`, which wants more tokens than a model has positions, `tiny_unsafe`,
    which would run code, and `tiny_gone`, whose data is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in _documents()))
    choice = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
    }  # fmt: skip
    answer = {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}, {"metric": "chrf"}],
    }  # fmt: skip
    tasks = [
        _task("tiny_choice", data, **choice),
        _task("tiny_word", data, output_type="loglikelihood", doc_to_text="{{question}} the",
              doc_to_target="{{word}}", metric_list=[{"metric": "acc"}, {"metric": "perplexity"}]),
        _task("tiny_rolling", data, output_type="loglikelihood_rolling", doc_to_text="",
              doc_to_target="{{page}}", metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]),
        _task("tiny_answer", data, **answer, repeats=2),
        _task("tiny_broken", data, **choice, process_results="!function code.raises"),
        _task("tiny_mute", data, **choice | {"doc_to_text": "!function code.mute"}),
        _task("tiny_long", data, **answer | {"generation_kwargs": {"until": ["."], "max_gen_toks": 1000}}),
        _task("tiny_gone", folder / "gone.jsonl", **choice),
        _task("tiny_unsafe", data, **answer, unsafe_code=True),
    ]  # fmt: skip
    for task in tasks:
        text = re.sub(r"'(!function [\w.]+)'", r"\1", yaml.safe_dump(task, sort_keys=False))
        (folder / f"{task['task']}.yaml").write_text(text)
    group = {
        "group": "tiny_group", "task": ["tiny_choice", "tiny_word"], "metadata": {"version": 2.0},
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }  # fmt: skip
    (folder / "tiny_group.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    (folder / "code.py").write_text(_CODE)
    return folder


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))
