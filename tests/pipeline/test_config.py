"""The run file: defaults, sizes, and how settings are cut to shards. `tests/hostile/runfiles.yaml` is what it refuses."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import apply_setting, load_config, read_config
from stages.contracts.errors import InputError
from stages.contracts.partition import held_bytes, layer_shards
from stages.contracts.settings import Resources
from stages.contracts.survey import Survey
from stages.contracts.text_settings import TextData
from stages.contracts.texts import texts_of
from tests.conftest import REPOSITORY


def text(**settings: int) -> TextData:
    return TextData.model_validate({"data": "x.txt", **settings})


def test_defaults_are_the_papers() -> None:
    config = read_config({"model": "m", "run_dir": "r", "calibration": {"data": "x.txt"}, "clustering": {"num_experts": 4}})
    assert (config.calibration.num_sequences, config.calibration.sequence_length) == (32, 2048)
    assert config.clustering.model_dump() == {
        "num_experts": (4,), "method": "hierarchical", "feature": "expert_output", "distance": "euclidean",
        "linkage": "average", "domain_weights": "uniform",
    }  # fmt: skip
    assert config.merging.method == "frequency"
    assert config.export.formats == ("tied", "stock")
    assert config.evaluation is None


@pytest.mark.parametrize("name", ["tiny-mixtral", "compare"])
def test_the_examples_are_valid_run_files(name: str) -> None:
    config = load_config(REPOSITORY / "examples" / f"{name}.yaml", [])
    assert config.clustering.num_experts == (6, 4)
    files = {section: [] for section in ("calibration", "evaluation")}
    for text in texts_of(config).values():
        files[text.section] += text.data
    assert all((REPOSITORY / name).is_file() for names in files.values() for name in names)
    assert all(files.values()) and not set(files["calibration"]) & set(files["evaluation"])


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        text().num_sequences = 3


@pytest.mark.parametrize(
    ("written", "num_bytes"), [("8 GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("200kb", 200_000), (17, 17), ("17", 17)]
)
def test_sizes_are_read_in_decimal_and_binary_units(written: str | int, num_bytes: int) -> None:
    assert Resources.model_validate({"worker_memory": written}).worker_memory == num_bytes


def test_settings_on_the_command_line_reach_any_depth() -> None:
    values = {"clustering": {"linkage": "average"}}
    for setting in ("clustering.linkage=single", "clustering.num_experts=[6, [5, 4]]", "resources.num_gpus=0.5", "model=a=b"):
        apply_setting(values, setting)
    assert values == {
        "clustering": {"linkage": "single", "num_experts": [6, [5, 4]]}, "resources": {"num_gpus": 0.5}, "model": "a=b",
    }  # fmt: skip


@pytest.mark.parametrize("num_sequences", [1, 7, 64])
@pytest.mark.parametrize("sequence_length", [2, 100, 2048, 10_000])
@pytest.mark.parametrize("tokens_per_shard", [1, 500, 8192])
def test_token_shards_are_whole_micro_batches_and_cover_all_sequences(
    num_sequences: int, sequence_length: int, tokens_per_shard: int
) -> None:
    data = text(num_sequences=num_sequences, sequence_length=sequence_length, tokens_per_shard=tokens_per_shard)
    assert data.micro_batch >= 1
    assert data.micro_batch == 1 or data.micro_batch * sequence_length <= data.tokens_per_micro_batch
    assert data.sequences_per_shard % data.micro_batch == 0
    assert (data.num_shards - 1) * data.sequences_per_shard < num_sequences <= data.num_shards * data.sequences_per_shard


SURVEY = Survey(
    family="tiny", architecture="Tiny", num_layers=10, moe_layers=tuple(range(10)), routers={}, num_experts=90_000, top_k=1,
    hidden_size=8, vocab_size=8, max_positions=None, dtype="bfloat16", num_parameters=1, total_bytes=1, mtp_tensors=0,
    first_mtp_tensor=None, unloaded_tensors=0, first_unloaded_tensor=None, ignored_files=(), outside_bytes=50_000_000,
    layer_bytes=(100_000_000,) * 10, layer_expert_bytes=(90_000_000,) * 10,
    layer_held_bytes=(100_000_000,) * 10,
)  # fmt: skip


@pytest.mark.parametrize("num_workers", [1, 3, 4, 100])
@pytest.mark.parametrize("memory", ["1", "350 MB", "500 MB", "8 GB"])
def test_layer_shards_fit_the_memory_cover_every_layer_once_and_are_never_empty(memory: str, num_workers: int) -> None:
    resources = Resources.model_validate({"worker_memory": memory})
    data = text(num_sequences=2, sequence_length=16)
    shards = layer_shards(SURVEY, data, resources, num_workers)
    assert [layer for first, stop in shards for layer in range(first, stop)] == list(range(10))
    for first, stop in shards:
        assert stop - first == 1 or held_bytes(SURVEY, (first, stop), data) <= resources.worker_memory
    assert len(shards) >= min(10, num_workers)


def test_layers_per_shard_is_obeyed() -> None:
    shards = layer_shards(SURVEY, text(), Resources(layers_per_shard=4), num_workers=1)
    assert shards == [(0, 4), (4, 8), (8, 10)]


def test_a_run_file_is_read_with_settings_on_top(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nrun_dir: r\ncalibration: {data: x.txt}\nclustering: {num_experts: 4}\n")
    assert load_config(path, []).clustering.num_experts == (4,)
    assert load_config(path, ["clustering.num_experts=[[3, 2]]", "export.formats=tied"]).clustering.num_experts == ((3, 2),)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"fraction": 0}, r"calibration\.sampling\.fraction: Input should be greater than 0"),
        ({"fraction": 1.5}, r"calibration\.sampling\.fraction: Input should be less than or equal to 1"),
        ({"groups": 4}, r"calibration\.sampling\.fraction is missing"),
        ({"fraction": 0.5, "groups": 1}, r"calibration\.sampling\.groups: Input should be greater than or equal to 2"),
        ({"fraction": 0.5, "groups": 33}, r"calibration: sampling\.groups is 33 but there are 32 sequences .* at most 32"),
        ({"fraction": 0.5, "seed": 1}, r"calibration\.sampling\.seed is not a setting"),
    ],
)
def test_sampling_is_checked(tmp_path: Path, sampling: dict[str, float], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nrun_dir: r\ncalibration: {data: x.txt}\nclustering: {num_experts: 4}\n")
    with pytest.raises(InputError, match=message):
        load_config(path, [f"calibration.sampling={yaml.safe_dump(sampling, default_flow_style=True)}"])


def test_evaluation_is_never_sampled(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\nrun_dir: r\ncalibration: {data: x.txt}\nclustering: {num_experts: 4}\nevaluation: {data: x.txt}\n"
    )
    with pytest.raises(InputError, match=r"evaluation\.sampling is not a setting"):
        load_config(path, ["evaluation.sampling={fraction: 0.5}"])
