"""The way of hidden states through a layer without its experts, and what its router makes of them.

Dimensions: B sequences of a micro-batch, T tokens, D hidden size, k experts a token.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stages.contracts.paths import hidden_file, student_file, tokens_file
from stages.contracts.units import Job
from stages.contracts.windows import NO_TOKEN
from stages.model.layer_shard import LayerShard
from stages.model.stream import read_hidden, read_token_ids
from stages.recombine.calls import AdvanceArgs, GatherArgs, LayerArgs, SourceArgs
from stages.recombine.given import Given
from stages.recombine.router import Router
from stages.recombine.student import Student

_BLOCK = 2048
"""Tokens whose routing is found at a time."""


def ids_of(job: Job[object], way: SourceArgs | AdvanceArgs | GatherArgs) -> list[Tensor]:
    """Token ids of a token shard, by micro-batch."""
    of = way.of if isinstance(way, GatherArgs) else way
    return list(read_token_ids(job.run_dir / of.tokens_dir / tokens_file(way.shard)).split(of.micro_batch))


def entering(part_dir: Path, shard: LayerShard, layer: int, number: int, ids: list[Tensor], is_source: bool) -> list[Tensor]:
    """Hidden states of a token shard as they enter a layer, by micro-batch: the source's or the student's."""
    path = hidden_file(part_dir, layer, number) if is_source else student_file(part_dir, layer, number)
    return read_hidden(shard, ids, path if layer else None)


class Passed:
    """What a student's stream gives on its way through a layer without its experts, by micro-batch; tokens alone, no padding,
    but for `bare`. is_token: by micro-batch, of its positions. lengths: tokens of each sequence."""

    def __init__(self) -> None:
        self.bare, self.x, self.slots, self.gates = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        self.router_x, self.router_logits = list[Tensor](), list[Tensor]()
        self.is_token, self.lengths = list[Tensor](), list[int]()
        self.first_x: Tensor | None = None
        """What the experts are given of the first micro-batch, padding and all."""

    def see(self, x_TD: Tensor, slots_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
        """Stands in for the experts, which give nothing."""
        self.first_x = x_TD if self.first_x is None else self.first_x
        for parts, value in ((self.x, x_TD), (self.slots, slots_Tk), (self.gates, gates_Tk)):
            parts.append(value[self.is_token[-1]])
        return torch.zeros_like(x_TD)


def passed_through(student: Student, of: LayerArgs, ids: list[Tensor], ours: list[Tensor]) -> Passed:
    """What a student's stream gives, of token ids and hidden states by micro-batch."""
    passed = Passed()
    with student.watched_router(passed.router_x, passed.router_logits) if of.score is not None else nullcontext():
        for ids_BT, hidden_BTD in zip(ids, ours, strict=True):
            is_token_BT = (ids_BT != NO_TOKEN).to(hidden_BTD.device)
            passed.is_token.append(is_token_BT.flatten())
            passed.lengths += is_token_BT.sum(1).tolist()
            passed.bare.append(student.run(hidden_BTD, passed.see))
            for parts in (passed.router_x, passed.router_logits):
                parts[-1:] = [part[passed.is_token[-1]] for part in parts[-1:]]
    return passed


def routed_by(student: Student, given: Given) -> Given:
    """With slots, gates and logits of all tokens under the router of another student."""
    passed = Passed()
    with student.watched_router(passed.router_x, passed.router_logits):
        for x_TD in given.x_TD.split(_BLOCK):
            passed.is_token.append(torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device))
            student.route(x_TD, passed.see)
    logits = torch.cat(passed.router_logits) if given.router_logits is not None else None
    return replace(given, routed=(torch.cat(passed.slots), torch.cat(passed.gates)), router_logits=logits)


def plain_routers(student: Student, given: Given) -> tuple[Router, Router] | None:
    """The router of the source and of a stock student; None for a family whose router is more than a matrix."""
    routers = student.routers()
    if routers is None or given.router_x is None or given.router_logits is None:
        return None
    source, start, _ = routers
    return (source, start) if start.gives(given.router_x, given.router_logits) else None
