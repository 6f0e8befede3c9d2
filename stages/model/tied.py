"""The tied checkpoint: E router rows, fewer experts, and a small file of model code that maps router rows to experts.

A layer's `experts` module becomes a subclass of its own class: its expert axis is shortened to r, and a persistent int64 buffer
`expert_map` [E] maps each routed index to the merged expert. A token that chose two members of one cluster thus adds both gate
weights, as in HC-SMoE.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from stages.contracts.errors import InputError
from stages.model.families import text_config

CONFIG_KEY = "hcsmoe_num_experts"
MODELING_FILE = "modeling_hcsmoe.py"
BASE_KEY = "hcsmoe_base_architecture"

_SOURCE = '''\
"""{base} with merged experts: the router keeps a row for every source expert, several of which share one expert.

Written by hcsmoe. config.hcsmoe_num_experts maps each MoE layer to the number of experts that it keeps.
"""

import torch
from torch import nn
from transformers import {bases}
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# transformers gives its names on disk to a class of others only once they are registered: for a class, or for a model type.
for _base in ({bases},):
    for _theirs, _ours in ((_base.__name__, f"HCSMoE{{_base.__name__}}"), (_base.config_class.model_type,) * 2):
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


class _Merged:
    """What a class below adds to its base, which is also its `_source`: fewer experts, and the map to them."""

    def __init__(self, config):
        text = config.get_text_config()
        if text is not config and self._source is not {base}:
            raise ValueError(
                f"{{type(self).__name__}}: the tied export of a multimodal model runs as its language model alone, by "
                f"AutoModelForCausalLM; a stock export (export.formats: [stock]) runs whole"
            )
        super().__init__(text)
        for name, module in list(self.named_modules()):
            if name.endswith(".experts") and hasattr(module, "num_experts"):
                layer = name.split("layers.")[1].split(".")[0]
                _merge(module, text.hcsmoe_num_experts[layer])

    # transformers looks for these in the source text of a class's module, and this is not the base's: ask for the base.
    # Otherwise experts would run in another implementation, depending on what the process has loaded before.
    @classmethod
    def _can_set_experts_implementation(cls):
        return cls._source._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls._source._can_set_attn_implementation()

    # Asked by engines that build the model from parts of their own (vLLM), never by transformers. They would leave the map out.
    @classmethod
    def is_backend_compatible(cls):
        raise ValueError(
            f"{{cls.__name__}} is a tied export of hcsmoe: this engine would run {{cls._source.__name__}} without the "
            f"expert_map and compute garbage. Run it with transformers and trust_remote_code=True, or make a stock export "
            f"(export.formats: [stock]), which runs wherever the source does"
        )
'''

_CLASS = """

class {name}(_Merged, {base}):
    _source = {base}
"""


def class_name(base: str) -> str:
    """Name of the tied class. It contains the base's name, from which transformers infers the kind of cache."""
    return f"HCSMoE{base}"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a raw config belongs to a tied checkpoint."""
    return CONFIG_KEY in text_config(config)


def tied_config(
    config: Mapping[str, Any], base: str, auto_classes: Mapping[str, str], num_experts: Mapping[int, int]
) -> dict[str, Any]:
    """Config of a tied checkpoint: the source's raw config, without names of model code, plus the settings of the tied form.

    base: transformers class of the language model. auto_classes: for every Auto class that knows the source's model type, the
    class that it gives. Each gets a tied class, so that no Auto class ever builds the plain model. num_experts: kept experts of
    each MoE layer.
    """
    edited = deepcopy(dict(config))
    edited["architectures"] = [class_name(base)]
    module = MODELING_FILE.removesuffix(".py")
    edited["auto_map"] = {
        **config.get("auto_map", {}),
        **{auto: f"{module}.{class_name(one)}" for auto, one in sorted(auto_classes.items())},
    }
    text = text_config(edited)
    assert isinstance(text, dict)
    text[BASE_KEY] = base
    text[CONFIG_KEY] = {str(layer): count for layer, count in sorted(num_experts.items())}
    return edited


def modeling_source(config: Mapping[str, Any]) -> str:
    """Text of the model file for a tied config. Raises InputError for a base that is not a transformers class."""
    base = text_config(config).get(BASE_KEY)
    prefix = f"{MODELING_FILE.removesuffix('.py')}.{class_name('')}"
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    bases = {value.removeprefix(prefix) for value in values if isinstance(value, str) and value.startswith(prefix)} | {base}
    for name in bases:
        if not (isinstance(name, str) and name.isidentifier()):
            raise InputError(
                f"config.json: {BASE_KEY} or auto_map names {name!r}, which is no class of transformers: restore the config"
            )
    ordered = sorted(map(str, bases))
    classes = "".join(_CLASS.format(name=class_name(one), base=one) for one in ordered)
    return _SOURCE.format(base=base, bases=", ".join(ordered)) + classes
