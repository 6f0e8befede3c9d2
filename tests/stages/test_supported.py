"""The table of families: what it says, that users can read it, and that everything else is refused before any work."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checks import check
from stages.contracts.errors import InputError
from stages.model.families import REFUSED, SUPPORTED, WRAPPERS, family_of, groups_in, stock_targets
from tests.runs import run_config, token_ids
from tests.stages.test_families import CASES
from tests.stages.test_layouts import test_language_model_of_a_multimodal_wrapper as wrapper_test
from tests.tiny import SETTINGS, build, save, tiny_config

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "families.md"


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the table under a heading, by their first cell."""
    section = DOCUMENT.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_document_lists_the_families_that_are_tested() -> None:
    tested = {case.values[0] for case in CASES}
    assert tested == set(SUPPORTED) == set(table("Supported families"))
    assert tested <= set(SETTINGS)


def test_the_readme_lists_the_same_families() -> None:
    rows = [line.split("|") for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("| ")]
    listed = {row[1].strip(): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    assert listed["supported"] == set(SUPPORTED)
    assert listed["supported inside a multimodal wrapper"] == set(WRAPPERS)
    assert listed["refused by name, with the reason"] == set(REFUSED)


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_the_document_says_what_the_table_says(family: str) -> None:
    score, groups, refused = table("Supported families")[family]
    facts = SUPPORTED[family]
    assert score == facts.score + (", multiplies the expert's input" if facts.gates_input else "")
    assert groups == (f"ranked by their best {facts.group_scores}" if facts.group_scores else "none")
    assert set(re.findall(r"`(\w+)`", refused)) == set(facts.refused_settings)


def test_the_document_lists_refused_families_and_wrappers() -> None:
    assert {name: cells[0] for name, cells in table("Refused families").items()} == REFUSED
    assert {name: cells[0].strip("`") for name, cells in table("Multimodal wrappers").items()} == WRAPPERS
    (mark,) = (mark for mark in wrapper_test.pytestmark if mark.name == "parametrize")
    assert set(mark.args[1]) == set(WRAPPERS)


@pytest.mark.parametrize("family", [*sorted(REFUSED), "gpt2"])
def test_other_families_are_refused_by_name_with_the_reason(family: str) -> None:
    with pytest.raises(InputError, match=f"here: {family} is not .*{re.escape(REFUSED.get(family, 'tested families'))}"):
        family_of({"model_type": family}, "here")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 2}, "num_kv_shared_layers 2"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input 8"),
        ({"model_type": "laguna", "moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input True"),
        ({"model_type": "other_vl", "text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe inside of other_vl"),
    ],
)
def test_settings_and_wrappers_that_do_not_work_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        family_of(config, "here")


@pytest.mark.parametrize(
    ("family", "changes", "possible"),
    [
        ("mixtral", {}, [2, 3, 4, 5, 6, 7, 8]),
        ("deepseek_v3", {}, [4, 6, 8]),
        ("deepseek_v3", {"n_group": 1}, [2, 3, 4, 5, 6, 7, 8]),
        ("deepseek_v3", {"num_experts_per_tok": 3}, [6, 8]),
        ("deepseek_v2", {}, [4, 6, 8]),
        ("deepseek_v2", {"topk_group": 2}, [2, 4, 6, 8]),
        ("deepseek_v2", {"topk_method": "greedy"}, [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_stock_targets_keep_groups_equally_large(family: str, changes: dict[str, Any], possible: list[int]) -> None:
    config = tiny_config(family, **changes).to_dict()
    assert stock_targets(config, "here") == possible
    assert (groups_in(config, "here") is None) == (possible[-1] - possible[-2] == 1)


def test_a_target_that_breaks_groups_is_refused_before_any_work(tmp_path: Path) -> None:
    source = save(build("deepseek_v3", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=r"clustering\.num_experts is 5 .* use one of 4, 6, 8, or set export\.formats"):
        check(run_config(source, tmp_path / "run", path, [5], ["stock"]))
    check(run_config(source, tmp_path / "run", path, [5], ["tied"]))
    assert not (tmp_path / "run").exists()
