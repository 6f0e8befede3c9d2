"""Bad input is one clear error, before anything expensive, and leaves nothing half made.

Every case is one change to a run that works; it names what the error must say: the place, the value, the bound, the remedy.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from tests.conftest import REPOSITORY
from tests.runs import write_run_file
from tests.tiny import random_model

Change = Callable[[Path], object]
EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"


@dataclass
class Result:
    """What a person at the command line gets."""

    exit_code: int
    out: str
    err: str


def hcsmoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["hcsmoe", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return Result(int(stopped.value.code or 0), captured.out, captured.err)


@pytest.fixture
def run_file(tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> Path:
    """A run that works, over a checkpoint and token ids that a test may change."""
    model = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "model")
    shutil.copy(token_ids, tmp_path / "ids.npy")
    return write_run_file(tmp_path, model, tmp_path / "ids.npy", {"clustering.num_experts": [3]})


def nothing_left(folder: Path) -> bool:
    """No model, no report, no half-written file, no lock."""
    run_dir = folder / "run"
    if not run_dir.exists():
        return True
    names = [path.name for path in run_dir.rglob("*")]
    wrong = [name for name in names if name in ("models", "report.json", "driver.lock", "checkpoint") or name.startswith(".")]
    return wrong == []


SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("clustering.likage=single", ("clustering.likage is not a setting",)),
    "unknown section": ("pruning.ratio=0.5", ("pruning is not a setting",)),
    "unknown linkage": (
        "clustering.linkage=averag",
        ("clustering.linkage", "'average', 'single', 'complete' or 'ward'", "'averag'"),
    ),
    "unknown format": ("export.formats=[gguf]", ("export.formats", "'tied' or 'stock'", "'gguf'")),
    "unknown metric": ("evaluation.metrics=[bleu]", ("evaluation.metrics", "'perplexity'", "'bleu'")),
    "a word for a number": ("calibration.num_sequences=many", ("calibration.num_sequences", "integer", "'many'")),
    "a fraction for a number": ("calibration.num_sequences=1.5", ("calibration.num_sequences", "integer", "1.5")),
    "true for a number": ("calibration.num_sequences=true", ("calibration.num_sequences", "integer", "True")),
    "a number for a section": ("calibration=3", ("calibration", "3")),
    "nothing for a section": ("clustering=", ("clustering",)),
    "not a size": ("export.max_file_bytes=huge", ("export.max_file_bytes", "'huge' is not a size; write for example 8 GB")),
    "a number of bytes of two points": ("export.max_file_bytes=1.2.3 GB", ("export.max_file_bytes", "1.2.3 GB")),
    "no file": ("calibration.data=[]", ("calibration.data", "at least 1")),
    "no target": ("clustering.num_experts=[]", ("clustering.num_experts", "at least 1")),
    "r = 0": ("clustering.num_experts=[0]", ("clustering.num_experts", "greater than or equal to 1", "0")),
    "r < 0": ("clustering.num_experts=[3, -2]", ("clustering.num_experts", "greater than or equal to 1", "-2")),
    "r a word": ("clustering.num_experts=half", ("clustering.num_experts", "integer", "'half'")),
    "r > E": ("clustering.num_experts=[7]", ("clustering.num_experts is 7", "6 experts a layer", "use at most 6")),
    "r < top-k": (
        "clustering.num_experts=[1]",
        ("clustering.num_experts is 1", "top_k=2", "at least 2", "export.formats to [tied]"),
    ),
    "r in a list < 1": ("clustering.num_experts=[[3, 0, 3]]", ("clustering.num_experts", "greater than or equal to 1")),
    "r twice": ("clustering.num_experts=[3, 3]", ("clustering.num_experts lists a target twice",)),
    "r by layer for stock": ("clustering.num_experts=[[3, 2, 3]]", ("clustering.num_experts", "set export.formats to [tied]")),
    "no model": ("model=nowhere/at-all", ("nowhere/at-all", "is not a folder")),
    "an empty name": ("run_dir=''", ("run_dir", "must not be empty")),
    "a missing text": ("calibration.data=gone.npy", ("calibration.data: gone.npy does not exist",)),
    "a missing evaluation text": ("evaluation.data=gone.jsonl", ("evaluation.data: gone.jsonl does not exist",)),
    "a setting without a value": ("clustering.linkage", ("--set clustering.linkage: write KEY=VALUE",)),
    "a setting of what is no section": ("model.name=x", ("--set model.name=x: model is not a section",)),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_exits_with_2_before_anything_is_written(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    setting, says = SETTINGS[case]
    result = hcsmoe(capsys, monkeypatch, "run", str(run_file), "--executor", "local", "--set", setting)
    assert result.exit_code == 2, result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for text in says:
        assert text in result.err
    assert result.out == ""
    assert not (run_file.parent / "run").exists()


RUN_FILES = {
    "empty": ("", "must hold keys and values"),
    "a list": ("- a\n- b\n", "must hold keys and values"),
    "not YAML": ("model: [\n", "is not YAML"),
    "not text": ("\udcff", "is not YAML"),
    "no model": ("run_dir: x\n", "model is missing; calibration is missing; clustering is missing"),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_bad_run_file_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, says = RUN_FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = hcsmoe(capsys, monkeypatch, "run", str(path), "--executor", "local")
    assert result.exit_code == 2
    assert says in result.err
    assert str(path) in result.err
    assert "Traceback" not in result.err


def test_a_missing_run_file_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = hcsmoe(capsys, monkeypatch, "run", str(tmp_path / "gone.yaml"), "--executor", "local")
    assert (result.exit_code, result.err) == (
        2,
        f"error: run file {tmp_path / 'gone.yaml'} cannot be read: No such file or directory\n",
    )


def edit_json(name: str, **values: object) -> Change:
    """Change a JSON file of the model; a value of None removes the key."""

    def change(folder: Path) -> None:
        path = folder / "model" / name
        fields = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return change


def dense(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder / "model")
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def truncate(folder: Path) -> None:
    path = folder / "model" / "model-00003-of-00010.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def outside(file: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = file
        path.write_text(json.dumps(index))

    return change


def pickled(folder: Path) -> None:
    for path in (folder / "model").glob("*.safetensors*"):
        path.unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(b"")


CHECKPOINTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "dense": (dense, ("'llama' is not a Mixture-of-Experts model", "no experts to merge")),
    "missing shard": (
        lambda folder: (folder / "model" / "model-00003-of-00010.safetensors").unlink(),
        ("model-00003-of-00010.safetensors does not exist", "download"),
    ),
    "truncated shard": (truncate, ("model-00003-of-00010.safetensors has", "the file is truncated: download it again")),
    "file above": (outside("../secret.safetensors"), ("'../secret.safetensors'", "only files in the folder itself are read")),
    "file elsewhere": (outside("/etc/secret.safetensors"), ("'/etc/secret.safetensors'", "only files in the folder itself")),
    "pickles": (pickled, ("pytorch_model.bin", "convert them to safetensors first")),
    "no config": (lambda folder: (folder / "model" / "config.json").unlink(), ("config.json does not exist",)),
    "damaged config": (lambda folder: (folder / "model" / "config.json").write_text("{"), ("config.json is not valid JSON",)),
    "damaged index": (
        lambda folder: (folder / "model" / "model.safetensors.index.json").write_text("{"),
        ("model.safetensors.index.json is not valid JSON",),
    ),
    "no model type": (edit_json("config.json", model_type=None), ("config.json has no model_type",)),
    "no top-k": (edit_json("config.json", num_experts_per_tok=None), ("does not say how many experts a token is sent to",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_exits_with_2_before_anything_is_written(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, says = CHECKPOINTS[case]
    change(run_file.parent)
    result = hcsmoe(capsys, monkeypatch, "run", str(run_file), "--executor", "local")
    assert result.exit_code == 2, result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for text in says:
        assert text in result.err
    assert not (run_file.parent / "run").exists()


def text(content: str, name: str = "x.txt") -> Change:
    """Calibrate on a text, with the example's tokenizer."""

    def change(folder: Path) -> None:
        for path in EXAMPLE.glob("tokenizer*"):
            shutil.copy(path, folder / "model")
        (folder / name).write_text(content)

    return change


