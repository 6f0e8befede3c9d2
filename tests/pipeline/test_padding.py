"""One document a sequence: padding counts nowhere.

Dimensions: S sequences, T tokens, E experts, F neurons of an expert.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from torch.nn.functional import silu
from transformers import AutoTokenizer

from pipeline.checks import check
from pipeline.config import load_config, read_config
from pipeline.run.view import RunView
from stages.calibrate.cells import ALL_TOKENS
from stages.calibrate.collectors.registry import FURTHER, collectors
from stages.calibrate.spec import CalibrationShardArgs
from stages.calibrate.sums import PartialSums, add_up, evidence_of
from stages.calibrate.token_sample import ShardPlace
from stages.calibrate.units import open_shard
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import domain_dir, tokens_file
from stages.contracts.settings import NEURON_COLUMN
from stages.contracts.tokens import read_place, read_tokens
from stages.contracts.windows import NO_TOKEN
from stages.model.stream import Stream, pass_through
from stages.recombine.pairing import shard_weights
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, read_tensors, write_run_file
from tests.stages.test_chat import TEMPLATE
from tests.stages.test_merge_plans import surveyed
from tests.stages.test_statistics import Layer, close
from tests.stages.texts import drawn
from tests.tiny import build, load, logits, save

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
LENGTH = 48
LAYER = 1


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Some shorter than a sequence, one longer."""
    said = ["the house and the river", "what is that", "a man came to the door of the house", "yes", "no, it was night"]
    return [
        [{"role": "user", "content": said[number % 5]}, {"role": "assistant", "content": f"{said[number % 4]} " * (number + 1)}]
        for number in range(count)
    ]


def notes(count: int) -> list[str]:
    text = "It was a night of the river, and the caf\xe9 by the house was \u4e16\u754c to them all"
    return [text[: 16 + 12 * number] for number in range(count)]


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the example in float32, with a chat template."""
    folder = tmp_path_factory.mktemp("source")
    load(EXAMPLE, dtype=torch.float32, num_hidden_layers=LAYER + 1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def mixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Calibrated on padded conversations and packed prose; evaluated on padded conversations and padded notes."""
    folder = tmp_path_factory.mktemp("mixed")
    chat = {"data": lines(folder / "chat.jsonl", [{"messages": one} for one in conversations(7)]), "format": "chat"}
    other = {"data": lines(folder / "notes.jsonl", [{"text": one} for one in notes(5)])}
    packed = {"data": str(REPOSITORY / "examples" / "text" / "calibration-fiction.jsonl")}
    cut = {"sequence_length": LENGTH, "tokens_per_shard": 3 * LENGTH, "tokens_per_micro_batch": 2 * LENGTH}
    settings = {
        "calibration": {"data": {"chat": {**chat, "packing": False}, "prose": packed}, "num_sequences": 12, **cut},
        "evaluation": {"data": {"chat": chat, "notes": other}, "num_sequences": 10, "packing": False, **cut},
        "clustering.num_experts": [4], "export.formats": ["stock"], "merging.align": "activation",
    }  # fmt: skip
    return FinishedRun.of(write_run_file(folder, source, Path("unused"), settings))


