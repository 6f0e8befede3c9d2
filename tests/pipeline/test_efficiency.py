"""The driver on simulated clusters, in virtual time: a property of the schedule, not of the machine that runs the test."""

import pytest

from bench.cluster_model import MODELS, Hardware, Model
from bench.simulation import NUM_WORKERS, simulate


@pytest.mark.parametrize("num_workers", NUM_WORKERS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_cluster_comes_near_the_ideal_pipeline(model: Model, num_workers: int) -> None:
    found = simulate(model, Hardware(), num_workers)
    assert found["efficiency"] >= 0.85, found
    assert found["efficiency"] <= 1, "the ideal is a bound"
    assert found["reads"] == found["layer_shards"], "each layer shard is read once"