def ids(values: np.ndarray) -> Change:
    return lambda folder: np.save(folder / "x.npy", values, allow_pickle=True)


def more_experts(folder: Path) -> None:
    """A config that asks for more than the weights hold."""
    edit_json("config.json", num_local_experts=8)(folder)


IN_PREPARE: dict[str, tuple[Change, list[str], tuple[str, ...]]] = {
    "empty text": (text(""), ["calibration.data={folder}/x.txt"], ("calibration.data", "0 tokens", "give more text")),
    "empty jsonl": (text("", "x.jsonl"), ["calibration.data={folder}/x.jsonl"], ("x.jsonl", "calibration.data")),
    "damaged jsonl": (text("{not json\n", "x.jsonl"), ["calibration.data={folder}/x.jsonl"], ("x.jsonl", "calibration.data")),
    "another field": (
        text('{"body": "a"}\n', "x.jsonl"),
        ["calibration.data={folder}/x.jsonl"], ("no field 'text'", "body", "set calibration.text_field"),
    ),
    "a field that is no text": (
        text('{"text": 3}\n', "x.jsonl"),
        ["calibration.data={folder}/x.jsonl"], ("x.jsonl", "field 'text' holds a value of type int"),
    ),
    "damaged parquet": (text("PAR?", "x.parquet"), ["calibration.data={folder}/x.parquet"], ("x.parquet", "calibration.data")),
    "text too short": (
        text("a few words"), ["calibration.data={folder}/x.txt"],
        ("calibration.data (", "x.txt) holds", "num_sequences 8 x sequence_length 32 = 256", "give more text or lower"),
    ),
    "a kind of file that is not read": (
        text("a", "x.docx"), ["calibration.data={folder}/x.docx"], ("x.docx", "known: .txt"),
    ),
    "two kinds of files": (
        text("a"), ["calibration.data=[{folder}/x.txt, {folder}/ids.npy]"], ("files must be of one kind",),
    ),
    "longer than the model": (
        text("a"), ["calibration.sequence_length=65"], ("calibration.sequence_length is 65", "64 positions", "lower it"),
    ),
    "no tokenizer": (
        lambda folder: (folder / "x.txt").write_text("a"), ["calibration.data={folder}/x.txt"], ("has no tokenizer",),
    ),
    "too few ids": (
        text("a"), ["calibration.num_sequences=9"], ("calibration.data holds 8 sequences of 32", "num_sequences is 9", "lower"),
    ),
    "ids of another vocabulary": (
        ids(np.full((8, 32), 96)),
        ["calibration.data={folder}/x.npy"], ("token ids from 96 to 96", "0 to 95", "another tokenizer"),
    ),
    "ids that are fractions": (ids(np.zeros((8, 32))), ["calibration.data={folder}/x.npy"], ("x.npy has shape", "integers")),
    "ids in one row": (ids(np.zeros(256, int)), ["calibration.data={folder}/x.npy"], ("x.npy has shape [256]", "integers")),
    "pickled ids": (ids(np.array([{}])), ["calibration.data={folder}/x.npy"], ("x.npy is not a plain numeric .npy file",)),
    "an empty file of ids": (
        lambda folder: (folder / "x.npy").write_bytes(b""), ["calibration.data={folder}/x.npy"], ("x.npy is not",),
    ),
    "damaged safetensors of ids": (
        lambda folder: (folder / "x.safetensors").write_bytes(b"12345678"), ["calibration.data={folder}/x.safetensors"],
        ("x.safetensors is not",),
    ),
    "bad evaluation ids": (
        ids(np.full((8, 32), -1)), ["evaluation.data={folder}/x.npy"], ("evaluation.data holds token ids from -1",),
    ),
    "config and weights of two models": (more_experts, [], ("config asks for [8, 32]", "do not belong together")),
    "layers that are not there": (edit_json("config.json", num_hidden_layers=4), [], ("layers.3", "no tensor")),
    "a family that transformers does not know": (edit_json("config.json", model_type="tomorrow_moe"), [], ("tomorrow_moe",)),
    "code of its own": (
        edit_json("config.json", model_type="own_moe", auto_map={"AutoConfig": "evil.Config"}),
        [],
        ("own_moe", "tested families"),
    ),
    "a target with a number too few": (
        text("a"),
        ["clustering.num_experts=[[3, 2]]", "export.formats=[tied]"],
        ("2 numbers", "3 MoE layers", "one number for each"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_PREPARE)
def test_what_only_prepare_can_see_fails_there_with_one_message_and_no_traceback(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    change, settings, says = IN_PREPARE[case]
    change(run_file.parent)
    options = [part for setting in settings for part in ("--set", setting.replace("{folder}", str(run_file.parent)))]
    result = hcsmoe(capsys, monkeypatch, "run", str(run_file), "--executor", "local", *options)
    assert result.exit_code in (1, 2), result.err
    errors = [line for line in result.err.splitlines() if line.startswith(("error: ", "failed: "))]
    assert len(errors) == 1, result.err
    for words in says:
        assert words in errors[0], result.err
    assert "Traceback" not in result.err
    assert "Error:" not in errors[0], "a class name is not for the user"
    assert "calibrate" not in [line.split(":")[0] for line in result.err.splitlines()], "nothing expensive has begun"
    assert nothing_left(run_file.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Seen only when they are loaded; by then nothing that looks like a model is there."""
    model = random_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = value
    model.save_pretrained(run_file.parent / "model", max_shard_size="60KB")
    result = hcsmoe(capsys, monkeypatch, "run", str(run_file), "--executor", "local")
    assert result.exit_code == 2
    assert "tensor model.layers.1.block_sparse_moe.experts.2.w2.weight holds NaN or infinity" in result.err
    assert "Traceback" not in result.err
    assert nothing_left(run_file.parent)


def test_a_run_that_works_exits_with_0_and_prints_a_row_a_model(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run file without any change: what the other tests fail for is their change alone."""
    result = hcsmoe(capsys, monkeypatch, "run", str(run_file), "--executor", "local")
    assert result.exit_code == 0, result.err
    report = json.loads((run_file.parent / "run" / "report.json").read_text())
    for model in report["models"]:
        (row,) = [line for line in result.out.splitlines() if line.startswith(f"│ {model['name']} ")]
        assert f"{model['parameters']:,}" in row
        assert f"{model['perplexity']:.3f}" in row
    assert str(run_file.parent / "run" / "models") in result.out
    assert not nothing_left(run_file.parent)
