"""A real Ray head on loopback, in a process group of its own that ends with the `with` block."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

BIN_DIR = Path(sys.executable).parent
START_TIMEOUT_S = 120
JOB_TIMEOUT_S = 400
END_TIMEOUT_S = 60
GRACE_S = 3
# Below the range from which the kernel takes ports of its own choice, as other Ray processes do, and above the ports that
# `ray start` gives its workers.
_FIRST_PORT = 20_000
_PORTS_PER_PROCESS = 1_500
_MAX_PROCESSES = 8
_OF_RAY_ITSELF = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::JobSupervisor")


@dataclass(frozen=True)
class Submission:
    """What `ray job submit` printed, how it exited, and the status that the head has for the job."""

    exit_code: int
    log: str
    status: str


@dataclass(frozen=True)
class RayHead:
    """A running head: the addresses for jobs, for drivers and for a Prometheus scrape, its temporary folder, and the
    environment that its commands need."""

    address: str
    gcs_address: str
    metrics_address: str
    temp_dir: Path
    env: Mapping[str, str]

    @property
    def log_path(self) -> Path:
        """What `ray start` printed."""
        return self.temp_dir / "head.log"

    def ray(self, *args: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a `ray` command; its output and errors come as one text."""
        return subprocess.run(
            [str(BIN_DIR / "ray"), *args],
            cwd=cwd,
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=False,
        )

    def submit(self, *entrypoint: str, working_dir: Path) -> Submission:
        """`ray job submit --working-dir . -- ENTRYPOINT`, started in `working_dir`."""
        done = self.ray("job", "submit", "--address", self.address, "--working-dir", ".", "--", *entrypoint, cwd=working_dir)
        job = re.search(r"raysubmit_\w+", done.stdout)
        assert job, done.stdout
        return Submission(done.returncode, done.stdout, self.status(job[0]))

    def get(self, path: str) -> Any:
        """What the head's own interface answers."""
        request = urllib.request.Request(f"{self.address}/{path}")
        if "RAY_AUTH_TOKEN" in self.env:
            request.add_header("Authorization", f"Bearer {self.env['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def status(self, job: str) -> str:
        """Status of a job."""
        return str(self.get(f"api/jobs/{job}")["status"])

    def worker_titles(self) -> list[str]:
        """Titles of the processes in which units run, or may: workers of a driver, not Ray's own idle ones."""
        titles = []
        for pid in _descendants(self.temp_dir):
            with contextlib.suppress(OSError):
                titles.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [title for title in titles if title.startswith("ray::") and not title.startswith(_OF_RAY_ITSELF)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. Processes of pytest-xdist choose from ranges of their own."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _MAX_PROCESSES
    first = _FIRST_PORT + process * _PORTS_PER_PROCESS
    found: list[int] = []
    for port in random.Random().sample(range(first, first + _PORTS_PER_PROCESS), _PORTS_PER_PROCESS):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} ports from {first} on are free")


@contextlib.contextmanager
def ray_head(
    token: str | None = None,
    node_types: Mapping[str, Any] | None = None,
    more_env: Mapping[str, str] | None = None,
    num_cpus: int = 2,
    num_gpus: int = 0,
    start_with: Sequence[str] = (),
) -> Iterator[RayHead]:
    """Start `ray start --head --block` on free ports, wait until it takes jobs, and end all its processes.

    token: turns token authentication on. node_types: starts a head without CPUs, and the autoscaler with Ray's fake provider,
    which adds nodes of these types on this machine. more_env: on top of its environment. num_cpus: a run starts a process for
    each, which takes seconds. num_gpus: that it pretends to have. start_with: a command that runs the rest of its command line
    as the head.
    """
    temp_dir = Path(tempfile.mkdtemp(prefix="ray-head-", dir="/tmp"))  # short: sockets lie in it
    head_port, dashboard_port, agent_port, agent_grpc_port, metrics_port, client_port = free_ports(6)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "PATH": f"{BIN_DIR}:{os.environ['PATH']}",  # a job's `python` is the one on the head's PATH
        "HOME": str(temp_dir),  # no token file of the user, and none left in the home folder
        "RAY_AUTH_MODE": "token" if token else "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if token:
        env["RAY_AUTH_TOKEN"] = token
    env |= more_env or {}
    size = [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"]
    if node_types is not None:
        config_path = temp_dir / "autoscaling.json"
        config_path.write_text(json.dumps(_fake_cluster(node_types, f"{get_node_ip_address()}:{head_port}")))
        size = ["--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={config_path}"]
        env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    command = [
        *start_with, str(BIN_DIR / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={head_port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}", f"--dashboard-agent-grpc-port={agent_grpc_port}",
        f"--metrics-export-port={metrics_port}", f"--ray-client-server-port={client_port}",
        "--min-worker-port=0", "--max-worker-port=0",  # any: heads beside each other would hand out the same ones
        *size, "--object-store-memory=100000000", f"--temp-dir={temp_dir / 'ray'}",
    ]  # fmt: skip
    head = RayHead(
        f"http://127.0.0.1:{dashboard_port}",
        f"127.0.0.1:{head_port}",
        f"http://127.0.0.1:{metrics_port}/metrics",
        temp_dir,
        env,
    )
    with head.log_path.open("w") as log:
        process = subprocess.Popen(
            command, env=env, cwd=temp_dir, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        _wait_until_up(head, process)
        yield head
    finally:
        _end(process, temp_dir)


def _fake_cluster(node_types: Mapping[str, Any], gcs_address: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads: the types, of which "head" is the head, on Ray's fake provider."""
    names = {"head": "ray.head.default"}  # the fake provider knows its head by this name
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    lists = ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    return {
        "cluster_name": "fake",
        "max_workers": sum(node["max_workers"] for node in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "available_node_types": {names.get(name, name): {**node, "node_config": {}} for name, node in node_types.items()},
        "head_node_type": names["head"],
        **{name: [] for name in (*commands, *lists)},
    }


def _wait_until_up(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    """Wait until the head takes jobs and its raylet, which comes seconds later, takes drivers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the head ended:\n{head.log_path.read_text()}"
        with contextlib.suppress(OSError):
            head.get("api/jobs/")
            nodes = head.get("nodes?view=summary")["data"]["summary"]
            if any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes):
                return
        time.sleep(0.2)
    raise TimeoutError(f"no head at {head.address} after {START_TIMEOUT_S} s:\n{head.log_path.read_text()}")


def _descendants(temp_dir: Path) -> list[int]:
    """Processes whose command line or environment names the head's folder: they may have left its process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(temp_dir).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def _end(process: subprocess.Popen[bytes], temp_dir: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    deadline = time.monotonic() + END_TIMEOUT_S
    while (left := _descendants(temp_dir)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait(END_TIMEOUT_S)
    assert not left, f"processes {left} of the head are still there"
    shutil.rmtree(temp_dir, ignore_errors=True)
