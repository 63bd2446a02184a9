"""A recorded step of one rank, spread over several: what torch's wrappers put between its operations.

DDP (arXiv 2006.15704; torch.nn.parallel.DistributedDataParallel at its defaults): gradients go into buckets in the
order in which they become whole, a bucket is closed once it holds its limit, is scaled and copied weight by weight, and
is summed behind the backward pass's operations that are still to come; then every bucket is copied back.

FSDP2 (torch.distributed.fsdp.fully_shard of every layer and of the whole, at its defaults): a unit is gathered before
its forward pass, and a layer again before its backward pass, while the unit ahead of it computes; what is gathered is
copied apart, gradients are copied together and scattered while the next unit computes, and each rank updates its share.

transformers' own plans, whose ranks have the same tokens: `moesim.recorded.plans`.

These are laws of the wrappers' source, held to what they send by tests/importing/test_timelines.py and test_plans.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moesim.errors import UserError
from moesim.kernels import KernelModel
from moesim.kernels.families import FAMILY_OF, MemoryBound
from moesim.network import Fabric
from moesim.network.collectives import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from moesim.network.nccl import ring_bytes
from moesim.recorded.host import Host, weights_of
from moesim.recorded.layers import Block, in_order
from moesim.recorded.plans import Planned, expert_plan, tensor_plan
from moesim.recorded.pricing import OPTIMIZER
from moesim.recorded.step_file import GRADIENTS, RecordedOp
from moesim.recorded.timeline import Sent, Work

# torch's DistributedDataParallel; fully_shard of every layer and of the whole; transformers' tp_plan and expert plan.
WRAPPERS = DDP, FSDP2, TP, EP = "ddp", "fsdp2", "tp", "ep"
PLANS: dict[str, Callable[[Sequence[RecordedOp], int], Planned]] = {TP: tensor_plan, EP: expert_plan}
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes at which a bucket is closed; torch.distributed's defaults
MEMORY = FAMILY_OF[MemoryBound]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks that share a step's data: which wrapper, on which GPUs of a fabric."""

    wrapper: str
    fabric: Fabric
    ranks: tuple[int, ...]

    def sent(self, call: str, num_bytes: float, *, phase: str, copy_s: float = 0.0) -> Sent:
        """A collective of `num_bytes` of the larger buffer of every rank."""
        n = len(self.ranks)
        seconds = _CALLS[call](self.fabric, list(self.ranks), num_bytes).seconds
        wire = ring_bytes(call, num_bytes, ranks=n)
        return Sent(
            name=call, seconds=seconds, num_bytes=num_bytes, ranks=n, wire_bytes=wire, copy_s=copy_s, phase=phase
        )


_CALLS: dict[str, Any] = {
    "all_reduce": all_reduce_seconds,
    "all_gather": all_gather_seconds,
    "reduce_scatter": reduce_scatter_seconds,
}


@dataclass(frozen=True, kw_only=True)
class Spreading:
    """Writes the works of a step of several ranks. `works_of`: of a run of one operation on one rank."""

    ops: Sequence[RecordedOp]
    works_of: Any
    ranks: Ranks
    kernels: KernelModel
    host: Host
    gap_s: float
    planned: Planned | None = None  # by a plan of transformers; the operations are then those of a rank's share

    def works(self) -> list[Work]:
        """One step. Raises UserError where the step does not say when its gradients are whole."""
        if self.planned is not None:
            return self._by_plan(self.planned, in_order(self.ops))
        if not any(GRADIENTS in op.facts for op in self.ops):
            raise UserError(
                "the step does not say when its gradients are whole; record it again with moesim import-step "
                "MODULE:FUNCTION, on one rank and from this version on"
            )
        blocks = in_order(self.ops)
        return self._ddp(blocks) if self.ranks.wrapper == DDP else self._fsdp2(blocks)

    def moves(self, kind: str, num_bytes: float, *, host_s: float, **more: Any) -> Work:
        """A copy on the stream that computes."""
        seconds = float(self.kernels.seconds(MemoryBound(kind, num_bytes)).seconds) + self.gap_s
        return Work(seconds=seconds, host_s=host_s, family=MEMORY, copies=True, **more)

    @cached_property
    def _element_bytes(self) -> float:
        optimizer = next(op for op in self.ops if op.name == OPTIMIZER)
        return optimizer.reads[0][2] / max(1.0, float(optimizer.facts["parameters"]))

    def weights(self, op: RecordedOp) -> list[float]:
        """Bytes of each of the weights whose gradients are whole behind an operation."""
        return [self._element_bytes * math.prod(shape) for shape in op.facts.get(GRADIENTS, ())]

    def _by_plan(self, planned: Planned, blocks: Sequence[Block]) -> list[Work]:
        """Each collective is waited for before anything else runs."""
        works: list[Work] = []
        number = 0
        for block in blocks:
            for place, times in block.runs:
                slow = self.host.shared if place in planned.wrapped else 0.0
                works += [replace(work, host_s=work.host_s + slow) for work in self.works_of(place, times)]
                for call, num_bytes in [*planned.sent.get(place, ())] * round(times):
                    sent = self.ranks.sent(call, num_bytes, phase=block.phase)
                    works[-1] = replace(works[-1], sends=(*works[-1].sends, sent))
                    works.append(Work(seconds=0.0, host_s=0.0, waits_for=(number,)))
                    number += 1
                if place in planned.copied:
                    works.append(self.moves("copy", planned.copied[place], host_s=self.host.op))
        return works

    def _ddp(self, blocks: Sequence[Block]) -> list[Work]:
        works: list[Work] = []
        buckets: list[list[float]] = [[]]
        for block in blocks[:-1]:
            for place, times in block.runs:
                works += self.works_of(place, times)
                for size in round(times) * self.weights(self.ops[place]):
                    buckets[-1].append(size)
                    limit = FIRST_BUCKET if len(buckets) == 1 else BUCKET
                    full = sum(buckets[-1]) >= limit
                    works.append(self.moves("elementwise", 2.0 * size, host_s=self.host.moved))
                    if full:
                        works[-1] = self._closed(works[-1], buckets)
        if buckets[-1]:
            works[-1] = self._closed(works[-1], buckets)
        for number, bucket in enumerate(buckets[:-1]):
            for at, size in enumerate(bucket):
                waits = (number,) if at == 0 else ()
                works.append(self.moves("copy", 2.0 * size, host_s=self.host.moved, waits_for=waits))
        for place, times in blocks[-1].runs:
            works += self.works_of(place, times)
        return works

    def _closed(self, work: Work, buckets: list[list[float]]) -> Work:
        sent = self.ranks.sent("all_reduce", sum(buckets[-1]), phase="backward")
        buckets.append([])
        return replace(work, sends=(sent,), host_s=work.host_s + self.host.bucket)

    def _fsdp2(self, blocks: Sequence[Block]) -> list[Work]:
        return _Sharded(self, blocks).works()


