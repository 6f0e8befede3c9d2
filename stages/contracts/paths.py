"""Paths of a stage's files inside the directory of its part, shared by the stages that write and read them."""

from pathlib import Path

SURVEY_FILE = "plan.json"
TENSORS_FILE = "tensors.arrow"
CHECKPOINT_DIR = "checkpoint"
SCORES_FILE = "scores.json"
GENERATION_FILE = "generation.json"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.json"
REPORT_PAGE_FILE = "report.html"
TRANSIENT_DIRS = ("hidden", "partial")


def tokens_file(shard: int) -> str:
    """File of a token shard."""
    return f"tokens-{shard:04d}.arrow"


def documents_file(part_dir: Path, domain: str) -> Path:
    """Fingerprints of the documents that a text's sequences come from. domain: empty if the section has none."""
    return part_dir / (f"documents-{domain}.arrow" if domain else "documents.arrow")


def hidden_file(part_dir: Path, layer: int, shard: int) -> Path:
    """Hidden states of a token shard at the input of a layer; transient."""
    return part_dir / TRANSIENT_DIRS[0] / f"layer-{layer:04d}" / f"tokens-{shard:04d}.safetensors"


def student_file(part_dir: Path, layer: int, shard: int) -> Path:
    """Hidden states of a token shard as they enter a layer, behind layers that are already refitted; transient."""
    return part_dir / TRANSIENT_DIRS[0] / f"layer-{layer:04d}" / f"student-{shard:04d}.safetensors"


def given_file(part_dir: Path, layer: int, shard: int) -> Path:
    """What a layer's experts are given and have to give, of a token shard; transient."""
    return part_dir / TRANSIENT_DIRS[0] / f"layer-{layer:04d}" / f"given-{shard:04d}.safetensors"


def pairs_file(part_dir: Path, layer: int, expert: int) -> Path:
    """What a slot loses that an expert shares with each later one; transient."""
    return part_dir / TRANSIENT_DIRS[1] / f"layer-{layer:04d}" / f"pairs-{expert:04d}.safetensors"


def start_file(part_dir: Path, layer: int, name: str) -> Path:
    """The solution of one of a layer's plans as it is, from which its neurons are chosen; transient."""
    return part_dir / TRANSIENT_DIRS[1] / f"layer-{layer:04d}" / name / "start.safetensors"


def start_plan_file(part_dir: Path, layer: int, name: str) -> Path:
    """One of a layer's plans, with pairs that are chosen anew; transient."""
    return part_dir / TRANSIENT_DIRS[1] / f"layer-{layer:04d}" / name / "plan.arrow"


def chosen_file(part_dir: Path, layer: int, name: str, rank: int) -> Path:
    """Neurons that a slot of one of a layer's plans keeps, largest slot first; transient."""
    return part_dir / TRANSIENT_DIRS[1] / f"layer-{layer:04d}" / name / f"slot-{rank:04d}.safetensors"


def partial_evidence_file(part_dir: Path, layer: int, shard: int) -> Path:
    """Sums of one layer over one token shard; transient."""
    return part_dir / TRANSIENT_DIRS[1] / f"layer-{layer:04d}" / f"tokens-{shard:04d}.arrow"


def domain_dir(calibrate_dir: Path, domain: str) -> Path:
    """Folder of the evidence of one domain. domain: empty for evidence of a text without domains."""
    return calibrate_dir / "domains" / domain if domain else calibrate_dir


def statistics_file(part_dir: Path, layer: int) -> Path:
    """Statistics of one layer over the calibration set."""
    return part_dir / f"layer-{layer:04d}.statistics.arrow"


def column_file(part_dir: Path, layer: int, column: str) -> Path:
    """A column of one layer's evidence that only some methods require, and that is no part of the statistics."""
    return part_dir / f"layer-{layer:04d}.{column}.arrow"


def plan_file(part_dir: Path, layer: int) -> Path:
    """The layer plan: which experts of one layer are kept or merged."""
    return part_dir / f"layer-{layer:04d}.plan.arrow"


def distances_file(part_dir: Path, layer: int) -> Path:
    """Distances of one layer's experts by their weights."""
    return part_dir / f"layer-{layer:04d}.distances.arrow"


def costs_file(part_dir: Path, layer: int) -> Path:
    """What each number of experts costs one layer of a target; only where a budget compares layers."""
    return part_dir / f"layer-{layer:04d}.costs.arrow"


def budget_file(part_dir: Path) -> Path:
    """How many experts each layer of a target keeps; only where a budget compares layers."""
    return part_dir / "budget.arrow"


def protected_file(part_dir: Path) -> Path:
    """Experts of all layers that a target keeps as they are; only under `clustering.protect`."""
    return part_dir / "protected.arrow"


def replaced_file(part_dir: Path, layer: int) -> Path:
    """Solved values of the parameters that a layer plan replaces."""
    return part_dir / f"layer-{layer:04d}.replaced.safetensors"


def groups_file(part_dir: Path, layer: int) -> Path:
    """Output sums of one layer by group of sequences; only under sampling."""
    return part_dir / f"layer-{layer:04d}.groups.arrow"


def errors_file(part_dir: Path, layer: int) -> Path:
    """Standard errors of one layer's mean outputs; only under sampling."""
    return part_dir / f"layer-{layer:04d}.errors.arrow"


def stability_file(part_dir: Path, layer: int) -> Path:
    """How often halves of the groups reproduce one layer's labels; only under sampling."""
    return part_dir / f"layer-{layer:04d}.stability.arrow"


def dendrogram_file(part_dir: Path, layer: int) -> Path:
    """Dendrogram of one layer's experts."""
    return part_dir / f"layer-{layer:04d}.dendrogram.arrow"


def labels_file(part_dir: Path, layer: int) -> Path:
    """Cluster labels of one layer's experts, for every number of clusters."""
    return part_dir / f"layer-{layer:04d}.labels.arrow"


def losses_file(part_dir: Path, shard: int) -> Path:
    """Losses of one token shard's sequences."""
    return part_dir / f"losses-{shard:04d}.arrow"
