"""Tests of hcsmoe; the folders mirror the packages.

The environment is set here, before any module of the tests imports transformers, datasets or ray: no network, no file outside
of one temporary folder, no Ray token file. Processes that the tests start inherit it.
"""

import os
import shutil
import tempfile
from pathlib import Path

import psutil

MEMORY_FOLDER = Path(f"/dev/shm/hcsmoe-{os.getuid()}")  # short: tests compare lines that paths stand in
_FREE_BYTES = 16 * 10**9
"""Tests write some hundred thousand files, which no machine has to keep. Where memory has room for them and for the tests,
pytest's folders lie there."""

HOME = Path(os.environ.get("HCSMOE_TESTS_HOME") or tempfile.mkdtemp(prefix="hcsmoe-tests-"))
os.environ.update(
    HCSMOE_TESTS_HOME=str(HOME),
    HF_HOME=str(HOME),
    HF_MODULES_CACHE=str(HOME / "modules"),
    HF_DATASETS_CACHE=str(HOME / "datasets"),
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
)
_shm = MEMORY_FOLDER.parent
if _shm.is_dir() and min(psutil.virtual_memory().available, shutil.disk_usage(_shm).free) > _FREE_BYTES:
    MEMORY_FOLDER.mkdir(exist_ok=True)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


def _not_forced(descriptor: int) -> None:
    """No test takes the power away, so what is written need not reach the disk, for which a test would wait a tenth of its
    time. That files are forced to the disk, `tests/stages/test_files.py` tests."""


os.fsync = _not_forced  # type: ignore[assignment]
