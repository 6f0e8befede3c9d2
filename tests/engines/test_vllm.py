"""vLLM computes what transformers computes, with stock exports and, by the plug-in, with tied ones. Run by `make test-vllm`.

HCSMOE_VLLM_PYTHON: Python of an environment with vLLM and this project's plug-in.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import REPOSITORY
from tests.engines.example import example_run, prompts
from tests.runs import FinishedRun, run_all, token_ids
from tests.tiny import NUM_EXPERTS, build, load, save

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("HCSMOE_VLLM_PYTHON" not in os.environ, reason="needs an environment with vLLM: `make test-vllm`"),
]

NUM_NEW_TOKENS = 16
# Shapes that vLLM's kernels for CPUs take.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mixtral": (_WIDE, (5, 3, 4)),
    "qwen2_moe": ({**_WIDE, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}, (5, 3)),
    "qwen3_moe": ({**_WIDE, "moe_intermediate_size": 64, "head_dim": 32}, (5, 3)),
    "olmoe": (_WIDE, (5, 3, 4)),
    "deepseek_v2": ({**_WIDE, **_LATENT, "moe_intermediate_size": 64}, (5, 3)),
    "deepseek_v3": (
        {**_WIDE, **_LATENT, "moe_intermediate_size": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        (5, 3),
    ),
    "glm4_moe": ({**_WIDE, "moe_intermediate_size": 64, "head_dim": 32}, (5, 3)),
    "gpt_oss": ({**_WIDE, "head_dim": 64}, (5, 3, 4)),
}
"""Settings of a tiny model, and how many experts each of its MoE layers keeps in the tied export."""
EXPORTS = [f"{family}-{kind}" for family in FAMILIES for kind in ("stock", "tied")]
EXAMPLES = ["hc-smoe-4e-stock", "hc-smoe-4e-tied", "slim-4e-stock"]


def vllm(models: Sequence[Path], asked: list[list[int]], **env: str) -> dict[str, Any]:
    """What vLLM answers, in a process of its own, by name of the folder."""
    python = os.environ["HCSMOE_VLLM_PYTHON"]
    task = {"models": [str(model) for model in models], "prompts": asked, "num_new_tokens": NUM_NEW_TOKENS}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(REPOSITORY / "tests/engines/vllm_answers.py")],
        input=json.dumps(task), stdout=subprocess.PIPE, text=True, env={**kept, **env}, check=True, timeout=3000,
    )  # fmt: skip
    return {Path(folder).name: answer for folder, answer in json.loads(done.stdout).items()}


def random_prompts(size: int) -> list[list[int]]:
    """Eight prompts of different lengths."""
    random = np.random.default_rng(0)
    return [random.integers(3, size, 8 + 3 * number).tolist() for number in range(8)]


def transformers_answers(folder: Path, asked: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Greedy ids after each prompt, and log-probabilities of the prompt's tokens after the first."""
    model = load(folder, dtype=torch.float32, trust_remote_code=True)
    for prompt in asked:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        with torch.inference_mode():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        yield made[0, len(prompt) :].tolist(), log_probs.gather(1, ids[0, 1:, None])[:, 0]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of tiny random models: half of the experts as stock, and a different number in each layer as tied."""
    found = {}
    for family, (settings, counts) in FAMILIES.items():
        root = tmp_path_factory.mktemp(family)
        source = save(build(family, torch.float32, **settings), root / family)
        path, _ = token_ids(root)
        made = run_all(source, root / "run", path, [NUM_EXPERTS // 2], ["stock"])
        found[f"{family}-stock"] = made[f"{NUM_EXPERTS // 2}e-stock"]
        (found[f"{family}-tied"],) = run_all(source, root / "tied", path, [list(counts)], ["tied"]).values()
    return {name: folder.rename(folder.with_name(name)) for name, folder in found.items()}


@pytest.fixture(scope="module")
def answers(exports: dict[str, Path]) -> dict[str, Any]:
    return vllm([*exports.values()], random_prompts(128))


def compare(folder: Path, asked: list[list[int]], answer: dict[str, Any], name: str) -> None:
    assert "error" not in answer, answer["error"]
    theirs, ours = [], []
    num_equal = 0
    for (due, log_probs), tokens, found in zip(
        transformers_answers(folder, asked), answer["tokens"], answer["log_probs"], strict=True
    ):
        num_equal += due == tokens
        theirs.append(torch.tensor(found))
        ours.append(log_probs)
    perplexities = [float((-torch.cat(one).double().mean()).exp()) for one in (ours, theirs)]
    worst = float((torch.cat(ours) - torch.cat(theirs)).abs().max())
    print(f"| {name} | {num_equal} of {len(asked)} | {perplexities[0]:.4f} | {perplexities[1]:.4f} | {worst:.1e} |")
    assert num_equal == len(asked)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)
    assert worst < 1e-3


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_of_random_models(name: str, exports: dict[str, Path], answers: dict[str, Any]) -> None:
    compare(exports[name], random_prompts(128), answers[name], name)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return example_run(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def example_prompts(example: FinishedRun) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(example.model(EXAMPLES[0]))
    return [tokenizer(text).input_ids for text in prompts()]


@pytest.fixture(scope="module")
def example_answers(example: FinishedRun, example_prompts: list[list[int]]) -> dict[str, Any]:
    models = example.run_dir / "models"
    return vllm([models / f"tiny-mixtral-{name}" for name in EXAMPLES], example_prompts)


@pytest.mark.parametrize("name", EXAMPLES)
def test_exports_of_the_example(
    name: str, example: FinishedRun, example_prompts: list[list[int]], example_answers: dict[str, Any]
) -> None:
    compare(example.model(name), example_prompts, example_answers[f"tiny-mixtral-{name}"], name)


def test_without_the_plug_in_a_tied_export_is_refused(exports: dict[str, Path]) -> None:
    (answer,) = vllm([exports["mixtral-tied"]], [[5, 6, 7]], VLLM_PLUGINS="none").values()
    assert "HCSMoEMixtralModel is a tied export of hcsmoe: this engine would run MixtralModel without" in answer["error"]
