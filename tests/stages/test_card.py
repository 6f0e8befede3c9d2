"""The model card: front matter that any reader parses, whatever the names and the source's card hold."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from stages.assemble.card import inherited_metadata, model_card
from stages.assemble.facts import CardFacts
from stages.assemble.spec import AssembleFacts

FACTS = CardFacts(
    name="tiny-4e-stock", source="org/tiny", base_model="org/tiny", revision="abc", num_experts=8, experts_text="4",
    source_parameters=2000, source_bytes=4000, router="frequency", method="HC-SMoE",
    method_source="arXiv:2410.08589", calibration="4 sequences", clustering="linkage average", budget="", merging="frequency",
    refit="", settings={"model": "org/tiny", "calibration": {"data": ["x.txt"]}},
)  # fmt: skip
WRITTEN = AssembleFacts(parameters=1000, bytes=2000, left_behind=())
OURS = {
    "base_model": "org/tiny", "base_model_relation": "merge", "library_name": "transformers",
    "pipeline_tag": "text-generation", "tags": ["hcsmoe", "mixture-of-experts", "merge"],
}  # fmt: skip


def front_matter(source_card: str = "", **changes: Any) -> dict[str, Any]:
    return ModelCard(model_card(replace(FACTS, **changes), "stock", WRITTEN, source_card)).data.to_dict()


def test_the_front_matter_of_a_hub_model_and_of_a_folder() -> None:
    assert front_matter() == OURS
    assert front_matter(base_model=None) == {k: v for k, v in OURS.items() if not k.startswith("base_model")}


def test_licence_and_languages_are_the_sources() -> None:
    source = (
        '---\nlicense: other\nlicense_name: >-\n  a "b": c\nlicense_link: LICENSE\nlanguage: [en, no]\ntags: [x]\n---\n# Tiny\n'
    )
    inherited = {"license": "other", "license_name": 'a "b": c', "license_link": "LICENSE", "language": ["en", "no"]}
    assert front_matter(source) == {**OURS, **inherited}


@pytest.mark.parametrize(
    "source",
    ["", "no front matter", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n", "---\nlicense:\n---\n",
     "---\nlicense: null\nlanguage: []\n---\n", "---\nlanguage: [[en]]\n---\n", "---\nlicense: " + "x" * 1001 + "\n---\n",
     "---\nlicense: " + "[" * 5000 + "\n---\n", "---\n? [a]\n: b\n---\n", "---\nlicense: \x00\n---\n"],
)  # fmt: skip
def test_a_source_card_that_is_not_well_formed_gives_nothing(source: str) -> None:
    assert inherited_metadata(source) == {}
    assert front_matter(source) == OURS


@pytest.mark.parametrize("base_model", ['a"b: c', "a\nlicense: mit", "- x", "{{ x }}", "no"])
def test_names_are_escaped(base_model: str) -> None:
    assert front_matter(base_model=base_model) == {**OURS, "base_model": base_model}


def test_names_stay_on_their_line_and_in_their_block() -> None:
    settings = {"calibration": {"data": ["a\n```\n# b"], "text_field": "````"}}
    written = replace(WRITTEN, left_behind=("a\n`b", *map(str, range(30))))
    text = model_card(replace(FACTS, source="a\nb", settings=settings), "stock", written, "")
    assert "\na\N{REPLACEMENT CHARACTER}b (revision abc) with 8 experts a layer merged to 4, without\n" in text
    listed = ", ".join(f"`{number}`" for number in range(19))
    assert f"not copied: `a\N{REPLACEMENT CHARACTER}b`, {listed}, 11 more\n" in text
    block = text.partition("`````yaml\n")[2].partition("\n`````\n")[0]
    assert yaml.safe_load(block) == {**settings, "run_dir": "runs/tiny-4e-stock"}


def test_a_card_says_how_wide_experts_are_and_that_router_rows_are_kept() -> None:
    text = model_card(replace(FACTS, merging="", experts_text="8", num_neurons=(256, 1024)), "stock", WRITTEN, "")
    assert "with 8 experts a layer of 256 neurons pruned to 8 of 1024, without" in text
    assert "\n| experts a layer | 8 | 8 |\n| neurons of an expert | 256 | 1,024 |\n| parameters |" in text
    assert "The router keeps the rows of these experts; any engine" in text
    assert "neurons of an expert" not in model_card(FACTS, "stock", WRITTEN, "")
    assert "one row for each merged expert (rule `frequency`)" in model_card(FACTS, "stock", WRITTEN, "")
