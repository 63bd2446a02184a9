"""What checks, stages, memory and planner ask of a pipeline schedule, as data: one entry per schedule.

Nothing else in moesim asks for a schedule by its name; laws in the tests hold every entry to its order.
Legend: p pipeline ranks, m micro-batches, v virtual stages per rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from moesim.schedules import orders
from moesim.schedules.record import Schedule

StagesOfRanks = tuple[tuple[int, ...], ...]


class PassTimes(NamedTuple):
    """Seconds of a rank's forward pass, full backward pass, its gradients of weights, and an overlapped pair."""

    forward: float
    backward: float
    weight: float
    pair: float


def stages_in_turn(num_ranks: int, virtual: int) -> StagesOfRanks:
    """Rank r holds stages r, r + p, r + 2p, ..."""
    return tuple(tuple(range(rank, num_ranks * virtual, num_ranks)) for rank in range(num_ranks))


def stages_both_ways(num_ranks: int, virtual: int) -> StagesOfRanks:
    """Rank r holds stages r and p - 1 - r: two ranks hold each."""
    del virtual
    return tuple((rank, num_ranks - 1 - rank) for rank in range(num_ranks))


@dataclass(frozen=True, kw_only=True)
class ScheduleFacts:
    """The facts of one schedule.

    order: of (p, m, v), who does what. stages: of (p, v), the stages of every rank. bubble: of (p, v, seconds of the
    passes of a whole rank), its published closed form in seconds, where there is one.
    Of its passes: full_backward and split_backward, whether it has whole backward passes, and those split in gradients
    of inputs and of weights; overlaps_pairs, whether a forward and a backward pass run as one.
    Of what it needs: virtual, several stages per rank as the user says (single: or one); whole_rounds, that m divides
    by p; even, that p and m are even; least_rounds, the fewest micro-batches per pipeline rank.
    Of what it holds: copies of the model's parameters; holds_all, the activations of all m micro-batches at once.
    settles: micro-batches per rank of two steps, behind the first of which a further round adds the same time.
    """

    name: str
    order: Callable[[int, int, int], Schedule]
    bubble: Callable[[int, int, PassTimes], float] | None = None
    stages: Callable[[int, int], StagesOfRanks] = stages_in_turn
    full_backward: bool = True
    split_backward: bool = False
    overlaps_pairs: bool = False
    virtual: bool = False
    single: bool = False
    whole_rounds: bool = False
    even: bool = False
    least_rounds: int = 0
    copies: int = 1
    holds_all: bool = False
    settles: tuple[int, int] = (2, 4)

    @property
    def passes(self) -> tuple[bool, bool, bool]:
        """Which kinds of passes it has: schedules with the same ones are made of the same pieces."""
        return self.full_backward, self.split_backward, self.overlaps_pairs


def _without_chunks(order: Callable[[int, int], Schedule]) -> Callable[[int, int, int], Schedule]:
    def build(num_ranks: int, num_micro_batches: int, virtual: int) -> Schedule:
        assert virtual == 1, "the scenario's checks refuse chunks where there are none"
        return order(num_ranks, num_micro_batches)

    return build


GPIPE = ScheduleFacts(
    name="gpipe",
    order=_without_chunks(orders.gpipe),
    bubble=lambda p, v, t: (p - 1) * (t.forward + t.backward),
    holds_all=True,
)
PLAIN = ScheduleFacts(
    name="1f1b",
    order=_without_chunks(orders.one_forward_one_backward),
    bubble=lambda p, v, t: (p - 1) * (t.forward + t.backward),
)
INTERLEAVED = ScheduleFacts(
    name="interleaved",
    order=orders.interleaved,
    bubble=lambda p, v, t: (p - 1) * (t.forward + t.backward) / v,
    virtual=True,
    whole_rounds=True,
)
COMBINED = ScheduleFacts(
    name="combined_1f1b",
    order=orders.combined_1f1b,
    overlaps_pairs=True,
    virtual=True,
    single=True,
    whole_rounds=True,
    least_rounds=2,
)
SPLIT = ScheduleFacts(
    name="zb_h1",
    order=_without_chunks(orders.zb_h1),
    bubble=lambda p, v, t: (p - 1) * (t.forward + t.backward - 2 * t.weight),
    full_backward=False,
    split_backward=True,
)
DUALPIPE = ScheduleFacts(
    name="dualpipe",
    order=_without_chunks(orders.dualpipe),
    bubble=lambda p, v, t: (p / 2 - 1) * (t.pair + t.backward - 3 * t.weight),
    stages=stages_both_ways,
    split_backward=True,
    overlaps_pairs=True,
    even=True,
    least_rounds=2,
    copies=2,
    settles=(6, 8),  # two directions settle later
)
SCHEDULES = {facts.name: facts for facts in (GPIPE, PLAIN, INTERLEAVED, COMBINED, SPLIT, DUALPIPE)}


def build_schedule(kind: str, *, num_ranks: int, num_micro_batches: int, virtual: int = 1) -> Schedule:
    """The order of one step on `num_ranks` pipeline ranks.

    >>> schedule = build_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    >>> [str(action) for action in schedule.actions[0]]
    ['F0.0', 'F1.0', 'B0.0', 'B1.0']
    """
    return SCHEDULES[kind].order(num_ranks, num_micro_batches, virtual)
