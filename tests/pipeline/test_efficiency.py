"""The driver on simulated clusters, in virtual time: a property of the schedule, not of the machine that runs the test."""

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


@pytest.mark.parametrize(("mode", "num_workers", "least"), [("one_shot", 8, 6.0), ("sequential", 2, 1.4)])
def test_workers_share_the_layers_of_a_refit_or_each_layer(mode: str, num_workers: int, least: float) -> None:
    one, several = (recombine(MIXTRAL, mode, 32, count) for count in (1, num_workers))
    assert one["reads"] == MIXTRAL.num_layers, "each layer is read once by a worker"
    assert several["reads"] <= num_workers * MIXTRAL.num_layers
    assert one["hours"] / several["hours"] >= least, (one, several)
