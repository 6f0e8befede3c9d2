"""What every stage makes of one fixed run: `python -m tests.pipeline.golden_digests` records it in `golden_digests.json`.

The model's weights are drawn by numpy's frozen generator, float32, experts in three planted groups that no rounding tears
apart. What every processor computes alike (token ids, counts, labels, names, shapes, configs) is recorded as it is or as its
digest; what depends on a processor's roundings as sums and norms, to be compared with a tolerance. A change of roundings alone
is therefore not seen.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from stages.contracts.arrow import read_table
from stages.contracts.paths import SCORES_FILE, SURVEY_FILE
from stages.registry import stage_specs
from tests.runs import FinishedRun, write_run_file

RECORD = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.pipeline.golden_digests"
UPSTREAM = {
    "prepare": (),
    "requests": (),
    "calibrate": ("prepare",),
    "cluster": ("calibrate",),
    "recombine": ("prepare", "cluster"),
    "mtp": ("prepare", "cluster", "recombine"),
    "merge": ("prepare", "cluster", "recombine", "mtp"),
    "assemble": ("prepare", "merge"),
    "evaluate": ("prepare", "assemble"),
    "report": ("prepare", "assemble", "evaluate"),
}
"""What a stage reads: where that has changed, its own results may, too."""
VERSIONS = {spec.name: spec.version for spec in stage_specs()}
_HIDDEN, _INTERMEDIATE, _EXPERTS, _LAYERS, _VOCABULARY = 32, 48, 6, 2, 96
_CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "float32", "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE, "num_local_experts": _EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": _VOCABULARY, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip


def write_model(folder: Path) -> Path:
    """The checkpoint, and token ids beside it."""
    chance = np.random.RandomState(0)  # its numbers never change; those of a newer generator may

    def drawn(*shape: int, scale: float = 0.3) -> np.ndarray[Any, Any]:
        return (scale * chance.standard_normal(shape)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": drawn(_VOCABULARY, _HIDDEN, scale=1), "lm_head.weight": drawn(_VOCABULARY, _HIDDEN)}
    tensors["model.norm.weight"] = np.ones(_HIDDEN, np.float32)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in {"q": _HIDDEN, "k": _HIDDEN // 2, "v": _HIDDEN // 2, "o": _HIDDEN}.items():
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = drawn(rows, _HIDDEN)
        for name in ("input", "post_attention"):
            tensors[f"{prefix}.{name}_layernorm.weight"] = np.ones(_HIDDEN, np.float32)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = drawn(_EXPERTS, _HIDDEN)
        shapes = {"w1": (_INTERMEDIATE, _HIDDEN), "w2": (_HIDDEN, _INTERMEDIATE), "w3": (_INTERMEDIATE, _HIDDEN)}
        groups = [{name: drawn(*shape) for name, shape in shapes.items()} for _ in range(3)]
        for expert in range(_EXPERTS):
            for name, shape in shapes.items():
                own = drawn(*shape, scale=0.02 * (1 + expert))
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = groups[expert % 3][name] + own
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    np.save(folder.parent / "ids.npy", chance.randint(0, _VOCABULARY, (8, 32)))
    return folder


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _summary(values: Any) -> list[float]:
    """Sum and norm."""
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    return [float(flat.sum()), float(np.linalg.norm(flat))]


def _table(path: Path) -> dict[str, Any]:
    """Integers and texts as a digest, numbers as a summary, by column."""
    found: dict[str, Any] = {}
    for name, column in zip(read_table(path).column_names, read_table(path).columns, strict=True):
        values = column.to_pylist()
        is_number = np.asarray(values[0] if isinstance(values[0], list) else values).dtype.kind == "f"
        found[name] = {"numbers": _summary(values)} if is_number else {"digest": _digest(values)}
    return found


def _tables(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): _table(path) for path in sorted(folder.rglob("*.arrow"))}


def _weights(folder: Path) -> dict[str, Any]:
    """Files, names, dtypes and shapes as a digest; each file's values as a summary."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        layout = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
        parts = [_summary(tensor) for tensor in tensors.values()]
        found[path.name] = {"digest": _digest(layout), "numbers": [number for part in parts for number in part]}
    return found


