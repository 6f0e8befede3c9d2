"""Keys: hashes of everything that a result depends on. Equal keys mean equal results."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

KEY_LENGTH = 12

Identity = Mapping[str, JsonValue]
"""Everything that a result depends on, as JSON values."""


def key_of(identity: Identity) -> str:
    """Shortened SHA-256 of the canonical JSON of an identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True)
class Part:
    """A part of a stage with its own key and directory, such as a text or a target.
    name: empty if the stage has only one part."""

    stage: str
    name: str
    identity: Identity

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return key_of(self.identity)

    @property
    def full_name(self) -> str:
        """Names of stage and part, without the key."""
        return f"{self.stage}-{self.name}" if self.name else self.stage

    @property
    def dir(self) -> str:
        """Directory of the part, relative to the run directory."""
        return f"{self.full_name}-{self.key}"
