"""`python -m tests.engines.torchao_rounding EXPORT`: loads an export with torchao's int8 weights, and checks what they are.

Weights of linear layers are rounded, each within half a step of its row's scale. transformers' experts are no linear layers, so
that they stay as they are. Logits are those of a model with the rounded values.
"""

import copy
import sys
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from tests.runs import aligned
from tests.tiny import load, logits

_IDS = torch.arange(3, 99).view(2, 48) % 96 + 3


def main(folder: Path) -> None:
    """Raises AssertionError where a weight is further off, or one is rounded that should not be."""
    exact = aligned(load(folder, trust_remote_code=True))
    config = TorchAoConfig(Int8WeightOnlyConfig())
    rounded = load(folder, trust_remote_code=True, dtype=torch.float32, quantization_config=config)
    weights = {name: one for name, one in rounded.named_parameters() if type(one).__name__ == "Int8Tensor"}
    assert {name.split(".")[-2] for name in weights} == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(weights) == 12
    due = copy.deepcopy(exact)
    for name, one in weights.items():
        found, source = one.dequantize(), exact.get_parameter(name)
        step = source.abs().amax(1, keepdim=True) / 127
        assert ((found - source).abs() <= 0.51 * step).all() and not torch.equal(found, source)
        due.get_parameter(name).data.copy_(found)
    torch.testing.assert_close(logits(rounded, _IDS), logits(due, _IDS), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
