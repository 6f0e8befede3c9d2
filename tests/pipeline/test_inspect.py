"""`inspect`: facts from headers, checked against what a run then writes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands.inspect import inspect_model
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.inspection import RouterFacts
from tests.runs import read_config, run_all, token_ids
from tests.tiny import NUM_EXPERTS, build, save


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_sizes_of_targets_are_those_that_are_written(family: str, tmp_path: Path) -> None:
    source = save(build(family, torch.bfloat16), tmp_path / "source")
    facts = inspect_model(str(source), None)
    assert facts.model is not None
    assert facts.total_bytes == sum(facts.model.bytes_by_role.values()) == Checkpoint(source).total_bytes
    path, _ = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"])
    sizes = {size.num_experts: {"tied": size.tied, "stock": size.stock} for size in facts.model.targets}
    for r in (NUM_EXPERTS, 4):
        for export_format in ("stock", "tied"):
            assert sizes[r][export_format] == Checkpoint(exports[f"{r}e-{export_format}"]).total_bytes


def test_facts_of_a_family_with_all_of_them(tmp_path: Path) -> None:
    source = save(build("deepseek_v3", torch.bfloat16), tmp_path / "source")
    facts = inspect_model(str(source), None)
    model = facts.model
    assert facts.family == "deepseek_v3" and facts.reason is None and model is not None
    assert (model.num_layers, model.moe_layers, model.num_experts, model.top_k) == (3, [1, 2], NUM_EXPERTS, 2)
    assert model.shared_experts == {"n_shared_experts": 1}
    assert model.router == RouterFacts("sigmoid", has_bias=True, num_groups=2, num_chosen_groups=1)
    assert model.layout == "one tensor for each expert" and model.dtype == "bfloat16"
    assert [size.num_experts for size in model.targets if size.stock is not None] == [8, 6, 4]
    printed = json.loads(CliRunner().invoke(app, ["inspect", str(source), "--json"]).stdout)
    assert printed == facts.values() and printed["router"]["num_groups"] == 2
    shown = CliRunner().invoke(app, ["inspect", str(source)]).stdout
    for text in ("deepseek_v3", "supported    yes", "8 a layer, top-2", "sigmoid, with a bias, 1 of 2 groups", "not possible"):
        assert text in shown


def test_what_is_not_supported_is_said_with_the_reason(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**read_config(source), "model_type": "jetmoe"}))
    facts = inspect_model(str(source), None)
    assert facts.model is None and facts.reason is not None
    assert "attention heads" in facts.reason and facts.total_bytes == Checkpoint(source).total_bytes
    assert "supported    no" in CliRunner().invoke(app, ["inspect", str(source)]).stdout
    with pytest.raises(InputError, match="not a folder"):
        inspect_model(str(tmp_path / "none"), None)