class _Sharded:
    """The order of FSDP2; a unit is a layer's number, or -1 for all that lies outside of the layers."""

    def __init__(self, of: Spreading, blocks: Sequence[Block]) -> None:
        self.of, self.blocks = of, blocks
        self.n = len(of.ranks.ranks)
        self.bytes: dict[int, float] = {}
        self.busy_s: dict[int, float] = {}  # of the host, with a unit in one pass
        for block in blocks:
            for place, times in block.runs:
                weights = of.weights(of.ops[place])
                self.bytes[block.layer] = self.bytes.get(block.layer, 0.0) + sum(weights) * times
                before = self.busy_s.get(block.layer, of.host.unit)
                self.busy_s[block.layer] = before + of.host.unit_weight * len(weights) * times
        self.out: list[Work] = []
        self.sent = 0

    def works(self) -> list[Work]:
        """One step: root, then layer after layer."""
        forward = [block for block in self.blocks if block.phase == "forward"]
        backward = [block for block in self.blocks if block.phase == "backward"]
        layers = [block.layer for block in forward if block.layer >= 0]
        gathered = {-1: self._gather(-1, "forward")}
        self._copy_out(-1, gathered)
        self._run(forward[0])
        for at, block in enumerate(forward[1:-1]):
            if block.layer not in gathered:
                gathered[block.layer] = self._gather(block.layer, "forward")
            self._copy_out(block.layer, gathered)
            following = layers[at + 1] if at + 1 < len(layers) else None
            if following is not None:
                gathered[following] = self._gather(following, "forward")
            self._run(block)
        self._run(forward[-1])
        self._backward(backward, layers[::-1])
        sharded_s = self.of.host.sharded * weights_of(self.of.ops)
        for place, times in self.blocks[-1].runs:
            updates = [_share(work, self.n) for work in self.of.works_of(place, times)]
            self.out += [replace(work, host_s=work.host_s + sharded_s / len(updates)) for work in updates]
        return self.out

    def _backward(self, backward: Sequence[Block], layers: Sequence[int]) -> None:
        gathered: dict[int, int] = {}
        if layers:
            gathered[layers[0]] = self._gather(layers[0], "backward")
        self._run(backward[0])
        scattered: int | None = None
        for at, block in enumerate(backward[1:-1]):
            self._copy_out(block.layer, gathered)
            if at + 1 < len(layers):
                gathered[layers[at + 1]] = self._gather(layers[at + 1], "backward")
            self._run(block)
            scattered = self._scatter(block.layer, scattered)
        self._run(backward[-1])
        scattered = self._scatter(-1, scattered)
        self.out.append(Work(seconds=0.0, host_s=0.0, waits_for=(scattered,)))

    def _run(self, block: Block) -> None:
        for place, times in block.runs:
            self.out += self.of.works_of(place, times)

    def _gather(self, unit: int, phase: str) -> int:
        """Sent behind what is written so far; its number. A rank's share is copied into the buffer before."""
        size = self.bytes.get(unit, 0.0)
        copy_s = float(self.of.kernels.seconds(MemoryBound("copy", 2.0 * size / self.n)).seconds)
        sent = self.of.ranks.sent("all_gather", size, phase=phase, copy_s=copy_s)
        self.out.append(Work(seconds=0.0, host_s=self.busy_s.get(unit, 0.0), sends=(sent,)))
        self.sent += 1
        return self.sent - 1

    def _copy_out(self, unit: int, gathered: dict[int, int]) -> None:
        work = self.of.moves("copy", 2.0 * self.bytes.get(unit, 0.0), host_s=self.of.host.backward_op)
        self.out.append(replace(work, waits_for=(gathered[unit],)))

    def _scatter(self, unit: int, before: int | None) -> int:
        size = self.bytes.get(unit, 0.0)
        sent = self.of.ranks.sent("reduce_scatter", size, phase="backward")
        copied = self.of.moves("copy", 2.0 * size, host_s=self.busy_s.get(unit, 0.0), sends=(sent,))
        self.out.append(copied if before is None else replace(copied, waits_for=(before,)))
        self.sent += 1
        return self.sent - 1


def _share(work: Work, ranks: int) -> Work:
    """Of an update, what falls to one rank."""
    return replace(work, seconds=work.seconds / ranks)
