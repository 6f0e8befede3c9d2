"""Engines that know only the older name of the base of rotary angles find it in exports, where it says all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from stages.assemble.config import target_config
from tests.runs import read_config
from tests.tiny import build, save

PLAIN = {"rope_theta": 5e5, "rope_type": "default"}
Config = dict[str, Any]


def exported(count: int, family: str = "mixtral", export_format: str = "stock", **settings: Any) -> Config:
    config = {"model_type": family, "num_local_experts": 8, "num_experts": 8, "rope_parameters": PLAIN, **settings}
    return target_config(config, "MixtralForCausalLM", {}, {0: count}, export_format, "source")


@pytest.mark.parametrize("export_format", ["stock", "tied"])
def test_written_beside_the_newer_name(export_format: str) -> None:
    config = exported(4, export_format=export_format)
    assert config["rope_theta"] == 5e5 and config["rope_parameters"] == PLAIN


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {**PLAIN, "rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        {"family": "afmoe"},
        {"rope_parameters": None},
    ],
)
def test_not_written_where_it_would_not_say_all_or_is_not_known(settings: Config) -> None:
    assert "rope_theta" not in exported(4, **settings)


def test_what_the_source_says_stays() -> None:
    assert exported(4, rope_theta=7.0)["rope_theta"] == 7.0
    assert "rope_theta" not in exported(8), "an export that keeps everything has the source's own config"


def test_transformers_reads_the_same_of_both(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32, rope_parameters=PLAIN), tmp_path / "source")
    config = target_config(read_config(source), "MixtralForCausalLM", {}, dict.fromkeys(range(3), 4), "stock", "source")
    assert AutoConfig.for_model(**config).rope_parameters == AutoConfig.from_pretrained(source).rope_parameters == PLAIN
