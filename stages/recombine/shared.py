"""The expert that every token passes beside those that the router picks: its W_down, what that is given, and its gates.

Dimensions: T tokens, B tokens of a block, R some of them, D hidden size, F neurons of the shared expert.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.model.layer_shard import LayerShard
from stages.model.stream import replaced_forward

_BLOCK = 2048
_MOST_OFF = 0.05
"""Of the columns' norm, by which the spread of a token's gate over them may be off: bfloat16 rounds to 0.004."""


@dataclass
class SharedExpert:
    """A shared expert of a MoE block.

    name: of the parameter of W_down, within the layer. block: whose output is that of the experts and of this one. mlp, down:
    the expert and its last matrix. experts: the module of the routed experts. down_DF: another W_down in the place of its own.
    """

    name: str
    block: nn.Module
    mlp: nn.Module
    down: nn.Linear
    experts: nn.Module
    down_DF: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module, experts: nn.Module) -> "SharedExpert | None":
        """The one of a layer, if its MoE block has one, of one matrix W_down, beside the module of its experts."""
        path = next(name for name, module in layer.named_modules() if module is experts)
        block_name = path.rpartition(".")[0]
        block = layer.get_submodule(block_name)
        below = ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))
        found = [(name, down) for name, down in below if name.startswith("shared") and name.partition(".")[2] == "down_proj"]
        if len(found) != 1:
            return None
        ((name, down),) = found
        prefix = f"{block_name}." if block_name else ""
        return cls(f"{prefix}{name}.weight", block, block.get_submodule(name.partition(".")[0]), down, experts)

    @property
    def weight_DF(self) -> Tensor:
        """W_down as it is now."""
        return self.down.weight if self.down_DF is None else self.down_DF

    @contextmanager
    def stands_in(self) -> Iterator[None]:
        """Let the layer run with the other W_down, if there is one."""
        if self.down_DF is None:
            yield
            return
        weight = self.down_DF.to(self.down.weight.dtype)
        with replaced_forward(self.down, lambda a_TF: functional.linear(a_TF, weight, self.down.bias)):
            yield

    def activations(self, x_RD: Tensor) -> Tensor:
        """What W_down is applied to, [R, F]."""
        with replaced_forward(self.down, lambda a_RF: a_RF):
            return self.mlp(x_RD)  # type: ignore[no-any-return]

    def gates(self, x_TD: Tensor) -> Tensor | None:
        """The factor [T], float32, with which a token's output of W_down is added, as a share of that of the experts' outputs:
        1, or what a gate of its own gives. None where the block does more with it than that.

        Found by trial: the experts give nothing and W_down gives ones, and the other way round.
        """
        if x_TD.shape[1] != self.down.out_features:
            return None
        gates = []
        for x_BD in x_TD.split(_BLOCK):
            ours_BD, theirs_BD = self._block_output(x_BD, 0.0, 1.0), self._block_output(x_BD, 1.0, 0.0)
            gate_B, scale_B = ours_BD.mean(1), theirs_BD.mean(1)
            for added_BD, mean_B in ((ours_BD, gate_B), (theirs_BD, scale_B)):
                if not float((added_BD - mean_B[:, None]).norm()) <= _MOST_OFF * float(added_BD.norm()):
                    return None
            gates.append(gate_B / scale_B)
        gate_T = torch.cat(gates)
        return gate_T if bool(gate_T.any()) and bool(gate_T.isfinite().all()) else None

    def _block_output(self, x_BD: Tensor, of_experts: float, of_down: float) -> Tensor:
        """The block's output, float32 [B, D], where its experts and W_down give these constants."""
        size = x_BD.shape[1]
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.experts, lambda hidden, *routing: torch.full_like(hidden, of_experts)))
            down = replaced_forward(self.down, lambda a_BF: a_BF.new_full((*a_BF.shape[:-1], size), of_down))
            stack.enter_context(down)
            out = self.block(x_BD[None])
        added_BD: Tensor = (out[0] if isinstance(out, tuple) else out).reshape(len(x_BD), -1)
        return added_BD.float()


def is_one_tensor(shard: LayerShard, parameter: str) -> bool:
    """Whether a parameter is one tensor on disk, of plain numbers in the same shape, so that merge can write another."""
    checkpoint = shard.adapted.checkpoint
    entries = [checkpoint.tensors[name] for name, to in shard.adapted.destinations.items() if to.parameter == parameter]
    held = shard.model.get_parameter(parameter)
    return len(entries) == 1 and entries[0].packing is None and tuple(entries[0].shape) == tuple(held.shape)