def sequences_of(done: FinishedRun, section: str, domain: str) -> list[np.ndarray]:
    """Token ids of each sequence without padding, which stands at the ends alone."""
    folder = done.run_dir / done.part("prepare", section).dir
    shards = getattr(done.config, section).shards_by_domain[domain]
    rows = np.concatenate([read_tokens(folder / tokens_file(shard)) for shard in shards])
    lengths = (rows != NO_TOKEN).sum(1)
    assert all((row[:length] != NO_TOKEN).all() for row, length in zip(rows, lengths, strict=True))
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def test_a_conversation_is_a_sequence_cut_or_padded(mixed: FinishedRun, source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    due = [tokenizer.apply_chat_template(one, return_dict=True)["input_ids"][:LENGTH] for one in conversations(7)]
    found = [row.tolist() for row in sequences_of(mixed, "calibration", "chat")]
    assert len(found) == 6 and all(row in due for row in found) and len({tuple(row) for row in found}) == 6
    assert min(map(len, found)) < LENGTH == max(map(len, found))
    assert all(len(row) == LENGTH for row in sequences_of(mixed, "calibration", "prose"))
    assert read_place(mixed.run_dir / mixed.part("prepare", "calibration").dir / tokens_file(3)) is None, "prose is packed"


def test_evidence_of_padded_sequences_is_that_of_a_whole_model_on_each_alone(mixed: FinishedRun, source: Path) -> None:
    sequences = sequences_of(mixed, "calibration", "chat")
    layers = [Layer(source, LAYER, ids_T[None]) for ids_T in sequences]
    found = read_evidence(domain_dir(mixed.calibrate_dir, "chat"), LAYER, [NEURON_COLUMN])
    num_tokens = sum(map(len, sequences))
    assert found.num_tokens == found.num_output_tokens == num_tokens < 6 * LENGTH
    assert read_evidence(domain_dir(mixed.calibrate_dir, "prose"), LAYER).num_tokens == 6 * LENGTH
    for expert in range(found.num_experts):
        assert found["num_routed_tokens"][expert] == sum(int((layer.index_Tk == expert).sum()) for layer in layers)
        gates = [layer.gates_of(expert) for layer in layers]
        outputs = [layer.outputs_of(expert) for layer in layers]
        close(found["gate_sum"][expert], sum(gate_T.sum() for gate_T in gates))
        close(found["output_sum"][expert], sum(output_TD.sum(0) for output_TD in outputs))
        norms = [(gate_T * output_TD.norm(dim=1)).sum() for gate_T, output_TD in zip(gates, outputs, strict=True)]
        close(found["gated_output_norm_sum"][expert], sum(norms))
        gate_FD, up_FD = layers[0].experts.gate_up_proj[expert].double().chunk(2)
        activations_TF = torch.cat([silu(layer.x_TD @ gate_FD.T) * (layer.x_TD @ up_FD.T) for layer in layers])
        assert found[NEURON_COLUMN].shape[1] == num_tokens, "few enough to keep them all"
        close(found[NEURON_COLUMN][expert], activations_TF)
    close(found["router_probability_sum"], sum(layer.router_logits_TE.softmax(1).sum(0) for layer in layers))
    close(found["router_logit_gram"], sum(layer.router_logits_TE.T @ layer.router_logits_TE for layer in layers))


def test_perplexity_and_bits_per_byte_are_those_of_a_whole_model_on_each_alone(mixed: FinishedRun, source: Path) -> None:
    model, tokenizer, total, count = load(source), AutoTokenizer.from_pretrained(source), 0.0, 0
    scores = mixed.report["models"][0]
    for domain in ("chat", "notes"):
        loss, predicted, num_bytes = 0.0, 0, 0
        for ids_T in sequences_of(mixed, "evaluation", domain):
            ids = torch.from_numpy(ids_T)
            loss += functional.cross_entropy(logits(model, ids[None])[0, :-1], ids[1:], reduction="sum").item()
            predicted += len(ids) - 1
            num_bytes += len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
        ours = scores["domains"][domain]
        assert ours["num_predictions"] == predicted
        assert ours["perplexity"] == pytest.approx(math.exp(loss / predicted), rel=1e-5)
        known = pytest.approx(loss / math.log(2) / num_bytes, rel=1e-5) if domain == "notes" else None
        assert ours["bits_per_byte"] == known
        total, count = total + loss, count + predicted
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_card_says_that_documents_are_not_joined(mixed: FinishedRun) -> None:
    card = (mixed.model("4e-stock") / "README.md").read_text()
    assert f"12 sequences of at most {LENGTH} tokens of chat (chat.jsonl, one document a sequence), prose (" in card
    assert card.count("packing: false") == 1


def test_domains_weigh_in_a_refit_by_their_tokens(mixed: FinishedRun) -> None:
    weighted = ["clustering.domain_weights=given", "calibration.data.chat.weight=3"]
    config = load_config(mixed.run_file, weighted)
    view = RunView(config, check(config).inputs)
    chat_shards = config.calibration.shards_by_domain["chat"]
    folder = mixed.run_dir / mixed.part("prepare", "calibration").dir
    counts = [
        int((read_tokens(folder / tokens_file(shard)) != NO_TOKEN).sum()) for shard in range(config.calibration.num_shards)
    ]
    products = [weight * count for weight, count in zip(shard_weights(view, view.targets[0]), counts, strict=True)]
    assert sum(products[shard] for shard in chat_shards) / sum(products) == pytest.approx(3 / 4)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_all_collectors_see_tokens_alone(family: str, tmp_path: Path) -> None:
    """Gates on outputs, and on inputs; every sample of tokens, too."""
    folder = save(build(family, torch.float32), tmp_path / "source")
    survey, _ = surveyed(str(folder))
    held = open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, routers=survey.routers))
    gathered, lengths, layer = collectors(sorted(FURTHER)), [5, 32, 17, 2, 31, 3, 9, 20], survey.moe_layers[-1]
    ids_ST = torch.from_numpy(np.random.default_rng(0).integers(3, 128, (8, 32)))
    is_token_ST = torch.arange(32) < torch.tensor(lengths)[:, None]

    def sums_of(ids: torch.Tensor, first: int, is_token_T: torch.Tensor) -> PartialSums:
        place, into = ShardPlace(int(is_token_T.sum()), first, sum(lengths), 1, 1, seed=0), dict[int, Watcher]()
        stream = Stream(around=lambda one: held.watch(one, into, ALL_TOKENS, gathered, place, is_token_T))
        pass_through(held.shard, ids, 4, {"source": stream})
        return into[layer].result()

    padded = sums_of(ids_ST.where(is_token_ST, NO_TOKEN), 0, is_token_ST.flatten())
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    alone = [sums_of(ids_ST[[s], :n], firsts[s], torch.ones(n, dtype=torch.bool)) for s, n in enumerate(lengths)]
    products = WeightProducts(held.shard.expert_weights(layer))
    found, due = (evidence_of(one, gathered, products, False) for one in (padded, add_up(alone, gathered)))
    assert found.num_tokens == found.num_output_tokens == due.num_tokens == sum(lengths)
    assert found.columns.keys() == due.columns.keys() > {column.name for one in FURTHER.values() for column in one.columns}
    for name, values in due.columns.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5 * max(1, np.abs(values).max()), err_msg=name)


