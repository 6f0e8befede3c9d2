"""llama.cpp runs a GGUF file in a process of its own: its server's threads end with it.

`python -m tests.engines.llama_cpp FILE` reads prompts (a JSON list of texts) and writes what it answers to each.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_NEW_TOKENS = 24
NUM_LIKELIEST = 50


@dataclass(frozen=True)
class Answer:
    """text: greedy continuation of a prompt. tokens: its ids. likeliest: for each, log-probabilities of NUM_LIKELIEST ids."""

    text: str
    tokens: tuple[int, ...]
    likeliest: tuple[dict[int, float], ...]


def answers(file: Path, prompts: Sequence[str]) -> list[Answer]:
    """What llama.cpp answers to each prompt."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(file)],
        input=json.dumps(prompts), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [_answer(reply) for reply in json.loads(done.stdout)]


def _answer(reply: Any) -> Answer:
    (choice,) = reply["choices"]
    steps = choice["logprobs"]["content"]
    likeliest = tuple({one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps)
    return Answer(choice["text"], tuple(step["id"] for step in steps), likeliest)


def _serve(file: str) -> list[Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.port, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # By default keys and values are rounded to 16 bits, which moves single tokens to other experts.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    asked = {"n_predict": NUM_NEW_TOKENS, "temperature": 0, "n_probs": NUM_LIKELIEST, "cache_prompt": False}
    return [server.handle_completions({**asked, "prompt": prompt}) for prompt in json.load(sys.stdin)]


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1])))
