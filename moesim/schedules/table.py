"""Six pipeline schedules: the order of work of each, derived from its principle, and its facts, one entry per schedule.

Checks, stages, memory and planner ask the facts, and nothing else in moesim asks for a schedule by its name; laws in
the tests hold every entry to its order. Every order takes the number of pipeline ranks p, of micro-batches m and, where
there are several, of virtual stages per rank v; what it needs of them is checked with the scenario. F, B, W: seconds of
a chunk's forward pass, full backward pass and the part of the backward that computes the gradient of the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

from moesim.schedules.record import Action, Pass, Place, Schedule, Work


def _one(kind: Pass, micro_batch: int, chunk: int = 0) -> Action:
    return Action((Work(kind, micro_batch, chunk),))


def _straight(kind: str, p: int, m: int, actions: Iterable[Iterable[Action]]) -> Schedule:
    """A schedule with one stage a rank, first stage first."""
    route: tuple[Place, ...] = tuple((rank, 0) for rank in range(p))
    return Schedule(
        kind=kind,
        stages_of_rank=tuple((rank,) for rank in range(p)),
        routes=(route,) * m,
        actions=tuple(tuple(order) for order in actions),
    )


def gpipe(p: int, m: int) -> Schedule:
    """All forward passes, then all backward passes, the last micro-batch first (arXiv 1811.06965).

    Bubble (p-1)(F+B) on every rank; each holds the activations of all m micro-batches.
    """
    forward = [_one(Pass.FORWARD, micro_batch) for micro_batch in range(m)]
    backward = [_one(Pass.BACKWARD, micro_batch) for micro_batch in reversed(range(m))]
    return _straight("gpipe", p, m, [forward + backward] * p)


def one_forward_one_backward(p: int, m: int) -> Schedule:
    """One forward pass, one backward pass (PipeDream-Flush, arXiv 2006.09503 and 2104.04473).

    A rank may run ahead of the last one by as many micro-batches as there are stages behind it; then each forward pass
    waits for a backward pass. Bubble (p-1)(F+B); rank r holds min(p - r, m) activations.
    """
    return _straight("1f1b", p, m, [_in_turn(m, ahead=p - 1 - rank) for rank in range(p)])


def _in_turn(m: int, *, ahead: int) -> list[Action]:
    order = [_one(Pass.FORWARD, micro_batch) for micro_batch in range(min(ahead, m))]
    for micro_batch in range(m):
        if micro_batch + ahead < m:
            order.append(_one(Pass.FORWARD, micro_batch + ahead))
        order.append(_one(Pass.BACKWARD, micro_batch))
    return order


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B with the backward split: the gradient of the weights fills the gaps at the end (arXiv 2401.10241).

    Rank r leaves r gradients of weights behind, so that every rank holds p activations, as many as the first one does
    under 1F1B. Bubble (p-1)(F+B-2W) as long as W <= F.
    """
    return _straight("zb_h1", p, m, [_split_in_turn(m, ahead=p - 1 - rank, behind=rank) for rank in range(p)])


def _split_in_turn(m: int, *, ahead: int, behind: int) -> list[Action]:
    order = [_one(Pass.FORWARD, micro_batch) for micro_batch in range(min(ahead, m))]
    for micro_batch in range(m):
        if micro_batch + ahead < m:
            order.append(_one(Pass.FORWARD, micro_batch + ahead))
        order.append(_one(Pass.INPUT, micro_batch))
        if micro_batch >= behind:
            order.append(_one(Pass.WEIGHT, micro_batch - behind))
    return order + [_one(Pass.WEIGHT, micro_batch) for micro_batch in range(max(0, m - behind), m)]


def interleaved(p: int, m: int, virtual: int) -> Schedule:
    """1F1B where rank r holds stages r, r + p, r + 2p, ...: `virtual` chunks (arXiv 2104.04473); m divides by p.

    Micro-batches go in rounds of p through chunk after chunk, forward in the order of the chunks, backward against it.
    With F and B of one chunk the bubble is (p-1)(F+B), which is a v-th of that of 1F1B with chunks v times as long.
    """
    return _in_rounds("interleaved", p, m, virtual, ahead=0, pairs=False)


