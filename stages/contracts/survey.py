"""The survey of a checkpoint: its dimensions and sizes, from config and headers alone (`plan.json` of prepare).

All sizes are bytes of values. A quantised tensor counts with its dequantised values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import JsonValue, TypeAdapter, ValidationError

from stages.contracts.errors import InputError


@dataclass(frozen=True)
class Survey:
    """A checkpoint's dimensions.

    family: `model_type` of the language model. architecture: transformers class. moe_layers: decoder layers with experts,
    ascending. routers: name of the router module of each MoE layer. top_k: experts that the router picks for a token.
    max_positions: longest sequence, or None. dtype: torch name of the dtype that the model computes in. num_parameters: number
    of values in all tensors. total_bytes: size of all tensors on disk. mtp_tensors, first_mtp_tensor: number of tensors of
    layers that predict further tokens (MTP), and the first one as messages name it. unloaded_tensors, first_unloaded_tensor:
    the same for tensors that transformers does not load. ignored_files: weight files that transformers does not read.
    outside_bytes: bytes of tensors outside the layers that transformers loads. layer_bytes: bytes of each layer.
    layer_expert_bytes: bytes of each layer's experts. layer_held_bytes: bytes of each layer in a worker, where experts that are
    packed on disk stay packed.
    """

    family: str
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    routers: Mapping[int, str]
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    dtype: str
    num_parameters: int
    total_bytes: int
    mtp_tensors: int
    first_mtp_tensor: str | None
    unloaded_tensors: int
    first_unloaded_tensor: str | None
    ignored_files: tuple[str, ...]
    outside_bytes: int
    layer_bytes: tuple[int, ...]
    layer_expert_bytes: tuple[int, ...]
    layer_held_bytes: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes per value of the dtype that the model computes in."""
        return 4 if self.dtype == "float32" else 2


_SURVEY = TypeAdapter(Survey)


def survey_values(survey: Survey) -> dict[str, JsonValue]:
    """JSON values of a survey."""
    return cast(dict[str, JsonValue], _SURVEY.dump_python(survey, mode="json"))


def read_survey(content: bytes, path: Path) -> Survey:
    """Parse the content of a survey file. Raises InputError, naming the path, for invalid content."""
    try:
        return _SURVEY.validate_json(content)
    except ValidationError as e:
        raise InputError(f"{path} is not a survey of this version; run again with --from prepare") from e


def unread_lines(ignored_files: Sequence[str], num_unloaded: int, first_unloaded: str | None) -> Iterator[str]:
    """Lines about the data in a checkpoint that transformers does not load. The arguments are fields of `Survey`."""
    if ignored_files:
        yield f"not read     {', '.join(ignored_files)}: model.safetensors comes first, as in transformers"
    if num_unloaded:
        more = f" and {num_unloaded - 1} more" if num_unloaded > 1 else ""
        yield f"not loaded   {first_unloaded}{more}: transformers does not use this; exports keep it as it is"
