"""Turns documents into tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.tokenizer import LoadedTokenizer
from stages.prepare.chat import Conversation
from stages.prepare.reading import Document
from stages.prepare.tokens import Encoded, Tokens


class Tokenizer(LoadedTokenizer):
    """Turns documents into token ids.

    counts_bytes: also find the bytes of tokens. Known are those of texts and a fast tokenizer, which says where in the text
    each token ends. Raises InputError as `LoadedTokenizer` does.
    """

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool, counts_bytes: bool = False) -> None:
        super().__init__(checkpoint, trust_remote_code)
        self._counts_bytes = counts_bytes and bool(self.plain.is_fast)

    def encode(self, document: Document) -> Encoded:
        """Tokens of a document, including the tokenizer's own special tokens, or those of its chat template."""
        what = "fails as a tokenizer on a document of the text"
        if isinstance(document, Conversation):
            self._check_template()
            what = f"cannot apply its chat template to {document.place}"
        with self.reported(what):
            encoded = self._encoded(document)
            ids = encoded["input_ids"]
            ids_T = np.asarray(ids)
        if not isinstance(ids, list) or ids_T.ndim != 1 or (ids and ids_T.dtype.kind != "i"):
            raise InputError(
                f"{self.name} returns {type(ids).__name__} of shape {list(ids_T.shape)} and {ids_T.dtype} for "
                f"a document; a list of token ids is needed: use the tokenizer files that belong to the checkpoint"
            )
        has_bytes = isinstance(document, str) and self._counts_bytes
        return Encoded(ids_T.astype(np.int64), _num_bytes(str(document), encoded["offset_mapping"]) if has_bytes else None)

    def _encoded(self, document: Document) -> Mapping[str, Any]:
        if isinstance(document, str):
            return self.plain(document, verbose=False, return_offsets_mapping=self._counts_bytes)  # type: ignore[no-any-return]
        encoded: Any = self.plain.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=True, return_dict=True
        )
        return encoded  # type: ignore[no-any-return]

    def _check_template(self) -> None:
        if not self.plain.chat_template:
            raise InputError(
                f"{self.name} has no chat template, which format chat needs; use the tokenizer of the model's chat version, "
                f"or set format to text"
            )


def _num_bytes(document: str, spans: Sequence[tuple[int, int]]) -> Tokens:
    """Bytes of UTF-8 that each token adds: those from the end of the tokens before it to its own. spans: first character of
    each token, and the one behind its last; special tokens have none."""
    code_points = np.frombuffer(document.encode("utf-32-le"), np.uint32)
    ends = np.cumsum(1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000)), dtype=np.int64)
    ends_T = np.concatenate([[0], ends])[np.maximum.accumulate(np.array([stop for _, stop in spans], np.int64))]
    return np.diff(ends_T, prepend=0)
