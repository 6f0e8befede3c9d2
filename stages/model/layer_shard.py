"""A layer shard: contiguous decoder layers of a checkpoint in memory, run on hidden states by transformers' own code.

The rest of the model stays on the meta device. The decoder's own forward runs with stand-ins for its layers. This reveals the
arguments (masks, position embeddings) that the decoder passes to each layer, and completes a forward from given hidden states.

Dimensions: B sequences of a micro-batch, T tokens, D hidden size, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TensorReader
from stages.contracts.errors import InputError
from stages.contracts.stream_units import LayerShardArgs
from stages.io.file_cache import read_ahead
from stages.io.storage import is_remote
from stages.model.adapter import AdaptedModel
from stages.model.direct_load import load_directly
from stages.model.expert_weights import NOTHING_MAPPED, ExpertWeights, Stack
from stages.model.experts_forward import ExpertsForward
from stages.model.model_config import reads_config
from stages.model.packed import PackedStack, load_packed, packed_parts

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(BaseException):
    """Leaves the decoder's forward once the arguments of its layers are known."""


class _StandIn(nn.Module):
    """Replaces a decoder layer in the decoder's loop. All attributes but `forward` are those of the layer."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.__dict__["_forward"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.__dict__["_forward"](hidden_BTD, args, kwargs)  # type: ignore[no-any-return]


def choose_device() -> torch.device:
    """The GPU that this process may use, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


