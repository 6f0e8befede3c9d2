"""A process that has loaded what computes, and forks: `python -m tests.forks SOCKET`.

Loading torch and transformers takes seconds, and the tests that kill drivers and workers start hundreds. Each fork is a process
of its own, with its own pid, environment, arguments, output and end, that runs the same module or script as a new interpreter
would. Tests of how processes start (`tests/pipeline/test_process.py`, `tests/ray/test_worker_processes.py`, `tests/deploy`)
start interpreters.

A client sends one request over the socket (a length, then JSON) with the descriptors of its output and errors. It is answered
by two lines: the pid, and the exit code once the fork has ended. A fork is killed when its client is gone.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from pipeline.driver.process import collection_paused, prepare_to_compute

SOCKET_VARIABLE = "HCSMOE_TESTS_FORKS"
"""The environment variable that names the socket."""
REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("forked_worker.py")
"""Instead of Ray's script that starts a worker (`setup_worker_path` of a node)."""
LOADED = (
    "pipeline.cli", "pipeline.driver.worker", "stages.prepare.units", "stages.calibrate.units", "stages.cluster.units",
    "stages.cluster.linkage", "stages.merge.units", "stages.assemble.units", "stages.evaluate.units", "stages.report.units",
    "transformers.models.mixtral.modeling_mixtral",
)  # fmt: skip
"""Not Ray: where it is loaded it reads its environment, which each fork has of its own."""
_START_S = 300
_LENGTH = struct.Struct("!I")


class Fork:
    """A fork, as its client sees it; much as `subprocess.Popen`. Its output and its errors go to one file."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        """arguments: of the interpreter, `-m MODULE ...` or `SCRIPT ...`."""
        self._output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        output = self._output.fileno()
        self._client = ask(arguments, str(cwd), env, (output, output))
        self.pid = int(line_of(self._client))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        with contextlib.suppress(TimeoutError):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout_s: float) -> None:
        if self.returncode is None:
            if not _is_ready(self._client, timeout_s):
                raise TimeoutError(f"process {self.pid} has not ended after {timeout_s} s")
            self.returncode = int(line_of(self._client))

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for its end. Returns what it printed."""
        self._wait(timeout)
        self._output.seek(0)
        return self._output.read(), None


def _is_ready(client: socket.socket, timeout_s: float) -> bool:
    """Whether a socket has something to read within a time."""
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))


def ask(arguments: Sequence[str], cwd: str, env: Mapping[str, str], outputs: tuple[int, int]) -> socket.socket:
    """Ask the server that this process's environment names for a fork. Returns the socket on which its answers come."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.environ[SOCKET_VARIABLE])
    request = json.dumps({"arguments": list(arguments), "cwd": cwd, "env": dict(env)}).encode()
    socket.send_fds(client, [_LENGTH.pack(len(request))], outputs)
    client.sendall(request)
    return client


def line_of(client: socket.socket) -> str:
    """One line of the server's answers. Waits for it."""
    found = b""
    while not found.endswith(b"\n"):
        piece = client.recv(1)
        if not piece:
            raise ConnectionError("the process that forks has ended")
        found += piece
    return found.decode()


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Start the process that forks, and name its socket in the environment, for this process and those that it starts."""
    folder = Path(tempfile.mkdtemp(prefix="hf-"))
    path = folder / "socket"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks", str(path)], cwd=REPOSITORY, stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        deadline = time.monotonic() + _START_S
        while not path.exists():
            assert server.poll() is None, "the process that forks has ended"
            assert time.monotonic() < deadline, f"no process that forks after {_START_S} s"
            time.sleep(0.1)
        os.environ[SOCKET_VARIABLE] = str(path)
        yield
    finally:
        os.environ.pop(SOCKET_VARIABLE, None)
        server.kill()
        server.communicate()
        shutil.rmtree(folder)


def _serve(path: str) -> tuple[list[str], str, dict[str, str]]:
    """Fork for every request. Returns in the fork alone, with its arguments, folder and environment."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    clients: dict[int, tuple[int, socket.socket]] = {}
    """By the descriptor that becomes readable when the fork ends: its pid and its client."""
    while True:
        for key, _ in selector.select():
            if key.fd == sys.stdin.fileno():
                sys.exit()  # who started this has ended
            elif key.fd == listener.fileno():
                client, _ = listener.accept()
                arguments, cwd, env, outputs = _received(client)
                pid = os.fork()
                if not pid:
                    selector.close()
                    for one in (listener, client, *(client for _, client in clients.values())):
                        one.close()
                    _take(outputs)
                    return arguments, cwd, env
                for output in outputs:
                    os.close(output)
                client.sendall(b"%d\n" % pid)
                clients[os.pidfd_open(pid)] = pid, client
                selector.register(list(clients)[-1], selectors.EVENT_READ)
                selector.register(client, selectors.EVENT_READ, pid)
            elif key.fd in clients:
                pid, client = clients.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(KeyError):
                    selector.unregister(client)
                with contextlib.suppress(OSError):
                    client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                client.close()
            elif key.fd in selector.get_map():  # nothing comes from a client but its end
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def _received(client: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
    head, outputs, _, _ = socket.recv_fds(client, _LENGTH.size, 2)
    (num_bytes,) = _LENGTH.unpack(head)
    found = b""
    while len(found) < num_bytes:
        found += client.recv(num_bytes - len(found))
    request = json.loads(found)
    return request["arguments"], request["cwd"], request["env"], outputs


def _take(outputs: list[int]) -> None:
    """Make descriptors this process's output and errors; its input is empty."""
    os.setsid()
    with open(os.devnull) as nothing:
        for target, source in enumerate((nothing.fileno(), *outputs)):
            os.dup2(source, target)
    for output in outputs:
        os.close(output)


def _load() -> None:
    prepare_to_compute()
    with collection_paused():
        for name in LOADED:
            importlib.import_module(name)
    gc.freeze()  # a collection would touch, and copy, every page


if __name__ == "__main__":
    _load()
    arguments, cwd, env = _serve(sys.argv[1])
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
