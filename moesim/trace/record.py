"""RoutingTrace: which experts a router chose for every token of held-out text, with what affinity and gate; and routing
samples: which recorded sequence every rank holds in every micro-batch of a step.

Legend: L thin MoE layers, S sequences, T tokens per sequence, K columns of selections, E experts. Of a sample: B
micro-batches, N data-parallel ranks, U sequences per rank and micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.scenario.routing import RouterShape

Array = NDArray[Any]
Json = None | bool | int | float | str | list[Any] | dict[str, Any]

NO_EXPERT = -1


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """The routing of one recorded training step, before any dropping.

    expert_ids_LSTK: int16, -1 where a token has fewer than K experts (expert choice).
    affinities_LSTK: float32, the score that ranked the expert; 0 at -1. gates_LSTK: float32, its weight; 0 at -1.
    """

    step: int
    expert_ids_LSTK: NDArray[np.int16]
    affinities_LSTK: NDArray[np.float32]
    gates_LSTK: NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Tokens recorded per layer."""
        return int(self.expert_ids_LSTK.shape[1] * self.expert_ids_LSTK.shape[2])

    def load_LE(self, *, num_experts: int) -> NDArray[np.int64]:
        """Rows that every expert gets in every layer, before dropping."""
        each_LN = self.expert_ids_LSTK.reshape(len(self.expert_ids_LSTK), -1) + 1
        return np.stack([np.bincount(ids_N, minlength=num_experts + 1)[1:] for ids_N in each_LN])

    def resequence(self, sequence_length: int) -> "TraceStep":
        """The same tokens in order, cut into sequences of `sequence_length`; an incomplete last one is left out."""
        num_sequences = self.num_tokens // sequence_length

        def cut(array_LSTK: Array) -> Array:
            layers, _, _, columns = array_LSTK.shape
            flat_LNK = array_LSTK.reshape(layers, -1, columns)[:, : num_sequences * sequence_length]
            return flat_LNK.reshape(layers, num_sequences, sequence_length, columns)

        return replace(
            self,
            expert_ids_LSTK=cut(self.expert_ids_LSTK),
            affinities_LSTK=cut(self.affinities_LSTK),
            gates_LSTK=cut(self.gates_LSTK),
        )


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """How often every expert was selected in a training step, before dropping: counts_LSE, int32.

    S is 1 where the counts of all sequences were added up.
    """

    step: int
    counts_LSE: NDArray[np.int32]


def _empty() -> NDArray[np.float64]:
    return np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class TrainingCurves:
    """What was measured while the router trained; all arrays 1-D and empty when nothing was trained.

    imbalance: max / mean expert load of each training step, averaged over the layers.
    """

    steps: Array = field(default_factory=_empty)
    train_loss: Array = field(default_factory=_empty)
    validation_steps: Array = field(default_factory=_empty)
    validation_loss: Array = field(default_factory=_empty)
    imbalance: Array = field(default_factory=_empty)


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """The exchange format between routers and the simulator.

    steps: ascending by step; the last one is the final router. earlier: steps of which only counts were kept, over
    sequences of the same held-out text, ascending. provenance: everything that made the trace
    (configuration, corpus hash, versions), as JSON values. num_phases: the sequences are so many equal runs, of which
    the micro-batches of a step hold one each, in turn; 1: any of them.
    """

    router: RouterShape
    steps: tuple[TraceStep, ...]
    earlier: tuple[StepCounts, ...] = ()
    curves: TrainingCurves = field(default_factory=TrainingCurves)
    provenance: Mapping[str, Json] = field(default_factory=dict)
    num_phases: int = 1

    @property
    def final(self) -> TraceStep:
        """The last recorded step: the router that is simulated."""
        return self.steps[-1]

    @cached_property
    def final_load_LE(self) -> NDArray[np.int64]:
        """Rows of every expert in every layer at the last recorded step."""
        return self.final.load_LE(num_experts=self.router.num_experts)

    @cached_property
    def first_load_LE(self) -> NDArray[np.int64]:
        """The same at the first step of which the trace knows them."""
        if self.earlier and self.earlier[0].step < self.steps[0].step:
            return np.asarray(self.earlier[0].counts_LSE.sum(axis=1, dtype=np.int64))
        return self.steps[0].load_LE(num_experts=self.router.num_experts) if len(self.steps) > 1 else self.final_load_LE

    @property
    def num_layers(self) -> int:
        """Thin MoE layers."""
        return int(self.final.expert_ids_LSTK.shape[0])

    @property
    def num_sequences(self) -> int:
        """Sequences of the final step."""
        return int(self.final.expert_ids_LSTK.shape[1])

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence of the final step."""
        return int(self.final.expert_ids_LSTK.shape[2])

    def resequence(self, sequence_length: int) -> "RoutingTrace":
        """The trace with its tokens, in order, cut into sequences of `sequence_length` tokens.

        Recorded sequences are contiguous text, so joining or splitting them keeps neighbours together. Earlier
        steps that hold less than one such sequence are left out. Raises UserError when the final step does.
        """
        if sequence_length == self.sequence_length:
            return self
        if self.final.num_tokens // self.num_phases % sequence_length and self.num_phases > 1:
            raise UserError(
                f"the trace has {self.num_phases} phases of {self.final.num_tokens // self.num_phases} tokens, which "
                f"workload.sequence_length = {sequence_length} does not divide; use {self.sequence_length}"
            )
        if self.final.num_tokens < sequence_length:
            raise UserError(
                f"the trace holds {self.final.num_tokens} tokens, less than one sequence of {sequence_length}; "
                "record more tokens (routing.tokens) or shorten workload.sequence_length"
            )
        steps = tuple(step.resequence(sequence_length) for step in self.steps if step.num_tokens >= sequence_length)
        return replace(self, steps=steps)


def group_of_expert(router: RouterShape) -> NDArray[np.int64]:
    """Router group of every expert, int64 [E]: groups are equal runs of consecutive experts."""
    return np.arange(router.num_experts) // (router.num_experts // router.num_groups)


MIN_COVERAGE_FOR_CONFIDENCE = 1.0  # below: warn
MIN_COVERAGE_FOR_RANGE = 1 / 8  # below: no range; a small trace gives a confidently wrong one


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceDraw:
    """The sequences of one step: `sequences_BNU`, int64 indices into the trace, out of `num_trace_sequences`."""

    sequences_BNU: NDArray[np.int64]
    num_trace_sequences: int

    @property
    def num_distinct(self) -> int:
        """Different sequences of the trace that the step holds."""
        return len(np.unique(self.sequences_BNU))

    @property
    def reused_share(self) -> float:
        """Share of the step's sequences that repeat another one of the step."""
        return 1.0 - self.num_distinct / self.sequences_BNU.size


