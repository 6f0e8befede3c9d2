"""A model run layer shard by layer shard gives the bits of the whole model."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.layer_shard import LayerShard
from stages.model.stream import Stream, pass_through
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun
from tests.tiny import FAMILIES, load, logits, random_ids, save_checkpoint

CUTS = {"one shard": [(0, 3)], "a layer each": [(0, 1), (1, 2), (2, 3)], "uneven": [(0, 2), (2, 3)]}


def streamed_logits(checkpoint: Checkpoint, shards: list[tuple[int, int]], ids_ST: np.ndarray, folder: Path) -> torch.Tensor:
    """Logits [S, T, V] in micro-batches of two sequences; hidden states go from shard to shard by file."""
    ids = torch.from_numpy(ids_ST)
    hidden_file: Path | None = None
    found: list[torch.Tensor] = []

    def see(logits_BTV: torch.Tensor, token_ids_BT: torch.Tensor) -> None:
        assert logits_BTV.shape[:2] == token_ids_BT.shape
        found.append(logits_BTV)

    for first, stop in shards:
        shard = LayerShard(checkpoint, first, stop, num_threads=1)
        is_last = stop == len(shard.adapted.layers)
        hidden_file, reads = folder / f"hidden-{stop}", hidden_file
        stream = Stream(reads, None if is_last else hidden_file, see_logits=see if is_last else None)
        pass_through(shard, ids, 2, {"model": stream})
    return torch.cat(found)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_whole_models_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype, cut: str) -> None:
    folder = save_checkpoint(tmp_path / "model", family, dtype)
    ids_ST = random_ids(num_sequences=5)
    model = load(folder)
    assert model.dtype == dtype
    whole = torch.cat([logits(model, ids_ST[start : start + 2]) for start in (0, 2, 4)])
    assert torch.equal(streamed_logits(Checkpoint(folder), CUTS[cut], ids_ST, tmp_path), whole)


_HOW_EXPERTS_RUN = """
import sys
from stages.checkpoint.folder import Checkpoint
from stages.model.layer_shard import LayerShard
print(LayerShard(Checkpoint(sys.argv[1]), 0, 1, num_threads=1).model.config._experts_implementation)
"""


def test_a_tied_checkpoint_runs_as_its_base_does_in_a_process_that_has_run_nothing_before(
    finished_run: Callable[[str], FinishedRun],
) -> None:
    """transformers guesses from a class's source text how its experts may run, and remembers it for the base: in bfloat16,
    perplexities changed with the order in which a worker got its models."""
    done = finished_run("mixtral")
    command = [sys.executable, "-c", _HOW_EXPERTS_RUN, str(done.model("3e-tied"))]
    fresh = subprocess.run(command, check=True, timeout=300, cwd=REPOSITORY, capture_output=True, text=True)
    base = LayerShard(Checkpoint(done.source), 0, 1, num_threads=1)
    assert fresh.stdout.split()[-1] == base.model.config._experts_implementation


def test_a_shard_holds_its_own_layers_and_no_other(tiny_checkpoint: Callable[[str], Path]) -> None:
    shard = LayerShard(Checkpoint(tiny_checkpoint("mixtral")), 1, 2, num_threads=1)
    on_meta = [all(parameter.is_meta for parameter in layer.parameters()) for layer in shard.adapted.layers]
    assert on_meta == [True, False, True]
    assert not any(parameter.is_meta for parameter in shard.adapted.layers[1].parameters())
    assert shard.model.get_input_embeddings().weight.is_meta


def test_a_layer_without_its_weights_is_an_error_that_names_them(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    checkpoint = Checkpoint(folder)
    lost = [name for name in checkpoint.tensors if name.endswith("layers.1.input_layernorm.weight")]
    for name in lost:
        del checkpoint.tensors[name]
    with pytest.raises(InputError, match=r"lacks tensors for model\.layers\.1\.input_layernorm\.weight"):
        LayerShard(checkpoint, 1, 2, num_threads=1)


def test_a_closed_shard_has_let_go_of_its_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    gc.collect()
    gc.disable()  # a model refers to itself; nothing is to be left to the collector
    try:
        shard = LayerShard(Checkpoint(tiny_checkpoint("mixtral")), 0, 3, num_threads=1)
        pass_through(shard, torch.from_numpy(random_ids()), 2, {"model": Stream()})
        held = [weakref.ref(tensor) for tensor in (*shard.model.parameters(), *shard.model.buffers())]
        shard.close()
        assert len(held) > 10
        assert not [one for one in held if one() is not None]
    finally:
        gc.enable()
