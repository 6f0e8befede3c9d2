"""Tests of hcsmoe; the folders mirror the packages.

The environment is set here, before any module of the tests imports transformers, datasets or ray: no network, no file outside
of one temporary folder, no Ray token file. Processes that the tests start inherit it.
"""

import os
import tempfile
from pathlib import Path

HOME = Path(os.environ.get("HCSMOE_TESTS_HOME") or tempfile.mkdtemp(prefix="hcsmoe-tests-"))
os.environ.update(
    HCSMOE_TESTS_HOME=str(HOME),
    HF_HOME=str(HOME),
    HF_MODULES_CACHE=str(HOME / "modules"),
    HF_DATASETS_CACHE=str(HOME / "datasets"),
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
)
