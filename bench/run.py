"""The benchmarks: `python -m bench.run`. Results go to JSON and to a generated page.

Every target is a ratio of two things measured in turn in one run on one machine, median of several; processor seconds stand
beside wall seconds, since the machine may be shared.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench import measure
from bench.models import IDS_FILE, MODELS, generate
from bench.page import write_page
from bench.scaling import pinned_stage_s
from stages.contracts.arrow import read_table
from stages.io.files import write_file, write_json

STAGES = ("prepare", "calibrate", "cluster", "merge", "assemble", "report")
BENCHMARKS = (
    "hand", "compute", "collectors", "transfer", "memory", "overhead", "scaling", "simulation", "recombine",
    "recombine_scaling", "recombine_simulation",
)  # fmt: skip
ON_ONE_MODEL = ("overhead", "scaling", "simulation", "recombine_scaling", "recombine_simulation")
SCALING_SEQUENCES = 64
SCALING_WORKERS = (1, 2, 4)
RECOMBINE_SEQUENCES = 64
"""Enough that a neuron sees some tokens: with fewer, factors of a fixed size are most of the work."""
RECOMBINE_WORKERS = (1, 2)
MEMORY_TOKENS = 65_536
"""As a run file calibrates by default, 32 sequences of 2,048: more than models have elsewhere."""
FEWER_TOKENS = (2_048, 32_768)
"""Of the smaller models memory is measured at these as well, since it might grow with them."""


class Bench:
    """One session: where models and runs lie, threads, repeats."""

    def __init__(self, work_dir: Path, num_threads: int, repeats: int) -> None:
        self.work_dir, self.num_threads, self.repeats = work_dir, num_threads, repeats

    def model(self, name: str) -> Path:
        """The generated model."""
        return generate(name, self.work_dir / "models" / name)

    def run_file(self, name: str, run: str, **resources: Any) -> Path:
        """A run to half the experts, stock export, no evaluation."""
        spec, model = MODELS[name], self.model(name)
        folder = self.work_dir / "runs" / f"{name}-{run}"
        values = {
            "model": str(model),
            "run_dir": str(folder),
            "calibration": {
                "data": str(model / IDS_FILE), "num_sequences": spec.num_sequences, "sequence_length": spec.sequence_length,
            },
            "clustering": {"num_experts": [spec.num_groups]},
            "export": {"formats": ["stock"]},
            "resources": {"num_cpus": self.num_threads, "worker_memory": "16 GB", **resources},
        }  # fmt: skip
        path = self.work_dir / "runs" / f"{name}-{run}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
        return path

    def _ids(self, name: str, num_sequences: int) -> Path:
        """Token ids beside the model's own, which are fewer."""
        spec, path = MODELS[name], self.work_dir / "models" / f"{name}-{num_sequences}-ids.npy"
        self.model(name)
        shape = (num_sequences, spec.sequence_length)
        write_file(path, lambda out: np.save(out, np.random.default_rng(0).integers(0, spec.config.vocab_size, shape)))
        return path

    def pipeline(
        self, run_file: Path, executor: str, watch_all: bool = False, settings: Sequence[str] = ()
    ) -> measure.Measured:
        """Run a run file, with settings on top, in a new process."""
        options = ["--executor", executor, *(["--address", "local"] if executor == "ray" else [])]
        options += [f"--set={setting}" for setting in settings]
        command = [sys.executable, "-m", "pipeline", "run", str(run_file), *options]
        threads = str(self.num_threads)
        return measure.run(command, watch_all, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)

    def by_hand(self, name: str) -> tuple[measure.Measured, list[list[int]]]:
        """Run the plain script; its labels."""
        spec, model = MODELS[name], self.model(name)
        output = self.work_dir / "runs" / f"{name}-by-hand"
        shutil.rmtree(output, ignore_errors=True)
        options = {
            "--ids": model / IDS_FILE, "--num-experts": spec.num_groups, "--threads": self.num_threads,
            "--micro-batch": max(1, 2048 // spec.sequence_length),
        }  # fmt: skip
        words = [str(word) for option in options.items() for word in option]
        threads = str(self.num_threads)
        command = [sys.executable, "-m", "bench.by_hand", str(model), str(output), *words]
        measured = measure.run(command, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        labels = json.loads((output / "labels.json").read_text())
        shutil.rmtree(output)
        return measured, labels

    def labels(self, name: str, run_file: Path) -> list[list[int]]:
        """The labels of a finished run, layer by layer."""
        run_dir = Path(yaml.safe_load(run_file.read_text())["run_dir"])
        tables = [read_table(path).to_pylist() for path in sorted(run_dir.glob("cluster-*/*.labels.arrow"))]
        wanted = MODELS[name].num_groups
        return [[row["label"] for row in rows if row["num_clusters"] == wanted] for rows in tables]

    def hand(self, name: str) -> dict[str, Any]:
        """Benchmark 1: the whole job, against the plain script."""
        run_file = self.run_file(name, "local", layers_per_shard=1)  # as on a machine that has room for no more
        run_dir = self.work_dir / "runs" / f"{name}-local"
        ours, theirs = [], []
        for _ in range(self.repeats):
            shutil.rmtree(run_dir, ignore_errors=True)
            ours.append(self.pipeline(run_file, "local"))
            measured, labels = self.by_hand(name)
            theirs.append(measured)
            if labels != self.labels(name, run_file):
                raise RuntimeError(f"{name}: labels of the plain script and of the pipeline differ; nothing to compare")
        return {
            "wall_s": [one.wall_s for one in ours],
            "cpu_s": [one.cpu_s for one in ours],
            "peak_bytes": [one.peak_bytes for one in ours],
            "hand_wall_s": [one.wall_s for one in theirs],
            "hand_cpu_s": [one.cpu_s for one in theirs],
            "hand_peak_bytes": [one.peak_bytes for one in theirs],
        }

    def compute(self, name: str) -> dict[str, Any]:
        """Benchmark 2."""
        return self._alone("bench.compute", name)

    def collectors(self, name: str) -> dict[str, Any]:
        """Benchmark 7."""
        return self._alone("bench.collectors", name)

    def _alone(self, module: str, name: str) -> dict[str, Any]:
        """What a module measures on a model, in a process of its own (`measure.print_measured`)."""
        options = ["--threads", str(self.num_threads), "--repeats", str(self.repeats)]
        command = [sys.executable, "-m", module, name, str(self.model(name)), *options]
        return json.loads(measure.run(command, OMP_NUM_THREADS=str(self.num_threads)).output)  # type: ignore[no-any-return]

    def transfer(self, name: str) -> dict[str, Any]:
        """Benchmark 3; on the run that benchmark 1 left, else on a new one."""
        run_file = self.run_file(name, "local")
        self.pipeline(run_file, "local")
        command = [sys.executable, "-m", "bench.transfer", str(run_file), "--repeats", str(self.repeats)]
        measured = measure.run(command, OMP_NUM_THREADS=str(self.num_threads))
        return {**json.loads(measured.output), "peak_bytes": measured.peak_bytes}

    def memory(self, name: str) -> dict[str, Any]:
        """Benchmark 4: one Ray worker that holds one layer at a time; every process watched."""
        counts = [MEMORY_TOKENS] if name.startswith(("true", "deep")) else [*FEWER_TOKENS, MEMORY_TOKENS]
        peaks = {str(num_tokens): self._peaks(name, num_tokens) for num_tokens in counts}
        run_dir = self.work_dir / "runs" / f"{name}-ray"
        plan = json.loads(next(run_dir.glob("prepare-model-*/plan.json")).read_text())
        shutil.rmtree(run_dir)
        return {
            "peaks": peaks,
            "dtype": MODELS[name].dtype,
            "layer_bytes": max(plan["layer_bytes"]),
            "outside_bytes": plan["outside_bytes"],
            "num_layers": plan["num_layers"],
        }

    def _peaks(self, name: str, num_tokens: int) -> dict[str, int]:
        """Peak bytes of each kind of process over so many calibration tokens."""
        run_file = self.run_file(name, "ray", num_workers=1, layers_per_shard=1)
        run_dir = self.work_dir / "runs" / f"{name}-ray"
        shutil.rmtree(run_dir, ignore_errors=True)
        num_sequences = num_tokens // MODELS[name].sequence_length
        settings = (f"calibration.data={self._ids(name, num_sequences)}", f"calibration.num_sequences={num_sequences}")
        measured = self.pipeline(run_file, "ray", watch_all=True, settings=settings)
        peaks: dict[str, int] = {"driver": measured.peak_bytes}
        for title, peak in measured.peaks.items():
            is_unit = any(f"ray::{stage} " in title for stage in STAGES)
            kind = "worker" if "ray::Worker" in title else "task" if is_unit else "other"
            peaks[kind] = max(peaks.get(kind, 0), peak)
        return peaks

    def overhead(self, name: str) -> dict[str, Any]:
        """Benchmark 6."""
        run_file = self.run_file(name, "local")
        self.pipeline(run_file, "local")
        again = [self.pipeline(run_file, "local") for _ in range(self.repeats)]
        helps = [measure.run([sys.executable, "-m", "pipeline", "--help"]) for _ in range(self.repeats)]
        bare = [measure.run([sys.executable, "-c", "pass"]) for _ in range(self.repeats)]
        units = json.loads(measure.run([sys.executable, "-m", "bench.overhead", "--units", "100"]).output)
        return {
            "help_s": [one.wall_s for one in helps],
            "python_s": [one.wall_s for one in bare],
            "nothing_to_do_s": [one.wall_s for one in again],
            "nothing_to_do_cpu_s": [one.cpu_s for one in again],
            **units,
        }

    def scaling(self, name: str) -> dict[str, Any]:
        """Benchmark 5: real workers in turn, each pinned to a core; more tokens than elsewhere, so that there is work."""
        spec, ids = MODELS[name], self._ids(name, SCALING_SEQUENCES)
        seconds: dict[str, list[float]] = {str(count): [] for count in SCALING_WORKERS}
        for _ in range(self.repeats):
            for count in SCALING_WORKERS:
                seconds[str(count)].append(self._scaled_s(name, ids, count))
        return {"calibrate_s": seconds, "num_tokens": SCALING_SEQUENCES * spec.sequence_length}

    def _scaled_s(self, name: str, ids: Path, num_workers: int, stage: str = "calibrate", further: Sequence[str] = ()) -> float:
        run_file = self.run_file(name, f"{num_workers}-workers", num_workers=num_workers, num_gpus=0, num_cpus=1)
        run_dir = self.work_dir / "runs" / f"{name}-{num_workers}-workers"
        shutil.rmtree(run_dir, ignore_errors=True)
        settings = [f"calibration.data={ids}", f"calibration.num_sequences={SCALING_SEQUENCES}", *further]
        command = [sys.executable, "-m", "pipeline", "run", str(run_file), "--address", "local"]
        seconds = pinned_stage_s([*command, *(f"--set={setting}" for setting in settings)], run_dir, num_workers, stage)
        shutil.rmtree(run_dir)
        return seconds

    def recombine(self, name: str) -> dict[str, Any]:
        """Benchmark 8: recombine and reap-refit, as multiples of calibrate."""
        run_file = self.run_file(name, "recombine")
        values = yaml.safe_load(run_file.read_text())
        values["variants"] = ["reap-refit", "recombine"]
        values["calibration"] |= {"data": str(self._ids(name, RECOMBINE_SEQUENCES)), "num_sequences": RECOMBINE_SEQUENCES}
        run_file.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "bench.recombine", str(run_file), "--repeats", str(self.repeats)]
        threads = str(self.num_threads)
        found = json.loads(measure.run(command, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads).output)
        return {**found, "num_tokens": RECOMBINE_SEQUENCES * MODELS[name].sequence_length}

    def recombine_scaling(self, name: str) -> dict[str, Any]:
        """Benchmark 8: real workers in turn, as in benchmark 5, by mode."""
        ids, seconds = self._ids(name, SCALING_SEQUENCES), dict[str, dict[str, list[float]]]()
        for _ in range(self.repeats):
            for mode in ("one_shot", "sequential"):
                variant = f"{{name: recombine, preset: recombine, refit: {{mode: {mode}}}}}"
                further = (f"variants=[{variant}]", "export.formats=[tied]")
                for count in RECOMBINE_WORKERS:
                    found = self._scaled_s(name, ids, count, "recombine", further)
                    seconds.setdefault(mode, {}).setdefault(str(count), []).append(found)
        return {"recombine_s": seconds, "num_tokens": SCALING_SEQUENCES * MODELS[name].sequence_length}

    def recombine_simulation(self, _name: str) -> dict[str, Any]:
        """Benchmark 8, on clusters that are not there; needs no model."""
        return json.loads(measure.run([sys.executable, "-m", "bench.recombine_simulation"]).output)  # type: ignore[no-any-return]

    def simulation(self, _name: str) -> dict[str, Any]:
        """Benchmark 5, on clusters that are not there; needs no model."""
        return json.loads(measure.run([sys.executable, "-m", "bench.simulation"]).output)  # type: ignore[no-any-return]


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mid", "fine", "true-layer"], choices=MODELS)
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench"), help="models and runs; 10 GB, with deep 60 GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=measure.REPOSITORY / "docs" / "benchmarks.json")
    parser.add_argument("--note", default="", help="for the page: what state was measured")
    args = parser.parse_args()
    bench = Bench(args.work_dir.resolve(), args.threads, args.repeats)
    state = {**measure.machine(), "threads": args.threads, "repeats": args.repeats, "note": args.note}
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for benchmark in args.benchmarks:
        call: Callable[[str], dict[str, Any]] = getattr(bench, benchmark)
        for name in args.models[:1] if benchmark in ON_ONE_MODEL else args.models:
            print(f"{benchmark} {name}", flush=True)
            results.setdefault(benchmark, {})[name] = {**call(name), "on": {**state, "load": measure.machine()["load"]}}
            write_json(args.output, results)
    if args.output.with_suffix(".md").parent.exists():
        write_page(results, args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
