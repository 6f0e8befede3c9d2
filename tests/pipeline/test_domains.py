"""Texts by domain: what is drawn, evidence and perplexity of each, their weights, and what the report says of them."""

import json
import math
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.config import load_config
from pipeline.display.comparison import Comparison
from pipeline.run.record import read_record
from stages.contracts.evidence import LayerEvidence, read_evidence
from stages.contracts.layer_plan import read_plan
from stages.contracts.paths import domain_dir, plan_file, statistics_file
from stages.contracts.texts import texts_of
from stages.contracts.tokens import read_tokens
from stages.recombine.pairing import shard_weights
from tests.runs import FinishedRun, digests, execute, write_run_file
from tests.tiny import load

SIZES = {"chat-2": 5, "code": 4, "prose": 4}
"""Sequences of each domain: 13 over three, of which a token shard takes four."""
LENGTH = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Token ids of each domain, drawn from a range of its own, so that domains are routed in their own ways."""
    folder = tmp_path_factory.mktemp("domains")
    paths = {}
    for number, name in enumerate(SIZES):
        ids = np.random.default_rng(number).integers(3 + 30 * number, 33 + 30 * number, (8, LENGTH))
        paths[name] = folder / f"{name}.npy"
        np.save(paths[name], ids)
    return paths


def by_domain(files: dict[str, Path], **weights: float) -> dict[str, Any]:
    return {name: {"data": str(path), "weight": weights.get(name, 1)} for name, path in files.items()}


def settings_of(files: dict[str, Path], **more: Any) -> dict[str, Any]:
    return {
        "calibration.data": by_domain(files, code=3), "calibration.num_sequences": 13,
        "evaluation.data": by_domain(files), "evaluation.num_sequences": 13,
        "clustering.num_experts": [3], "export.formats": ["tied"], **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def mixed(
    files: dict[str, Path], finished_run: Callable[[str], FinishedRun], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    source = finished_run("mixtral").source
    return FinishedRun.of(write_run_file(tmp_path_factory.mktemp("mixed"), source, files["prose"], settings_of(files)))


def evidence_of(done: FinishedRun, layer: int) -> dict[str, LayerEvidence]:
    return {name: read_evidence(domain_dir(done.calibrate_dir, name), layer) for name in SIZES}


def test_token_shards_hold_one_domain_each(mixed: FinishedRun, files: dict[str, Path]) -> None:
    assert mixed.config.calibration.sequences_by_domain == SIZES
    assert {name: list(shards) for name, shards in mixed.config.calibration.shards_by_domain.items()} == {
        "chat-2": [0, 1], "code": [2], "prose": [3],
    }  # fmt: skip
    folder = mixed.run_dir / mixed.part("prepare", "calibration").dir
    for name, shards in mixed.config.calibration.shards_by_domain.items():
        drawn = np.concatenate([read_tokens(folder / f"tokens-{shard:04d}.arrow") for shard in shards])
        assert np.array_equal(drawn, np.load(files[name])[: SIZES[name]])


def test_evidence_of_a_domain_is_that_of_a_calibration_with_it_alone(
    mixed: FinishedRun, files: dict[str, Path], tmp_path: Path
) -> None:
    for name, path in files.items():
        alone = {"calibration.num_sequences": SIZES[name], "evaluation": None, "clustering.num_experts": [3]}
        other = FinishedRun.of(write_run_file(tmp_path / name, mixed.source, path, alone))
        for layer in (0, 1, 2):
            ours = statistics_file(domain_dir(mixed.calibrate_dir, name), layer)
            assert ours.read_bytes() == statistics_file(other.calibrate_dir, layer).read_bytes(), (name, layer)


def test_uniform_weights_count_every_domain_the_same(mixed: FinishedRun) -> None:
    """Merged with frequencies by hand: shares of routed tokens of each domain, averaged."""
    for layer in (0, 1, 2):
        parts = evidence_of(mixed, layer).values()
        used_E = sum(part["num_routed_tokens"] / part.num_tokens for part in parts)
        mean_ED = sum(part["output_sum"] / part.num_tokens for part in parts)
        plan = read_plan(plan_file(mixed.run_dir / mixed.part("cluster", "3e-tied").dir, layer))
        for slot in plan.slots:
            members = list(slot.experts)
            weights = {member.expert: member.weight for member in slot.members}
            for expert in members:
                assert weights.get(expert, 0) == pytest.approx(used_E[expert] / used_E[members].sum(), rel=1e-12)
        assert partition(plan.slot_E) == average_linkage(mean_ED, 3)


def partition(slot_E: "np.ndarray[Any, Any]") -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(slot_E == slot).tolist()) for slot in set(slot_E.tolist())}


def average_linkage(feature_ED: "np.ndarray[Any, Any]", count: int) -> set[frozenset[int]]:
    """Clusters by definition: join the two whose members' mean distance is least."""
    clusters = [frozenset([expert]) for expert in range(len(feature_ED))]

    def distance(one: frozenset[int], other: frozenset[int]) -> float:
        return float(np.mean([np.linalg.norm(feature_ED[a] - feature_ED[b]) for a in one for b in other]))

    while len(clusters) > count:
        one, other = min(combinations(clusters, 2), key=lambda pair: distance(*pair))
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one | other]
    return set(clusters)


