"""Configs that transformers or we would choke on: one line before any work, or the same numbers as without the oddity."""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from pipeline.checks import check
from pipeline.errors import RunFailed
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model import trial
from stages.model.adapter import AdaptedModel, build_meta_model
from stages.model.config_checks import check_config
from stages.model.expert_weights import ExpertsLayout
from stages.model.families import SUPPORTED, WRAPPERS, text_config
from stages.model.model_config import load_config, reads_config, stated_dtype, writable
from stages.model.products import gates_by_halves
from stages.model.survey import survey
from stages.model.tied import modeling_source
from stages.model.trial import check_forward
from tests.runs import read_config, run_all, run_config, token_ids
from tests.tiny import build, load, save, tiny_config

REPOSITORY = Path(__file__).parents[2]
EVALUATED = {"num_sequences": 4, "sequence_length": 16, "tokens_per_micro_batch": 32}
Copy = Callable[..., Path]

REMEDY = "restore the config, or use a model that this version of transformers knows"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family, made once."""
    folder = tmp_path_factory.mktemp("sources")

    def source(family: str) -> Path:
        path = folder / family
        return path if path.exists() else save(build(family, torch.float32), path)

    return source


@pytest.fixture
def copy(sources: Callable[[str], Path], tmp_path: Path) -> Copy:
    """A copy of a tiny checkpoint with changes to its config; `raw` is text that is put into the JSON as it is."""

    def copied(family: str = "mixtral", raw: str = "", **changes: Any) -> Path:
        path = Path(shutil.copytree(sources(family), tmp_path / family, dirs_exist_ok=True))
        text = json.dumps({**read_config(sources(family)), **changes}, indent=1)
        (path / "config.json").write_text(text.replace("{", "{" + raw + ",", 1) if raw else text)
        return path

    return copied


def scores(source: Path, run_dir: Path, formats: list[str] | None = None) -> dict[str, float]:
    """Perplexities of a whole run, by the end of the model's name."""
    ids, _ = token_ids(run_dir.parent)
    run_all(source, run_dir, ids, [4], formats or ["stock", "tied"], evaluation={"data": str(ids), **EVALUATED})
    report = json.loads((run_dir / "report.json").read_text())
    return {model["name"].removeprefix(source.name): model["perplexity"] for model in report["models"]}


def refusal(source: Path) -> str:
    """The one line that a survey says, before anything is computed."""
    with pytest.raises(InputError) as caught:
        survey(Checkpoint(source))
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


FLAGS = {
    "output_router_logits": True, "output_hidden_states": True, "output_attentions": True, "return_dict": False,
    "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_flags_of_what_a_forward_returns_change_no_number_and_stay_in_the_written_config(
    family: str, copy: Copy, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    plain = scores(sources(family), tmp_path / "plain" / "run")
    flagged = copy(family, **FLAGS)
    assert scores(flagged, tmp_path / "run") == plain
    found = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("calibrate-*/*.statistics.arrow")}
    due = {path.name: path.read_bytes() for path in (tmp_path / "plain" / "run").glob("calibrate-*/*.statistics.arrow")}
    assert found and found == due
    for name in ("4e-stock", "4e-tied"):
        written = read_config(tmp_path / "run" / "models" / f"{family}-{name}")
        assert {key: written[key] for key in FLAGS} == FLAGS


def test_flags_inside_of_a_text_config_are_neutral_in_what_runs() -> None:
    text = tiny_config("qwen3_5_moe_text", output_router_logits=True, return_dict=False, output_hidden_states=True).to_dict()
    raw = {"model_type": "qwen3_5_moe", "text_config": text, "output_hidden_states": True}
    config = load_config(SimpleNamespace(config=raw, folder=Path("here")))  # type: ignore[arg-type]
    for section in (config, config.get_text_config()):
        assert not section.output_hidden_states and section.return_dict and section._attn_implementation is None
    assert not config.get_text_config().output_router_logits


@pytest.mark.parametrize("name", sorted({*SUPPORTED, *WRAPPERS}))
def test_a_family_has_no_other_flag_of_what_a_forward_returns(name: str) -> None:
    fields = {key for key, value in CONFIG_MAPPING[name]().to_dict().items() if isinstance(value, bool)}
    assert {key for key in fields if key.startswith(("output_", "return_", "use_cache"))} <= set(FLAGS)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "somebody/some-kernel", "eager", "no-such-thing"])
def test_attention_that_a_config_names_is_ours_all_the_same(key: str, value: str, copy: Copy) -> None:
    plain = build_meta_model(Checkpoint(copy()))
    named = build_meta_model(Checkpoint(copy(**{key: value, key.replace("attn", "experts"): "eager"})))
    assert named.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    assert named.config._experts_implementation == plain.config._experts_implementation == "grouped_mm"


