"""Trial forward without values: finds errors before the run that transformers would raise at its first token.

Real weights would take the memory of the model. torch's fake tensors have only shapes and dtypes, so the trial takes seconds.
"""

import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.adapter import AdaptedModel, build_meta_model
from stages.model.expert_weights import ExpertsLayout
from stages.model.model_config import reads_config

_SHAPE = (2, 2)
"""Numbers of sequences and tokens in the trial."""


def check_experts(adapted: AdaptedModel) -> None:
    """Raise InputError for experts of a class whose weights and arithmetic are unknown to this program."""
    for layer, experts in adapted.experts_modules().items():
        try:
            ExpertsLayout.of(experts)
        except InputError as e:
            raise InputError(f"{adapted.checkpoint.folder}: layer {layer}: {e}") from e


def check_forward(checkpoint: Checkpoint) -> None:
    """Raise InputError, with transformers' reason, if a forward with this config would fail.

    Experts are skipped, because their kernels need values. Their sizes and names are checked elsewhere.
    """
    try:
        # fake CPU tensors, so that the few tensors that models make from numbers are fake, too
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            model = build_meta_model(checkpoint, device="cpu")
            skip_experts(model)
            with reads_config(checkpoint.folder, "run this model"):
                model(input_ids=torch.zeros(_SHAPE, dtype=torch.int64), use_cache=False)
    except InputError as e:
        if not _needs_numbers(e.__cause__):
            raise


def skip_experts(model: nn.Module) -> None:
    """Make routed experts return their input: their kernels need values."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "experts" and hasattr(module, "num_experts"):
            module.forward = _first


def _needs_numbers(reason: BaseException | None) -> bool:
    """Whether the trial failed because it needs values, for example if rotary frequencies depend on positions.
    Then only a run can tell."""
    frames = traceback.extract_tb(reason.__traceback__) if reason is not None else []
    return bool(frames) and Path(fake_tensor.__file__).parent in Path(frames[-1].filename).parents


def _first(hidden: Tensor, *routing: Tensor) -> Tensor:
    return hidden
