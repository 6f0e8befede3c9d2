"""Every kind of tokenizer file is read, and every failure of a tokenizer is one line with the file's name."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken

from stages.contracts.errors import InputError
from tests.stages.texts import EXAMPLE, drawn, model_folder

TEXT = "the house stands by the river and the water flows "
GOOD = json.loads((EXAMPLE / "tokenizer.json").read_text())
SETTINGS = json.loads((EXAMPLE / "tokenizer_config.json").read_text())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def first_ids(text: Path, model: Path) -> list[int]:
    return list(drawn(text, model, sequence_length=10)[0])


def is_piece(ids: Sequence[int], whole: Sequence[int]) -> bool:
    return any(list(whole[begin : begin + len(ids)]) == list(ids) for begin in range(len(whole)))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer"])
def test_a_sentencepiece_model_alone_is_a_tokenizer(
    kind: str, tokenizer_class: str | None, text: Path, model: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{TEXT} number {number}" for number in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    if tokenizer_class:
        (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    shutil.copy(tmp_path / "m.model", model / "tokenizer.model")
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model")).encode(TEXT.strip())
    assert is_piece(first_ids(text, model)[2:], expected)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_a_tiktoken_file_is_a_tokenizer_and_read_anew_when_it_changes(name: str, text: Path, model: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    for more in ([b"th", b"the", b"ou"], [b"he", b"us", b"use"]):
        ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *more])}
        (model / name).write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+"
        encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        assert is_piece(first_ids(text, model), encoding.encode(TEXT))


def replace(name: str, **values: Any) -> Callable[[Path], object]:
    before = GOOD if name == "tokenizer.json" else SETTINGS
    return lambda model: (model / name).write_text(json.dumps({**before, **values}))


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def pipe(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
BOTH = "tokenizer.json with tokenizer_config.json "
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a newer version": (
        replace("tokenizer.json", version="2.0"), BOTH + "cannot be loaded as a tokenizer: Unknown tokenizer version '2.0'",
    ),
    "a model of an unknown type": (
        replace("tokenizer.json", model={"type": "Future"}), BOTH + "cannot be loaded as a tokenizer: data did not match",
    ),
    "no JSON": (write("tokenizer.json", "{"), BOTH + "cannot be loaded as a tokenizer: "),
    "a list": (write("tokenizer.json", "[]"), BOTH + "cannot be loaded as a tokenizer: "),
    "nothing": (write("tokenizer.json", ""), BOTH + "cannot be loaded as a tokenizer: "),
    "nested without end": (write("tokenizer.json", "[" * 10**5), BOTH + "cannot be loaded as a tokenizer: maximum recursion"),
    "added tokens of another type": (replace("tokenizer.json", added_tokens="x"), BOTH + "cannot be loaded as a tokenizer: "),
    "settings that are no JSON": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON: "),
    "settings that are a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json is not a JSON object; use "),
    "special tokens that are a list": (write("special_tokens_map.json", "[]"), "special_tokens_map.json is not a JSON"),
    "a class that is a number": (
        replace("tokenizer_config.json", tokenizer_class=3), BOTH + "cannot be loaded as a tokenizer: 'int' object",
    ),
    "a special token that is a number": (
        replace("tokenizer_config.json", bos_token=3), BOTH + "cannot be loaded as a tokenizer: Special token bos_token has",
    ),
    "a length that is a word": (
        replace("tokenizer_config.json", model_max_length="x"), BOTH + "fails as a tokenizer on a document of the text: '>'",
    ),
    "a word that it has no token for": (
        replace("tokenizer.json", model=WORDS, pre_tokenizer=None, post_processor=None, normalizer=None, added_tokens=[]),
        BOTH + "fails as a tokenizer on a document of the text: WordLevel error: Missing [UNK] token from the vocabulary",
    ),
    "a pipe": (pipe, "tokenizer.json is a pipe, socket or device; a regular file is needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_one_line_that_names_its_file(case: str, text: Path, model: Path) -> None:
    make, says = BROKEN[case]
    make(model)
    with pytest.raises(InputError) as raised:
        first_ids(text, model)
    assert str(raised.value).startswith(f"{model}/{says}")
    assert "\n" not in str(raised.value)


def test_no_tokenizer_is_one_line(text: Path, model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(InputError) as raised:
        first_ids(text, model)
    assert str(raised.value).startswith(f"{model} has no tokenizer that transformers can load: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        replace("tokenizer_config.json", chat_template="{% broken"),
        replace("tokenizer_config.json", model_max_length=4),
        replace("tokenizer_config.json", tokenizer_class="OfTomorrowTokenizer"),
        replace("tokenizer.json", truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ],
)
def test_what_ids_do_not_depend_on_does_not_matter(make: Callable[[Path], object], text: Path, model: Path) -> None:
    expected = first_ids(text, model)
    make(model)
    assert first_ids(text, model) == expected


def test_an_added_token_beyond_the_vocabulary_is_refused(text: Path, model: Path) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    replace("tokenizer.json", added_tokens=[*GOOD["added_tokens"], {"id": 4096, "content": "the house", **flags}])(model)
    with pytest.raises(InputError) as raised:
        first_ids(text, model)
    assert "to 4096 but the model's vocabulary is 0 to 4095; the ids come from another tokenizer" in str(raised.value)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("np.zeros(3, int)", "returns ndarray of shape [3] and int64 for a document; a list of token ids is needed"),
        ("[[1, 2]]", "returns list of shape [1, 2] and int64 for a document; a list of token ids is needed"),
        ("[1.5]", "returns list of shape [1] and float64 for a document; a list of token ids is needed"),
        ("['a']", "returns list of shape [1] and <U1 for a document; a list of token ids is needed"),
        ("None", "returns NoneType of shape [] and object for a document; a list of token ids is needed"),
        ("[[1], [2, 3]]", "fails as a tokenizer on a document of the text: setting an array element with a sequence."),
        ("{}[0]", "fails as a tokenizer on a document of the text: 0 is not there; use "),
    ],
)
def test_code_that_returns_no_list_of_ids_is_one_line(returned: str, says: str, text: Path, model: Path) -> None:
    (model / "tokenization_own.py").write_text(
        "import numpy as np\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        f"    def __call__(self, text, **options):\n        return {{'input_ids': {returned}}}\n"
    )
    replace("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})(model)
    with pytest.raises(InputError) as raised:
        drawn(text, model, trust_remote_code=True)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert np.asarray(drawn(text, EXAMPLE)).shape == (1, 8)
