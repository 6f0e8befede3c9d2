"""For every family: what its router would pick among fewer experts is told from the logits of sampled tokens, or the family is
refused by name before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.calibrate.spec import CalibrateArgs, CalibrationShardArgs
from stages.calibrate.sums import read_partial_sums
from stages.calibrate.token_sample import ShardPlace
from stages.calibrate.units import calibrate_unit, open_shard
from stages.checkpoint.folder import Checkpoint
from stages.cluster.rerouting import rule_of
from stages.contracts.errors import InputError
from stages.contracts.paths import partial_evidence_file, tokens_file
from stages.contracts.stream_units import StreamArgs
from stages.contracts.tokens import write_tokens
from stages.contracts.units import HeldJob
from stages.model.families import SUPPORTED, groups_in
from stages.model.survey import survey_checkpoint
from tests.tiny import NUM_EXPERTS, build, save

REFUSED = {"gemma4_text", "llama4_text", "phimoe"}
"""Beside those that first pick groups."""


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_rule_of_a_familys_router_is_found_unless_it_is_refused(family: str, tmp_path: Path) -> None:
    source = save(build(family, torch.float32), tmp_path / "tiny")
    has_groups = groups_in(Checkpoint(source).config, str(source)) is not None
    facts = SUPPORTED[family]
    assert bool(facts.gates_input or facts.rerouting) == (family in REFUSED)
    if facts.gates_input:
        return
    survey, _ = survey_checkpoint(str(source))
    held = open_shard(CalibrationShardArgs(str(source), 0, survey.num_layers, 1, survey.routers))
    (tmp_path / "tokens").mkdir()
    write_tokens(tmp_path / "tokens" / tokens_file(0), np.random.default_rng(0).integers(3, 128, (4, 16)))
    args = CalibrateArgs(StreamArgs("tokens", 0, 4, is_last=True), None, ("sampled_outputs",), ShardPlace(64, 0, 64, 4, 4, 0))
    calibrate_unit(HeldJob(tmp_path, tmp_path / "calibrate", args, held))
    for layer in survey.moe_layers:
        sums = read_partial_sums(partial_evidence_file(tmp_path / "calibrate", layer, 0)).sums["sampled_outputs"]
        assert sums["sampled_logits"].shape == (NUM_EXPERTS, 64)
        logits, gates = sums["sampled_logits"].T, sums["sampled_gates"].T
        if has_groups or facts.rerouting:
            with pytest.raises(InputError, match="so what the router would pick among fewer experts is not known"):
                rule_of(logits, sums["router_choice_bias"], gates, f"layer {layer}")
            continue
        rule = rule_of(logits, sums["router_choice_bias"], gates, f"layer {layer}")
        picked, found = rule.route(logits, sums["router_choice_bias"], range(NUM_EXPERTS))
        np.testing.assert_allclose(found, np.take_along_axis(gates, picked, 1), rtol=1e-4)