@pytest.mark.parametrize("rule", ["given", "max_min"])
def test_other_weights_recompute_nothing_before_cluster(mixed: FinishedRun, rule: str) -> None:
    before = digests(mixed.calibrate_dir)
    other = FinishedRun.of(mixed.run_file, [f"clustering.domain_weights={rule}"])
    assert other.calibrate_dir == mixed.calibrate_dir and digests(mixed.calibrate_dir) == before
    assert other.recorder.stages == {"cluster", "merge", "assemble", "evaluate", "report"}
    assert other.part("cluster", "3e-tied").dir != mixed.part("cluster", "3e-tied").dir


def test_a_given_weight_changes_only_where_it_is_read(mixed: FinishedRun, files: dict[str, Path]) -> None:
    changed = by_domain(files, code=7)
    setting = f"calibration.data={yaml.safe_dump(changed, default_flow_style=True, width=10**6).strip()}"
    dirs = [FinishedRun.of(mixed.run_file, settings).part("cluster", "3e-tied").dir for settings in ([], [setting])]
    assert dirs[0] == dirs[1] == mixed.part("cluster", "3e-tied").dir
    weighted = [
        FinishedRun.of(mixed.run_file, [*settings, "clustering.domain_weights=given"]).part("cluster", "3e-tied").dir
        for settings in ([], [setting])
    ]
    assert len({*dirs, *weighted}) == 3


def test_given_weights_are_shares_of_tokens(mixed: FinishedRun) -> None:
    other = FinishedRun.of(mixed.run_file, ["clustering.domain_weights=given"])
    weights = {"prose": 1 / 5, "code": 3 / 5, "chat-2": 1 / 5}
    for layer in (0, 1, 2):
        found = evidence_of(mixed, layer)
        used_E = sum(weights[name] * part["num_routed_tokens"] / part.num_tokens for name, part in found.items())
        plan = read_plan(plan_file(other.run_dir / other.part("cluster", "3e-tied").dir, layer))
        for slot in plan.slots:
            for member in slot.members:
                share = used_E[member.expert] / used_E[list(slot.experts)].sum()
                assert member.weight == pytest.approx(share, rel=1e-12)


def test_perplexity_by_domain_is_that_of_the_whole_model(mixed: FinishedRun, files: dict[str, Path]) -> None:
    for model in mixed.report["models"]:
        is_source = model["target"] == "source"
        folder = mixed.source if is_source else mixed.model("3e-tied")
        whole = load(folder, dtype=torch.float32, **({} if is_source else {"trust_remote_code": True}))
        losses = {}
        for name, path in files.items():
            ids = torch.from_numpy(np.load(path)[: SIZES[name]])
            with torch.inference_mode():
                losses[name] = whole(input_ids=ids, labels=ids).loss.double().item()
            assert model["domains"][name]["loss"] == pytest.approx(losses[name], rel=1e-5)
            assert model["domains"][name]["perplexity"] == pytest.approx(math.exp(losses[name]), rel=1e-5)
            assert model["domains"][name]["num_predictions"] == SIZES[name] * (LENGTH - 1)
        macro = math.prod(math.exp(loss) for loss in losses.values()) ** (1 / len(losses))
        assert model["macro_perplexity"] == pytest.approx(macro, rel=1e-5)
        total = sum(losses[name] * count for name, count in SIZES.items()) / sum(SIZES.values())
        assert model["loss"] == pytest.approx(total, rel=1e-5)


