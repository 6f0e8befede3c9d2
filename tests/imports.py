"""What a command has imported by the time it ends. Run in a process of its own: `python -m tests.imports COMMAND ...`."""

import json
import subprocess
import sys
from pathlib import Path

from pipeline.cli import main

LIBRARIES = (
    "compressed_tensors", "datasets", "huggingface_hub", "numpy", "pyarrow", "ray", "safetensors", "scipy", "tokenizers",
    "torch", "transformers",
)  # fmt: skip


def imported_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of `hcsmoe ARGUMENTS` in a new process, and which of LIBRARIES it has imported."""
    command = [sys.executable, "-m", "tests.imports", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    exit_code, names = json.loads(done.stdout.splitlines()[-1])
    return exit_code, set(names)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code
    print(json.dumps([code or 0, [name for name in LIBRARIES if name in sys.modules]]))
