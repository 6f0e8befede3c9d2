"""A store that does not answer is one error, soon, before anything is done."""

import builtins
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.contracts.errors import InputError
from stages.io.storage import STORES, as_path
from tests.conftest import REPOSITORY
from tests.storage.conftest import SECRET

RunFile = Callable[[dict[str, Any]], Path]
_LIMIT_S = 200


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"run_dir": "s3://no-such-bucket/run"}, {}, "s3://no-such-bucket/run cannot be reached: The specified bucket"),
        ({"model": "s3://no-such-bucket/model"}, {}, "s3://no-such-bucket/model cannot be reached: The specified bucket"),
        ({}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "cannot be reached: Could not connect"),
        ({}, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "cannot be reached: Unable to locate credentials"),
        ({"calibration.data": "s3://bucket/c4.jsonl"}, {}, "calibration.data: s3://bucket/c4.jsonl is a URL; texts are read"),
        ({"run_dir": "nowhere://bucket/run"}, {}, "nowhere:// is not a kind of storage that is known"),
    ],
    ids=["no bucket for the run", "no bucket for the model", "nobody there", "no credentials", "text", "unknown scheme"],
)
def test_a_store_that_does_not_answer_is_one_error(
    remote_run_file: RunFile, settings: dict[str, str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = remote_run_file(settings)
    command = [sys.executable, "-m", "pipeline", "run", str(path), "--executor", "local"]
    env = {**os.environ, **environment, "AWS_CONFIG_FILE": str(tmp_path / "none"), "HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert time.monotonic() - started < _LIMIT_S
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert SECRET not in done.stderr


def test_a_url_without_its_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_upath(name: str, *rest: Any) -> Any:
        if name == "upath":
            raise ImportError("No module named 'upath'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_upath)
    with pytest.raises(InputError, match=r"s3://bucket/run: s3:// needs a package.*pip install 'hcsmoe\[s3\]'"):
        as_path("s3://bucket/run")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///x", "file:///x: write a path on this machine without file://"),
        ("local:///x", "local:///x: write a path on this machine without local://"),
        ("s3://", "s3://: names no bucket; write for example s3://bucket/run"),
        ("s3:///", "s3:///: names no bucket; write for example s3://bucket/run"),
        *(
            (url, f"{url}: {url.partition('://')[0]}:// is not a kind of storage that is known; known: {', '.join(STORES)}")
            for url in ("S3://b/x", "://x", "memory://x", "http://host/x", "data://x", "github://a", "simplecache::s3://b/x")
        ),
    ],
)
def test_a_url_of_what_is_no_object_store_is_one_error(url: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        as_path(url)
    assert str(refused.value) == says


def test_a_hub_model_needs_files_to_be_downloaded_to(s3: str, remote_run_file: RunFile) -> None:
    from pipeline.checks import check
    from pipeline.config import load_config

    with pytest.raises(InputError, match=r"cache_dir is missing: org/name is downloaded to files, and run_dir s3://"):
        check(load_config(remote_run_file({"model": "org/name"}), []))
