"""A tied export gives the right model or an error: to every Auto class, to other engines, and with code planted beside it."""

import importlib.util
import py_compile
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, MixtralForCausalLM, MixtralModel, PreTrainedModel

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.adapter import build_meta_model
from tests.runs import run_all, token_ids
from tests.tiny import NUM_EXPERTS, build, load, save

HEADS = {
    "AutoModelForQuestionAnswering": "HCSMoEMixtralForQuestionAnswering",
    "AutoModelForSequenceClassification": "HCSMoEMixtralForSequenceClassification",
    "AutoModelForTokenClassification": "HCSMoEMixtralForTokenClassification",
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tied")
    source = save(build("mixtral", torch.float32), root / "tiny")
    path, _ = token_ids(root)
    return run_all(source, root / "run", path, [NUM_EXPERTS, 4], ["tied"])


@pytest.fixture
def folder(exports: dict[str, Path], tmp_path: Path) -> Path:
    """A tied export with 4 of 8 experts that a test may change."""
    return Path(shutil.copytree(exports["4e-tied"], tmp_path / "copy"))


def expert_maps(model: PreTrainedModel) -> list[list[int]]:
    return [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith(".expert_map")]


@pytest.mark.parametrize("auto", HEADS)
def test_an_auto_class_with_a_head_gives_merged_experts(auto: str, exports: dict[str, Path]) -> None:
    model = getattr(transformers, auto).from_pretrained(exports["4e-tied"], trust_remote_code=True)
    assert type(model).__name__ == HEADS[auto]
    tied = load(exports["4e-tied"], trust_remote_code=True)
    assert expert_maps(model) == expert_maps(tied) != [[0] * NUM_EXPERTS] * 3
    weights, due = ({n.split("layers.")[1]: t for n, t in m.named_parameters() if ".experts." in n} for m in (model, tied))
    assert set(weights) == set(due) and all(torch.equal(weights[name], due[name]) for name in due)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", *HEADS])
def test_without_trust_no_auto_class_gives_a_model(auto: str, exports: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(transformers, auto).from_pretrained(exports["4e-tied"], trust_remote_code=False)


@pytest.mark.parametrize("plain", [MixtralModel, MixtralForCausalLM])
def test_the_plain_classes_refuse_experts_that_are_fewer(plain: type[PreTrainedModel], exports: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain.from_pretrained(exports["4e-tied"])


def test_the_plain_class_is_right_where_every_expert_is_kept(exports: dict[str, Path]) -> None:
    whole = exports[f"{NUM_EXPERTS}e-tied"]
    assert expert_maps(load(whole, trust_remote_code=True)) == [list(range(NUM_EXPERTS))] * 3
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        assert torch.equal(
            MixtralForCausalLM.from_pretrained(whole)(ids).logits, load(whole, trust_remote_code=True)(ids).logits
        )


def test_an_auto_class_builds_from_the_config_alone(exports: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(exports["4e-tied"])
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert {tensor.shape[0] for name, tensor in model.named_parameters() if name.endswith("experts.down_proj")} == {4}


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", *HEADS])
def test_an_engine_that_builds_the_model_itself_is_stopped(auto: str, exports: dict[str, Path]) -> None:
    """vLLM asks the first class of `auto_map` whether its Transformers backend may run it."""
    model = getattr(transformers, auto).from_pretrained(exports["4e-tied"], trust_remote_code=True)
    plain = type(model).__name__.removeprefix("HCSMoE")
    with pytest.raises(ValueError) as caught:
        type(model).is_backend_compatible()
    assert str(caught.value) == (
        f"HCSMoE{plain} is a tied export of hcsmoe: this engine would run {plain} without the expert_map and compute garbage. "
        "Run it with transformers and trust_remote_code=True, or make a stock export (export.formats: [stock]), which runs "
        "wherever the source does"
    )


def test_compiled_code_beside_the_model_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    evil, flag = tmp_path / "evil.py", tmp_path / "was-run"
    evil.write_text(f"open({str(flag)!r}, 'w')\n" + (folder / "modeling_hcsmoe.py").read_text())
    planted = importlib.util.cache_from_source(str(folder / "modeling_hcsmoe.py"))
    py_compile.compile(str(evil), planted, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert type(build_meta_model(Checkpoint(folder))).__name__ == "HCSMoEMixtralForCausalLM"
    assert not flag.exists()


def test_a_run_leaves_no_compiled_code(exports: dict[str, Path]) -> None:
    run_dir = exports["4e-tied"].parent.parent
    assert [*run_dir.glob("assemble-*")] and not [*run_dir.rglob("__pycache__")]


@pytest.mark.parametrize("change", [lambda text: text + "#", lambda text: text.replace("\n", "\r\n")])
def test_a_model_file_with_one_byte_changed_is_not_run(change: object, folder: Path) -> None:
    path = folder / "modeling_hcsmoe.py"
    path.write_bytes(change(path.read_text()).encode())  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        build_meta_model(Checkpoint(folder))
    assert str(caught.value) == (
        f"{path} is not the file that this version writes for a tied checkpoint; it is not run: run the run file again, which "
        "writes it anew"
    )


def test_a_tied_checkpoint_without_its_model_file_is_named(folder: Path) -> None:
    (folder / "modeling_hcsmoe.py").unlink()
    with pytest.raises(InputError) as caught:
        build_meta_model(Checkpoint(folder))
    assert (
        str(caught.value)
        == f"{folder / 'modeling_hcsmoe.py'} does not exist; a tied checkpoint is not whole without it; run the run file again"
    )
