"""Warnings of a report: each line names what a number does not say, or why it is null. They are no errors."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def of_scores(models: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings for evaluated models (rows of the report) whose loss or perplexity is null."""
    for model in models:
        if "loss" not in model:
            continue
        if model["loss"] is None:
            yield (
                f"{model['name']}: the loss on the evaluation text is not finite, since the logits are not; loss and "
                "perplexity are written as null"
            )
        elif model["perplexity"] is None:
            yield (
                f"{model['name']}: the loss is {model['loss']:.6g} nats a token; its perplexity, exp(loss), is larger than any "
                "number of 64 bits, and is written as null"
            )


def of_overlap(overlap: Mapping[str, int] | None) -> Iterator[str]:
    """A warning if documents of the evaluation text are in the calibration text."""
    if overlap and overlap["num_in_calibration"]:
        yield (
            f"evaluation: {overlap['num_in_calibration']} of its {overlap['num_documents']} documents are in the calibration "
            "text, too, so its scores say less of new text; give texts that have no document in common"
        )


def of_generation(generation: Mapping[str, Any] | None) -> Iterator[str]:
    """Warnings for models that repeat themselves or never stop thinking on prompts on which the source does not."""
    for name, what in (("is_loop", "repeat themselves"), ("is_endless_thought", "think without an end")):
        found: Counter[str] = Counter()
        for prompt in generation["prompts"] if generation else ():
            source, *others = prompt["answers"]
            found.update(answer["model"] for answer in others if answer[name] and not source[name])
        for model, count in found.items():
            yield f"{model}: {count} of {len(generation['prompts'])} answers {what} where the source's do not"  # type: ignore[index]


def of_certainty(certainty: Mapping[str, Any] | None) -> Iterator[str]:
    """Warnings for experts whose relative standard error is null: with finite outputs, this means that their mean is zero."""
    errors = certainty["relative_standard_errors"] if certainty else {}
    for layer, values in errors.items():
        for expert, error in enumerate(values):
            if error is None:
                yield (
                    f"layer {layer}, expert {expert}: its mean output is zero on the calibration text, so its relative "
                    "standard error is not defined and is written as null; means over experts leave it out"
                )
