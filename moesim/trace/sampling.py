"""Routing samples: which recorded sequence every rank holds in every micro-batch of a step.

Legend: B micro-batches, N data-parallel ranks, U sequences per rank and micro-batch, S sequences of the trace.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    @property
    def coverage(self) -> float:
        """Trace sequences / batch sequences: how far the trace carries a statement about the batch."""
        return self.num_trace_sequences / self.sequences_BNU.size


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
