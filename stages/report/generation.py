"""Answers of all models to the same prompts, side by side."""

from dataclasses import asdict

from pydantic import JsonValue

from stages.contracts.generation import read_answers
from stages.contracts.paths import GENERATION_FILE
from stages.contracts.units import Job
from stages.report.spec import ReportArgs


def read_generation(job: Job[ReportArgs]) -> dict[str, JsonValue] | None:
    """For each prompt the answers of the source and of every export, in the order of the report; None without prompts."""
    args = job.args
    folders = {args.source_name: args.source_generate_dir, **{target.name: target.generate_dir for target in args.targets}}
    found = {name: read_answers(job.run_dir / folder / GENERATION_FILE) for name, folder in folders.items() if folder}
    if not found:
        return None
    evaluation = args.settings["evaluation"]
    assert isinstance(evaluation, dict)
    prompts = evaluation["generate"]
    assert isinstance(prompts, list)
    return {
        "uses_chat_template": all(answers.uses_chat_template for answers in found.values()),
        "prompts": [
            {
                "prompt": prompt,
                "answers": [{"model": name, **asdict(answers.answers[number])} for name, answers in found.items()],
            }
            for number, prompt in enumerate(prompts)
        ],
    }