class LayerShard:
    """Loaded decoder layers [first, stop) of a checkpoint. The first and the last shard also load tensors outside the layers.

    has_head: whether `logits` will be called. If not, the output embedding stays on disk, and all other tensors outside the
    layers are loaded only with layer 0. maps_experts: whether large matrices of experts may stay in their files, on a CPU. They
    are then accessible only through `expert_weights`, and the experts' own forward cannot be called. num_threads: CPU threads
    of this process; a setting, so that results do not depend on the machine. Raises InputError, naming the tensors, when the
    checkpoint does not fill these layers.

    Attributes: `bytes_read` of the checkpoint. `packed`: by parameter, experts that are packed on disk. They stay so, and their
    module's forward is one that unpacks an expert at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        first: int,
        stop: int,
        num_threads: int,
        has_head: bool = True,
        maps_experts: bool = False,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.device = choose_device()
        self.adapted = AdaptedModel(checkpoint)
        self.model = self.adapted.model
        self.first, self.stop, self._has_head = first, stop, has_head
        self._arguments: dict[tuple[int, int], list[LayerArguments]] = {}
        prefixes = self._prefixes(first, stop)
        mapped = self._load(self._names(first, stop), self._expert_parameters(prefixes), maps_experts)
        self._initialise_buffers(tuple(prefixes))
        self._check_loaded(prefixes, mapped)

    def _prefixes(self, first: int, stop: int) -> list[str]:
        return [f"{self.adapted.layers_prefix}{layer}." for layer in range(first, stop)]

    def _names(self, first: int, stop: int) -> list[str]:
        """Tensors on disk of layers [first, stop). At the model's ends also the needed tensors outside the layers."""
        prefixes = tuple(self._prefixes(first, stop))
        is_end = first == 0 or (self._has_head and stop == len(self.adapted.layers))
        unused = "" if self._has_head else self._head_prefix()

        def is_wanted(parameter: str) -> bool:
            is_outside = bool(parameter) and self.adapted.layer_of(parameter) is None
            is_unused = bool(unused) and parameter.startswith(unused)
            return parameter.startswith(prefixes) or (is_end and is_outside and not is_unused)

        return [name for name, destination in self.adapted.destinations.items() if is_wanted(destination.parameter)]

    def _head_prefix(self) -> str:
        """Name of the output embedding with a trailing dot; empty if the input embedding is filled from its tensors."""
        head = self.model.get_output_embeddings()
        if head is None or self.adapted.head_fills_embedding:
            return ""
        return next(f"{name}." for name, module in self.model.named_modules() if module is head)

    def read_ahead(self, args: object) -> None:
        """Start to read another shard's layers into the system's file cache while this shard computes, if they are of this
        model.

        The cache uses only free memory and gives it back on demand. The call does not wait for the read.
        """
        if isinstance(args, LayerShardArgs) and args.model == str(self.adapted.checkpoint.folder):
            entries = (self.adapted.checkpoint.tensors[name] for name in self._names(args.first, args.stop))
            packed = (e.packing.parts.values() if e.packing else (e,) for e in entries)
            stretches = [(e.file, e.begin, e.num_bytes) for parts in packed for e in parts]
            read_ahead(self.adapted.checkpoint.folder, stretches)

    def close(self) -> None:
        """Free all weights immediately.
        Models contain reference cycles, so they would otherwise live until the garbage collector runs."""
        for module in self.model.modules():
            module._parameters.clear()
            module._buffers.clear()
        for experts in self.adapted.experts_modules().values():
            experts.__dict__.pop("forward", None)
        for stacks in self._mapped.values():
            stacks.clear()
        self._mapped.clear()
        self.packed.clear()
        self._arguments.clear()

    def _expert_parameters(self, prefixes: list[str]) -> dict[str, tuple[int, str]]:
        """Layer and weight name of the experts' parameters, by parameter."""
        modules = {id(experts): layer for layer, experts in self.adapted.experts_modules().items()}
        return {
            f"{name}.{weight}": (modules[id(module)], weight)
            for name, module in self.model.named_modules() if id(module) in modules and name.startswith(tuple(prefixes))
            for weight in ("gate_up_proj", "up_proj", "down_proj")
        }  # fmt: skip

    def _load(self, wanted: list[str], experts: dict[str, tuple[int, str]], maps_experts: bool) -> Collection[str]:
        """Fill the layers. Returns the names of the parameters that stay mapped or packed."""
        self.bytes_read = sum(self.adapted.checkpoint.tensors[name].stored_bytes for name in wanted)
        state = self.model.state_dict()
        self.packed: dict[str, PackedStack] = {
            parameter: load_packed(self.adapted, parts, state[parameter], self.device)
            for parameter, parts in packed_parts(self.adapted, wanted, experts).items()
        }
        left = [name for name in wanted if self.adapted.destinations[name].parameter not in self.packed]
        can_map = maps_experts and self.device.type == "cpu" and not is_remote(self.adapted.checkpoint.folder)
        names, mapped = load_directly(self.adapted, left, self.device, experts if can_map else ())
        held: dict[str, Stack] = {**mapped, **self.packed}
        self._mapped: dict[int, dict[str, Stack]] = defaultdict(dict)
        for parameter, stack in held.items():
            layer, weight = experts[parameter]
            self._mapped[layer][weight] = stack
        if names:
            self._convert(names)
        if self._has_head or self.adapted.head_fills_embedding:
            # as in from_pretrained: tied tensors that differ on disk stay separate, whatever the config says
            self.model.tie_weights(missing_keys=set(self.adapted.tied_without_tensor), recompute_mapping=False)
        self.model.requires_grad_(False)
        for layer in {experts[parameter][0] for parameter in self.packed}:
            self._run_packed(layer)
        return held.keys()

    def _run_packed(self, layer: int) -> None:
        """Give a layer's experts a forward that unpacks one at a time, instead of transformers', which needs all values."""
        forward = ExpertsForward(self.expert_weights(layer))

        def run(hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
            return forward.output_gated(hidden_TD, top_k_index_Tk, top_k_weights_Tk, lambda pairs: None)

        self.adapted.experts_modules()[layer].forward = run

    def _convert(self, names: list[str]) -> None:
        """Load tensors that need more than reading, by transformers' own conversion."""
        dtype = self.model.dtype
        config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": self.device},
            weight_mapping=self.adapted.weight_mapping,  # type: ignore[arg-type]
        )
        with TensorReader(self.adapted.checkpoint) as reader:
            slices = {name: reader.slices(name) for name in names}
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        problems = [*info.conversion_errors.values(), *info.error_msgs, *map(str, info.mismatched_keys)]
        if problems:
            raise InputError(
                f"{self.adapted.checkpoint.folder}: transformers cannot load layers: {problems[0]}; report the family"
            )
        self._check_finite(names)

    def _check_finite(self, names: list[str]) -> None:
        state = self.model.state_dict()
        loaded = {self.adapted.destinations[name].parameter for name in names}
        bad = {name for name in loaded if state[name].is_floating_point() and not torch.isfinite(state[name].sum())}
        with TensorReader(self.adapted.checkpoint) as reader:
            for name in names:
                if self.adapted.destinations[name].parameter not in bad:
                    continue
                tensor = reader.read(name)
                if not torch.isfinite(tensor.float()).all():
                    raise InputError(f"{reader.place(name)} holds NaN or infinity; download the checkpoint again")

    def _initialise_buffers(self, prefixes: tuple[str, ...]) -> None:
        """Compute buffers that no checkpoint contains (rotary frequencies), as transformers does after loading."""
        for name, module in self.model.named_modules():
            inside_layers = f"{name}.".startswith(self.adapted.layers_prefix)
            if inside_layers and not f"{name}.".startswith(prefixes):
                continue
            names = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
            for key in names:
                module._buffers[key] = torch.empty_like(module._buffers[key], device=self.device)
            if names:
                with torch.no_grad():
                    self.model._init_weights(module)

    def _check_loaded(self, prefixes: list[str], mapped: Collection[str]) -> None:
        state = self.model.state_dict()
        due = (name for name in state if name.startswith(tuple(prefixes)) and name not in mapped)
        missing = [name for name in due if state[name].is_meta]
        if missing:
            raise InputError(
                f"{self.adapted.checkpoint.folder} lacks tensors for {', '.join(missing[:5])}; download the checkpoint again"
            )

    def expert_weights(self, layer: int) -> ExpertWeights:
        """Weights of the experts in a MoE layer of this shard."""
        return ExpertWeights(self.adapted.experts_modules()[layer], self._mapped.get(layer, NOTHING_MAPPED))

    @contextmanager
    def _stand_ins(self, forward: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        layers = self.adapted.layers

        def bind(index: int) -> Callable[..., Tensor]:
            return lambda hidden, args, kwargs: forward(index, hidden, args, kwargs)

        self.adapted.decoder.layers = nn.ModuleList(_StandIn(layer, bind(i)) for i, layer in enumerate(layers))
        try:
            with torch.inference_mode():
                yield
        except _Stop:
            pass
        finally:
            self.adapted.decoder.layers = layers

    def embed(self, token_ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] that the decoder passes to layer 0."""
        captured: list[Tensor] = []

        def capture(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            captured.append(hidden)
            raise _Stop

        with reads_config(self.adapted.checkpoint.folder, "run this model"), self._stand_ins(capture):
            self.adapted.decoder(input_ids=token_ids_BT.to(self.device), use_cache=False)
        return captured[0]

    def _layer_arguments(self, hidden_BTD: Tensor) -> list[LayerArguments]:
        """Arguments that the decoder passes to each layer besides the hidden states. They depend only on B and T."""
        shape = (hidden_BTD.shape[0], hidden_BTD.shape[1])
        if shape not in self._arguments:
            arguments: list[LayerArguments] = []

            def capture(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                arguments.append((args, kwargs))
                if index == len(self.adapted.layers) - 1:
                    raise _Stop
                return hidden

            with reads_config(self.adapted.checkpoint.folder, "run this model"), self._stand_ins(capture):
                self.adapted.decoder(inputs_embeds=torch.zeros_like(hidden_BTD), use_cache=False)
            self._arguments[shape] = arguments
        return self._arguments[shape]

    def run_layer(self, layer: int, hidden_BTD: Tensor, module: nn.Module | None = None) -> Tensor:
        """Hidden states [B, T, D] after one decoder layer of this shard. module: that takes the layer's place."""
        args, kwargs = self._layer_arguments(hidden_BTD)[layer]
        with torch.inference_mode():
            out = (module or self.adapted.layers[layer])(hidden_BTD, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] from the hidden states after the last layer, by the model's own final norm and output embedding."""
        with self._stand_ins(lambda index, hidden, args, kwargs: hidden_BTD):
            out = self.model(inputs_embeds=hidden_BTD, use_cache=False)
        return out.logits  # type: ignore[no-any-return]


def open_layer_shard(args: LayerShardArgs) -> LayerShard:
    """Load a layer shard. A worker holds it for all token shards."""
    return LayerShard(Checkpoint(args.model), args.first, args.stop, args.num_threads)