def combined_1f1b(p: int, m: int, virtual: int) -> Schedule:
    """Interleaved 1F1B whose forward and backward passes in turn run as one, overlapped (as in Megatron-Core).

    The forward pass of one micro-batch, or chunk, lies beside the backward pass of another: a rank runs one more ahead,
    so that the pair's forward pass is never what its backward pass needs. m divides by p, m >= 2p. On one rank that is
    F, then pairs, then B; with one chunk a rank runs twice as far ahead as under 1F1B.
    """
    return _in_rounds("combined_1f1b", p, m, virtual, ahead=1, pairs=True)


def _in_rounds(kind: str, p: int, m: int, virtual: int, *, ahead: int, pairs: bool) -> Schedule:
    """Micro-batches in rounds of p, each rank `ahead` more of them ahead than under 1F1B."""
    assert m % p == 0, "the scenario's checks refuse other numbers"
    rounds = [range(first, first + p) for first in range(0, m, p)]
    forward = [(micro_batch, chunk) for batch in rounds for chunk in range(virtual) for micro_batch in batch]
    backward = [(micro_batch, chunk) for batch in rounds for chunk in reversed(range(virtual)) for micro_batch in batch]
    actions = []
    for rank in range(p):
        first = min((virtual - 1) * p + 2 * (p - 1 - rank) + ahead, m * virtual)
        order = [_one(Pass.FORWARD, *place) for place in forward[:first]]
        for place, later in zip_longest(backward, forward[first:]):
            works = [Work(Pass.FORWARD, *later)] if later else []
            works.append(Work(Pass.BACKWARD, *place))
            order += [Action(tuple(works))] if pairs else [Action((work,)) for work in works]
        actions.append(tuple(order))
    route: tuple[Place, ...] = tuple((stage % p, stage // p) for stage in range(p * virtual))
    return Schedule(
        kind=kind,
        stages_of_rank=tuple(tuple(range(rank, p * virtual, p)) for rank in range(p)),
        routes=(route,) * m,
        actions=tuple(actions),
    )


def dualpipe(p: int, m: int) -> Schedule:
    """Two pipelines through the same ranks in opposite directions (arXiv 2412.19437, section 3.2.1).

    p and m are even, m >= 2p. Rank r holds stage r (chunk 0) and stage p-1-r (chunk 1). The first half of the
    micro-batches enters at rank 0, the other half at rank p-1. Once both directions have filled the pipeline, a rank
    runs the forward pass of one direction overlapped with the backward pass of the other. At the end the gradients of
    weights wait until no gradient of an input is ready. Each rank holds up to p + 1 activations. Where F = B - W = W,
    the bubble is (p/2-1)(F&B+B-3W), F&B being the seconds of a pair.
    """
    assert p % 2 == 0 and m % 2 == 0 and m >= 2 * p, "the scenario's checks refuse other numbers"
    down: tuple[Place, ...] = tuple((rank, 0) for rank in range(p))
    up: tuple[Place, ...] = tuple((p - 1 - stage, 1) for stage in range(p))
    return Schedule(
        kind="dualpipe",
        stages_of_rank=tuple((rank, p - 1 - rank) for rank in range(p)),
        routes=(down,) * (m // 2) + (up,) * (m // 2),
        actions=tuple(tuple(_both_ways(rank, p, m)) for rank in range(p)),
    )


def _both_ways(rank: int, p: int, m: int) -> Iterator[Action]:
    """The eight phases of one rank; "near" is the direction that enters at the end of the pipeline nearer to it.

    Each phase is (how often, what). f, b: near; F, B: far. A pair is written with &, i or I is a backward pass without
    its gradient of weights, w the oldest such gradient still owed. `inner` counts ranks towards the middle.
    """
    half = p // 2
    outer = min(rank, p - 1 - rank)  # ranks between this one and its end of the pipeline
    inner = half - 1 - outer
    in_middle = inner == 0
    pairs = m // 2 - p + outer + 1
    # The two middle ranks open the main phase without overlap: the far gradient leaves one pair earlier.
    opening = ["f", "B", "F&b"] if in_middle else ["f&B", "F&b"]
    # Of the last 2 (outer + 1) backward passes the later half leaves its gradient of weights for the gaps to come.
    ending = [("Ii" if turn > outer else "Bb")[turn % 2] for turn in range(2 * (outer + 1))]
    phases: list[tuple[int, list[str]]] = [
        (2 * inner, ["f"]),
        (outer + 1, ["f", "F"]),
        (inner, ["I", "w", "F"]),
        (1, opening),
        (pairs - 1, ["f&B", "F&b"]),
        (inner, ["B", "F&b"]),
        (1, ending),
        (inner, ["w", "i"]),
        (outer + 1, ["w"]),
    ]
    near = 0 if rank < half else 1
    return _written_out((name for times, names in phases for name in names * times), near=near, m=m)


_LETTERS = {"f": Pass.FORWARD, "b": Pass.BACKWARD, "i": Pass.INPUT}


def _written_out(names: Iterable[str], *, near: int, m: int) -> Iterator[Action]:
    """Names of phases as actions: each direction takes its micro-batches in order, in either pass."""
    firsts = (0, m // 2)
    micro_batches = {
        (is_forward, chunk): iter(range(firsts[chunk], firsts[chunk] + m // 2))
        for is_forward in (True, False)
        for chunk in (0, 1)
    }
    owed: list[Work] = []
    for name in names:
        if name == "w":
            late = owed.pop(0)
            yield Action((Work(Pass.WEIGHT, late.micro_batch, late.chunk),))
            continue
        works = []
        for letter in name.split("&"):
            kind = _LETTERS[letter.lower()]
            chunk = near if letter.islower() else 1 - near
            (micro_batch,) = islice(micro_batches[kind is Pass.FORWARD, chunk], 1)
            works.append(Work(kind, micro_batch, chunk))
            if kind is Pass.INPUT:
                owed.append(works[-1])
        yield Action(tuple(works))
    assert not owed


StagesOfRanks = tuple[tuple[int, ...], ...]


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

    order: of (p, m, v), who does what. stages: of (p, v), the stages of every rank.
    Of its passes: full_backward and split_backward, whether it has whole backward passes, and those split in gradients
    of inputs and of weights; overlaps_pairs, whether a forward and a backward pass run as one.
    Of what it needs: virtual, several stages per rank as the user says (single: or one); whole_rounds, that m divides
    by p; even, that p and m are even; least_rounds, the fewest micro-batches per pipeline rank.
    Of what it holds: copies of the model's parameters; holds_all, the activations of all m micro-batches at once.
    settles: micro-batches per rank of two steps, behind the first of which a further round adds the same time.
    """

    name: str
    order: Callable[[int, int, int], Schedule]
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
    order=_without_chunks(gpipe),
    holds_all=True,
)
PLAIN = ScheduleFacts(
    name="1f1b",
    order=_without_chunks(one_forward_one_backward),
)
INTERLEAVED = ScheduleFacts(
    name="interleaved",
    order=interleaved,
    virtual=True,
    whole_rounds=True,
)
COMBINED = ScheduleFacts(
    name="combined_1f1b",
    order=combined_1f1b,
    overlaps_pairs=True,
    virtual=True,
    single=True,
    whole_rounds=True,
    least_rounds=2,
)
SPLIT = ScheduleFacts(
    name="zb_h1",
    order=_without_chunks(zb_h1),
    full_backward=False,
    split_backward=True,
)
DUALPIPE = ScheduleFacts(
    name="dualpipe",
    order=_without_chunks(dualpipe),
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