def ranks(values_E: "np.ndarray[Any, Any]") -> list[float]:
    """Rank of each value: how many are below it, and half of the others that equal it."""
    return [
        sum(other < value for other in values_E) + (sum(other == value for other in values_E) - 1) / 2 for value in values_E
    ]


def test_the_report_states_coverage_and_rank_correlations(mixed: FinishedRun) -> None:
    saliency = {
        layer: {name: part["gated_output_norm_sum"] for name, part in evidence_of(mixed, layer).items()} for layer in range(3)
    }
    target = mixed.report["models"][1]
    for name in SIZES:
        shares = []
        for layer in range(3):
            plan = read_plan(plan_file(mixed.run_dir / mixed.part("cluster", "3e-tied").dir, layer))
            stay = [max(slot.members, key=lambda member: member.weight).expert for slot in plan.slots]
            shares.append(sum(saliency[layer][name][expert] for expert in stay) / saliency[layer][name].sum())
        assert target["coverage"][name]["mean"] == pytest.approx(np.mean(shares))
        assert target["coverage"][name]["least"] == pytest.approx(min(shares))
    assert [row["domains"] for row in mixed.report["rank_correlations"]] == [list(pair) for pair in combinations(SIZES, 2)]
    for row in mixed.report["rank_correlations"]:
        values = [np.corrcoef(*(ranks(saliency[layer][name]) for name in row["domains"]))[0, 1] for layer in range(3)]
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["least"] == pytest.approx(min(values))


def test_a_comparison_has_a_table_for_each_domain(mixed: FinishedRun) -> None:
    found = Comparison.all_of(mixed.report)
    assert [one.measure for one in found] == ["geometric mean over domains", "all tokens", *SIZES]
    source, target = mixed.report["models"]
    for one in found[2:]:
        assert one.source == source["domains"][one.measure]["perplexity"]
        (cell,) = one.rows[""].values()
        assert cell.perplexities == (target["domains"][one.measure]["perplexity"],)
    text = CliRunner().invoke(app, ["compare", str(mixed.run_file), "--format", "markdown"]).stdout
    assert all(f"({name})" in text for name in SIZES)


def test_sampled_groups_are_groups_of_each_domain(mixed: FinishedRun) -> None:
    sampled = FinishedRun.of(mixed.run_file, ["calibration.sampling={fraction: 0.5, groups: 2}"])
    for name, count in SIZES.items():
        groups = read_evidence(domain_dir(sampled.calibrate_dir, name), 0).groups
        assert groups is not None
        assert groups.num_tokens_G.sum() == count * LENGTH // 2 and len(groups.num_tokens_G) == 2
        assert abs(int(groups.num_tokens_G[0]) - int(groups.num_tokens_G[1])) <= LENGTH // 2
    assert 0 < sampled.report["certainty"]["mean_relative_standard_error"] < 10


def test_a_refitted_variant_runs_on_domains(mixed: FinishedRun) -> None:
    other = FinishedRun.of(mixed.run_file, ["refit.mode=sequential"])
    plain, refitted = (run.report["models"][1]["macro_perplexity"] for run in (mixed, other))
    assert refitted != plain


def test_the_card_names_files_of_domains_without_paths(mixed: FinishedRun) -> None:
    card = (mixed.model("3e-tied") / "README.md").read_text()
    assert "chat-2 (chat-2.npy), code (code.npy), prose (prose.npy)" in card
    assert str(mixed.run_dir.parent) not in card


def test_the_order_of_domains_in_a_run_file_changes_nothing(mixed: FinishedRun, files: dict[str, Path], tmp_path: Path) -> None:
    backwards = dict(reversed(by_domain(files, code=3).items()))
    values = yaml.safe_load(mixed.run_file.read_text())
    values["calibration"]["data"] = backwards
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert list(yaml.safe_load(path.read_text())["calibration"]["data"]) == list(backwards)
    assert execute(load_config(path, []))[1].units == []


