"""Arguments and facts of the units of recombine. No torch."""

from dataclasses import dataclass
from math import isqrt

from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.units import HoldCall, NoFacts, UnitCall

JOINT_COLUMNS = 4096
"""Columns (experts times neurons) of a layer beyond which solving for all slots together takes too long."""
CHOICE_COLUMNS = 24_576
"""Neurons that no slot chooses from more of, however much memory there is."""
SWEEPS = 2
"""Gauss-Seidel passes over all slots."""
HELD_OUT = 8
"""One sequence of so many chooses the ridge, and nothing else may have seen it."""
_MATRICES = 4
"""Matrices of float64 that a solution holds at a time: moments of two kinds of tokens, a copy, its factor."""
_CHOICE_MATRICES = 3
"""Those that a choice among neurons holds: moments, a copy, its factor."""


@dataclass(frozen=True)
class Bounds:
    """Sizes of moments. joint_columns: up to so many columns all slots are solved together; else one after another
    (Gauss-Seidel), each on what the others leave. choice_columns: neurons at most that a slot chooses from, if it keeps fewer.
    Results depend on these two. moment_values, activation_values: numbers of float64 that moments may take, and room for
    activations that are kept from one use to the next, counted alike."""

    joint_columns: int
    choice_columns: int
    moment_values: int
    activation_values: int = 0

    @classmethod
    def of(cls, worker_memory: int) -> "Bounds":
        """Moments may take half of a worker's memory, kept activations an eighth; layer and tokens have the rest."""
        moment_values = worker_memory // 2 // 8
        joint, choice = isqrt(moment_values // _MATRICES), isqrt(moment_values // _CHOICE_MATRICES)
        return cls(min(JOINT_COLUMNS, joint), min(CHOICE_COLUMNS, choice), moment_values, worker_memory // 8 // 8)


def moment_bytes(num_columns: int) -> int:
    """Memory in bytes of a solution for so many columns at a time."""
    return 8 * _MATRICES * num_columns**2


def choice_bytes(num_candidates: int) -> int:
    """Memory in bytes of a choice among so many neurons."""
    return 8 * _CHOICE_MATRICES * num_candidates**2


SAMPLED = 8192
"""Tokens that pairs are compared on, evenly spaced over those that choose no ridge."""
COMPARED = 384
"""Neurons of an expert that pairs are compared by, evenly spaced over all."""
FEW, NEAR, LOOK = 16, 4, 4
"""Where an expert has more than FEW partners, it looks at all of them by one of LOOK of these neurons, and of the numbers of a
hidden state, and the best NEAR are compared."""
CANDIDATES = 8192
"""Neurons from which a slot may choose by elimination; of more, the most important CANDIDATES, or half as many again as it
keeps. The least important eighth is never among them: losing a neuron costs at most what it gives."""
SHARE = 0.15
"""Of the neurons that a slot still has, so many are eliminated at a time."""
OWN = "planned"
"""Name of the method's own plan where it is compared with alternatives."""


def num_candidates(num_neurons: int, num_kept: int, choice_columns: int) -> int:
    """Of so many neurons of a slot's members, those from which it chooses. choice_columns: as in `Bounds`."""
    most = min(choice_columns, max(CANDIDATES, num_kept + num_kept // 2))
    return max(num_kept, min(num_neurons - num_neurons // 8, most))


@dataclass(frozen=True)
class PairArgs:
    """Pairs are chosen anew, by elimination. num_runs: groups of equally many experts, in order, in which slots stay."""

    num_runs: int


@dataclass(frozen=True)
class LayerArgs:
    """A MoE layer of a target.

    tokens_dir, plan_dir: of the calibration set and of the method's plans, relative to the run directory. micro_batch:
    sequences that run at once. score: of the family's router, whose rows are fitted; None if they are not. is_one_shot: whether
    the layer gets what the source's earlier layers give, instead of what is left of them. has_shared: whether W_down of a
    shared expert is solved, too. shard_weights: how much each token shard counts; empty where all count the same.
    """

    tokens_dir: str
    plan_dir: str
    layer: int
    num_shards: int
    micro_batch: int
    score: str | None
    is_one_shot: bool
    has_shared: bool
    shard_weights: tuple[float, ...]


@dataclass(frozen=True)
class SourceArgs:
    """The source's stream of a token shard through a layer."""

    tokens_dir: str
    layer: int
    shard: int
    micro_batch: int


@dataclass(frozen=True)
class GatherArgs:
    """The student's stream of a token shard through a layer without its experts, and what it lacks of the source's."""

    of: LayerArgs
    shard: int


@dataclass(frozen=True)
class CompareArgs:
    """The pairs of an expert with every later one of its run."""

    of: LayerArgs
    pairs: PairArgs
    expert: int


@dataclass(frozen=True)
class StartArgs:
    """A plan whose pairs or router rows are chosen before anything is solved. name: of the plan, OWN or an alternative. pairs:
    how its slots are chosen anew, if they are."""

    of: LayerArgs
    name: str
    pairs: PairArgs | None


@dataclass(frozen=True)
class ChooseArgs:
    """A slot of a plan, and how many whole neurons of its members it keeps. rank: the slot's, largest first, so that the last
    units are short ones. choice_columns: as in `Bounds`."""

    of: LayerArgs
    name: str
    rank: int
    num_neurons: int
    choice_columns: int


@dataclass(frozen=True)
class SolveArgs:
    """ridge: None to be chosen. has_start: whether the layer has had a start. num_neurons: that each
    slot has chosen; None if they are not chosen. names: of the plans that are compared, OWN first."""

    of: LayerArgs
    names: tuple[str, ...]
    ridge: float | None
    bounds: Bounds
    has_start: bool
    num_neurons: int | None


@dataclass(frozen=True)
class SolveFacts:
    """ridge: that was used. error_before, error_after: of the layer's output, squared, over that of giving nothing.
    is_router_fitted: whether router rows were fitted, and gave a lesser error on held-out tokens than those of the planned
    rule. is_joint: whether all slots were solved together, and not one after another. chosen, compared: where plans were
    compared, the name of the best, and the error of each on held-out calibration text as a share of that of giving nothing,
    the method's own first."""

    layer: int
    ridge: float
    error_before: float
    error_after: float
    is_router_fitted: bool
    is_joint: bool
    chosen: str = ""
    compared: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AdvanceArgs:
    """The student's stream of a token shard through a layer. has_plan: whether the layer has experts, which are solved by
    then."""

    tokens_dir: str
    layer: int
    shard: int
    micro_batch: int
    has_plan: bool


@dataclass(frozen=True)
class KeepArgs:
    """A MoE layer of a target that loses nothing. plan_dir: of the method's plans, relative to the run directory."""

    plan_dir: str
    layer: int


OPEN = HoldCall("stages.recombine.steps.held:open_layer", LayerShardArgs)
SOURCE = UnitCall("stages.recombine.steps.source:source_unit", SourceArgs, NoFacts)
GATHER = UnitCall("stages.recombine.steps.gather:gather_unit", GatherArgs, NoFacts)
COMPARE = UnitCall("stages.recombine.steps.compare:compare_unit", CompareArgs, NoFacts)
START = UnitCall("stages.recombine.steps.start:start_unit", StartArgs, NoFacts)
CHOOSE = UnitCall("stages.recombine.steps.choose:choose_unit", ChooseArgs, NoFacts)
SOLVE = UnitCall("stages.recombine.steps.solve:solve_unit", SolveArgs, SolveFacts)
ADVANCE = UnitCall("stages.recombine.steps.advance:advance_unit", AdvanceArgs, NoFacts)
KEEP = UnitCall("stages.recombine.steps.solve:keep_unit", KeepArgs, NoFacts)
