"""Which files beside the weights an export takes along, and that none of them leads out of the model folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.run.identity import model_identity
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.untrusted import MAX_SMALL_BYTES
from tests.runs import read_config, run_all, tensor_bytes, token_ids
from tests.tiny import build, save

KEPT = [
    "LICENSE", "Notice.txt", "USE_POLICY.md", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "qwen.tiktoken", "special_tokens_map.json", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer/deep/vocab.txt", "vocab.json",
]  # fmt: skip
LEFT = [
    "adapter_config.json", "additional_chat_templates/run.py", "configuration_own.py", "hf_quant_config.json",
    "modeling_own.py", "params.json", "pytorch_model.bin", "setup.py",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32), tmp_path_factory.mktemp("side") / "source")


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def refused(folder: Path) -> str:
    """The one error that the identity of a model gives, with which every run begins."""
    with pytest.raises(InputError) as caught:
        model_identity(Checkpoint(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizer_generation_and_processor_are_kept_and_the_rest_is_listed(source: Path) -> None:
    add(source, *KEPT, *LEFT, "README.md", "original/consolidated.00.pth", "LICENSES/MIT.txt", ".gitattributes")
    found = Checkpoint(source).side_files
    assert found.kept == tuple(sorted([*KEPT, "README.md"]))
    assert found.left == tuple(sorted([*LEFT, "original/", "LICENSES/"]))


def test_names_that_are_no_text_are_left_behind_and_shown_escaped(source: Path) -> None:
    add(source, "vocab\n.json")
    (Path(os.fsdecode(os.fsencode(source) + b"/vocab\xff.json"))).write_text("{}")
    found = Checkpoint(source).side_files
    assert found.kept == ("generation_config.json",)
    assert found.left == ("'vocab\\n.json'", "'vocab\\udcff.json'")


def test_the_identity_of_a_model_covers_exactly_what_is_copied(source: Path) -> None:
    add(source, *KEPT, *LEFT)
    before = model_identity(Checkpoint(source))
    assert set(before["files"]) == {*KEPT, "config.json", "model.safetensors.index.json"}
    (source / "additional_chat_templates" / "rag.jinja").write_text("another")
    after = model_identity(Checkpoint(source))
    assert {name for name in KEPT if before["files"][name] != after["files"][name]} == {"additional_chat_templates/rag.jinja"}
    (source / "params.json").write_text("another")
    assert model_identity(Checkpoint(source)) == after


def test_an_export_has_what_is_kept_and_tells_what_is_left(source: Path, tmp_path: Path) -> None:
    add(source, *KEPT, *LEFT)
    (source / "tokenizer.json").unlink()  # it would be read for the names of its tokens
    path, _ = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [4], ["stock", "tied"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    kept = set(KEPT) - {"tokenizer.json"}
    own = {"README.md", "config.json", "model.safetensors.index.json"}
    for name, folder in exports.items():
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        code = {"modeling_hcsmoe.py"} if name.endswith("tied") else set()
        assert {file for file in files if not file.endswith(".safetensors")} == kept | own | code
    assert [model.get("left_behind") for model in report["models"]] == [None, LEFT, LEFT]
    listed = ", ".join(f"`{name}`" for name in LEFT)
    assert f"- Files of the source that are not copied: {listed}\n" in (exports["4e-tied"] / "README.md").read_text()


def test_code_is_kept_where_a_tokenizer_names_it_with_what_it_imports(source: Path) -> None:
    add(source, "tokenization_own.py", "helpers.py", "deeper.py", "unused.py", "modeling_own.py", "modeling_hcsmoe.py")
    auto_map = {"AutoTokenizer": [None, "tokenization_own.Own"], "AutoProcessor": "modeling_hcsmoe.Own", "x": "org/a--unused.X"}
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (source / "tokenization_own.py").write_text("from .helpers import a\nfrom . import gone\nfrom unused import b\n")
    (source / "helpers.py").write_text("def f():\n    from . import deeper\n")
    (source / "deeper.py").write_text("this is no Python (")
    found = Checkpoint(source).side_files
    assert [name for name in found.kept if name.endswith(".py")] == ["deeper.py", "helpers.py", "tokenization_own.py"]
    assert found.left == ("modeling_hcsmoe.py", "modeling_own.py", "unused.py")


def test_an_export_names_no_code_that_is_left_behind_and_no_place(source: Path, tmp_path: Path) -> None:
    flag = tmp_path / "was-run"
    add(source, "tokenization_own.py")
    (source / "modeling_own.py").write_text(f"open({str(flag)!r}, 'w')\n")
    model_code = {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.M", "AutoModelForCausalLM": "modeling_own.L"}
    config = {**read_config(source), "_name_or_path": "/home/someone/model"}
    tokenizer = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {**model_code, **tokenizer}}))
    path, _ = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [8], ["stock", "tied"])
    stock, tied = read_config(exports["8e-stock"]), read_config(exports["8e-tied"])
    del config["_name_or_path"]
    assert stock == {**config, "auto_map": tokenizer}
    assert tied["auto_map"]["AutoTokenizer"] == tokenizer["AutoTokenizer"]
    assert tied["auto_map"]["AutoModel"] == "modeling_hcsmoe.HCSMoEMixtralModel" and "AutoConfig" not in tied["auto_map"]
    for name, folder in exports.items():
        assert (folder / "tokenization_own.py").exists() and not (folder / "modeling_own.py").exists()
        for options in ({}, {"trust_remote_code": True}):
            if options or name == "8e-stock":
                AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not flag.exists()
    assert tensor_bytes(exports["8e-stock"]) == tensor_bytes(source)


@pytest.mark.parametrize("name", ["merges.txt", "additional_chat_templates/rag.jinja", "LICENSE"])
def test_a_link_out_of_the_folder_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret)
    assert refused(source) == (
        f"{source / name} is a link to {secret}, outside of the model folder; an export would publish that file: replace the "
        f"link by a copy, or remove it"
    )


def test_a_link_to_code_or_a_folder_outside_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "own.py").write_text("")
    (source / "own.py").symlink_to(tmp_path / "elsewhere" / "own.py")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    assert refused(source).startswith(f"{source / 'own.py'} is a link to {tmp_path / 'elsewhere' / 'own.py'}, outside of")
    (source / "own.py").unlink()
    (source / "tokenizer").symlink_to(tmp_path / "elsewhere")
    assert refused(source) == (
        f"{source / 'tokenizer'} is a link to a folder; links are followed to files only: copy the folder there"
    )


def test_links_within_a_folder_and_to_it_are_followed(source: Path, tmp_path: Path) -> None:
    add(source, "vocab.json")
    (source / "tokenizer.json").symlink_to("vocab.json")
    (tmp_path / "latest").symlink_to(source)
    assert {"tokenizer.json", "vocab.json"} <= set(Checkpoint(tmp_path / "latest").side_files.kept)


@pytest.mark.parametrize("is_shared", [False, True], ids=["blobs of the model", "blobs of the whole cache"])
def test_links_of_the_hub_cache_are_followed_to_its_blobs_alone(is_shared: bool, source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    blobs = repository / "blobs"
    add(blobs, "blob")
    if is_shared:
        add(tmp_path / "cache" / "blobs" / "ab", "blob")
        (blobs / "linked").symlink_to("../../blobs/ab/blob")
    (snapshot / "tokenizer.json").symlink_to(f"../../blobs/{'linked' if is_shared else 'blob'}")
    assert "tokenizer.json" in Checkpoint(snapshot).side_files.kept
    add(tmp_path / "cache" / "models--org--private" / "blobs", "blob")
    (snapshot / "vocab.json").symlink_to("../../../models--org--private/blobs/blob")
    assert f"{snapshot / 'vocab.json'} is a link to" in refused(snapshot)


def test_what_is_no_regular_file_is_refused_without_waiting(source: Path) -> None:
    os.mkfifo(source / "tokenizer.json")
    assert refused(source) == f"{source / 'tokenizer.json'} is a pipe, socket or device; a regular file is needed"
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("gone")
    assert refused(source) == (
        f"{source / 'tokenizer.json'} cannot be read: No such file or directory; download it again, or remove it"
    )
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("tokenizer.json")
    assert refused(source) == (f"{source / 'tokenizer.json'} is a link that leads in a circle; a regular file is needed")


def test_a_huge_file_is_refused(source: Path) -> None:
    with open(source / "vocab.bin", "wb") as raw:
        raw.truncate(MAX_SMALL_BYTES + 1)
    assert refused(source) == (
        f"{source / 'vocab.bin'} has 268,435,457 bytes; a file that is copied beside the weights may have 268,435,456: remove "
        f"it if it is no part of the tokenizer"
    )
