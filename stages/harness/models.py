"""Model classes of lm-evaluation-harness: one that records requests, one that replays answers, and one for a whole model.

All are the harness's own class for transformers models, so that texts become tokens as they do there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from stages.checkpoint.folder import Checkpoint
from stages.contracts.requests import Request
from stages.model.layer_shard import LayerShard
from stages.model.model_config import load_config
from stages.model.tokenizer import LoadedTokenizer

Pairs = Sequence[tuple[Any, list[int], list[int]]]
"""Texts, tokens of the context, tokens of the continuation."""


class _Absent:
    """Stands for a model whose weights are not needed."""

    def __init__(self, config: Any) -> None:
        self.config, self.device = config, torch.device("cpu")


class _WithoutModel(HFLM):  # type: ignore[misc]
    """Config and tokenizer of a checkpoint. Raises InputError if they cannot be read."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool, max_length: int | None) -> None:
        tokenizer = LoadedTokenizer(checkpoint, trust_remote_code).plain
        super().__init__(
            pretrained=_Absent(load_config(checkpoint)), tokenizer=tokenizer, backend="causal", max_length=max_length
        )

    def request(self, context: list[int], continuation: list[int]) -> Request:
        """The request as the harness puts it to a model: cut from the left to the model's length."""
        assert context and continuation and len(continuation) <= self.max_length
        return Request(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))


class Recorder(_WithoutModel):
    """Keeps the log-likelihood requests that it is asked, each once, in order."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool, max_length: int | None) -> None:
        super().__init__(checkpoint, trust_remote_code, max_length)
        self.requests: dict[Request, None] = {}

    def _loglikelihood_tokens(self, requests: Pairs, **_: Any) -> list[tuple[float, bool]]:
        self.requests |= dict.fromkeys(self.request(context, continuation) for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)


class Replay(_WithoutModel):
    """Answers log-likelihood requests with what was computed before."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        trust_remote_code: bool,
        max_length: int | None,
        answers: Mapping[Request, tuple[float, bool]],
    ) -> None:
        super().__init__(checkpoint, trust_remote_code, max_length)
        self._answers = answers

    def _loglikelihood_tokens(self, requests: Pairs, **_: Any) -> list[tuple[float, bool]]:
        return [self._answers[self.request(context, continuation)] for _, context, continuation in requests]


def whole_model(held: LayerShard, trust_remote_code: bool, max_length: int | None, batch_size: int) -> HFLM:
    """The harness's class around a model whose layers are all held."""
    tokenizer = LoadedTokenizer(held.adapted.checkpoint, trust_remote_code).plain
    model = HFLM(pretrained=held.model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size)
    model._device = held.device
    return model
