"""The driver on simulated clusters, in virtual time: a property of the schedule, not of the machine that runs the test."""

from dataclasses import replace

import pytest

from bench.cluster_model import MIXTRAL, MODELS, Hardware, Model
from bench.recombine_simulation import simulate as recombine
from bench.simulation import NUM_WORKERS, simulate


@pytest.mark.parametrize("num_workers", NUM_WORKERS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_cluster_comes_near_the_ideal_pipeline(model: Model, num_workers: int) -> None:
    found = simulate(model, Hardware(), num_workers)
    assert found["efficiency"] >= 0.85, found
    assert found["efficiency"] <= 1, "the ideal is a bound"
    assert found["reads"] == found["layer_shards"], "each layer shard is read once"


MID = replace(MIXTRAL, name="mid", num_layers=8, hidden_size=512, intermediate=1792)
"""Of the size of the benchmarks' `mid`. In sequential, of larger experts one worker's solution is more of the whole."""


@pytest.mark.parametrize(
    ("model", "mode", "num_workers", "least"),
    [(MIXTRAL, "one_shot", 8, 6.0), (MID, "sequential", 2, 1.4), (MIXTRAL, "sequential", 2, 1.2)],
    ids=lambda value: getattr(value, "name", value),
)
def test_workers_share_the_layers_of_a_refit_or_each_layer(model: Model, mode: str, num_workers: int, least: float) -> None:
    one, several = (recombine(model, mode, 32, count) for count in (1, num_workers))
    assert one["reads"] == model.num_layers, "each layer is read once by a worker"
    come_back = 2 if mode == "sequential" else 0  # times that a worker changes layers to send the source's stream ahead
    assert several["reads"] <= (num_workers + come_back) * model.num_layers
    assert one["hours"] / several["hours"] >= least, (one, several)