def test_a_refit_on_padded_sequences_is_that_on_the_same_sequences_without_padding(source: Path, tmp_path: Path) -> None:
    """Documents of 24 tokens: as sequences of 24, and padded to 40."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    known = (f" {word}" for word in re.findall(r"[a-z]+", "the and of house river man night door was said with from they upon"))
    words = [word for word in known if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
    chance = np.random.default_rng(0)
    texts = ["".join(chance.choice(words, 24)) for _ in range(16)]
    assert len(words) > 10 and {len(tokenizer(text)["input_ids"]) for text in texts} == {24}
    data, checkpoints = lines(tmp_path / "notes.jsonl", [{"text": text} for text in texts]), []
    for length in (24, 40):
        settings = {
            "calibration": {"data": data, "num_sequences": 16, "packing": False, "sequence_length": length,
                            "tokens_per_shard": 4 * length, "tokens_per_micro_batch": 2 * length},
            "evaluation": None, "clustering.num_experts": [4], "export": {"formats": ["stock"], "router": "fitted"},
            "refit.mode": "sequential",
        }  # fmt: skip
        done = FinishedRun.of(write_run_file(tmp_path / str(length), source, Path("unused"), settings))
        assert {tuple(row) for row in sequences_of(done, "calibration", "")} == {
            tuple(tokenizer(text)["input_ids"]) for text in texts
        }
        checkpoints.append(read_tensors(done.model("4e-stock")))
    for name, value in checkpoints[0].items():
        np.testing.assert_allclose(checkpoints[1][name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), err_msg=name)


def test_padding_has_no_place_in_a_sample_or_in_a_text_to_slide_over() -> None:
    chat = {"one": {"data": "a.jsonl", "format": "chat", "packing": False}, "two": "b.txt"}
    base: dict[str, Any] = {"model": "m", "run_dir": "r", "calibration": {"data": chat}, "clustering": {"num_experts": 2}}
    read_config(base)
    with pytest.raises(ValidationError, match=r"sampling is set, but packing is false: .*; leave one of them out"):
        read_config({**base, "calibration": {"data": chat, "sampling": {"fraction": 0.5, "groups": 2}}})
    with pytest.raises(ValidationError, match=r"perplexity.stride is 16, .* but packing is false; leave one of them out"):
        read_config({**base, "evaluation": {"data": chat, "perplexity": {"stride": 16}}})


def test_documents_that_make_no_sequence_are_one_line(tmp_path: Path) -> None:
    rows = [{"text": "the house"}, {"text": "the river"}]
    path = Path(lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(
        InputError, match=r"holds 2 documents but num_sequences is 3 and packing is false; give more text, lower"
    ):
        drawn(path, packing=False, num_sequences=3)
    path = Path(lines(tmp_path / "b.jsonl", [*rows, {"text": "x"}]))
    with pytest.raises(InputError, match=r"has a document of 1 tokens, but with packing false each needs two; take it out, or"):
        drawn(path, packing=False, num_sequences=3)
    np.save(tmp_path / "ids.npy", np.zeros((2, 8), dtype=np.int64))
    with pytest.raises(InputError, match=r"calibration.packing is false, but .*ids.npy holds token ids; leave packing out"):
        drawn(tmp_path / "ids.npy", packing=False)
