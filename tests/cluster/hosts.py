"""Hosts that share nothing but a disk: each has a network, processes, a name and shared memory of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import MEMORY_FOLDER

RAY = Path(sys.executable).with_name("ray")
NETWORK = "10.77.0"  # reached from nowhere else: the bridge has no address
HEAD_PORT = 6379
_COMMAND_S = 30
_START_S = 200
_END_S = 60
# A node counts as dead after about five seconds without an answer, where Ray's own setting is about half a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=_COMMAND_S)


def _skip_unless_possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("hosts in network namespaces need root")
    if shutil.which("ip") is None or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("hosts in network namespaces need the commands ip, unshare and nsenter")
    probe = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=_COMMAND_S)
    if probe.returncode:
        pytest.skip(f"ip netns does not work here: {probe.stderr.strip()}")


class Host:
    """One host. `name` is its network namespace and its host name."""

    def __init__(self, name: str, number: int, bridge: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, f"{NETWORK}.{number}", folder
        self._link = f"{name}v"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "ray").mkdir(parents=True)
        _ip("netns", "add", name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", self._link, "master", bridge, "up")
        _ip("-n", name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")

    @property
    def env(self) -> dict[str, str]:
        """The environment of its processes."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        repository = str(Path(__file__).parents[2])
        own = {"HOME": str(self.folder), "PYTHONPATH": repository, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        return inherited | own | HEALTH

    def start_ray(self, *options: str) -> None:
        """Start its raylet. Its folder stands at /tmp/ray, for it alone, as does its /dev/shm but for the tests' own files."""
        prepare = (
            f"hostname {self.name} && mkdir -p /tmp/ray {MEMORY_FOLDER} && mount --bind {MEMORY_FOLDER} /tmp/ray && "
            f"mount -t tmpfs -o size=1g tmpfs /dev/shm && mkdir {MEMORY_FOLDER} && mount --bind /tmp/ray {MEMORY_FOLDER} && "
            f"mount --bind {self.folder / 'ray'} /tmp/ray && exec "
        )
        start = [
            str(RAY), "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.address}",
            "--object-store-memory=80000000", *options,
        ]  # fmt: skip
        isolated = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.name, *isolated, "bash", "-c", prepare + " ".join(start)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)

    @property
    def log(self) -> Path:
        """What its raylet printed."""
        return self.folder / "ray.log"

    def has_ended(self) -> bool:
        """Whether its raylet is gone."""
        return self._process is None or self._process.poll() is not None

    def popen(self, command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
        """Start a command on this host, beside its raylet."""
        inside = ["nsenter", f"--target={self._first_process()}", "--net", "--mount", "--pid", "--uts", "--ipc"]
        return subprocess.Popen(
            [*inside, *command], cwd=cwd, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def _first_process(self) -> str:
        """The first process of its process namespace, as seen from outside; it comes a moment after `unshare`."""
        assert self._process is not None
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            if children:
                return children[0]
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} did not start:\n{self.log.read_text()}")

    def cut_off(self) -> None:
        """Pull its network cable."""
        _ip("link", "set", self._link, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._link, "up")

    def end(self) -> None:
        """Kill all its processes (with `unshare` goes its whole process namespace)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_S)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Hosts on one bridge, without a raylet yet; skips the test where that cannot be made."""
    _skip_unless_possible()
    prefix = f"hc{os.getpid() % 100_000}"
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir="/tmp"))
    made: list[Host] = []
    _ip("link", "add", prefix, "type", "bridge")
    try:
        _ip("link", "set", prefix, "up")
        for number in range(1, count + 1):
            made.append(Host(f"{prefix}n{number}", number, prefix, folder / str(number)))
        yield made
    finally:
        for host in made:
            host.end()
        for number in range(1, count + 1):
            # the link by itself: sockets with unsent data keep a namespace, and what is in it, for minutes
            for command in (["link", "del", f"{prefix}n{number}v"], ["netns", "del", f"{prefix}n{number}"]):
                subprocess.run(["ip", *command], capture_output=True, timeout=_COMMAND_S)
        _ip("link", "del", prefix)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(head: Host, count: int) -> None:
    """Wait until a head knows so many live nodes."""
    script = (
        f"import ray; ray.init(address='{head.address}:{HEAD_PORT}', logging_level='error'); "
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    deadline = time.monotonic() + _START_S
    output = ""
    while time.monotonic() < deadline:
        output, _ = head.popen([sys.executable, "-c", script], Path("/")).communicate(timeout=_START_S)
        if output.strip().splitlines()[-1:] == [str(count)]:
            return
        time.sleep(0.5)
    raise TimeoutError(f"no {count} nodes after {_START_S} s: {output}\n{head.log.read_text()[-2000:]}")
