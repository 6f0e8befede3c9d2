"""What a model is called: in the names of its exports, and in the cards that are published with them."""

import re
from pathlib import Path

from stages.io.storage import is_url

MAX_NAME_LENGTH = 96
_NAME = re.compile(r"\w[\w.+ -]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(model: str) -> bool:
    """Whether a model is named as on the hub, `org/name`, rather than by a folder that exists."""
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).exists()


def hub_name(model: str) -> str | None:
    """The name on the hub of a model that is given by it, or by a snapshot in a cache of the hub; else None."""
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
    """The folder that a text names, `~` replaced; that of an unknown user is a folder of that name."""
    try:
        return Path(model).expanduser()
    except RuntimeError:
        return Path(model)


def model_name(model: str) -> str:
    """The last part of a model's name on the hub, of its URL, or of its folder as it is given (a link is not followed)."""
    named = hub_name(model)
    if named is not None:
        return named.rpartition("/")[2]
    name = model.rstrip("/").rpartition("/")[2] if is_url(model) else _absolute(model).name
    return name or "model"


def check_name(name: str) -> None:
    """Raise ValueError for a name that is no safe part of a path or a URL."""
    if _NAME.fullmatch(name) is None or name != name.strip() or len(name.encode()) > MAX_NAME_LENGTH:
        raise ValueError(
            f"exports would be called {name!r}; a name begins with a letter or digit, goes on with letters, digits, spaces and "
            f". _ + -, and takes at most {MAX_NAME_LENGTH} bytes: set name"
        )


def _absolute(model: str) -> Path:
    """The folder without `~`, `.` and `..`. Links are left, since their names were chosen too, unless `..` leads out of one."""
    path = expanded(model).absolute()
    return path.resolve() if ".." in path.parts else path
