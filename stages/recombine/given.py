"""What a layer's slots are given and have to give, on every calibration token: transient files between the units of a layer.

Dimensions: T tokens, D hidden size, K neurons that a slot keeps, k experts a token, S slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan, read_plan, write_plan
from stages.contracts.paths import chosen_file, given_file, start_file, start_plan_file
from stages.io.files import WrittenFile, write_bytes
from stages.io.storage import is_remote
from stages.recombine.moments import down
from stages.recombine.neurons import Chosen
from stages.recombine.solve import Problem, SlotTokens
from stages.recombine.student import Student

_ROW = "row:"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A file of safetensors, local or remote."""
    return load(path.read_bytes()) if is_remote(path) else load_file(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write a file of safetensors."""
    return write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))


@dataclass(frozen=True)
class Start:
    """A plan whose pairs and router rows are chosen. error_before: of the plan as it was, as `error_of_start` gives it. rows:
    fitted router rows, by parameter. routed: slots [T, k] and gates [T, k] of every token; router_logits: what chose them,
    where the router is one matrix."""

    plan: LayerPlan
    error_before: float
    rows: Mapping[str, Tensor]
    routed: tuple[Tensor, Tensor]
    router_logits: Tensor | None

    def write(self, part_dir: Path, name: str) -> tuple[WrittenFile, WrittenFile]:
        """Write the start of a layer's plan of this name."""
        tensors = {
            "error_before": torch.tensor([self.error_before], dtype=torch.float64),
            "slots": self.routed[0],
            "gates": self.routed[1],
            **{f"{_ROW}{parameter}": row for parameter, row in self.rows.items()},
        }
        if self.router_logits is not None:
            tensors["logits"] = self.router_logits
        written = write_plan(start_plan_file(part_dir, self.plan.layer, name), self.plan)
        return save_tensors(start_file(part_dir, self.plan.layer, name), tensors), written

    @classmethod
    def read(cls, part_dir: Path, layer: int, name: str, device: torch.device) -> "Start":
        """Read the start of a layer's plan of this name."""
        found = {key: tensor.to(device) for key, tensor in load_tensors(start_file(part_dir, layer, name)).items()}
        return cls(
            read_plan(start_plan_file(part_dir, layer, name)),
            float(found["error_before"]),
            {key.removeprefix(_ROW): row for key, row in found.items() if key.startswith(_ROW)},
            (found["slots"], found["gates"]),
            found.get("logits"),
        )


def write_chosen(part_dir: Path, layer: int, name: str, rank: int, slot: int, chosen: Chosen) -> WrittenFile:
    """Write what a slot keeps. rank: the slot's, largest first."""
    numbers = {"slot": torch.tensor([slot]), "is_joined": torch.tensor([chosen.is_joined])}
    kept = {} if chosen.kept_K is None else {"kept": chosen.kept_K}
    return save_tensors(chosen_file(part_dir, layer, name, rank), {"weight": chosen.weight_DK, **numbers, **kept})


def read_chosen(part_dir: Path, layer: int, name: str, num_slots: int, device: torch.device) -> list[Chosen]:
    """Read what all slots keep, in the order of the plan."""
    by_slot = dict[int, Chosen]()
    for rank in range(num_slots):
        path = chosen_file(part_dir, layer, name, rank)
        found = {name: tensor.to(device) for name, tensor in load_tensors(path).items()}
        by_slot[int(found["slot"])] = Chosen(found.get("kept"), bool(found["is_joined"]), found["weight"])
    return [by_slot[slot] for slot in range(num_slots)]


@dataclass(frozen=True)
class Given:
    """What the experts of a layer are given, and have to give: input x_TD, slots [T, k] and gates [T, k] of every token, under
    a plan; the target with the outputs' biases, float32 [T, D], and the weight of each token. lengths: tokens of each sequence.
    router_x, router_logits: what the router of a stock plan is given and gives; none where it is not one matrix, or is not
    fitted."""

    x_TD: Tensor
    routed: tuple[Tensor, Tensor]
    target_TD: Tensor
    weight_T: Tensor
    place: str
    lengths: Sequence[int]
    router_x: Tensor | None
    router_logits: Tensor | None

    def problem(self, student: Student, has_shared: bool, start: Sequence[Tensor] | None = None) -> Problem:
        """To be solved for a student's slots, and after them for its shared expert where has_shared is set and there is one
        that can be solved. start: W_down of each slot, instead of what they have."""
        target_TD, shared = self.target_TD.clone(), student.shared
        wide = torch.float32 if self.x_TD.dtype.itemsize == 2 else torch.float64
        slots = slot_tokens(self.routed[0], self.routed[1].float(), student.weights.num_experts)
        num_slots = len(slots)
        for number, slot in enumerate(slots):
            bias_D = student.weights.bias("down_proj", number, number + 1)
            if bias_D is not None:
                target_TD.index_add_(0, slot.tokens_R, -slot.gates_R[:, None] * bias_D.float())
        own = list(start or (student.down(number) for number in range(num_slots)))
        shared_T = shared.gates(self.x_TD) if has_shared and shared is not None else None
        if shared is not None and shared_T is not None:
            everyone = SlotTokens(torch.arange(len(self.x_TD), device=self.x_TD.device), shared_T)
            for tokens_R, gates_R in everyone.blocks():
                given_RD = down(shared.activations(self.x_TD[tokens_R]), shared.weight_DF, wide)
                target_TD.index_add_(0, tokens_R, gates_R[:, None] * given_RD.float())
            slots, own = [*slots, everyone], [*own, shared.weight_DF]

        def activations(number: int, tokens_R: Tensor) -> Tensor:
            if shared is not None and number == num_slots:
                return shared.activations(self.x_TD[tokens_R])
            return student.forward.activations_of(self.x_TD, tokens_R, number)

        return Problem(slots, activations, target_TD, self.weight_T, own, self.place, self.lengths, wide)


@dataclass(frozen=True)
class GivenShard:
    """Of one token shard. added_TD: what the source's layer gives beyond the student's without its experts, float32. norm_T:
    root mean square of the source's hidden state after the layer, less where the token counts more. lengths: tokens of each
    sequence. scale: the factor with which the layer adds what its experts
    give; of the first token shard, which stands for all."""

    x_TD: Tensor
    slots_Tk: Tensor
    gates_Tk: Tensor
    added_TD: Tensor
    norm_T: Tensor
    lengths: Sequence[int]
    scale: float | None
    router_x: Tensor | None
    router_logits: Tensor | None

    def write(self, part_dir: Path, layer: int, shard: int) -> WrittenFile:
        """Write a token shard's part."""
        tensors = {
            "x": self.x_TD, "slots": self.slots_Tk, "gates": self.gates_Tk, "added": self.added_TD, "norm": self.norm_T,
            "lengths": torch.tensor(self.lengths),
        }  # fmt: skip
        if self.scale is not None:
            tensors["scale"] = torch.tensor([self.scale], dtype=torch.float64)
        if self.router_x is not None and self.router_logits is not None:
            tensors |= {"router_x": self.router_x, "router_logits": self.router_logits}
        return save_tensors(given_file(part_dir, layer, shard), tensors)


def read_given(part_dir: Path, layer: int, num_shards: int, device: torch.device) -> Given:
    """Read what a layer is given, all token shards in order."""
    parts = [load_tensors(given_file(part_dir, layer, shard)) for shard in range(num_shards)]

    def joined(name: str) -> Tensor:
        return torch.cat([part.pop(name) for part in parts]).to(device)

    target_TD = joined("added").div_(float(parts[0]["scale"]))
    weight_T = 1 / joined("norm").clamp(min=1e-12)
    routed, lengths = (joined("slots"), joined("gates")), joined("lengths").tolist()
    router = (joined("router_x"), joined("router_logits")) if "router_x" in parts[0] else (None, None)
    return Given(joined("x"), routed, target_TD, weight_T / weight_T.mean(), f"layer {layer}", lengths, *router)


def slot_tokens(slots_Tk: Tensor, gates_Tk: Tensor, num_slots: int) -> list[SlotTokens]:
    """Tokens of each slot with the sum of their gates: two experts of a token may share a slot."""
    gate_TS = torch.zeros(len(slots_Tk), num_slots, device=slots_Tk.device).scatter_add_(1, slots_Tk, gates_Tk)
    tokens = [gate_TS[:, number].nonzero().flatten() for number in range(num_slots)]
    return [SlotTokens(tokens_R, gate_TS[tokens_R, number]) for number, tokens_R in enumerate(tokens)]