def test_equal_numbers_for_every_layer_are_one_number(copy: Copy, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """As Hunyuan-A13B is published; transformers' class takes a list of top-k, and no list of expert counts."""
    (tmp_path / "plain").mkdir()
    plain = scores(sources("hunyuan_v1_moe"), tmp_path / "plain" / "run")
    lists = {"moe_topk": [2, 2, 2], "moe_intermediate_size": [48, 48, 48], "num_shared_expert": [1, 1, 1]}
    source = copy("hunyuan_v1_moe", **lists)
    surveyed, _ = survey(Checkpoint(source))
    assert (surveyed.num_experts, surveyed.top_k) == (8, 2)
    assert scores(source, tmp_path / "run") == plain
    for name in ("stock", "tied"):
        folder = tmp_path / "run" / "models" / f"hunyuan_v1_moe-4e-{name}"
        assert {key: read_config(folder)[key] for key in lists} == lists
        assert load(folder, trust_remote_code=name == "tied").config.moe_topk == [2, 2, 2]


def test_a_list_of_expert_counts_keeps_its_form(copy: Copy, tmp_path: Path) -> None:
    ids, _ = token_ids(tmp_path)
    source = copy("hunyuan_v1_moe", num_experts=[8, 8, 8])
    folder = run_all(source, tmp_path / "run", ids, [4], ["stock"])["4e-stock"]
    assert read_config(folder)["num_experts"] == [4, 4, 4]


@pytest.mark.parametrize("key", ["moe_topk", "moe_intermediate_size", "num_experts"])
def test_layers_that_differ_are_one_line(key: str, copy: Copy) -> None:
    message = refusal(copy("hunyuan_v1_moe", **{key: [2, 2, 3]}))
    assert f"{key} is [2, 2, 3]: entry 2 is not entry 0; layers that differ in it are not supported" in message


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float4", "auto", 5, "complex64"])
def test_a_dtype_that_cannot_compute_is_one_line(dtype: Any, copy: Copy) -> None:
    message = refusal(copy(dtype=dtype))
    assert "dtype" in message and ("a model computes in bfloat16" in message or "cannot read this config" in message)


def test_the_dtype_that_is_stated() -> None:
    def stated(**raw: Any) -> torch.dtype | None:
        return stated_dtype(SimpleNamespace(config=raw, folder=Path("here")))  # type: ignore[arg-type]

    assert stated() is None and stated(dtype=None, text_config=None) is None
    assert stated(torch_dtype="bfloat16") == torch.bfloat16
    assert stated(text_config={"dtype": "float16"}) == torch.float16
    with pytest.raises(
        InputError, match=r"^here/config\.json: dtype is 'float8_e5m2'; a model computes in bfloat16, float16, "
    ):
        stated(dtype="float8_e5m2")


ODD = {
    "a size below zero": {"intermediate_size": -48},
    "no size": {"hidden_size": 0},
    "no size at all": {"hidden_size": None},
    "heads that do not divide": {"num_attention_heads": 5},
    "no heads": {"num_attention_heads": 0},
    "no heads of keys": {"num_key_value_heads": 0},
    "text for a number": {"intermediate_size": "48"},
    "a list for a number": {"num_attention_heads": [4, 4]},
    "a fraction for a number": {"intermediate_size": 48.5},
    "true for a number": {"num_hidden_layers": True},
    "null for a number": {"num_attention_heads": None},
    "top-k of none": {"num_experts_per_tok": 0},
    "top-k below zero": {"num_experts_per_tok": -1},
    "top-k above all experts": {"num_experts_per_tok": 9},
    "top-k true": {"num_experts_per_tok": True},
    "top-k text": {"num_experts_per_tok": "2"},
    "expert count text": {"num_local_experts": "8"},
    "expert count fraction": {"num_local_experts": 8.0},
    "epsilon text": {"rms_norm_eps": "small"},
    "epsilon null": {"rms_norm_eps": None},
    "unknown activation": {"hidden_act": "no-such-thing"},
    "activation null": {"hidden_act": None},
    "activation number": {"hidden_act": 3},
    "unknown rope": {"rope_parameters": {"rope_type": "no-such-thing", "rope_theta": 1e4}},
    "rope without theta": {"rope_parameters": {"rope_type": "yarn"}},
    "rope of text": {"rope_parameters": "yarn"},
    "rope theta text": {"rope_parameters": {"rope_type": "default", "rope_theta": "high"}},
    "rope theta zero": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 0, "factor": 0.0}},
    "padding beyond the vocabulary": {"pad_token_id": 128},
    "padding far beyond": {"pad_token_id": 10**12},
    "window text": {"sliding_window": "16"},
    "positions text": {"max_position_embeddings": "64"},
    "positions infinite": {"max_position_embeddings": math.inf},
    "positions below zero": {"max_position_embeddings": -1},
    "unread files": {"configuration_files": ["config.4.0.0.json"]},
    "layers with configs of their own": {"per_layer_config": {"1": {"intermediate_size": 24}}},
    "huge head": {"head_dim": 10**30},
    "huge intermediate size": {"intermediate_size": 10**18},
    "labels": {"num_labels": 10**9},
    "layers": {"num_hidden_layers": 10**9},
    "layers that are few enough for a list": {"num_hidden_layers": 10**6},
    "experts": {"num_local_experts": 10**9},
    "experts that are few enough for a list": {"num_local_experts": 10**6},
    "vocabulary": {"vocab_size": 10**9},
    "hidden size": {"hidden_size": 10**9},
    "labels that are no map": {"id2label": [1, 2]},
    "half a character": {"_name_or_path": "\ud800"},
    "half a character in a key": {"\ud800": 1},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_an_odd_value_is_one_line_that_names_the_config_within_seconds(change: dict[str, Any], copy: Copy) -> None:
    source, begin = copy(**change), time.perf_counter()
    message = refusal(source)
    assert time.perf_counter() - begin < 10
    (key,) = change
    named = {"num_attention_heads": "self_attn", "pad_token_id": "Padding_idx", "\ud800": "'\\ud800'", "rms_norm_eps": "eps"}
    assert key in message or named.get(key, "no-such") in message or "transformers" in message


