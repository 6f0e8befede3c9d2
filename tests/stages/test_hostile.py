"""Checkpoints that lie or are broken, where a case takes code. What is plain data stands in `tests/hostile/`."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.errors import RunFailed
from stages.contracts.arrow import read_table
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.prepare.spec import TextArgs
from stages.prepare.units import sequences
from tests.runs import read_config, read_tensors, rewrite, run_all, token_ids
from tests.tiny import build, save

REPOSITORY = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32), tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def refused(source: Path, tmp_path: Path, *named: str) -> str:
    """Run it; return the error, which must name what is given, after which no weights and no model are there."""
    path, _ = token_ids(tmp_path)
    with pytest.raises((InputError, RunFailed)) as caught:
        run_all(source, tmp_path / "run", path, [4], ["stock", "tied"])
    message = str(caught.value)
    assert "Traceback" not in message
    for text in named:
        assert text in message
    assert not (tmp_path / "run" / "models").exists()
    assert not [*(tmp_path / "run").rglob("*.safetensors")] or "hidden" in {p.name for p in (tmp_path / "run").rglob("*")}
    return message


@pytest.mark.parametrize("layers", ["model.layers.", "model.layers.2."], ids=["of all layers", "of the last layer"])
def test_all_experts_transposed(layers: str, source: Path, tmp_path: Path) -> None:
    tensors = {
        name: value.T if name.startswith(layers) and name.endswith(".w2.weight") else value
        for name, value in read_tensors(source).items()
    }
    rewrite(source, tensors)
    refused(source, tmp_path, "model.safetensors", "experts.", "w2.weight")


def test_statistics_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    path, _ = token_ids(tmp_path)
    run_all(source, tmp_path / "run", path, [4], ["stock"])
    (file,) = (tmp_path / "run").glob("calibrate-*/layer-0001.statistics.arrow")
    table = read_table(file)
    sums = table["gate_sum"].to_numpy().copy()
    sums[2] = float("nan")
    table = table.set_column(table.schema.get_field_index("gate_sum"), table.schema.field("gate_sum"), pa.array(sums))
    file.unlink()  # it is mapped to memory
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"layer-0001\.statistics\.arrow: gate_sum of expert 2 is not finite"):
        read_evidence(file.parent, 1)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/hcsmoe-pickle-was-run").touch, ())


def test_pickle_files_are_not_opened(source: Path, tmp_path: Path) -> None:
    for path in (*source.glob("*.safetensors"), source / INDEX):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    refused(source, tmp_path, "pytorch_model.bin", "safetensors")
    assert not Path("/tmp/hcsmoe-pickle-was-run").exists()


def test_code_that_comes_with_a_model_is_not_run(source: Path, tmp_path: Path) -> None:
    flag = tmp_path / "was-run"
    (source / "modeling_evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"}
    config = read_config(source)
    (source / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    refused(source, tmp_path, "evil is not among the", "tested families")
    (source / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    path, _ = token_ids(tmp_path)
    run_all(source, tmp_path / "native", path, [4], ["stock"])  # mixtral is transformers' own: theirs is not needed
    assert not flag.exists()


def test_a_tied_export_is_no_source(source: Path, tmp_path: Path) -> None:
    path, _ = token_ids(tmp_path)
    tied = run_all(source, tmp_path / "run", path, [4], ["tied"])["4e-tied"]
    with pytest.raises((InputError, RunFailed), match="tied export"):
        run_all(Path(shutil.copytree(tied, tmp_path / "copy")), tmp_path / "again", path, [2], ["tied"])


@pytest.mark.parametrize("is_trusted", [False, True])
def test_code_that_comes_with_a_tokenizer_is_run_only_if_trusted(is_trusted: bool, source: Path, tmp_path: Path) -> None:
    flag = tmp_path / "was-run"
    (source / "tokenization_own.py").write_text(
        "from pathlib import Path\n\n"
        "from transformers import PreTrainedTokenizerFast\n\n"
        f"Path({str(flag)!r}).touch()\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    pass\n"
    )
    shutil.copy(REPOSITORY / "examples" / "tiny-mixtral" / "tokenizer.json", source / "tokenizer.json")
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 20)
    args = TextArgs("calibration", str(source), is_trusted, (str(text),), "text", 1, 2, seed=0)
    with pytest.raises(InputError, match="vocabulary is 0 to 127"):  # of tiny-mixtral's tokenizer, by either class
        sequences(args)
    assert flag.exists() == is_trusted
