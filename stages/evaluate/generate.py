"""The unit that lets a whole model answer prompts.

Dimensions: T tokens.
"""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stages.contracts.generation import Answer, Answers, write_answers
from stages.contracts.paths import GENERATION_FILE
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.evaluate.generation import GenerateArgs
from stages.evaluate.loops import LOOP_SHARE, is_thinking, repeated_share
from stages.model.layer_shard import LayerShard
from stages.model.tokenizer import LoadedTokenizer

_GENERATION_CONFIG = "generation_config.json"


def generate_unit(job: HeldJob[GenerateArgs, LayerShard]) -> UnitResult[NoFacts]:
    """Continue every prompt greedily and write the texts, with signs of loops."""
    args, held = job.args, job.held
    tokenizer = LoadedTokenizer(held.adapted.checkpoint, args.trust_remote_code).plain
    uses_template = getattr(tokenizer, "chat_template", None) is not None
    config = _greedy(held, tokenizer, args.max_new_tokens)
    answers = [_answer(held, tokenizer, config, prompt, uses_template) for prompt in args.prompts]
    return UnitResult(NoFacts(), (write_answers(job.part_dir / GENERATION_FILE, Answers(uses_template, answers)),))


def _greedy(held: LayerShard, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy search that ends where the checkpoint's own generation config ends; penalties and sampling of that one are left
    out."""
    folder = held.adapted.checkpoint.local_folder
    own = GenerationConfig.from_pretrained(folder) if (folder / _GENERATION_CONFIG).exists() else held.model.generation_config
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
    return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad)


def _answer(
    held: LayerShard, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, prompt: str, uses_template: bool
) -> Answer:
    text = prompt
    if uses_template:
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # a template writes the special tokens itself
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not uses_template).to(held.device)
    with torch.inference_mode():
        generated = held.model.generate(**encoded, generation_config=config)  # type: ignore[operator]
    ids_T = generated[0, encoded["input_ids"].shape[1] :].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    has_ended = bool(ids_T) and ids_T[-1] in ends
    share = repeated_share(ids_T)
    whole = f"{text}{tokenizer.decode(ids_T, skip_special_tokens=False)}"
    return Answer(
        text=str(tokenizer.decode(ids_T, skip_special_tokens=True)),
        num_tokens=len(ids_T),
        has_ended=has_ended,
        repeated_8_grams=share,
        is_loop=share >= LOOP_SHARE,
        is_endless_thought=not has_ended and is_thinking(whole),
    )
