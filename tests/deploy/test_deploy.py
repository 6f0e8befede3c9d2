"""The files that put hcsmoe on a cluster agree with each other, with Ray's schema and with the command line."""

import copy
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from pipeline import __version__
from pipeline.cli import app
from pipeline.config import load_config

REPOSITORY = Path(__file__).parents[2]
PYTHON = "3.11"
USER_ID = 1000


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
PINS = {
    requirement.name.lower().replace("_", "-"): requirement
    for requirement in map(Requirement, (line for line in read("constraints.txt").splitlines() if line and line[0] != "#"))
}
DOCKERFILE = read("docker/Dockerfile").replace("\\\n", " ")
CLUSTER = yaml.safe_load(read("cluster.yaml"))
COMPOSE = yaml.safe_load(read("docker/compose.yaml"))
VOLUME_CLAIM, RAY_JOB = yaml.safe_load_all(read("docker/rayjob.yaml"))
RAY_CLUSTER = RAY_JOB["spec"]["rayClusterSpec"]


def pinned(name: str) -> str:
    (specifier,) = PINS[name].specifier
    assert specifier.operator == "=="
    return specifier.version


def tag(device: str) -> str:
    return f"{__version__}-py{PYTHON}-ray{pinned('ray')}-torch{pinned('torch')}-{device}"


