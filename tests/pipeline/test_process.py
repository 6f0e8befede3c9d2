"""How a process begins and ends: what is set before torch loads; exit codes, output, files and processes at its end."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.driver.process import COMPUTING, collection_paused
from pipeline.driver.worker import resolve
from tests.conftest import REPOSITORY
from tests.runs import write_run_file

Checkpoints = Callable[[str], Path]


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A new Python without what this one has set for computing, that buffers its output."""
    kept = {name: value for name, value in os.environ.items() if name not in (*COMPUTING, "PYTHONUNBUFFERED")}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    return subprocess.Popen([sys.executable, *arguments], text=True, env=environment, cwd=REPOSITORY, **options)


def python(code: str, **env: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a program; pipes, so that output is not written line by line."""
    with start("-c", code, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE", "LRU_CACHE_CAPACITY": "7"}], ids=["unset", "the user's own"])
def test_a_worker_sets_what_libraries_read_while_torch_is_not_loaded(own: dict[str, str]) -> None:
    code = """
import os, sys
from pipeline.driver.process import COMPUTING
from pipeline.driver.worker import Worker
Worker()
assert "torch" not in sys.modules
print({name: os.environ.get(name) for name in COMPUTING})
"""
    assert python(code, **own) == (0, f"{ {**COMPUTING, **own} }\n", "")


_KERNELS = """
from pathlib import Path
from pipeline.driver.process import prepare_to_compute
{prepare}
import torch
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
matrix, rows = torch.randn(512, 512), torch.randn(600, 512)
before = resident()
for count in range(1, 601):
    torch.ops.mkldnn._linear_pointwise(rows[:count], matrix, None, "none", [], "")
print(resident() - before)
"""


def test_kernels_for_many_numbers_of_rows_are_not_all_kept() -> None:
    """oneDNN's own products, which every processor makes; which of torch's products it makes depends on the processor."""
    all_kept, few_kept = (int(python(_KERNELS.format(prepare=prepare))[1]) for prepare in ("", "prepare_to_compute()"))
    assert few_kept < all_kept / 3, (few_kept, all_kept)


def test_nothing_is_collected_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("pipeline.imports.importlib.import_module", lambda name: seen.append(gc.isenabled()) or os)
    resolve("any:getpid")
    assert (seen, gc.isenabled()) == ([False], True)
    with pytest.raises(ZeroDivisionError), collection_paused():
        raise ZeroDivisionError
    assert gc.isenabled()


_LEAVES = """
import atexit, sys, tempfile, threading, time, weakref
from pipeline.driver.process import run_and_leave
folder = tempfile.TemporaryDirectory()
class Owner: pass
owner = Owner()
weakref.finalize(owner, print, "finalized")
atexit.register(print, "at exit")
def main():
    print(folder.name)
    print("last words", file=sys.stderr, end="")
    {last}
run_and_leave(main)
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(1)", 1), ("sys.exit(2)", 2), ("sys.exit(130)", 130)],
)
def test_the_exit_code_is_the_programs_and_hooks_have_run(last: str, code: int) -> None:
    found, out, err = python(_LEAVES.format(last=last))
    folder, *rest = out.splitlines()
    assert (found, sorted(rest), err) == (code, ["at exit", "finalized"], "last words")
    assert folder.startswith("/") and not Path(folder).exists()


def test_python_is_not_dismantled() -> None:
    code = (
        "import sys\nfrom pipeline.driver.process import run_and_leave\nclass A:\n def __del__(self): print('gone')\na = A()\n"
    )
    assert python(f"{code}run_and_leave(lambda: None)") == (0, "", "")
    assert python(f"{code}run_and_leave(lambda: sys.exit('a reason'))") == (1, "gone\n", "a reason\n")


def test_threads_are_waited_for_and_errors_are_shown() -> None:
    thread = "threading.Thread(target=lambda: (time.sleep(1), print('thread'))).start(); sys.exit(3)"
    code, out, _ = python(_LEAVES.format(last=thread))
    assert code == 3 and "thread" in out.splitlines()
    code, out, err = python(_LEAVES.format(last="1 / 0"))
    assert code == 1 and err.endswith("ZeroDivisionError: division by zero\n") and "finalized" in out


def test_output_that_cannot_be_written_is_not_passed_over() -> None:
    nobody_reads, write_end = os.pipe()
    os.close(nobody_reads)
    with start("-c", _LEAVES.format(last="pass"), stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 120 and "BrokenPipeError" in err


@pytest.fixture
def run_file(tmp_path: Path, tiny_checkpoint: Checkpoints, token_ids: Path) -> Path:
    return write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, {})


def test_a_real_run_ends_with_its_whole_output_in_a_file_and_a_refused_one_with_2(run_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        command = ("-m", "pipeline", "run", str(run_file), "--executor", "local")
        assert start(*command, stdout=out, stderr=subprocess.DEVNULL).wait(300) == 0
    assert (tmp_path / "out").read_text().splitlines()[-1].endswith(" s")
    with start("-m", "pipeline", "run", str(tmp_path / "no.yaml"), stderr=subprocess.PIPE) as refused:
        _, err = refused.communicate(timeout=300)
    assert refused.returncode == 2 and err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130(run_file: Path, number: signal.Signals) -> None:
    with start("-m", "pipeline", "run", str(run_file), "--executor", "local", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("prepare: "):
            pass
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "interrupted; what was finished is kept" in err
    assert not (run_file.parent / "run" / "driver.lock").exists()


def marked(mark: str) -> list[str]:
    """Command lines of processes that have a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.slow
def test_a_run_on_its_own_cluster_leaves_no_process(run_file: Path, tmp_path: Path) -> None:
    mark = f"HCSMOE_MARK={tmp_path}"
    command = ("-m", "pipeline", "run", str(run_file), "--address", "local")
    with start(*command, env={"HCSMOE_MARK": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "units run" in out
    until = time.monotonic() + 120  # Ray's agents see that their cluster has ended, and end, a moment later
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.5)
    assert marked(mark) == []
