"""Model classes of lm-evaluation-harness: one that records requests, one that replays answers, and those that answer with a
whole model.

All but vLLM's are the harness's own class for transformers models, so that texts become tokens as they do there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from stages.checkpoint.folder import Checkpoint
from stages.contracts.prompts import Prompt
from stages.contracts.requests import Request, Row
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
    """Keeps what it is asked, in order: each log-likelihood request once, and every prompt."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool, max_length: int | None) -> None:
        super().__init__(checkpoint, trust_remote_code, max_length)
        self.requests: dict[Request, None] = {}
        self.prompts: list[Prompt] = []

    def forget(self) -> None:
        """Keep nothing of what was asked so far."""
        self.requests, self.prompts = {}, []

    def num_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt."""
        return len(self.tok_encode(prompt.context))

    def most_generated(self, prompt: Prompt) -> int:
        """Tokens with which a model continues it at most."""
        return int(json.loads(prompt.settings).get("max_gen_toks", self.max_gen_toks))

    def ask(self, requests: Mapping[str, Sequence[Any]]) -> None:
        """Put the requests of tasks to it, by the method that answers them, each as often as its task repeats it."""
        for kind, asked in requests.items():
            getattr(self, kind)([one for one in asked for _ in range(one.repeats)])

    def _loglikelihood_tokens(self, requests: Pairs, **_: Any) -> list[tuple[float, bool]]:
        self.requests |= dict.fromkeys(self.request(context, continuation) for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Keep the prompts."""
        self.prompts += map(_prompt, requests)
        return [""] * len(requests)


class Replay(_WithoutModel):
    """Gives answers that were computed before. texts: of a prompt, as many as it was put."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        trust_remote_code: bool,
        max_length: int | None,
        answers: Mapping[Request, tuple[float, bool]],
        texts: Mapping[Prompt, Iterable[str]],
    ) -> None:
        super().__init__(checkpoint, trust_remote_code, max_length)
        self._answers = answers
        self._texts = {prompt: iter(found) for prompt, found in texts.items()}

    def _loglikelihood_tokens(self, requests: Pairs, **_: Any) -> list[tuple[float, bool]]:
        return [self._answers[self.request(context, continuation)] for _, context, continuation in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts of the prompts."""
        return [next(self._texts[_prompt(request)]) for request in requests]


def _prompt(request: Any) -> Prompt:
    context, settings = request.args
    return Prompt(context, json.dumps(settings, sort_keys=True))


def whole_model(held: LayerShard, trust_remote_code: bool, max_length: int | None, batch_size: int) -> LM:
    """The harness's class around a model whose layers are all held."""
    tokenizer = LoadedTokenizer(held.adapted.checkpoint, trust_remote_code).plain
    model = HFLM(pretrained=held.model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size)
    model._device = held.device
    return model


def vllm_model(folder: str, **settings: Any) -> LM:
    """The harness's class around an engine of vLLM, which takes most of the GPU's memory. settings: of that class."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(pretrained=folder, **settings)


def answers_of(model: LM, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """A model's answers to the requests of rows, in order."""
    requests = [request for row in rows for request in row.requests]
    pairs = [(None, list(ids[:-num_scored]), list(ids[-num_scored:])) for ids, num_scored in requests]
    found: list[tuple[float, bool]] = model._loglikelihood_tokens(pairs, disable_tqdm=True)
    return found


def texts_of(model: LM, prompts: Sequence[Prompt]) -> list[str]:
    """The texts with which a model continues prompts."""
    requests = [SimpleNamespace(args=(prompt.context, json.loads(prompt.settings))) for prompt in prompts]
    texts: list[str] = model.generate_until(requests, disable_tqdm=True)
    return texts