BEFORE_A_PROCESS = [
    "top-k of none", "top-k above all experts", "top-k text", "expert count text", "layers", "experts", "vocabulary", "labels",
    "hidden size", "half a character", "half a character in a key", "positions text", "unread files",
]  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_A_PROCESS)
def test_what_a_config_says_itself_is_refused_before_a_process_is_started(case: str, copy: Copy, tmp_path: Path) -> None:
    ids, _ = token_ids(tmp_path)
    with pytest.raises(InputError):
        check(run_config(copy(**ODD[case]), tmp_path / "run", ids, [4], ["tied"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("deepseek_v3", {"n_group": 3}, "n_group is 3; 8 experts must divide into that many equal groups of at least 2"),
        ("deepseek_v3", {"n_group": 8}, "n_group is 8; 8 experts must divide into that many equal groups of at least 2"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group is 0; a whole number, 1 to 2, is needed"),
        ("deepseek_v3", {"topk_group": 3}, "topk_group is 3; a whole number, 1 to 2, is needed"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "topk_group is 1; so many groups hold 4 experts, and a token is sent to 5"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "transformers"),
        ("qwen3_moe", {"head_dim": 0}, "config.json"),
        ("nemotron_h", {"layers_block_type": ["moe"]}, "tensor"),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "transformers"),
        ("mixtral", {"num_local_experts": 0}, "is not a Mixture-of-Experts model"),
    ],
)
def test_values_of_a_family_that_do_not_fit(family: str, changes: dict[str, Any], reason: str, copy: Copy) -> None:
    assert reason in refusal(copy(family, **changes))


def test_a_config_as_deep_as_python_can_read(copy: Copy) -> None:
    message = refusal(copy(raw='"deep": ' + "[" * 300 + "]" * 300))
    assert "'deep' lies more than 100 levels deep" in message


def test_what_only_transformers_finds_ends_a_run_with_one_line_before_calibrate(copy: Copy, tmp_path: Path) -> None:
    ids, _ = token_ids(tmp_path)
    source = copy(pad_token_id=128)
    with pytest.raises((InputError, RunFailed)) as caught:
        run_all(source, tmp_path / "run", ids, [4], ["stock"])
    place = f"{source}/config.json: transformers {transformers.__version__}"
    assert str(caught.value) == f"{place} cannot build this model: Padding_idx must be within num_embeddings; {REMEDY}"
    assert not [*(tmp_path / "run").glob("calibrate-*/*.arrow")]
    assert not (tmp_path / "run" / "models").exists()


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_a_forward_without_numbers_gets_to_its_end_for_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_needs_numbers", lambda error: False)
    entry = SimpleNamespace(dtype="F32", num_bytes=4)
    check_forward(SimpleNamespace(config=tiny_config(family).to_dict(), folder=Path("here"), tensors={"a": entry}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32},
    ],
)
def test_a_forward_that_asks_for_numbers_is_not_refused(rope: dict[str, Any], copy: Copy) -> None:
    survey(Checkpoint(copy(head_dim=8, rope_parameters={"rope_theta": 10000.0, **rope})))


