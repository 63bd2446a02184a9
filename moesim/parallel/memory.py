"""Peak memory of every pipeline rank, from the schedule, the recomputation and the rows that were really routed.

Memory of one rank at one instant:

    states       weights, gradients, master copy, optimizer states (`memory_parameters`)
    activations  what each micro-batch whose backward pass has not ended keeps, layer by layer (`memory_saved`), its
                 rows and copies as routed; which micro-batches those are at each action is read from the schedule
    buffers      dispatch and combine of one layer: copies sent and arrived, in the wider of both formats; the largest
                 of the layers and micro-batches of the rank; two at once where micro-batches overlap in pairs
    repeated     what the backward pass of one layer computes again: the largest of the layers
    temporaries  gradients inside the largest layer: of the residual stream, and of the products' inputs and outputs;
                 what tensor ranks gather of a product's input, and context ranks pass around
    allocator    memory.allocator_overhead of the four above
    workspace    what the libraries of matrix products keep for themselves
    dispatch_library  what that of the dispatch keeps for what other ranks write (`moesim.scenario.dispatch_buffers`)
    communicators  those that the layout has beyond the ones in memory.reserved
    reserved     memory.reserved

Which of them exist together is told moment by moment: `memory_phases`.
Legend: S samples, L MoE layers, B micro-batches with rows of their own, W ranks of a stage, C chunks, P pipeline ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory_libraries import libraries_bytes
from moesim.parallel.memory_parameters import holders, state_bytes, table_parameters
from moesim.parallel.memory_phases import LayerMoment, Phase, Sizes, eager_phases, held_phases
from moesim.parallel.memory_rows import RoutedRows
from moesim.parallel.memory_saved import FP32, Part, Saved, SavedTensors, Unit
from moesim.parallel.memory_temporaries import (
    ELEMENT,
    Moment,
    attention_moment,
    dense_moments,
    expert_moments,
)
from moesim.parallel.traffic import token_bytes
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.model import Mla
from moesim.scenario.pools import pools_of_ranks
from moesim.schedules import Pass, Schedule, build_schedule

FloatArray = NDArray[np.float64]
Array = NDArray[Any]


class OfLoss(NamedTuple):
    """Of the logits in fp32: what the loss adds to those that are kept, and what is kept of them."""

    copies: float
    kept: float


LOSSES = {"fused": OfLoss(0.0, 0.5), "fp32": OfLoss(2.0, 1.0), "parallel": OfLoss(0.5, 1.0)}
LEAST_OF_LIST = 0.5  # of what moves, below which no recording takes it
# Gradients of single parts, to the states that they are of.
MADE_OF = {
    "gradients.head": "gradients.dense",
    "gradients.embedding": "gradients.dense",
    "made.dense": "gradients.dense",
    "made.experts": "gradients.experts",
}


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


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a recording of the software says of its peak on one GPU, beside the list at the same size.

    difference: bytes that the recording takes more. tokens, activations: of its micro-batch, and bytes that the list
    keeps of them.
    """

    difference: float
    tokens: float
    activations: float

    def bytes_at(self, *, tokens: float, activations_SW: FloatArray) -> FloatArray:
        """The difference at another size. It grows with the tokens, where it is of one layer, or with all activations;
        a recording does not tell which, so the larger memory is taken.
        """
        ratios = tokens / self.tokens, activations_SW / self.activations
        return self.difference * (np.maximum if self.difference > 0 else np.minimum)(*ratios)


def memory_report(scenario: Scenario, rows: RoutedRows, *, recorded: Recorded | None = None) -> MemoryReport:
    """The memory of every pipeline rank; `rows` from `routed_rows` or `even_rows`.

    `recorded`: of an imported step (`moesim.recorded.peak`); without it the list stands alone.
    """
    schedule = _schedule(scenario)
    ranks = [_PipelineRank(scenario, rows, schedule, rank, recorded) for rank in range(schedule.num_ranks)]
    fullest = [_fullest_pool(scenario, rank) for rank in ranks]
    return MemoryReport(
        parts=tuple(rank.parts(pool) for rank, pool in zip(ranks, fullest, strict=True)),
        peak_SP=np.stack([rank.peak_SW[:, rank.on(p)].max(axis=1) for rank, p in zip(ranks, fullest, strict=True)], 1),
        capacity_P=np.array([scenario.cluster.pools[pool].spec.memory_bytes for pool in fullest]),
        held_P=np.array([sum(rank.states.values()) + scenario.memory.reserved for rank in ranks]),
        kept_PCBW=np.stack([rank.kept_CBW for rank in ranks]),
        gpus=tuple(scenario.cluster.pools[pool].gpu_name for pool in fullest),
        pools=tuple(_pool_memory(scenario, ranks, pool) for pool in sorted({p for rank in ranks for p in rank.pools})),
    )


