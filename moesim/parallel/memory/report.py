"""Peak memory of every pipeline rank, from the schedule, the recomputation and the rows that were really routed.

Memory of one rank at one instant:

    states       weights, gradients, master copy, optimizer states (`parameters`)
    activations  what each micro-batch whose backward pass has not ended keeps, layer by layer (`saved`), its
                 rows and copies as routed; which micro-batches those are at each action is read from the schedule
    buffers      dispatch and combine of one layer: copies sent and arrived, in the wider of both formats; the largest
                 of the layers and micro-batches of the rank; two at once where micro-batches overlap in pairs
    repeated     what the backward pass of one layer computes again: the largest of the layers
    temporaries  gradients inside the largest layer: of the residual stream, and of the GEMMs' inputs and outputs;
                 what tensor ranks gather of a GEMM's input, and context ranks pass around
    allocator    memory.allocator_overhead of the four above
    workspace    what the libraries of GEMMs keep for themselves
    dispatch_library  what that of the dispatch keeps for what other ranks write (`moesim.scenario.dispatch`)
    communicators  those that the layout has beyond the ones in memory.reserved
    reserved     memory.reserved

Which of them exist together is told moment by moment: `phases`.
Legend: S samples, L MoE layers, B micro-batches with rows of their own, W ranks of a stage, C chunks, P pipeline ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory.rank import PipelineRank, Recorded
from moesim.parallel.memory.rows import RoutedRows
from moesim.scenario import Scenario
from moesim.schedules import Schedule, build_schedule

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PoolMemory:
    """Of the ranks on the GPUs of one pool: bytes of its fullest rank, of one GPU, and in which samples all fit."""

    name: str
    gpu: str
    peak_bytes: float
    capacity_bytes: float
    fits_S: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryReport:
    """Peak memory of each pipeline rank.

    parts: by pipeline rank, bytes by part on its fullest rank in its fullest sample, adding up to its peak.
    peak_SP: bytes of the fullest rank of each pipeline rank, by sample; of those on the pool that comes closest to its
    capacity there, where it has several. capacity_P, gpus: bytes and name of one of these. pools: those with ranks.
    held_P: bytes that stay through the step (states and what is reserved). kept_PCBW: bytes that a micro-batch keeps
    in each chunk between its forward pass and the end of its backward pass, sample 0.
    """

    parts: tuple[Mapping[str, float], ...]
    peak_SP: FloatArray
    capacity_P: FloatArray
    held_P: FloatArray
    kept_PCBW: FloatArray
    gpus: tuple[str, ...]
    pools: tuple[PoolMemory, ...]

    @property
    def peak_bytes(self) -> float:
        """Bytes of the fullest rank of all."""
        return float(self.peak_SP.max())

    @property
    def fits_share(self) -> float:
        """Share of routing samples in which every rank fits."""
        return float(np.all([pool.fits_S for pool in self.pools], axis=0).mean())

    @property
    def fullest(self) -> int:
        """The pipeline rank that comes closest to its capacity, or exceeds it most."""
        return int((self.peak_SP.max(axis=0) / self.capacity_P).argmax())

    @property
    def largest_part(self) -> tuple[str, float]:
        """Name and bytes of the largest part of the fullest pipeline rank."""
        return max(self.parts[self.fullest].items(), key=lambda part: part[1])

    def as_json(self) -> dict[str, Any]:
        """The report for a result file, SI units."""
        return {
            "peak_bytes": self.peak_bytes,
            "peak_bytes_by_pipeline_rank": self.peak_SP.max(axis=0).tolist(),
            "capacity_bytes_by_pipeline_rank": self.capacity_P.tolist(),
            "fits_share": self.fits_share,
            "fullest_pipeline_rank": self.fullest,
            "parts_bytes_by_pipeline_rank": [dict(parts) for parts in self.parts],
        }


def memory_report(scenario: Scenario, rows: RoutedRows, *, recorded: Recorded | None = None) -> MemoryReport:
    """The memory of every pipeline rank; `rows` from `routed_rows` or `even_rows`.

    `recorded`: of an imported step (`moesim.recorded.peak`); without it the list stands alone.
    """
    schedule = _schedule(scenario)
    ranks = [PipelineRank(scenario, rows, schedule, rank, recorded) for rank in range(schedule.num_ranks)]
    fullest = [_fullest_pool(scenario, rank) for rank in ranks]
    return MemoryReport(
        parts=tuple(rank.parts(pool) for rank, pool in zip(ranks, fullest, strict=True)),
        peak_SP=np.stack([rank.peak_SW[:, rank.on(p)].max(axis=1) for rank, p in zip(ranks, fullest, strict=True)], 1),
        capacity_P=np.array([scenario.cluster.pools[pool].spec.memory_bytes for pool in fullest]),
        held_P=np.array([sum(rank.states.values()) + scenario.memory.reserved for rank in ranks]),
        kept_PCBW=np.stack([rank.kept.kept_CBW for rank in ranks]),
        gpus=tuple(scenario.cluster.pools[pool].gpu_name for pool in fullest),
        pools=tuple(_pool_memory(scenario, ranks, pool) for pool in sorted({p for rank in ranks for p in rank.pools})),
    )


def recorded_beside(scenario: Scenario, rows: RoutedRows, *, peak_bytes: float) -> Recorded:
    """What a recording of this scenario, of one rank and one micro-batch, says whose peak is `peak_bytes`."""
    rank = PipelineRank(scenario, rows, _schedule(scenario), 0)
    return Recorded(
        difference=peak_bytes - float(rank.peak_SW.max()),
        tokens=rank.kept.tokens,
        activations=float(rank.kept.most[0].max()),
    )


def _schedule(scenario: Scenario) -> Schedule:
    mesh, work = scenario.parallelism, scenario.parallelism.schedule
    return build_schedule(
        work.kind,
        num_ranks=mesh.pipeline,
        num_micro_batches=scenario.num_micro_batches,
        virtual=work.virtual,
    )


def _fullest_pool(scenario: Scenario, rank: PipelineRank) -> int:
    """The pool whose ranks come closest to their capacity on this pipeline rank."""
    pools = scenario.cluster.pools
    return max(rank.pools, key=lambda pool: rank.peak_SW[:, rank.on(pool)].max() / pools[pool].spec.memory_bytes)


def _pool_memory(scenario: Scenario, ranks: Sequence[PipelineRank], number: int) -> PoolMemory:
    pool = scenario.cluster.pools[number]
    peak_S = np.max([rank.peak_SW[:, rank.on(number)].max(axis=1) for rank in ranks if number in rank.pools], axis=0)
    capacity = pool.spec.memory_bytes
    return PoolMemory(
        name=pool.name,
        gpu=pool.gpu_name,
        peak_bytes=float(peak_S.max()),
        capacity_bytes=capacity,
        fits_S=tuple((peak_S <= capacity).tolist()),
    )
