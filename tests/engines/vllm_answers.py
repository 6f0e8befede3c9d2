"""What vLLM computes with checkpoints. Run by vLLM's own environment, which has another transformers than this project's.

`python vllm_answers.py` reads {"prompts": lists of token ids, "num_new_tokens": N, "models": folders} and writes, for each
model, either {"tokens": greedy ids of each prompt, "log_probs": of each prompt's tokens after the first} or {"error": text}.
"""

import gc
import json
import os
import sys
from typing import Any

# DeepSeek's attention needs two things of vLLM's CPU build: its plain form, as the kernel for the latent one (AMX) computes in
# bfloat16, and rotary embedding in torch, as the kernel for that is wrong for queries with an axis for heads (docs/engines.md).
os.environ.update(
    VLLM_MLA_DISABLE="1",
    VLLM_CPU_OMP_THREADS_BIND="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    TORCHDYNAMO_DISABLE="1",
    HF_HUB_OFFLINE="1",
)


def _answers(model: str, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            model, dtype="float32", distributed_executor_backend="uni", enforce_eager=True, max_model_len=64,
            skip_tokenizer_init=True, trust_remote_code=True, max_num_seqs=8,
            compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        )  # fmt: skip
        asked = SamplingParams(temperature=0, max_tokens=num_new_tokens, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        return {
            "tokens": [list(one.outputs[0].token_ids) for one in outputs],
            "log_probs": [
                [step[token].logprob for token, step in zip(one.prompt_token_ids, one.prompt_logprobs, strict=True) if step]
                for one in outputs
            ],
        }
    except Exception as e:  # the reason is the result: of a refusal, or of a case that fails
        return {"error": f"{type(e).__name__}: {e}"}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    result, sys.stdout = sys.stdout, sys.stderr  # vLLM writes lines of its own
    task = json.load(sys.stdin)
    found = {}
    for folder in task["models"]:
        found[folder] = _answers(folder, task["prompts"], task["num_new_tokens"])
        shown = found[folder].get("error", "ran")
        print(f"vllm_answers: {folder}: {shown}", flush=True)
    print(json.dumps(found), file=result, flush=True)