def test_only_what_transformers_says_of_a_config_is_the_input_s_fault() -> None:
    def raising(error: BaseException) -> None:
        with reads_config(Path("a"), "build this model"):
            raise error

    with pytest.raises(
        InputError, match=rf"^a/config\.json: transformers [0-9.]+ cannot build this .*: 'x' is not known or missing; {REMEDY}$"
    ):
        raising(KeyError("x"))
    with pytest.raises(
        InputError, match=rf"cannot build this model: raise error \(test_model_config\.py, line \d+\); {REMEDY}$"
    ):
        raising(ZeroDivisionError())
    for ours in (MemoryError(), torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        with pytest.raises(type(ours)):
            raising(ours)


LITERALS = '"time_step_limit": [0.0, Infinity], "odd": NaN, "low": -Infinity'


@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h"])
def test_infinity_and_nan_are_written_as_transformers_writes_them(family: str, copy: Copy, tmp_path: Path) -> None:
    source = copy(family)
    config = read_config(source)
    config.pop("time_step_limit", None)
    (source / "config.json").write_text(json.dumps(config).replace("{", "{" + LITERALS + ",", 1))
    plain = AutoConfig.from_pretrained(source, local_files_only=True)
    assert plain.time_step_limit[1] == math.inf
    ids, tensor = token_ids(tmp_path)
    for name, folder in run_all(source, tmp_path / "run", ids, [4], ["stock", "tied"]).items():
        text = (folder / "config.json").read_text()
        written = json.loads(text, parse_constant=lambda literal: pytest.fail(f"{literal} is not JSON"))
        assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
        assert (written["odd"], written["low"]) == ({"__float__": "NaN"}, {"__float__": "-Infinity"})
        model = load(folder, trust_remote_code=name.endswith("tied"))
        assert list(model.config.time_step_limit) == [0.0, math.inf]
        assert math.isnan(model.config.odd) and model.config.low == -math.inf
        assert torch.isfinite(model(tensor).logits).all()


def test_transformers_reads_back_what_it_writes() -> None:
    value = {"a": [math.inf, {"b": -math.inf}], "c": "x", "d": 1.5}
    assert writable(value) == {"a": [{"__float__": "Infinity"}, {"b": {"__float__": "-Infinity"}}], "c": "x", "d": 1.5}
    assert PreTrainedConfig._decode_special_floats(writable(value)) == value


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_default_sizes_of_a_family_are_within_the_bounds(family: str) -> None:
    config = CONFIG_MAPPING[family]().to_dict()
    sizes = {name: 2 for name in ("moe_topk", "num_experts_per_tok") if isinstance(text_config(config).get(name), list)}
    checkpoint = SimpleNamespace(
        config={**config, **sizes}, folder=Path("here"), tensors={str(i): SimpleNamespace(shape=(1 << 19,)) for i in range(999)}
    )
    try:
        check_config(checkpoint)  # type: ignore[arg-type]
    except InputError as e:
        assert "at most" not in str(e) and "no tensor of" not in str(e), e


class _Unknown(torch.nn.Module):
    num_experts = 8

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_experts_of_an_unknown_class_are_refused_and_never_taken_for_llama_4(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="experts of class _Unknown do not say how they keep their weights"):
        ExpertsLayout.of(_Unknown())
    assert not gates_by_halves(_Unknown())
    monkeypatch.setattr(AdaptedModel, "experts_modules", lambda self: {1: _Unknown()})
    assert "layer 1: experts of class _Unknown do not say" in refusal(copy())
    llama = AdaptedModel(Checkpoint(copy("llama4_text")))
    monkeypatch.undo()
    source: dict[str, Any] = {}
    exec(modeling_source({"hcsmoe_base_architecture": "MixtralForCausalLM"}), source)  # what is written beside a tied export
    with pytest.raises(ValueError, match=r"^_Unknown: experts of this class are not known to the code of this checkpoint$"):
        source["_merge"](_Unknown(), 4)
    (experts, *_) = llama.experts_modules().values()
    assert ExpertsLayout.of(experts) == ExpertsLayout(is_transposed=True, has_bias=False, has_gate=True)
    assert gates_by_halves(experts)


def test_a_fault_of_a_config_starts_no_import_of_torch() -> None:
    code = "import sys, stages.model.config_checks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False"