def _assembled(folder: Path) -> dict[str, Any]:
    """Names of all files; configs, index and code as digests."""
    texts = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".py")]
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {"files": names, **{path.name: {"digest": _digest(path.read_text())} for path in texts}}


def _report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Its keys, and what it says of models and never routed experts; versions and paths differ between machines."""
    models = report["models"]
    rows = [{key: model[key] for key in sorted(model) if key not in ("path", "perplexity", "loss")} for model in models]
    exact = [sorted(report), rows, report["never_routed"], report["warnings"]]
    gaps = [gap["perplexity_gap"] for gap in report["tied_stock_gaps"]]
    losses = [model["loss"] for model in models]
    return {"exact": {"digest": _digest(exact)}, "losses": {"numbers": losses}, "gaps": {"numbers": gaps}}


def found_in(folder: Path) -> dict[str, Any]:
    """Run the pipeline in an empty folder; what each stage made."""
    model = write_model(folder / "golden")
    settings = {"clustering.num_experts": [6, 3], "clustering.linkage": "average"}
    done = FinishedRun.of(write_run_file(folder, model, folder / "ids.npy", settings))
    prepared, targets = done.view.parts("prepare"), done.view.targets
    plan = json.loads((done.run_dir / done.part("prepare", "model").dir / SURVEY_FILE).read_text())
    scores: dict[str, Any] = {}
    names = {"source": "source", **{target.part: target.name for target in targets}}
    for part in done.view.parts("evaluate"):
        folder = done.run_dir / part.dir
        values = json.loads((folder / SCORES_FILE).read_text())
        found = {key: {"digest": None} if value is None else {"numbers": [value]} for key, value in values.items()}
        scores[names[part.name]] = found | _tables(folder)
    return {
        "prepare": {"plan": {"digest": _digest(plan)}, **{one.full_name: _tables(done.run_dir / one.dir) for one in prepared}},
        "requests": {},  # the run has no tasks
        "calibrate": _tables(done.calibrate_dir),
        "cluster": {one.full_name: _tables(done.run_dir / one.dir) for one in done.view.parts("cluster")},
        "recombine": {},  # what it solves depends on the processor's roundings; tests/stages/test_recombine.py compares it
        "mtp": {},  # the model has no layers that predict further tokens
        "merge": {one.name: _weights(done.model(one.part)) for one in targets},
        "assemble": {one.name: _assembled(done.model(one.part)) for one in targets},
        "evaluate": scores,
        "report": _report(done.report),
    }


def differences(found: Any, recorded: Any, place: str = "") -> list[str]:
    """Places where two results differ: numbers by more than 1e-5 of their size, anything else at all."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        lines = [f"{place}: {sorted(found)} instead of {sorted(recorded)}"] if set(found) != set(recorded) else []
        for key in sorted(set(found) & set(recorded)):
            lines += differences(found[key], recorded[key], f"{place}/{key}")
        return lines
    if place.endswith("/numbers"):
        ours, theirs = (np.asarray(numbers, dtype=np.float64) for numbers in (found, recorded))
        if ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(initial=0)):
            return []
        return [f"{place}: {found} instead of {recorded}"]
    return [] if found == recorded else [f"{place}: {found} instead of {recorded}"]


def changed_without_a_version(
    found: Mapping[str, Any], recorded: Mapping[str, Any], versions: Mapping[str, int]
) -> dict[str, list[str]]:
    """Places by stage: of those whose results differ from the record, though neither version nor what they read has changed."""
    changed = {stage: differences(found[stage], recorded["stages"].get(stage), stage) for stage in UPSTREAM}
    return {
        stage: lines
        for stage, lines in changed.items()
        if lines and versions[stage] == recorded["versions"].get(stage) and not any(changed[one] for one in UPSTREAM[stage])
    }


def main() -> None:
    """Record; refuses where a version has to be raised first."""
    with tempfile.TemporaryDirectory() as folder:
        found = found_in(Path(folder) / "work")
    if RECORD.exists():
        for stage in changed_without_a_version(found, json.loads(RECORD.read_text()), VERSIONS):
            sys.exit(f"{stage} computes something else: raise the version in stages/{stage}/spec.py first")
    RECORD.write_text(json.dumps({"versions": VERSIONS, "stages": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
