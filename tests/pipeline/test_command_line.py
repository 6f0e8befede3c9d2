"""What holds for every command: JSON in place of tables, exit codes, silence, colours, completion."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from pipeline.cli import app
from tests.conftest import REPOSITORY
from tests.runs import Call, FinishedRun
from tests.tiny import FAMILIES

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NO_TABLE = {"clean", "export-gguf", "init", "push", "schema"}
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


@pytest.fixture
def done(finished_run: Callable[[str], FinishedRun]) -> FinishedRun:
    return finished_run("mixtral")


def test_every_command_that_prints_a_table_has_json() -> None:
    having = {name for name, one in COMMANDS.items() if any("--json" in option.opts for option in one.params)}
    assert having == COMMANDS.keys() - NO_TABLE


def test_json_is_the_only_output_and_has_what_the_tables_have(call: Call, done: FinishedRun, tmp_path: Path) -> None:
    batch = tmp_path / "batch.yaml"
    batch.write_text(yaml.safe_dump({"batch_dir": str(tmp_path / "batch"), "runs": [{"run": str(done.run_file)}]}))
    arguments = {
        "run": [str(done.run_file), "--executor", "local"], "batch": [str(batch), "--executor", "local"],
        "plan": [str(done.run_file)], "compare": [str(done.run_file)], "status": [str(done.run_dir)],
        "inspect": [str(done.source)],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, given in arguments.items():
        code, output, errors = call(name, *given, "--json")
        assert code == 0, errors
        found[name] = json.loads(output)
    names = [model["name"] for model in done.report["models"]]
    assert [model["name"] for model in found["run"]["models"]] == names and found["run"]["num_run"] == 0
    assert [model["name"] for model in found["batch"]["runs"][0]["models"]] == names
    assert [one["name"] for one in found["plan"]["checkpoints"]] == names[1:]
    assert [one["num_bytes"] for one in found["plan"]["checkpoints"]] == [one["bytes"] for one in done.report["models"][1:]]
    stages = {one["stage"]: one for one in found["status"]["stages"]}
    assert stages["merge"]["num_sealed"] == stages["merge"]["num_units"] > 0 and stages["merge"]["num_to_run"] == 0
    assert found["compare"]["comparisons"] and found["inspect"]["num_experts"] == FAMILIES["mixtral"].num_experts


def test_a_quiet_run_prints_results_and_errors_alone(call: Call, done: FinishedRun, tmp_path: Path) -> None:
    again = ("--executor", "local", "--set", f"run_dir={tmp_path / 'run'}", "--only", "prepare")
    code, output, errors = call("run", str(done.run_file), *again, "--quiet", "--log-level", "error")
    assert (code, errors) == (0, "") and "units run" in output
    assert not list((tmp_path / "run" / "logs").glob("*")), "nothing of level error has happened"
    code, _, errors = call("run", str(done.run_file), *again[:-1], "report", "-q")
    assert code == 2 and errors.startswith("error: --only report needs ") and "units" in errors
    code, _, errors = call("run", str(done.run_file), *again, "--from", "prepare", "--log-level", "debug")
    assert code == 0 and "prepare: 3 units" in errors
    assert list((tmp_path / "run" / "logs").glob("*.log"))


def test_exit_codes_are_those_of_the_help(
    call: Call, done: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, _ = call("--help")
    said = " ".join(text.split())
    assert code == 0
    for one in ("0 done;", "1 the run, or a run of the batch, failed;", "2 bad input;", "130 interrupted"):
        assert one in said
    assert "Exit codes: 0 done, 1 the run failed" in (REPOSITORY / "README.md").read_text()
    assert call("status", str(tmp_path))[0] == 2
    assert call("run", str(done.run_file), "--executor", "elsewhere")[0] == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    local = ("--executor", "local", "--set")
    assert call("run", str(done.run_file), *local, f"run_dir={blocked / 'run'}")[0] == 1

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.commands.run.run", interrupt)
    assert call("run", str(done.run_file), *local, f"run_dir={tmp_path / 'run'}")[0] == 130


def output_of(*arguments: str, **environment: str) -> str:
    """Of a command in a new process."""
    command = [sys.executable, "-m", "pipeline", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=True).stdout


def test_no_color_is_honoured() -> None:
    assert COLOUR.search(output_of("--help", FORCE_COLOR="1", TERM="xterm-256color"))
    assert not COLOUR.search(output_of("--help", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1"))


def test_a_shell_completes_commands_and_presets() -> None:
    assert completed("hcsmoe in") == {"init", "inspect"}
    assert {"reap", "recombine"} <= completed("hcsmoe init m --method re")


def completed(line: str) -> set[str]:
    """What bash offers for the last word of a line."""
    asked = {"_HCSMOE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    script = "import sys; sys.argv = ['hcsmoe']; from pipeline.__main__ import entry; entry()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **asked}, capture_output=True, text=True, timeout=300, check=True
    )
    return set(done.stdout.split())
