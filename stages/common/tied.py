"""The tied checkpoint: E router rows, fewer experts, and a small file of model code that knows which is which.

A layer's `experts` module becomes a subclass of its own class: its expert axis is shortened to r, and a persistent
int64 buffer `expert_map` [E] sends each routed index to the expert that stands for it. A token that chose two members
of one cluster thus adds both gate weights, as HC-SMoE does.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from stages.common.errors import InputError
from stages.common.families import text_config

CONFIG_KEY = "hcsmoe_num_experts"
MODELING_FILE = "modeling_hcsmoe.py"
BASE_KEY = "hcsmoe_base_architecture"

_SOURCE = '''\
"""{base} with merged experts: the router keeps a row for every source expert, several of which share one expert.

Written by hcsmoe. config.hcsmoe_num_experts maps each MoE layer to the number of experts that it keeps.
"""

import torch
from torch import nn
from transformers import {base} as _Base
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# transformers gives its names on disk to a class of others only once they are registered: for a class, or for a model type.
for _theirs, _ours in (("{base}", "{class_name}"), (_Base.config_class.model_type,) * 2):
    _mapping = get_checkpoint_conversion_mapping(_theirs)
    if _mapping is not None:
        register_checkpoint_conversion_mapping(_ours, _mapping, overwrite=True)


def _merged_class(experts_class):
    class MergedExperts(experts_class):
        def forward(self, hidden_states, *routing):
            if routing:
                index, weights = routing
                return super().forward(hidden_states, self.expert_map[index], weights)
            # Llama 4: hidden_states holds one block of rows for each source expert, already multiplied by its score
            blocks = hidden_states.view(len(self.expert_map), -1, hidden_states.shape[-1])
            outputs = []
            for block, merged in zip(blocks, self.expert_map.tolist()):
                gate, up = (block @ self.gate_up_proj[merged]).chunk(2, dim=-1)
                outputs.append((up * self.act_fn(gate)) @ self.down_proj[merged])
            return torch.cat(outputs)

    return MergedExperts


def _merge(experts, num_merged):
    if not hasattr(experts, "is_transposed") and type(experts).__name__ != "Llama4TextExperts":
        raise ValueError(f"{{type(experts).__name__}}: experts of this class are not known to the code of this checkpoint")
    num_experts = experts.num_experts
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[0] == num_experts:
            shorter = parameter.new_empty((num_merged, *parameter.shape[1:]))
            setattr(experts, name, nn.Parameter(shorter, requires_grad=parameter.requires_grad))
    experts.num_experts = num_merged
    experts.register_buffer("expert_map", torch.zeros(num_experts, dtype=torch.int64))
    experts.__class__ = _merged_class(type(experts))


class {class_name}(_Base):
    def __init__(self, config):
        config = config.get_text_config()
        super().__init__(config)
        for name, module in list(self.named_modules()):
            if name.endswith(".experts") and hasattr(module, "num_experts"):
                layer = name.split("layers.")[1].split(".")[0]
                _merge(module, config.hcsmoe_num_experts[layer])

    # transformers looks for these in the source text of a class's module, and this is not the base's: ask for the base.
    # Otherwise experts would run in another implementation, depending on what the process has loaded before.
    @classmethod
    def _can_set_experts_implementation(cls):
        return _Base._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return _Base._can_set_attn_implementation()
'''


def class_name(base: str) -> str:
    """Name of the tied class. It holds the base's, which transformers asks for the kind of cache."""
    return f"HCSMoE{base}"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a raw config is that of a tied checkpoint."""
    return CONFIG_KEY in text_config(config)


def tied_config(config: Mapping[str, Any], base: str, num_experts: Mapping[int, int]) -> dict[str, Any]:
    """The source's raw config with what a tied checkpoint adds.

    base: transformers' class for the language model. num_experts: kept experts of each MoE layer.
    """
    edited = deepcopy(dict(config))
    edited["architectures"] = [class_name(base)]
    edited["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.{class_name(base)}"}
    text = text_config(edited)
    assert isinstance(text, dict)
    text[BASE_KEY] = base
    text[CONFIG_KEY] = {str(layer): count for layer, count in sorted(num_experts.items())}
    return edited


def modeling_source(config: Mapping[str, Any]) -> str:
    """Text of the model file that belongs to a tied config. Raises InputError for a base that is no class of transformers."""
    base = text_config(config).get(BASE_KEY)
    if not (isinstance(base, str) and base.isidentifier()):
        raise InputError(f"config.json: {BASE_KEY} is {base!r}; the name of a class of transformers is due")
    return _SOURCE.format(base=base, class_name=class_name(base))