def draw_sequences(
    num_trace_sequences: int,
    *,
    num_micro_batches: int,
    num_data_ranks: int,
    micro_batch: int,
    rng: np.random.Generator,
    bootstrap: bool = False,
    num_phases: int = 1,
) -> SequenceDraw:
    """Deal whole sequences to every data-parallel rank and micro-batch of a step.

    Without replacement as long as the trace lasts; then it is dealt again, so that use differs by at most one, and no
    sequence comes twice in one micro-batch if the trace has enough for one. With `bootstrap` the trace itself is
    first resampled with replacement (double bootstrap): repeats then stand for the trace's own uncertainty. With phases
    the micro-batches hold sequences of one of the trace's equal runs each, in turn, beginning with any.
    """
    assert num_trace_sequences % num_phases == 0
    sequences_BNU = np.empty((num_micro_batches, num_data_ranks, micro_batch), dtype=np.int64)
    first = rng.integers(num_phases) if num_phases > 1 else 0
    phase_B = (first + np.arange(num_micro_batches)) % num_phases
    size = num_trace_sequences // num_phases
    for phase in np.unique(phase_B):
        pool = np.arange(size)
        if bootstrap:
            pool = rng.integers(size, size=size)
        hands = int((phase_B == phase).sum())
        dealt = _deal(size, hands=hands, hand_size=num_data_ranks * micro_batch, rng=rng)
        sequences_BNU[phase_B == phase] = phase * size + pool[dealt].reshape(hands, num_data_ranks, micro_batch)
    return SequenceDraw(sequences_BNU=sequences_BNU, num_trace_sequences=num_trace_sequences)


def _deal(num_cards: int, *, hands: int, hand_size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cards of `hands` hands [hands * hand_size], from a deck that is reshuffled whenever it is used up.

    A reshuffle in the middle of a hand puts the cards of that hand last, so the hand has no card twice.
    """
    dealt = np.empty(hands * hand_size + num_cards, dtype=np.int64)
    count = 0
    while count < hands * hand_size:
        deck = rng.permutation(num_cards)
        in_hand = np.isin(deck, dealt[count // hand_size * hand_size : count])
        dealt[count : count + num_cards] = np.concatenate([deck[~in_hand], deck[in_hand]])
        count += num_cards
    return dealt[: hands * hand_size]


def choose_protected(shape: tuple[int, ...], *, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """True for round(share * size) of the step's sequences, chosen at random: those that capacity never drops."""
    size = int(np.prod(shape))
    protected = np.zeros(size, dtype=bool)
    protected[rng.permutation(size)[: round(share * size)]] = True
    return protected.reshape(shape)
