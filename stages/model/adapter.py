"""Adapter to transformers: builds a model without weights, and finds the parameter that each tensor on disk belongs to.

Only this module, `model_config.py`, `trial.py`, `layer_shard.py`, `direct_load.py`, `tied.py` and `products.py` use
semi-private names of transformers. `tests/stages/test_contract.py`, `test_model_config.py`, `test_direct_load.py` and
`test_products.py` check these names against the installed version.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.loading_report import LoadStateDictInfo

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TORCH_DTYPES
from stages.contracts.errors import InputError
from stages.io.untrusted import read_small
from stages.model.families import EXPERT_COUNT_FIELDS, num_experts_in, text_config
from stages.model.model_config import load_config, reads_config, stated_dtype
from stages.model.tied import BASE_KEY, MODELING_FILE, class_name, is_tied, modeling_source


@dataclass(frozen=True)
class Destination:
    """The parameter that transformers fills from a tensor on disk.

    parameter: the parameter or buffer that the tensor becomes part of; empty when transformers does not load it. renamed: the
    tensor's name in the model. pattern: pattern of the converter that it matched, if any.
    """

    parameter: str
    renamed: str
    pattern: str | None


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the model computes in: the config's, or else the dtype of most floating-point bytes in the checkpoint."""
    named = stated_dtype(checkpoint)
    if named is not None:
        return named
    num_bytes: dict[str, int] = defaultdict(int)
    for entry in checkpoint.tensors.values():
        if entry.dtype in ("F64", "F32", "F16", "BF16"):
            num_bytes[entry.dtype] += entry.num_bytes
    if not num_bytes:
        raise InputError(f"{checkpoint.folder} holds no floating-point tensor; give a checkpoint with weights")
    return TORCH_DTYPES[max(num_bytes, key=lambda name: num_bytes[name])]


def auto_classes(checkpoint: Checkpoint) -> dict[str, str]:
    """transformers Auto classes that know a checkpoint's model type: name of each, and of the class that it gives."""
    config = load_config(checkpoint)
    found = {}
    for name in _auto_class_names():
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            found[name] = _get_model_class(config, mapping).__name__
    return found


@cache
def _auto_class_names() -> tuple[str, ...]:
    """Of all models. transformers takes a fifth of a second to list what it has."""
    return tuple(name for name in dir(transformers) if name.startswith("AutoModel"))


def check_tied_code(checkpoint: Checkpoint) -> str:
    """The code of a tied checkpoint. Raises InputError unless its file has the bytes that this program writes."""
    path, text = checkpoint.folder / MODELING_FILE, modeling_source(checkpoint.config)
    try:
        written = read_small(path)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; a tied checkpoint is not whole without it; run the run file again") from e
    if written != text.encode():
        raise InputError(
            f"{path} is not the file that this version writes for a tied checkpoint; it is not run: run the "
            f"run file again, which writes it anew"
        )
    return text


def _tied_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """Model class of a tied checkpoint.

    The compared text is executed, not the file: Python would prefer a compiled copy beside the file, whatever that contains.
    """
    text = check_tied_code(checkpoint)
    module = ModuleType(MODELING_FILE.removesuffix(".py"))
    exec(compile(text, str(checkpoint.folder / MODELING_FILE), "exec"), module.__dict__)
    return getattr(module, class_name(text_config(checkpoint.config)[BASE_KEY]))  # type: ignore[no-any-return]


