"""The package as others install it: built from what git has, in an environment that knows nothing of this folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from pipeline import __version__
from pipeline.commands.demo import demo_config, examples_folder
from tests.conftest import REPOSITORY


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_of_the_source_distribution(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=REPOSITORY).split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", cwd=source)
    wheel, archive = (
        tmp_path / "dist" / f"hcsmoe-{__version__}-py3-none-any.whl",
        tmp_path / "dist" / f"hcsmoe-{__version__}.tar.gz",
    )
    with tarfile.open(archive) as packed:
        assert f"hcsmoe-{__version__}/examples/tiny-mixtral/model.safetensors" in packed.getnames()
    with zipfile.ZipFile(wheel) as packed_wheel:
        names = packed_wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"hcsmoe.py", "pipeline", "stages", f"hcsmoe-{__version__}.data", f"hcsmoe-{__version__}.dist-info"}
    tracked = {name for name in listed if name.endswith(".py") and name.split("/")[0] in ("hcsmoe.py", "pipeline", "stages")}
    assert tracked == {name for name in names if name.endswith(".py")}
    static = {name for name in listed if name.startswith("stages/") and "/static/" in name}
    assert static and static <= set(names)
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    # What it depends on is that of this environment, without what is editable here: a .pth file is not read by way of another.
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = place / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    script = "import hcsmoe, stages; print(hcsmoe.__file__, stages.__file__, hcsmoe.__version__)"
    where = run(python, "-c", script, cwd=tmp_path)
    assert where.count(str(packages)) == 2 and where.endswith(f" {__version__}\n")
    few = ("variants=[hc-smoe]", "clustering.num_experts=[4]", "calibration.num_sequences=4", "evaluation.num_sequences=4")
    quick = [word for setting in few for word in ("--set", setting)]
    shown = run(place / "bin" / "hcsmoe", "demo", "--executor", "local", "--quiet", *quick, cwd=tmp_path)
    assert "hc-smoe" in shown and (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert len(list((tmp_path / "runs" / "demo" / "models").iterdir())) == 2


def test_the_demo_reads_its_files_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = demo_config("out", ["clustering.num_experts=[6]"])
    assert Path(config.model).is_absolute() and Path(config.model).is_dir() and config.run_dir == "out"
    assert config.clustering.num_experts == (6,)
    assert isinstance(config.calibration.data, dict)
    assert all(Path(name).is_file() for one in config.calibration.data.values() for name in one.data)
    assert examples_folder() == REPOSITORY / "examples"


def test_the_version_stands_in_one_place() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert newest is not None and newest[1] == __version__
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert 'dynamic = ["version"]' in (REPOSITORY / "pyproject.toml").read_text()


def test_hooks_call_what_make_lint_calls() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (REPOSITORY / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    called = set(re.findall(r"\$\(BIN\)/(\w+(?: \w+)?)", lint))
    assert called == {"ruff check", "ruff format", "mypy"}
    assert {hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in hooks} == called