def recorded_beside(scenario: Scenario, rows: RoutedRows, *, peak_bytes: float) -> Recorded:
    """What a recording of this scenario, of one rank and one micro-batch, says whose peak is `peak_bytes`."""
    rank = _PipelineRank(scenario, rows, _schedule(scenario), 0)
    return Recorded(
        difference=peak_bytes - float(rank.peak_SW.max()),
        tokens=rank.tokens,
        activations=float(rank.live[0].max()),
    )


def _schedule(scenario: Scenario) -> Schedule:
    mesh, work = scenario.parallelism, scenario.parallelism.schedule
    return build_schedule(
        work.kind,
        num_ranks=mesh.pipeline,
        num_micro_batches=scenario.num_micro_batches,
        virtual=work.virtual,
    )


def _fullest_pool(scenario: Scenario, rank: "_PipelineRank") -> int:
    """The pool whose ranks come closest to their capacity on this pipeline rank."""
    pools = scenario.cluster.pools
    return max(rank.pools, key=lambda pool: rank.peak_SW[:, rank.on(pool)].max() / pools[pool].spec.memory_bytes)


def _pool_memory(scenario: Scenario, ranks: Sequence["_PipelineRank"], number: int) -> PoolMemory:
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


@dataclass(frozen=True, eq=False)
class _PipelineRank:
    """The ranks of one place of the pipeline; they hold the same stages and differ in rows alone."""

    scenario: Scenario
    rows: RoutedRows
    schedule: Schedule
    rank: int
    recorded: Recorded | None = None

    @cached_property
    def pool_W(self) -> NDArray[np.int64]:
        """The pool of every rank of the stage."""
        cluster, mesh = self.scenario.cluster, self.scenario.parallelism
        if len(cluster.pools) == 1:
            return np.zeros(mesh.stage_ranks, dtype=np.int64)
        first = self.rank * mesh.stage_ranks
        return np.array(pools_of_ranks(cluster, mesh)[first : first + mesh.stage_ranks], dtype=np.int64)

    @property
    def pools(self) -> list[int]:
        """Those that have ranks here."""
        return sorted(set(self.pool_W.tolist()))

    def on(self, pool: int) -> NDArray[np.intp]:
        """The ranks on a pool."""
        return np.flatnonzero(self.pool_W == pool)

    @cached_property
    def saved(self) -> SavedTensors:
        return SavedTensors(self.scenario)

    @property
    def stages(self) -> Sequence[int]:
        return self.schedule.stages_of_rank[self.rank]

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank."""
        return self.scenario.tokens_per_rank

    def dense_layers(self, stage: int) -> int:
        """Layers of a stage without experts."""
        return sum(map(self.scenario.model.is_dense, self.scenario.stage_layers[stage]))

    def moe_layers(self, stage: int) -> list[int]:
        """Layers of a stage with experts, by their number among such; prediction layers are on the last stage."""
        model = self.scenario.model
        layers = self.scenario.stage_layers[stage]
        numbers = [model.moe_number(layer) for layer in layers if not model.is_dense(layer)]
        if stage == self.schedule.num_stages - 1:
            numbers += range(model.moe_layers, model.moe_layers + model.mtp_layers)
        return numbers

    @cached_property
    def states(self) -> dict[str, float]:
        return state_bytes(self.scenario, self.stages, replicas=self.schedule.num_replicas)

    def _of_all_slices(self, counts_SLBW: Array) -> Array:
        """Counts of ranks with slices of the same experts, each of which sees the rows and copies of all of them."""
        together = self.scenario.parallelism.expert_tensor
        if together == 1:
            return counts_SLBW
        blocks = counts_SLBW.reshape(*counts_SLBW.shape[:3], -1, together)
        return np.asarray(np.repeat(blocks.sum(axis=-1), together, axis=-1))

    @property
    def _results(self) -> Array:
        """Results of a rank's own tokens: as many as the copies that it sends, or all rows where nothing travels."""
        return self.rows.rows_SLBW if self.scenario.parallelism.expert == 1 else self.rows.copies_out_SLBW

    def _computed(self, layers: Sequence[int]) -> Array:
        """Rows that an expert slice of each rank computes."""
        return self._of_all_slices(self.rows.rows_SLBW[:, layers])

    def _sizes(self, kept: Sequence[Saved]) -> dict[tuple[Part, Unit], float]:
        sizes: dict[tuple[Part, Unit], float] = {}
        for saved in kept:
            sizes[saved.part, saved.unit] = sizes.get((saved.part, saved.unit), 0.0) + saved.bytes
        return sizes

    def activations(self, chunk: int) -> dict[Part, Array]:
        """Bytes by part that one micro-batch keeps in one chunk: a number, or [S, B, W] where rows matter."""
        stage = self.stages[chunk]
        layers, model = self.moe_layers(stage), self.scenario.model
        parts: dict[Part, Array] = {}

        def add(kept: Sequence[Saved], times: int) -> None:
            counts: dict[Unit, Array] = {"token": np.asarray(times * self.tokens)}
            if any(saved.unit != "token" for saved in kept):
                counts["row"] = self._computed(layers).sum(axis=1)
                counts["copy"] = self._results[:, layers].sum(axis=1)
            for (part, unit), size in self._sizes(kept).items():
                parts[part] = np.asarray(parts.get(part, 0.0) + size * counts[unit])

        if self.dense_layers(stage):
            add(self.saved.kept(moe=False), self.dense_layers(stage))
        if layers:
            add(self.saved.kept(moe=True), len(layers))
        if stage == 0:
            add(self.saved.embedding(), 1)
        if stage == self.schedule.num_stages - 1:
            add(self.saved.head(), 1 + model.mtp_layers)
            add(self.saved.prediction_join(), model.mtp_layers)
        return parts

    def head_bytes(self, chunk: int) -> float:
        """What the head and its copies for prediction layers keep of it: a split backward pass ends them at once."""
        if self.stages[chunk] != self.schedule.num_stages - 1:
            return 0.0
        heads = 1 + self.scenario.model.mtp_layers
        return heads * sum(saved.bytes for saved in self.saved.head()) * self.tokens

    @cached_property
    def activations_C(self) -> list[dict[Part, Array]]:
        return [self.activations(chunk) for chunk in range(len(self.stages))]

    @cached_property
    def live(self) -> tuple[FloatArray, Array]:
        """Peak bytes of activations, [S, W], and the index of the action at which it is reached, [S, W]."""
        return self._live(0, len(self.schedule.actions[self.rank]))

    @cached_property
    def first_backward(self) -> int:
        """The index of the first action with a backward pass."""
        ends = (Pass.BACKWARD, Pass.INPUT)
        actions = self.schedule.actions[self.rank]
        return next(index for index, action in enumerate(actions) if any(work.kind in ends for work in action.works))

    def _live(self, begin: int, end: int) -> tuple[FloatArray, Array]:
        """`live` of the actions from `begin` to before `end` alone."""
        shape = (self.rows.num_samples, self.scenario.parallelism.stage_ranks)
        totals = [self._of_all_parts(chunk) for chunk in range(len(self.stages))]
        distinct = totals[0].shape[1]
        now_SW, peak_SW = np.zeros(shape), np.zeros(shape)
        when_SW = np.zeros(shape, dtype=np.int64)
        for index, action in enumerate(self.schedule.actions[self.rank][:end]):
            for work in action.works:
                if work.kind is Pass.FORWARD:
                    now_SW += totals[work.chunk][:, work.micro_batch % distinct]
            higher_SW = (now_SW > peak_SW) & (index >= begin)
            peak_SW[higher_SW], when_SW[higher_SW] = now_SW[higher_SW], index
            for work in action.works:
                head = self.head_bytes(work.chunk)
                if work.kind is Pass.INPUT:
                    now_SW -= head
                elif work.kind in (Pass.BACKWARD, Pass.WEIGHT):
                    kept_SW = totals[work.chunk][:, work.micro_batch % distinct]
                    now_SW -= kept_SW - head if work.kind is Pass.WEIGHT else kept_SW
        return peak_SW, when_SW

    @property
    def kept_CBW(self) -> FloatArray:
        """What every micro-batch keeps in every chunk, sample 0."""
        return np.stack([self._of_all_parts(chunk)[0] for chunk in range(len(self.stages))])

    def _of_all_parts(self, chunk: int) -> FloatArray:
        shape = (*self.rows.rows_SLBW.shape[::2], self.scenario.parallelism.stage_ranks)
        total_SBW = np.zeros(shape)
        for values in self.activations_C[chunk].values():
            total_SBW += values
        return total_SBW

    def _largest(self, per_row: float, per_out: float, per_in: float) -> FloatArray:
        """The largest of the rank's MoE layers and micro-batches, [S, W], of a weighted sum of rows and copies."""
        return self._extreme(per_row, per_out, per_in)

    def _extreme(self, per_row: float, per_out: float, per_in: float, *, least: bool = False) -> FloatArray:
        layers = sorted(layer for stage in self.stages for layer in self.moe_layers(stage))
        if not layers:
            return np.zeros((self.rows.num_samples, self.scenario.parallelism.stage_ranks))
        rows = self.rows
        weighted = per_row * self._computed(layers)
        weighted = weighted + per_out * self._results[:, layers]
        weighted = weighted + per_in * self._of_all_slices(rows.copies_in_SLBW[:, layers])
        return np.asarray((weighted.min if least else weighted.max)(axis=(1, 2)), dtype=np.float64)

    @cached_property
    def buffers_SW(self) -> FloatArray:
        """Send and receive buffers; nothing travels inside a group of one rank."""
        scenario = self.scenario
        if scenario.parallelism.expert * scenario.parallelism.expert_tensor == 1:
            return self._largest(0.0, 0.0, 0.0)
        hidden, dispatch = scenario.model.row_width, scenario.dispatch
        size = max(token_bytes(hidden, dispatch.dtype), token_bytes(hidden, dispatch.combine_dtype))
        pairs = any(action.is_pair for action in self.schedule.actions[self.rank])
        return self._largest(0.0, size, size) * (2 if pairs else 1)

    def _layer_SW(self, which: str, parts: Sequence[str] = (), *, least: bool = False) -> FloatArray:
        """Bytes of these parts (all where none is named) of what one layer has kept, or computes again (`which`).

        The most that a layer of the rank has, or the least.
        """

        def sizes(moe: bool) -> dict[Unit, float]:
            found = self.saved.kept(moe=moe) if which == "kept" else self.saved.repeated(moe=moe)
            by_unit: dict[Unit, float] = {"token": 0.0, "row": 0.0, "copy": 0.0}
            for saved in found:
                by_unit[saved.unit] += saved.bytes * (not parts or saved.part in parts)
            return by_unit

        kinds = []
        if self._has_moe:
            moe = sizes(True)
            rows_SW = self._extreme(moe["row"], moe["copy"], 0.0, least=least)
            kinds.append(rows_SW + moe["token"] * self.tokens)
        if self._has_dense:
            kinds.append(np.full(self._shape, sizes(False)["token"] * self.tokens))
        if not kinds:
            return np.zeros(self._shape)
        return np.asarray(np.min(kinds, axis=0) if least else np.max(kinds, axis=0))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows.num_samples, self.scenario.parallelism.stage_ranks

    @cached_property
    def repeated_SW(self) -> FloatArray:
        """What one layer computes again in its backward pass."""
        return self._layer_SW("repeated")

    @property
    def _has_moe(self) -> bool:
        return any(self.moe_layers(stage) for stage in self.stages)

    @property
    def _has_dense(self) -> bool:
        return any(self.dense_layers(stage) for stage in self.stages)

    @property
    def _gathered(self) -> float:
        """Bytes per token of what other ranks share: a product's input of tensor ranks, what context ranks pass on."""
        model, mesh, a = self.scenario.model, self.scenario.parallelism, self.saved.activation_bytes
        extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
        kv_heads = model.heads if isinstance(model.attention, Mla) else model.kv_heads
        pair = kv_heads * (2 * model.head_dim + extra) * a
        ring = 4 * pair * (mesh.context > 1)  # keys, values and their gradients: in use, and on their way
        return model.hidden * a * mesh.tensor * (mesh.tensor > 1) + ring

    @cached_property
    def layer_SW(self) -> FloatArray:
        """What one layer keeps, the larger of both kinds."""
        return self._layer_SW("kept")

    @cached_property
    def phases(self) -> list[Phase]:
        """Moments of the step, one of which is its peak."""
        switches = self.scenario.implementation.switches
        model, last = self.scenario.model, self.schedule.num_stages - 1 in self.stages
        vocab_bytes = FP32 * model.vocab * self.tokens * last / switches.loss_chunks
        fresh = switches.fresh_gradients
        of_loss = LOSSES[switches.loss]
        table = table_parameters(self.scenario) * BYTES_PER_ELEMENT[self.scenario.workload.precision.gradients]
        both = model.tied_embeddings and last and 0 in self.stages
        dense, expert = holders(self.scenario, replicas=self.schedule.num_replicas)
        begin = self.first_backward + 1
        sizes = Sizes(
            first_SW=self._live(0, begin)[0] if fresh else self.live[0],
            later_SW=self._live(begin, len(self.schedule.actions[self.rank]))[0],
            layer_SW=self.layer_SW,
            moments=self._moments,
            loss=self._loss_temporaries(vocab_bytes),
            logits=vocab_bytes * of_loss.kept * (fresh or len(self.stages) == 1),
            head_gradient=table * last,
            embedding_gradient=table * (0 in self.stages and not both),
            flat=self.states["gradients.dense"] * (dense > 1) + self.states["gradients.experts"] * (expert > 1),
            states=self._optimizer_temporaries,
        )
        return eager_phases(sizes) if fresh else held_phases(sizes)

    def _loss_temporaries(self, vocab_bytes: float) -> float:
        """What the loss, or the head behind it, adds to kept logits that are `vocab_bytes` in fp32 (0: no head here).

        The loss makes its copies; then the head has the logits' gradient in bf16 and makes that of its input, which is
        there from the first chunk on.
        """
        if not vocab_bytes:
            return 0.0
        switches = self.scenario.implementation.switches
        of_loss = LOSSES[switches.loss]
        of_input = self.scenario.model.hidden * ELEMENT * self.tokens
        copies = vocab_bytes * of_loss.copies + of_input * (switches.loss_chunks > 1)
        return max(copies, vocab_bytes * (ELEMENT / FP32 - of_loss.kept) + of_input)

    @property
    def _moments(self) -> list[LayerMoment]:
        """Those of the backward pass of the layers that the rank has: of experts, dense networks and attention."""
        attention = attention_moment(self.scenario, kept_per_query=self.saved.per_query).token + self._gathered
        behind: list[Part] = ["router", "permuted_rows", "experts", "shared_experts", "dense_ffn"]
        everything = self.scenario.workload.recompute == "full"
        repeated = self.repeated_SW if everything else self._layer_SW("repeated", behind)
        found, made = [], 0.0
        kinds = (("experts", expert_moments, self._has_moe), ("dense", dense_moments, self._has_dense))
        for kind, moments_of, has in kinds:
            moments = moments_of(self.scenario) if has else []
            made = max([made, *(moment.made for moment in moments)])
            for number, moment in enumerate(moments):
                parts = {
                    "dispatch_buffers": self.buffers_SW if kind == "experts" else 0.0,
                    "repeated": repeated,
                    "temporaries": self._needed_SW(moment),
                }
                whole = moments[-1].made
                found.append(
                    LayerMoment(name=f"{kind} {number}", parts=parts, made=moment.made, whole=whole, kind=kind)
                )
        return [
            *found,
            LayerMoment(
                name="attention",
                parts={
                    "temporaries": attention * self.tokens,
                    "repeated": self._layer_SW("repeated", ["attention"]),
                },
                ended={part: self._layer_SW("kept", [part], least=True) for part in behind},
                made=made,
                whole=made,
                kind="experts" if self._has_moe else "dense",
            ),
        ]

    def _needed_SW(self, moment: Moment) -> FloatArray:
        """Bytes of a moment on the rank with the most rows (the fewest where rows have ended)."""
        rows_SW = self._extreme(abs(moment.row), 0.0, 0.0, least=moment.row < 0) * np.sign(moment.row)
        return np.asarray(rows_SW + (moment.token + self._gathered) * self.tokens + moment.fixed)

    @property
    def _optimizer_temporaries(self) -> float:
        """Square roots of second moments, of all tensors of an optimizer at once: experts that ranks share have one of
        their own, which steps behind that of the other weights. Of one tensor where each is by itself.
        """
        way = self.scenario.implementation.switches.optimizer
        if way in ("flat", "fused"):
            return 0.0
        if way == "loop":
            return 2 * FP32 * table_parameters(self.scenario)
        halves = [self.states[f"optimizer.{part}"] / 2 for part in ("dense", "experts")]
        return max(halves) if self.scenario.parallelism.expert > 1 else sum(halves)

    def _states(self, phase: Phase) -> dict[str, float]:
        """States that exist in a phase."""
        return {name: size for name, size in self.states.items() if phase.gradients or "gradients" not in name}

    @cached_property
    def _libraries(self) -> dict[str, float]:
        return libraries_bytes(
            self.scenario, tokens=self.tokens, has_moe=self._has_moe, replicas=self.schedule.num_replicas
        )

    def _moving_SW(self, phase: Phase) -> FloatArray:
        """Bytes of a phase that move, as a recording has them where there is one and activations are kept."""
        moving_SW = np.broadcast_to(np.asarray(phase.moving_SW, dtype=np.float64), self._shape)
        if self.recorded is None or phase.live in ("", "layer"):
            return moving_SW
        more_SW = self.recorded.bytes_at(tokens=self.tokens, activations_SW=self.live[0])
        return np.asarray(np.maximum(moving_SW + more_SW, LEAST_OF_LIST * moving_SW))

    def _phase_SW(self, phase: Phase) -> FloatArray:
        memory = self.scenario.memory
        held = sum(self._states(phase).values()) + sum(self._libraries.values()) + memory.reserved
        return np.asarray(held + (1 + memory.allocator_overhead) * self._moving_SW(phase))

    @cached_property
    def peak_SW(self) -> FloatArray:
        """Peak bytes of every rank in every sample."""
        return np.asarray(np.max([self._phase_SW(phase) for phase in self.phases], axis=0), dtype=np.float64)

    def parts(self, pool: int) -> dict[str, float]:
        """Bytes by part on the fullest rank of a pool in the fullest sample, largest first."""
        at_W = self.on(pool)
        sample, place = np.unravel_index(int(self.peak_SW[:, at_W].argmax()), (len(self.peak_SW), len(at_W)))
        at = (int(sample), int(at_W[place]))
        phase = max(self.phases, key=lambda phase: self._phase_SW(phase)[at])
        shape, memory = self.peak_SW.shape, self.scenario.memory
        moving = {f"activations.{part}": size for part, size in self._live_parts(phase, *at).items()}
        moving |= {name: float(np.broadcast_to(size, shape)[at]) for name, size in phase.parts.items()}
        total = float(self._moving_SW(phase)[at])
        listed = sum(moving.values())
        share = total / listed if self.recorded is not None and listed > 0 else 1.0
        moving = {name: share * size for name, size in moving.items()}
        states = dict(self._states(phase))
        for name, kind in MADE_OF.items():
            states[kind] = states.get(kind, 0.0) + moving.pop(name, 0.0)
        moving["ended.embedding_head"] = moving.pop("logits", 0.0)
        for name in [name for name in moving if name.startswith("ended.")]:
            kept = "activations.one_layer" if phase.live == "layer" else name.replace("ended", "activations")
            moving[kept] = moving.get(kept, 0.0) + moving.pop(name)
        other = {
            "allocator": memory.allocator_overhead * total,
            **self._libraries,
            "reserved": memory.reserved,
        }
        everything = {**states, **moving, **other}
        return {name: size for name, size in sorted(everything.items(), key=lambda part: -part[1]) if size > 0}

    def _live_parts(self, phase: Phase, sample: int, place: int) -> dict[str, float]:
        """Activations by part in a phase of one rank in one sample."""
        actions = len(self.schedule.actions[self.rank])
        if phase.live == "layer":
            return {"one_layer": float(self.layer_SW[sample, place])}
        if not phase.live:
            return {}
        begin, end = {
            "all": (0, actions),
            "first": (0, self.first_backward + 1),
            "later": (self.first_backward + 1, actions),
        }[phase.live]
        held: set[tuple[int, int]] = set()
        without_head: set[tuple[int, int]] = set()
        last = int(self._live(begin, end)[1][sample, place])
        for index, action in enumerate(self.schedule.actions[self.rank][: last + 1]):
            held |= {(work.micro_batch, work.chunk) for work in action.works if work.kind is Pass.FORWARD}
            if index < last:
                ended = {Pass.BACKWARD, Pass.WEIGHT}
                held -= {(work.micro_batch, work.chunk) for work in action.works if work.kind in ended}
                without_head |= {(work.micro_batch, work.chunk) for work in action.works if work.kind is Pass.INPUT}
        parts: dict[str, float] = {}
        for micro_batch, chunk in held:
            for part, values in self.activations_C[chunk].items():
                size = (
                    float(values)
                    if np.ndim(values) == 0
                    else float(values[sample, micro_batch % values.shape[1], place])
                )
                parts[part] = parts.get(part, 0.0) + size
            if (micro_batch, chunk) in without_head and self.head_bytes(chunk):
                parts["embedding_head"] -= self.head_bytes(chunk)
        return parts
