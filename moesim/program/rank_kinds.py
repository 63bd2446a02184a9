"""Ranks that differ: kind of GPU and speed of each, and blocks whose durations follow them.

All ranks of a group run the same operations. A block is written once for every kind of GPU in the group, and each rank
takes the durations of its own kind, divided by its speed.

Legend: see `moesim.program.operations`; W ranks of the world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import KernelModel, kernels_of_kind
from moesim.program.operations import Block, Operation
from moesim.program.stage import source_seconds
from moesim.results.outcome import Basis
from moesim.scenario import Scenario
from moesim.scenario.pools import kinds_of_pools, pools_of_ranks

IntArray = NDArray[np.int64]
BlocksOf = Callable[[KernelModel], Mapping[Any, Block]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankKinds:
    """`kind_W`: kind of GPU of every rank; `batches_W`: micro-batches; `speed_W`: over that of the kind, or None."""

    kind_W: IntArray
    batches_W: IntArray
    speed_W: NDArray[np.float64] | None

    @classmethod
    def of(cls, scenario: Scenario) -> "RankKinds":
        """Those of a scenario's ranks."""
        cluster, mesh = scenario.cluster, scenario.parallelism
        if len(cluster.pools) == 1:
            pool_W = np.zeros(mesh.world_size, dtype=np.int64)
        else:
            pool_W = np.array(pools_of_ranks(cluster, mesh), dtype=np.int64)
        return cls(
            kind_W=np.array(kinds_of_pools(cluster), dtype=np.int64)[pool_W],
            batches_W=np.array(scenario.micro_batches_of_pools, dtype=np.int64)[pool_W],
            speed_W=cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed),
        )

    @cached_property
    def are_equal(self) -> bool:
        """Whether all ranks are."""
        one_kind = len(np.unique(self.kind_W)) == len(np.unique(self.batches_W)) == 1
        return one_kind and self.speed_W is None

    def key(self, ranks_R: IntArray) -> bytes:
        """Equal for groups whose ranks are alike one by one."""
        if self.are_equal:
            return b""
        speeds = b"" if self.speed_W is None else self.speed_W[ranks_R].tobytes()
        return self.kind_W[ranks_R].tobytes() + self.batches_W[ranks_R].tobytes() + speeds

    def kinds(self, ranks_R: IntArray) -> list[int]:
        """The kinds of a group, in the order of first appearance."""
        return list(dict.fromkeys(self.kind_W[ranks_R].tolist()))

    def blocks(self, kernels: KernelModel, ranks_R: IntArray, write: BlocksOf) -> "RankBlocks":
        """The blocks that `write` makes of the kernels of a kind, with the durations of the group's ranks."""
        kinds = self.kinds(ranks_R)
        by_kind = {kind: write(kernels_of_kind(kernels, kind)) for kind in kinds}
        blocks, sources = dict(by_kind[kinds[0]]), {}
        kind_R = self.kind_W[ranks_R]
        for key in blocks if len(kinds) > 1 else ():
            same_kind = {kind: by_kind[kind][key] for kind in kinds}
            blocks[key] = _mixed(same_kind, kind_R)
            sources[blocks[key]] = _mixed_sources(same_kind, blocks[key], kind_R)
        if self.speed_W is not None and (self.speed_W[ranks_R] != 1.0).any():
            speed_R = self.speed_W[ranks_R]
            for key, block in blocks.items():
                blocks[key] = _at_speed(block, speed_R)
                if block in sources:
                    sources[blocks[key]] = sources.pop(block)
        return RankBlocks(blocks, sources)


@dataclass(frozen=True)
class RankBlocks:
    """Blocks of a group; `sources`: of those on several kinds of GPU, what their seconds rest on."""

    blocks: Mapping[Any, Block]
    sources: Mapping[Block, Sequence[tuple[Basis, float]]]


def _mixed(by_kind: Mapping[int, Block], kind_R: IntArray) -> Block:
    """Every rank with the durations of its kind."""
    blocks = list(by_kind.values())
    assert len({tuple(o.label for o in block.operations) for block in blocks}) == 1, "kinds differ in time alone"

    def together(operations: Sequence[Operation]) -> Operation:
        first = operations[0]
        if first.seconds_MSR is None:
            return first
        each = [operation.seconds_MSR for operation in operations if operation.seconds_MSR is not None]
        length, samples, _ = np.broadcast_shapes(*(seconds_MSR.shape for seconds_MSR in each))
        seconds_MSR = np.empty((length, samples, len(kind_R)))
        for kind, of_kind_MSR in zip(by_kind, each, strict=True):
            whole_MSR = np.broadcast_to(of_kind_MSR, seconds_MSR.shape)
            seconds_MSR[..., kind_R == kind] = whole_MSR[..., kind_R == kind]
        return replace(first, seconds_MSR=seconds_MSR)

    return Block(blocks[0].name, tuple(map(together, zip(*(block.operations for block in blocks), strict=True))))


def _mixed_sources(by_kind: Mapping[int, Block], mixed: Block, kind_R: IntArray) -> list[tuple[Basis, float]]:
    """As `source_seconds`, with the sources of every kind."""
    found = list(source_seconds(Block("", tuple(o for o in mixed.operations if o.seconds_MSR is None))))
    for kind, block in by_kind.items():
        at_R = kind_R == kind
        own = [
            replace(o, seconds_MSR=np.broadcast_to(o.seconds_MSR, (*o.seconds_MSR.shape[:2], len(kind_R)))[..., at_R])
            for o in block.operations
            if o.seconds_MSR is not None
        ]
        found += [(basis, seconds * float(at_R.mean())) for basis, seconds in source_seconds(Block("", tuple(own)))]
    return found


def _at_speed(block: Block, speed_R: NDArray[np.float64]) -> Block:
    return Block(
        block.name,
        tuple(
            o if o.seconds_MSR is None else replace(o, seconds_MSR=o.seconds_MSR / speed_R) for o in block.operations
        ),
    )
