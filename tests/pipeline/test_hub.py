"""Models of the hub, from a stand-in server on this machine, each in a process of its own: HF_ENDPOINT is read at import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.hub_server import COMMIT, Hub, serve
from tests.runs import read_config, token_ids
from tests.tiny import build, save

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(build("mixtral", torch.float32), tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "USE_POLICY.md").write_text("be kind")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"not to be fetched")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5"):
        (folder / name).write_bytes(b"not to be fetched")
    return folder


def hcsmoe(hub: Hub, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), **environment}
    variables.pop("HF_HUB_OFFLINE", None)
    variables |= {name: value for name, value in environment.items() if name == "HF_HUB_OFFLINE"}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def write_run_file(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    ids, _ = token_ids(folder)
    settings = {
        "model": "org/tiny",
        "run_dir": str(folder / "run"),
        "calibration": {"data": str(ids), "num_sequences": 4, "sequence_length": 16},
        "clustering": {"num_experts": 4},
        "export": {"formats": "stock"},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_a_run_fetches_what_it_needs_once_and_states_the_commit(model: Path, tmp_path: Path) -> None:
    with serve(Hub({"org/tiny": model}, token="secret")) as hub:
        run_file = write_run_file(tmp_path)
        arguments = ("run", str(run_file), "--executor", "local")
        done = hcsmoe(hub, tmp_path, *arguments, HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr
        weights = {path.name for path in model.glob("model-*.safetensors")}
        downloads = hub.downloads()
        assert len(downloads) == len(set(downloads))
        assert set(downloads) == weights | {
            "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "USE_POLICY.md",
            "additional_chat_templates/rag.jinja",
        }  # fmt: skip
        assert downloads.index("config.json") < min(downloads.index(name) for name in weights)
        card = (tmp_path / "run" / "models" / "tiny-4e-stock" / "README.md").read_text()
        assert f"org/tiny (revision {COMMIT})" in card
        assert "\nbase_model: org/tiny\n" in card and "\nbase_model_relation: merge\n" in card and str(tmp_path) not in card
        assert (tmp_path / "run" / "models" / "tiny-4e-stock" / "additional_chat_templates" / "rag.jinja").exists()
        again = hcsmoe(hub, tmp_path, *arguments, HF_TOKEN="secret")
        assert again.returncode == 0 and "\n0 units run" in again.stdout, again.stdout + again.stderr
        assert hub.downloads() == downloads
    offline = hcsmoe(hub, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_single_file_is_fetched_rather_than_the_shards_of_an_index(model: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(model, tmp_path / "both"))
    save(build("mixtral", torch.float32, seed=5), tmp_path / "single", max_shard_size="1GB")
    shutil.copy(tmp_path / "single" / "model.safetensors", both)
    with serve(Hub({"org/tiny": both})) as hub:
        done = hcsmoe(hub, tmp_path, "run", str(write_run_file(tmp_path)), "--executor", "local", "--only", "prepare")
    assert done.returncode == 0, done.stderr
    assert [name for name in hub.downloads() if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "not read     model.safetensors.index.json: model.safetensors comes first, as in transformers" in done.stderr


def test_plan_keeps_no_weights_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with serve(Hub({"org/tiny": model})) as hub:
        done = hcsmoe(hub, tmp_path, "plan", str(write_run_file(tmp_path)))
        assert done.returncode == 0, done.stderr
        assert "org/tiny: MixtralForCausalLM" in done.stdout and "tiny-4e-stock" in done.stdout
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.rglob("*.safetensors"))


def test_inspect_reads_headers_alone(model: Path, tmp_path: Path) -> None:
    with serve(Hub({"org/tiny": model})) as hub:
        found = hcsmoe(hub, tmp_path, "inspect", "org/tiny", "--json")
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts["family"] == "mixtral" and facts["reason"] is None
    local = hcsmoe(hub, tmp_path, "inspect", str(model), "--json")
    assert facts == json.loads(local.stdout)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("org/none", {}, "org/none"),
        ("org/tiny", {"revision": "v9"}, "org/tiny (revision v9)"),
        ("org/pickled", {}, "pytorch_model.bin"),
        ("org/other", {}, "gpt2 is not among the"),
    ],
)
def test_one_clear_error_before_the_weights(
    name: str, changes: dict[str, str], named: str, model: Path, tmp_path: Path
) -> None:
    pickled, other = tmp_path / "pickled", Path(shutil.copytree(model, tmp_path / "other"))
    pickled.mkdir()
    for file in ("config.json", "pytorch_model.bin"):
        shutil.copy(model / file, pickled / file)
    (other / "config.json").write_text(json.dumps({**read_config(model), "model_type": "gpt2"}))
    with serve(Hub({"org/tiny": model, "org/pickled": pickled, "org/other": other})) as hub:
        run_file = write_run_file(tmp_path / "job", model=name, **changes)
        failed = hcsmoe(hub, tmp_path, "run", str(run_file), "--executor", "local")
        assert not any("safetensors" in file and "index" not in file for file in hub.downloads())
    assert failed.returncode == 2 and failed.stderr.startswith("error: "), failed.stderr
    assert named in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "job" / "run" / "models").exists()


def test_a_gated_model_without_a_token_and_a_hub_that_is_away(model: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path)
    with serve(Hub({"org/tiny": model}, token="secret")) as hub:
        gated = hcsmoe(hub, tmp_path, "run", str(run_file), "--executor", "local")
    assert gated.returncode == 2 and "HF_TOKEN" in gated.stderr, gated.stderr
    away = hcsmoe(hub, tmp_path, "run", str(run_file), "--executor", "local")
    assert away.returncode == 2 and "the hub cannot be reached" in away.stderr, away.stderr