def pods() -> list[dict[str, Any]]:
    groups = [RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def ray_start_options(command: str) -> dict[str, Any]:
    """A `ray start ...` command as Ray's own command line reads it."""
    words = shlex.split(command)
    assert words[:2] == ["ray", "start"]
    return ray_start.make_context("start", words[2:]).params


def requirements(*, with_extras: bool) -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values() if with_extras else []
    return [Requirement(name) for names in (PROJECT["dependencies"], *extras) for name in names]


# Versions


@pytest.mark.parametrize("requirement", requirements(with_extras=True), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_in_its_range(requirement: Requirement) -> None:
    version = pinned(requirement.name.lower().replace("_", "-"))
    assert requirement.specifier.contains(version)
    assert Version(version).local is None  # 2.13.0 stands for 2.13.0+cpu as well


def test_python_of_the_image_is_supported_and_tested() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{PYTHON}.0")
    assert re.search(r"^ARG PYTHON_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[1] == PYTHON  # type: ignore[index]
    assert COMPOSE["services"]["head"]["build"]["args"]["PYTHON_VERSION"] == PYTHON


def test_pins_are_what_is_installed_here() -> None:
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        pytest.skip(f"constraints.txt is for Python {PYTHON}")
    for requirement in requirements(with_extras=False):
        assert Version(importlib.metadata.version(requirement.name)).public == pinned(
            requirement.name.lower().replace("_", "-")
        )


def test_transitive_dependencies_are_pinned() -> None:
    """Whatever the direct dependencies bring along, on this platform, is in constraints.txt; torch pins its CUDA packages."""
    seen: set[str] = set()
    todo = [(requirement.name, requirement.extras or {""}) for requirement in requirements(with_extras=False)]
    while todo:
        name, extras = todo.pop()
        key = name.lower().replace("_", "-").replace(".", "-")
        if key in seen or key.startswith(("nvidia-", "cuda-", "triton")) or key == "setuptools":
            continue
        seen.add(key)
        assert key in PINS, f"{name} is not in constraints.txt"
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append((requirement.name, requirement.extras or {""}))


def test_torch_of_the_image_is_the_pinned_one() -> None:
    installed = re.findall(r"torch==([0-9.]+)(\+cpu)?\"", DOCKERFILE)
    assert installed == [(pinned("torch"), "+cpu"), (pinned("torch"), "")]
    assert DOCKERFILE.count("--constraint constraints.txt") == DOCKERFILE.count("pip install")


HOW_TO = ("docs/cluster.md", "docs/howto/vms.md", "docs/howto/kubernetes.md", "docs/howto/slurm.md")


def test_images_name_the_versions() -> None:
    assert CLUSTER["docker"]["image"].rpartition(":")[2] == tag("cuda")
    assert {service["image"] for service in COMPOSE["services"].values()} == {f"hcsmoe:{tag('cpu')}"}
    images = {container["image"] for pod in pods() for container in pod["containers"]}
    assert images == {CLUSTER["docker"]["image"]}
    assert RAY_CLUSTER["rayVersion"] == pinned("ray")
    for name in ("docker/README.md", *HOW_TO):
        for version in re.findall(r"hcsmoe:(\S+-(?:cpu|cuda))", read(name)):
            assert version in {tag("cpu"), tag("cuda")}, name


# Dockerfile


def test_copied_files_exist_and_reach_the_builder() -> None:
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "pipeline/", "stages/", "examples/"} <= set(sources)
    assert not [source for source in sources if not (REPOSITORY / source).exists()]
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(sources)


def test_image_suits_kuberay_and_ray_up() -> None:
    apt = re.search(r"apt-get install ([^&]+)", DOCKERFILE)
    assert apt is not None
    assert {"wget", "rsync", "openssh-client"} <= set(apt[1].split())
    assert "ENTRYPOINT" not in DOCKERFILE  # `ray up` starts the container with `bash`
    assert re.search(r"\bHOME=/home/hcsmoe\b", DOCKERFILE)  # where `ray up` looks for the home folder
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "hcsmoe"
    assert f"--uid {USER_ID} " in DOCKERFILE


# cluster.yaml


def test_cluster_is_valid_for_ray() -> None:
    config = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    zones = CLUSTER["provider"]["availability_zone"].split(",")
    assert all(zone.startswith(CLUSTER["provider"]["region"]) for zone in zones)


def test_schema_is_really_asked() -> None:
    wrong = copy.deepcopy(CLUSTER)
    wrong["available_node_types"]["head"]["resources"]["CPU"] = "none"
    with pytest.raises(Exception, match="is not of type 'integer'"):
        validate_config(prepare_config(wrong))


def test_cluster_head_runs_no_units_and_workers_are_spot() -> None:
    types = CLUSTER["available_node_types"]
    head = types[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    workers = {name: node for name, node in types.items() if name != CLUSTER["head_node_type"]}
    assert {node["resources"]["GPU"] > 0 for node in workers.values()} == {True, False}
    for node in workers.values():
        assert node["min_workers"] == 0 < node["max_workers"]
        assert node["resources"]["CPU"] > 0
        assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert CLUSTER["max_workers"] == sum(node["max_workers"] for node in workers.values())


def test_cluster_commands_are_real() -> None:
    head = ray_start_options(CLUSTER["head_start_ray_commands"][-1])
    assert (head["num_cpus"], head["num_gpus"], head["dashboard_host"]) == (0, 0, "127.0.0.1")
    assert head["autoscaling_config"]
    worker = ray_start_options(CLUSTER["worker_start_ray_commands"][-1])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    for command in CLUSTER["initialization_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


def test_cluster_shares_a_volume_and_a_token() -> None:
    assert any("mount -t nfs4" in command and "/shared" in command for command in CLUSTER["initialization_commands"])
    options = CLUSTER["docker"]["run_options"]
    assert "--volume=/shared:/shared" in options
    assert "--env=RAY_AUTH_MODE=token" in options
    assert "/home/hcsmoe/.ray/auth_token" in CLUSTER["file_mounts"]


def test_head_comment_names_the_lines_to_edit() -> None:
    comment = read("cluster.yaml").split("\ncluster_name:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    for name in ("region", "docker.image", "EFS_ADDRESS", "ImageId", "InstanceType", "max_workers", "RAY_AUTH_MODE"):
        assert name in comment


# docker/rayjob.yaml


def test_rayjob_has_a_head_and_two_kinds_of_workers() -> None:
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert RAY_JOB["spec"]["shutdownAfterJobFinishes"] is True
    assert RAY_JOB["spec"]["backoffLimit"] >= 1
    assert RAY_CLUSTER["authOptions"] == {"mode": "token"}
    assert RAY_CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in RAY_CLUSTER["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    for name, group in groups.items():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")
    parameters = [group["rayStartParams"] for group in (RAY_CLUSTER["headGroupSpec"], *groups.values())]
    for given in parameters:
        assert all(isinstance(value, str) for value in given.values())  # the field is a map of strings
        ray_start_options("ray start --head " + " ".join(f"--{key}={value}" for key, value in given.items()))


def test_rayjob_pods_share_the_volume_as_the_user_of_the_image() -> None:
    assert VOLUME_CLAIM["kind"] == "PersistentVolumeClaim"
    assert VOLUME_CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == VOLUME_CLAIM["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER_ID


def test_rayjob_entrypoint_is_a_command_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    python, module_flag, module, command, *args = shlex.split(RAY_JOB["spec"]["entrypoint"])
    assert (python, module_flag, module) == ("python", "-m", "pipeline")
    group: Any = typer.main.get_command(app)
    options = group.commands[command].make_context(command, args).params  # raises for what is no option
    monkeypatch.chdir(REPOSITORY)  # the image's working directory holds the same files
    assert re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE) == ["/app"]
    config = load_config(Path(options["run_file"]), options["settings"])
    assert Path(config.run_dir).is_relative_to("/shared")
    assert Path(config.model, "config.json").is_file()
    assert config.resources.num_gpus == 1
    assert config.resources.num_workers is not None  # an autoscaled cluster starts empty: nothing can be counted
    gpu_group = next(group for group in RAY_CLUSTER["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert config.resources.num_workers <= gpu_group["maxReplicas"]


# docker/compose.yaml


def test_compose_publishes_on_loopback_only() -> None:
    services = COMPOSE["services"]
    assert {name for name, service in services.items() if service.get("ports")} == {"head"}
    for service in services.values():
        assert not {"network_mode", "privileged", "expose"} & set(service)
        for port in service.get("ports", []):
            assert isinstance(port, str)
            assert port.startswith("127.0.0.1:")


def test_compose_is_a_head_and_two_workers() -> None:
    head, worker = COMPOSE["services"]["head"], COMPOSE["services"]["worker"]
    assert worker["deploy"]["replicas"] == 2
    started = ray_start_options(head["command"])
    assert (started["num_cpus"], started["num_gpus"], started["block"]) == (0, 0, True)
    joined = ray_start_options(worker["command"].replace("${CPUS_PER_WORKER:-2}", "2"))
    assert joined["address"] == f"head:{started['port']}"
    assert head["ports"] == [f"127.0.0.1:{started['dashboard_port']}:{started['dashboard_port']}"]
    for service in (head, worker):
        assert service["volumes"] == ["shared:/shared"]
        context = (REPOSITORY / "docker" / service["build"]["context"]).resolve()
        assert context == REPOSITORY
        assert (context / service["build"]["dockerfile"]).is_file()
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")  # no default: it must be given
    assert "shared" in COMPOSE["volumes"]


def test_the_token_file_is_in_no_commit() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "docker/.env"], cwd=REPOSITORY, capture_output=True, check=False, timeout=10
    )
    assert ignored.returncode == 0


# Documents


@pytest.mark.parametrize(
    "name", ["docker/README.md", "docs/howto/vms.md", "docs/howto/kubernetes.md", "cluster.yaml", "docker/rayjob.yaml"]
)
def test_named_files_exist(name: str) -> None:
    named = set(re.findall(r"\b(?:docker|docs|examples|tests)/[\w./-]*\w\.(?:ya?ml|md|py)\b", read(name)))
    assert named
    assert not [path for path in named if not (REPOSITORY / path).exists()]