def build_meta_model(checkpoint: Checkpoint, num_experts: int | None = None, device: str = "meta") -> PreTrainedModel:
    """Build the model's modules on the meta device, which gives shapes and code without weights.

    num_experts: if given, build with this number of routed experts instead of the config's. device: another device, under a
    torch mode in which its tensors have no weights either.
    """
    transformers.utils.logging.disable_progress_bar()
    config = load_config(checkpoint)
    if num_experts is not None:
        text = config.get_text_config()
        for name in EXPERT_COUNT_FIELDS:
            if getattr(text, name, None) is not None:
                setattr(text, name, num_experts)
    dtype = checkpoint_dtype(checkpoint)
    with torch.device(device):
        if is_tied(checkpoint.config):  # our own class: its errors are bugs, not bad input
            return _tied_class(checkpoint)._from_config(config, dtype=dtype).eval()  # type: ignore[no-any-return]
        with reads_config(checkpoint.folder, "build this model"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()  # type: ignore[no-any-return]


def expert_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """Axis of the experts of every parameter that has such an axis.

    The axes are found by comparing the shapes of two models whose configs differ only in the number of experts. Raises
    InputError if an axis contains more than the routed experts.
    """
    num_experts = num_experts_in(checkpoint.config, str(checkpoint.folder))
    ours = {name: tensor.shape for name, tensor in build_meta_model(checkpoint).state_dict().items()}
    other = build_meta_model(checkpoint, 2 * num_experts).state_dict()
    axes = {}
    for name, shape in ours.items():
        differing = [axis for axis in range(len(shape)) if shape[axis] != other[name].shape[axis]]
        if differing:
            if len(differing) > 1 or shape[differing[0]] != num_experts:
                raise InputError(
                    f"{checkpoint.folder}: {name} has shape {list(shape)}; no axis is that of the {num_experts} experts: "
                    "restore the config, or report the family"
                )
            axes[name] = differing[0]
    return axes


class AdaptedModel:
    """A checkpoint and the meta model to be filled from it.

    Attributes: `checkpoint`, `model` (on meta), `weight_mapping` (transformers' conversions from disk to module).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = build_meta_model(checkpoint)
        self.weight_mapping = get_model_conversion_mapping(self.model)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that contains the decoder layers."""
        decoder = self.model.get_decoder()
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            return decoder  # type: ignore[no-any-return]
        owners = (module for module in self.model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))
        found = next(owners, None)
        if found is None:
            raise InputError(f"{self.checkpoint.folder}: {type(self.model).__name__} has no list of decoder layers; report it")
        return found

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @cached_property
    def layers_prefix(self) -> str:
        """Name of the decoder layers in the state dict, with a trailing dot."""
        for name, module in self.model.named_modules():
            if module is self.decoder:
                return f"{name}.layers." if name else "layers."
        raise AssertionError("the decoder is not part of the model")

    def layer_of(self, parameter: str) -> int | None:
        """Index of the decoder layer that a parameter belongs to, or None."""
        if not parameter.startswith(self.layers_prefix):
            return None
        index = parameter[len(self.layers_prefix) :].split(".", 1)[0]
        return int(index) if index.isdecimal() else None

    @cached_property
    def destinations(self) -> dict[str, Destination]:
        """The destination of every tensor on disk."""
        renamings = [entry for entry in self.weight_mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.weight_mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        destinations: dict[str, Destination] = {}
        for name in self.checkpoint.tensors:
            renamed, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if renamed not in state and name in state:
                renamed, pattern = name, None
            destinations[name] = Destination(renamed if renamed in state else "", renamed, pattern)
        return destinations

    @cached_property
    def ignored(self) -> set[str]:
        """Model names of tensors that transformers neither loads nor reports as unexpected.

        transformers' rules decide: names listed by the model class, and names that old checkpoints contain
        (`rotary_emb.inv_freq` in each layer).
        """
        unloaded = {destination.renamed for destination in self.destinations.values() if not destination.parameter}
        info = LoadStateDictInfo(
            missing_keys=set(), unexpected_keys=set(unloaded), mismatched_keys=set(), error_msgs=[], conversion_errors={},
            skipped_pp_keys=set(),
        )  # fmt: skip
        self.model._adjust_missing_and_unexpected_keys(info)
        return unloaded - info.unexpected_keys

    @cached_property
    def tied_without_tensor(self) -> frozenset[str]:
        """Parameters without a tensor in the checkpoint that the config ties to another parameter.

        transformers fills them from the other one. If the checkpoint has tensors of both and they differ, transformers ties
        nothing.
        """
        found = {destination.parameter for destination in self.destinations.values()}
        return frozenset(name for pair in self.model.all_tied_weights_keys.items() for name in pair if name not in found)

    @property
    def head_fills_embedding(self) -> bool:
        """Whether the input embedding has no tensor and is filled from the output embedding, not the other way round."""
        missing = self.tied_without_tensor
        return any(one in missing and other not in missing for other, one in self.model.all_tied_weights_keys.items())

    def experts_modules(self) -> dict[int, nn.Module]:
        """The experts module of every MoE layer."""
        found = {}
        for index, layer in enumerate(self.layers):
            for name, module in layer.named_modules():
                if name.rsplit(".", 1)[-1] == "experts" and hasattr(module, "num_experts"):
                    found[index] = module
        return found
