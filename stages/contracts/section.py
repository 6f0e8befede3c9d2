"""What every section of the run file is made of: its base class, and types of settings that several sections have."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MAX_BYTES = 1 << 63
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _parse_bytes(value: Any) -> Any:
    """Parse `"8 GB"` or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?b)?\s*", value.lower())
        if match is None:
            raise ValueError(f"{value!r} is not a size; write for example 8 GB")
        num_bytes = float(match[1]) * _UNITS[match[2] or ""]
        if num_bytes >= _MAX_BYTES:
            raise ValueError(f"{value!r} is larger than any file or memory; write for example 8 GB")
        return int(num_bytes)
    return value


def as_tuple(value: Any) -> Any:
    """One value as a list of one, for settings that take either."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Bytes = Annotated[int, BeforeValidator(_parse_bytes, json_schema_input_type=int | str), Field(ge=1)]
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple, json_schema_input_type=str | tuple[str, ...])]
Names = Annotated[Strings, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**53, strict=True)]


class Section(BaseModel):
    """A section of the run file. It is frozen, and unknown settings are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
