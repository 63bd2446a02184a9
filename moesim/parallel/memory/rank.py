"""Peak memory of the ranks of one pipeline rank, moment by moment (`phases`).

Legend: S samples, L MoE layers, W ranks of a stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory.activations import Activations
from moesim.parallel.memory.libraries import libraries_bytes
from moesim.parallel.memory.parameters import holders, state_bytes, table_parameters
from moesim.parallel.memory.phases import LayerMoment, Phase, Sizes, eager_phases, held_phases
from moesim.parallel.memory.rows import RoutedRows
from moesim.parallel.memory.saved import FP32, Part, Unit
from moesim.parallel.memory.temporaries import ELEMENT, Moment, attention_moment, dense_moments, expert_moments
from moesim.parallel.traffic import token_bytes
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.model import Mla
from moesim.scenario.pools import pools_of_ranks
from moesim.schedules import Schedule

FloatArray = NDArray[np.float64]


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


@dataclass(frozen=True, eq=False)
class PipelineRank:
    """The ranks of one place of the pipeline; they hold the same stages and differ in rows alone."""

    scenario: Scenario
    rows: RoutedRows
    schedule: Schedule
    rank: int
    recorded: Recorded | None = None

    @cached_property
    def kept(self) -> Activations:
        """What its micro-batches keep."""
        return Activations(self.scenario, self.rows, self.schedule, self.rank)

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
    def states(self) -> dict[str, float]:
        return state_bytes(self.scenario, self.kept.stages, replicas=self.schedule.num_replicas)

    def _extreme(self, per_row: float, per_out: float, per_in: float, *, least: bool = False) -> FloatArray:
        """The largest (or least) of the rank's MoE layers and micro-batches, [S, W], of weighted rows and copies."""
        layers = sorted(layer for numbers in self.kept.moe_layers_C for layer in numbers)
        if not layers:
            return np.zeros(self.kept.shape)
        rows = self.rows
        weighted = per_row * self.kept.computed(layers)
        weighted = weighted + per_out * self.kept.results[:, layers]
        weighted = weighted + per_in * self.kept.of_all_slices(rows.copies_in_SLBW[:, layers])
        return np.asarray((weighted.min if least else weighted.max)(axis=(1, 2)), dtype=np.float64)

    @cached_property
    def buffers_SW(self) -> FloatArray:
        """Send and receive buffers; nothing travels inside a group of one rank."""
        scenario = self.scenario
        if scenario.parallelism.expert * scenario.parallelism.expert_tensor == 1:
            return self._extreme(0.0, 0.0, 0.0)
        hidden, dispatch = scenario.model.row_width, scenario.dispatch
        size = max(token_bytes(hidden, dispatch.dtype), token_bytes(hidden, dispatch.combine_dtype))
        pairs = any(action.is_pair for action in self.schedule.actions[self.rank])
        return self._extreme(0.0, size, size) * (2 if pairs else 1)

    def _layer_SW(self, which: str, parts: Sequence[str] = (), *, least: bool = False) -> FloatArray:
        """Bytes of these parts (all where none is named) of what one layer has kept, or computes again (`which`).

        The most that a layer of the rank has, or the least.
        """

        def sizes(moe: bool) -> dict[Unit, float]:
            found = self.kept.saved.kept(moe=moe) if which == "kept" else self.kept.saved.repeated(moe=moe)
            by_unit: dict[Unit, float] = {"token": 0.0, "row": 0.0, "copy": 0.0}
            for saved in found:
                by_unit[saved.unit] += saved.bytes * (not parts or saved.part in parts)
            return by_unit

        kinds = []
        if self.kept.has_moe:
            moe = sizes(True)
            rows_SW = self._extreme(moe["row"], moe["copy"], 0.0, least=least)
            kinds.append(rows_SW + moe["token"] * self.kept.tokens)
        if self.kept.has_dense:
            kinds.append(np.full(self.kept.shape, sizes(False)["token"] * self.kept.tokens))
        if not kinds:
            return np.zeros(self.kept.shape)
        return np.asarray(np.min(kinds, axis=0) if least else np.max(kinds, axis=0))

    @cached_property
    def repeated_SW(self) -> FloatArray:
        """What one layer computes again in its backward pass."""
        return self._layer_SW("repeated")

    @property
    def _gathered(self) -> float:
        """Bytes per token of what other ranks share: a GEMM's input of tensor ranks, what context ranks pass on."""
        model, mesh, a = self.scenario.model, self.scenario.parallelism, self.kept.saved.activation_bytes
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
        model, last = self.scenario.model, self.schedule.num_stages - 1 in self.kept.stages
        vocab_bytes = FP32 * model.vocab * self.kept.tokens * last / switches.loss_chunks
        fresh = switches.fresh_gradients
        of_loss = LOSSES[switches.loss]
        table = table_parameters(self.scenario) * BYTES_PER_ELEMENT[self.scenario.workload.precision.gradients]
        both = model.tied_embeddings and last and 0 in self.kept.stages
        dense, expert = holders(self.scenario, replicas=self.schedule.num_replicas)
        begin = self.kept.first_backward + 1
        sizes = Sizes(
            first_SW=self.kept.most_between(0, begin)[0] if fresh else self.kept.most[0],
            later_SW=self.kept.most_between(begin, len(self.schedule.actions[self.rank]))[0],
            layer_SW=self.layer_SW,
            moments=self._moments,
            loss=self._loss_temporaries(vocab_bytes),
            logits=vocab_bytes * of_loss.kept * (fresh or len(self.kept.stages) == 1),
            head_gradient=table * last,
            embedding_gradient=table * (0 in self.kept.stages and not both),
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
        of_input = self.scenario.model.hidden * ELEMENT * self.kept.tokens
        copies = vocab_bytes * of_loss.copies + of_input * (switches.loss_chunks > 1)
        return max(copies, vocab_bytes * (ELEMENT / FP32 - of_loss.kept) + of_input)

    @property
    def _moments(self) -> list[LayerMoment]:
        """Those of the backward pass of the layers that the rank has: of experts, dense networks and attention."""
        attention = attention_moment(self.scenario, kept_per_query=self.kept.saved.per_query).token + self._gathered
        behind: list[Part] = ["router", "permuted_rows", "experts", "shared_experts", "dense_ffn"]
        everything = self.scenario.workload.recompute == "full"
        repeated = self.repeated_SW if everything else self._layer_SW("repeated", behind)
        found, made = [], 0.0
        kinds = (("experts", expert_moments, self.kept.has_moe), ("dense", dense_moments, self.kept.has_dense))
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
                    "temporaries": attention * self.kept.tokens,
                    "repeated": self._layer_SW("repeated", ["attention"]),
                },
                ended={part: self._layer_SW("kept", [part], least=True) for part in behind},
                made=made,
                whole=made,
                kind="experts" if self.kept.has_moe else "dense",
            ),
        ]

    def _needed_SW(self, moment: Moment) -> FloatArray:
        """Bytes of a moment on the rank with the most rows (the fewest where rows have ended)."""
        rows_SW = self._extreme(abs(moment.row), 0.0, 0.0, least=moment.row < 0) * np.sign(moment.row)
        return np.asarray(rows_SW + (moment.token + self._gathered) * self.kept.tokens + moment.fixed)

    @property
    def _optimizer_temporaries(self) -> float:
        """Square roots of second moments, of all tensors of an optimizer at once: experts that ranks share have one of
        their own, which steps behind that of the other weights. Of one tensor where each is by itself.
        """
        switches = self.scenario.implementation.switches
        if switches.updates_in_one:
            return 0.0
        if switches.optimizer == "loop":
            return 2 * FP32 * table_parameters(self.scenario)
        halves = [self.states[f"optimizer.{part}"] / 2 for part in ("dense", "experts")]
        return max(halves) if self.scenario.parallelism.expert > 1 else sum(halves)

    def _states(self, phase: Phase) -> dict[str, float]:
        """States that exist in a phase."""
        return {name: size for name, size in self.states.items() if phase.gradients or "gradients" not in name}

    @cached_property
    def _libraries(self) -> dict[str, float]:
        return libraries_bytes(
            self.scenario, tokens=self.kept.tokens, has_moe=self.kept.has_moe, replicas=self.schedule.num_replicas
        )

    def _moving_SW(self, phase: Phase) -> FloatArray:
        """Bytes of a phase that move, as a recording has them where there is one and activations are kept."""
        moving_SW = np.broadcast_to(np.asarray(phase.moving_SW, dtype=np.float64), self.kept.shape)
        if self.recorded is None or phase.live in ("", "layer"):
            return moving_SW
        more_SW = self.recorded.bytes_at(tokens=self.kept.tokens, activations_SW=self.kept.most[0])
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
            "first": (0, self.kept.first_backward + 1),
            "later": (self.kept.first_backward + 1, actions),
        }[phase.live]
        return self.kept.parts_between(begin, end, sample=sample, place=place)
