"""Names of models, for their exports and for the model cards published with them."""

import re
from pathlib import Path

from stages.io.storage import is_url

MAX_NAME_LENGTH = 96
_NAME = re.compile(r"\w[\w.+ -]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(model: str) -> bool:
    """Whether a model is a hub name `org/name` and not an existing folder."""
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).exists()


def hub_name(model: str) -> str | None:
    """Hub name of a model that is given by that name or by a snapshot in a hub cache; else None."""
    if is_url(model):
        return None
    if is_hub_name(model):
        return model
    folder = _absolute(model)
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return None


def expanded(model: str) -> Path:
    """The folder that a text names, with `~` expanded. A `~name` of an unknown user stays as it is."""
    try:
        return Path(model).expanduser()
    except RuntimeError:
        return Path(model)


def model_name(model: str) -> str:
    """Last part of a model's hub name, URL, or folder as given. Symbolic links are not followed."""
    named = hub_name(model)
    if named is not None:
        return named.rpartition("/")[2]
    name = model.rstrip("/").rpartition("/")[2] if is_url(model) else _absolute(model).name
    return name or "model"


def check_name(name: str) -> None:
    """Raise ValueError for a name that is unsafe in a path or a URL."""
    if _NAME.fullmatch(name) is None or name != name.strip() or len(name.encode()) > MAX_NAME_LENGTH:
        raise ValueError(
            f"exports would be called {name!r}; a name begins with a letter or digit, goes on with letters, digits, spaces and "
            f". _ + -, and takes at most {MAX_NAME_LENGTH} bytes: set name"
        )


def _absolute(model: str) -> Path:
    """Absolute folder without `~`, `.` and `..`.
    Symbolic links keep their names, which were chosen by the user, unless `..` leads out of one."""
    path = expanded(model).absolute()
    return path.resolve() if ".." in path.parts else path
