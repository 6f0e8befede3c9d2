"""Checkpoints that lie or are broken: one clear error that names file and tensor, and nothing is written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.errors import RunFailed
from stages.common import tables
from stages.common.errors import InputError
from stages.common.schemas import read_table
from stages.prepare.stage import sequences
from tests.stages.runs import read_config, read_tensors, rewrite, run_all, token_ids
from tests.stages.tiny import build, save

REPOSITORY = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
ROUTER = "model.layers.2.block_sparse_moe.gate.weight"


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


def edit_index(source: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def edit_header(source: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Change the header of the file that holds EXPERT; return the file's name."""
    file = json.loads((source / INDEX).read_text())["weight_map"][EXPERT]
    data = (source / file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (source / file).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return file


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "a\\b.safetensors", ""])
def test_index_that_leaves_the_folder(place: str, source: Path, tmp_path: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.__setitem__(EXPERT, place))
    refused(source, tmp_path, INDEX, EXPERT, repr(place))


def test_index_that_names_the_wrong_file(source: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in source.glob("*.safetensors"))
    edit_index(source, lambda weight_map: weight_map.__setitem__(EXPERT, next(f for f in files if f != weight_map[EXPERT])))
    refused(source, tmp_path, INDEX, EXPERT)


@pytest.mark.parametrize(
    "offsets", [lambda a, b: [a - 4, b - 4], lambda a, b: [a + 10**9, b + 10**9], lambda a, b: [a, b - 4], lambda a, b: [b, a]]
)
def test_header_with_offsets_that_are_not_the_tensors(offsets: Any, source: Path, tmp_path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[EXPERT]["data_offsets"] = offsets(*header[EXPERT]["data_offsets"])

    file = edit_header(source, change)
    refused(source, tmp_path, file, "tensor model.")


def test_header_with_an_unknown_dtype(source: Path, tmp_path: Path) -> None:
    file = edit_header(source, lambda header: header[EXPERT].update(dtype="F31"))
    refused(source, tmp_path, file, EXPERT, "'F31'")


def test_truncated_file(source: Path, tmp_path: Path) -> None:
    file = edit_header(source, lambda header: None)
    data = (source / file).read_bytes()
    (source / file).write_bytes(data[:-100])
    refused(source, tmp_path, file, "truncated")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (EXPERT, torch.ones(32, 47)),
        (EXPERT, torch.ones(48, 32)),
        (EXPERT, torch.ones(32, 48, dtype=torch.int32)),
        (ROUTER, torch.ones(7, 32)),
        (ROUTER, torch.ones(32, 8)),
        (ROUTER, torch.ones(8, 32, dtype=torch.int64)),
        ("model.norm.weight", torch.ones(31)),
    ],
)
def test_tensor_of_another_shape_or_kind(name: str, tensor: torch.Tensor, source: Path, tmp_path: Path) -> None:
    rewrite(source, {**read_tensors(source), name: tensor})
    message = refused(source, tmp_path)
    assert name in message or name.replace("experts.5.w2.weight", "experts.") in message
    assert str(source) in message


@pytest.mark.parametrize("layers", ["model.layers.", "model.layers.2."], ids=["of all layers", "of the last layer"])
def test_all_experts_transposed(layers: str, source: Path, tmp_path: Path) -> None:
    tensors = {
        name: value.T if name.startswith(layers) and name.endswith(".w2.weight") else value
        for name, value in read_tensors(source).items()
    }
    rewrite(source, tensors)
    refused(source, tmp_path, "model.safetensors", "experts.", "w2.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, ROUTER, "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(name: str, value: float, source: Path, tmp_path: Path) -> None:
    tensors = read_tensors(source)
    tensors[name][3, 5] = value
    rewrite(source, tensors)
    refused(source, tmp_path, "model.safetensors", name, "NaN or infinity")


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
    with pytest.raises(InputError, match=r"layer-0001\.statistics\.arrow: gate_sum_E of expert 2 is not finite"):
        tables.statistics(file)


@pytest.mark.parametrize(
    "change",
    [
        {"num_local_experts": 9},
        {"num_local_experts": 7},
        {"hidden_size": 64},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
    ],
)
def test_config_that_disagrees_with_the_tensors(change: dict[str, int], source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({**read_config(source), **change}))
    refused(source, tmp_path, str(source), "tensor")


def test_missing_expert(source: Path, tmp_path: Path) -> None:
    tensors = read_tensors(source)
    del tensors[EXPERT]
    rewrite(source, tensors)
    refused(source, tmp_path, "model.layers.1", "experts")


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
    args = {
        "place": "calibration", "model": str(source), "trust_remote_code": is_trusted, "data": [str(text)],
        "text_field": "text", "revision": None, "num_sequences": 1, "sequence_length": 2, "seed": 0,
    }  # fmt: skip
    with pytest.raises(InputError, match="vocabulary is 0 to 127"):  # of tiny-mixtral's tokenizer, by either class
        sequences(args)
    assert flag.exists() == is_trusted
