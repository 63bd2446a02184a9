"""What micro-batches keep between their forward and the end of their backward pass, on the ranks of one pipeline rank.

Legend: S samples, L MoE layers, B micro-batches with rows of their own, W ranks of a stage, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory.rows import RoutedRows
from moesim.parallel.memory.saved import Part, Saved, SavedTensors, Unit
from moesim.scenario import Scenario
from moesim.schedules import Pass, Schedule

FloatArray = NDArray[np.float64]
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Activations:
    """Those of the ranks of one place of the pipeline, which hold the same stages and differ in rows alone."""

    scenario: Scenario
    rows: RoutedRows
    schedule: Schedule
    rank: int

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

    @cached_property
    def moe_layers_C(self) -> list[list[int]]:
        """Layers of every stage with experts, by their number among such; prediction layers are on the last stage."""
        model, found = self.scenario.model, []
        for stage in self.stages:
            layers = self.scenario.stage_layers[stage]
            numbers = [model.moe_number(layer) for layer in layers if not model.is_dense(layer)]
            if stage == self.schedule.num_stages - 1:
                numbers += range(model.moe_layers, model.moe_layers + model.mtp_layers)
            found.append(numbers)
        return found

    @property
    def has_moe(self) -> bool:
        """Whether any of its layers has experts."""
        return any(self.moe_layers_C)

    @property
    def has_dense(self) -> bool:
        """Whether any has none."""
        return any(self.dense_layers(stage) for stage in self.stages)

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and ranks."""
        return self.rows.num_samples, self.scenario.parallelism.stage_ranks

    def of_all_slices(self, counts_SLBW: Array) -> Array:
        """Counts of ranks with slices of the same experts, each of which sees the rows and copies of all of them."""
        together = self.scenario.parallelism.expert_tensor
        if together == 1:
            return counts_SLBW
        blocks = counts_SLBW.reshape(*counts_SLBW.shape[:3], -1, together)
        return np.asarray(np.repeat(blocks.sum(axis=-1), together, axis=-1))

    @property
    def results(self) -> Array:
        """Results of a rank's own tokens: as many as the copies that it sends, or all rows where nothing travels."""
        return self.rows.rows_SLBW if self.scenario.parallelism.expert == 1 else self.rows.copies_out_SLBW

    def computed(self, layers: Sequence[int]) -> Array:
        """Rows that an expert slice of each rank computes."""
        return self.of_all_slices(self.rows.rows_SLBW[:, layers])

    def _sizes(self, kept: Sequence[Saved]) -> dict[tuple[Part, Unit], float]:
        sizes: dict[tuple[Part, Unit], float] = {}
        for saved in kept:
            sizes[saved.part, saved.unit] = sizes.get((saved.part, saved.unit), 0.0) + saved.bytes
        return sizes

    def of_chunk(self, chunk: int) -> dict[Part, Array]:
        """Bytes by part that one micro-batch keeps in one chunk: a number, or [S, B, W] where rows matter."""
        stage = self.stages[chunk]
        layers, model = self.moe_layers_C[chunk], self.scenario.model
        parts: dict[Part, Array] = {}

        def add(kept: Sequence[Saved], times: int) -> None:
            counts: dict[Unit, Array] = {"token": np.asarray(times * self.tokens)}
            if any(saved.unit != "token" for saved in kept):
                counts["row"] = self.computed(layers).sum(axis=1)
                counts["copy"] = self.results[:, layers].sum(axis=1)
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

    @cached_property
    def by_chunk_C(self) -> list[dict[Part, Array]]:
        """The same of every chunk."""
        return [self.of_chunk(chunk) for chunk in range(len(self.stages))]

    def head_bytes(self, chunk: int) -> float:
        """What the head and its copies for prediction layers keep of it: a split backward pass ends them at once."""
        if self.stages[chunk] != self.schedule.num_stages - 1:
            return 0.0
        heads = 1 + self.scenario.model.mtp_layers
        return heads * sum(saved.bytes for saved in self.saved.head()) * self.tokens

    @cached_property
    def _total_CSBW(self) -> list[FloatArray]:
        """Bytes that a micro-batch keeps in each chunk."""
        shape = (*self.rows.rows_SLBW.shape[::2], self.scenario.parallelism.stage_ranks)
        totals = []
        for parts in self.by_chunk_C:
            total_SBW = np.zeros(shape)
            for values in parts.values():
                total_SBW += values
            totals.append(total_SBW)
        return totals

    @property
    def kept_CBW(self) -> FloatArray:
        """What every micro-batch keeps in every chunk, sample 0."""
        return np.stack([total_SBW[0] for total_SBW in self._total_CSBW])

    @cached_property
    def first_backward(self) -> int:
        """The index of the first action with a backward pass."""
        ends = (Pass.BACKWARD, Pass.INPUT)
        actions = self.schedule.actions[self.rank]
        return next(index for index, action in enumerate(actions) if any(work.kind in ends for work in action.works))

    @cached_property
    def most(self) -> tuple[FloatArray, Array]:
        """Peak bytes of all that is kept at once, and the index of the action at which it is reached, both [S, W]."""
        return self.most_between(0, len(self.schedule.actions[self.rank]))

    def most_between(self, begin: int, end: int) -> tuple[FloatArray, Array]:
        """`most` of the actions from `begin` to before `end` alone."""
        totals, heads = self._total_CSBW, [self.head_bytes(chunk) for chunk in range(len(self.stages))]
        distinct = totals[0].shape[1]
        now_SW, peak_SW = np.zeros(self.shape), np.zeros(self.shape)
        when_SW = np.zeros(self.shape, dtype=np.int64)
        for index, action in enumerate(self.schedule.actions[self.rank][:end]):
            for work in action.works:
                if work.kind is Pass.FORWARD:
                    now_SW += totals[work.chunk][:, work.micro_batch % distinct]
            if index >= begin:
                higher_SW = now_SW > peak_SW
                peak_SW[higher_SW], when_SW[higher_SW] = now_SW[higher_SW], index
            for work in action.works:
                head = heads[work.chunk]
                if work.kind is Pass.INPUT:
                    now_SW -= head
                elif work.gives_back:
                    kept_SW = totals[work.chunk][:, work.micro_batch % distinct]
                    now_SW -= kept_SW - head if work.kind is Pass.WEIGHT else kept_SW
        return peak_SW, when_SW

    def parts_between(self, begin: int, end: int, *, sample: int, place: int) -> dict[str, float]:
        """Bytes by part at the peak of `most_between`, of one rank in one sample."""
        last = int(self.most_between(begin, end)[1][sample, place])
        held = next(islice(self.schedule.held(self.rank), last, None))
        ended = {
            (work.micro_batch, work.chunk)
            for action in self.schedule.actions[self.rank][:last]
            for work in action.works
            if work.kind is Pass.INPUT
        }
        parts: dict[str, float] = {}
        for micro_batch, chunk in held:
            for part, values in self.by_chunk_C[chunk].items():
                of_all = np.ndim(values) == 0
                size = float(values if of_all else values[sample, micro_batch % values.shape[1], place])
                parts[part] = parts.get(part, 0.0) + size
            if (micro_batch, chunk) in ended and self.head_bytes(chunk):
                parts["embedding_head"] -= self.head_bytes(chunk)
        return parts