def test_a_record_of_domains_is_read_back(mixed: FinishedRun) -> None:
    record = read_record(mixed.run_dir)
    assert set(record.identities) == {"model", *texts_of(record.config)}
    assert "calibration.data.chat-2" in record.identities
    assert execute(mixed.config)[1].units == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no domain": ({"calibration.data": {}}, "calibration.data: Dictionary should have at least 1 item"),
    "a name that is a path": ({"calibration.data": {"../x": "a.npy"}}, r"data...\/x.\[key\]: String should match"),
    "names that differ in case": ({"calibration.data": {"a": "a.npy", "A": "a.npy"}}, "two domains named a, apart from case"),
    "a weight of zero": (
        {"calibration.data": {"a": {"data": "a.npy", "weight": 0}}}, "data.a.weight: Input should be greater than 0",
    ),
    "no data": ({"calibration.data": {"a": {}}}, "calibration.data.a.data is missing"),
    "more domains than sequences": (
        {"calibration.data": {"a": "a.npy", "b": "b.npy"}, "calibration.num_sequences": 1},
        "num_sequences is 1 but data has 2 domains",
    ),
    "groups that a domain cannot fill": (
        {"calibration.data": {"a": "a.npy", "b": "b.npy"}, "calibration.sampling": {"fraction": 0.5, "groups": 5}},
        "sampling.groups is 5 but there are 4 sequences of a domain",
    ),
    "a revision for all": (
        {"calibration.data": {"a": "a.npy"}, "calibration.revision": "main"}, "revision is set, but data is a mapping",
    ),
    "weights without domains": (
        {"clustering.domain_weights": "max_min"}, "clustering.domain_weights is max_min but calibration.data has no domains",
    ),
    "a missing file": ({"calibration.data": {"a": "/nowhere/a.npy"}}, "calibration.data.a.data: /nowhere/a.npy does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_domain_is_one_line(
    case: str,
    mixed: FinishedRun,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, message = BAD[case]
    run_file = write_run_file(tmp_path, mixed.source, files["prose"], settings)
    monkeypatch.setattr("sys.argv", ["hcsmoe", "plan", str(run_file)])
    with pytest.raises(SystemExit, match="2"):
        main()
    (line,) = capsys.readouterr().err.replace("\n", " ").strip().split("error: ")[1:]
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_plan_counts_texts_and_token_shards_of_domains(mixed: FinishedRun) -> None:
    shown = CliRunner().invoke(app, ["plan", str(mixed.run_file)]).stdout
    assert "4 token shards" in shown
    assert load_config(mixed.run_file, []).calibration.domains == tuple(SIZES)


def test_a_refit_counts_domains_as_their_weights_say(mixed: FinishedRun) -> None:
    """A token shard holds one domain; its weight over what was drawn. What counts a million times as much is fitted to."""
    heavy = {name: {"data": str(path), "weight": 1e6 if name == "code" else 1} for name, path in files_of(mixed).items()}
    given = ["clustering.domain_weights=given", f"calibration.data={json.dumps(heavy)}"]
    runs = [FinishedRun.of(mixed.run_file, ["refit={mode: sequential, ridge: 1.0e-4}", *more]) for more in ([], given)]
    (target,) = runs[1].view.targets
    weights, data = shard_weights(runs[1].view, target), runs[1].view.config.calibration
    for name, shards in data.shards_by_domain.items():
        due = (1e6 if name == "code" else 1) / (1e6 + 2) * 13 / SIZES[name]
        assert [weights[shard] for shard in shards] == pytest.approx([due] * len(shards))
    assert shard_weights(runs[0].view, runs[0].view.targets[0]) == ()
    errors = [first_error(run) for run in runs]
    assert errors[1] < 0.5 * errors[0], errors


def files_of(run: FinishedRun) -> dict[str, Path]:
    data = run.view.config.calibration.data
    assert isinstance(data, dict)
    return {name: Path(domain.data[0]) for name, domain in data.items()}


def first_error(run: FinishedRun) -> float:
    """What is left of the first layer's target, each token counted with its weight."""
    manifest = run.run_dir / run.part("recombine", "3e-tied").dir / "manifests" / "layer-0000.json"
    return float(json.loads(manifest.read_text())["facts"]["error_after"])
