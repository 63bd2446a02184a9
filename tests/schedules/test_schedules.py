"""Laws that every pipeline schedule keeps, and the published closed forms of bubbles and activations."""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.schedules import SCHEDULES, Pass, Walk, build_schedule

KINDS = sorted(SCHEDULES)
# Seconds that a rank stands idle, of p ranks with v stages each and the seconds of the passes of a whole rank, as
# published (arXiv 2412.19437, Table 2, and 2104.04473).
PUBLISHED = {
    "gpipe": lambda p, v, F, B, W, pair: (p - 1) * (F + B),
    "1f1b": lambda p, v, F, B, W, pair: (p - 1) * (F + B),
    "interleaved": lambda p, v, F, B, W, pair: (p - 1) * (F + B) / v,
    "zb_h1": lambda p, v, F, B, W, pair: (p - 1) * (F + B - 2 * W),
    "dualpipe": lambda p, v, F, B, W, pair: (p / 2 - 1) * (pair + B - 3 * W),
}


def chunks_of(kind):
    """The fewest virtual stages that the schedule can have."""
    return 2 if SCHEDULES[kind].virtual else 1


@st.composite
def schedules(draw, kinds=KINDS, max_ranks=6):
    kind = draw(st.sampled_from(kinds))
    ranks = draw(st.integers(1, max_ranks))
    micro_batches = draw(st.integers(1, 16))
    facts = SCHEDULES[kind]
    virtual = draw(st.integers(1 if facts.single else 2, 4)) if facts.virtual else 1
    if facts.even:
        ranks += ranks % 2
        micro_batches += micro_batches % 2
    if facts.whole_rounds:
        micro_batches = ranks * draw(st.integers(1, 4))
    micro_batches += facts.least_rounds * ranks
    return build_schedule(kind, num_ranks=ranks, num_micro_batches=micro_batches, virtual=virtual)


@dataclass(frozen=True)
class Timetable:
    """When every action of every rank begins and ends, in its order; seconds from the start of the step."""

    start_PA: list
    finish_PA: list

    @property
    def seconds(self):
        return max(finish_A[-1] for finish_A in self.finish_PA)

    @property
    def bubble_P(self):
        """Seconds that each rank stands idle between 0 and the end of the last rank."""
        pairs = zip(self.start_PA, self.finish_PA, strict=True)
        return np.array([self.seconds - (finish_A - start_A).sum() for start_A, finish_A in pairs])


def walk_schedule(schedule, *, seconds, p2p_seconds=0.0):
    """Every rank runs its actions in order, each as soon as what it needs has arrived."""
    walk = Walk.of(schedule)
    ranks = np.array(walk.ranks)
    times = [np.array(times) for times in walk.times(seconds, p2p_seconds=p2p_seconds)]
    return Timetable(*([each[ranks == rank] for rank in range(schedule.num_ranks)] for each in times))


def equal_seconds(*, forward, backward, weight, pair=None):
    """Durations alike on all chunks: `backward` is the full one and `weight` its part; absent, a pair is the sum."""
    single = {Pass.FORWARD: forward, Pass.BACKWARD: backward, Pass.INPUT: backward - weight, Pass.WEIGHT: weight}
    together = forward + backward if pair is None else pair
    return lambda rank, action: together if action.is_pair else single[action.works[0].kind]


def peak_live_P(schedule):
    """Most activations (micro-batches times chunks) that each rank holds at once."""
    return [max(map(len, schedule.held(rank))) for rank in range(schedule.num_ranks)]


def works(schedule, rank):
    return [work for action in schedule.actions[rank] for work in action.works]


@settings(max_examples=40)
@given(schedule=schedules())
def test_every_micro_batch_passes_every_stage_once_in_each_direction(schedule):
    forward, backward, split, weight = Counter(), Counter(), Counter(), Counter()
    counters = {Pass.FORWARD: forward, Pass.BACKWARD: backward, Pass.INPUT: split, Pass.WEIGHT: weight}
    for rank in range(schedule.num_ranks):
        for work in works(schedule, rank):
            counters[work.kind][work.micro_batch, schedule.stage(rank, work)] += 1
            assert schedule.routes[work.micro_batch][schedule.stage(rank, work)] == (rank, work.chunk)
    everything = {(m, s): 1 for m in range(schedule.num_micro_batches) for s in range(schedule.num_stages)}
    assert forward == everything
    assert backward + split == everything
    assert weight == split


@settings(max_examples=40)
@given(schedule=schedules(), data=st.data())
def test_no_rank_waits_for_ever_and_nothing_begins_before_what_it_needs(schedule, data):
    durations = data.draw(st.lists(st.floats(0.1, 5.0), min_size=7, max_size=7))
    delay = data.draw(st.floats(0.0, 2.0))
    table = walk_schedule(
        schedule,
        seconds=lambda rank, action: durations[(3 * rank + len(action.works) + action.works[0].micro_batch) % 7],
        p2p_seconds=delay,
    )
    start, finish, done = {}, {}, {}
    for rank, actions in enumerate(schedule.actions):
        assert (table.start_PA[rank][1:] >= table.finish_PA[rank][:-1]).all()
        for index, action in enumerate(actions):
            for work in action.works:
                key = (work.kind is Pass.FORWARD, work.micro_batch, schedule.stage(rank, work))
                if work.kind is Pass.WEIGHT:
                    assert table.start_PA[rank][index] >= finish[key][0]
                else:
                    start[key] = table.start_PA[rank][index], rank
                    finish[key] = table.finish_PA[rank][index], rank
            done[rank] = table.finish_PA[rank][index]
    for (is_forward, micro_batch, stage), (begun, rank) in start.items():
        before = (is_forward, micro_batch, stage - 1 if is_forward else stage + 1)
        if before in finish:
            ended, sender = finish[before]
            assert begun >= ended + (delay if sender != rank else 0.0)
        if not is_forward:
            assert begun >= finish[True, micro_batch, stage][0]
    assert table.seconds == max(done.values())


@settings(max_examples=40)
@given(schedule=schedules())
def test_every_hand_off_is_sent_once_and_received_once(schedule):
    sent, received = Counter(), Counter()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            for p2p in schedule.sends(rank, action):
                assert p2p.source == rank
                sent[p2p] += 1
            for p2p in schedule.receives(rank, action):
                assert p2p.target == rank
                received[p2p] += 1
    assert sent == received
    assert set(sent.values()) <= {1}
    assert len(sent) == 2 * schedule.num_micro_batches * (schedule.num_stages - 1)


@settings(max_examples=40)
@given(schedule=schedules())
def test_activations_are_held_from_the_forward_to_the_last_backward_and_then_given_back(schedule):
    for rank, actions in enumerate(schedule.actions):
        at = defaultdict(list)  # the actions that pass a micro-batch through a chunk
        for index, action in enumerate(actions):
            for work in action.works:
                at[work.micro_batch, work.chunk].append(index)
        for index, held in enumerate(schedule.held(rank)):
            assert held == {each for each, indices in at.items() if indices[0] <= index <= indices[-1]}


@settings(max_examples=40)
@given(schedule=schedules())
def test_the_facts_of_a_schedule_are_those_of_its_order(schedule):
    facts = SCHEDULES[schedule.kind]
    kinds = {work.kind for rank in range(schedule.num_ranks) for work in works(schedule, rank)}
    pairs = {tuple(w.kind for w in a.works) for actions in schedule.actions for a in actions if a.is_pair}
    virtual = schedule.num_stages // schedule.num_ranks
    assert facts.stages(schedule.num_ranks, virtual) == schedule.stages_of_rank
    assert facts.copies == schedule.num_replicas
    assert (Pass.BACKWARD in kinds, Pass.INPUT in kinds) == (facts.full_backward, facts.split_backward)
    assert pairs == ({(Pass.FORWARD, Pass.BACKWARD)} if facts.overlaps_pairs else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_only_what_holds_all_micro_batches_holds_more_of_them_the_more_there_are(kind, ranks):
    peaks = [
        max(peak_live_P(build_schedule(kind, num_ranks=ranks, num_micro_batches=m * ranks, virtual=chunks_of(kind))))
        for m in (4, 8)
    ]
    assert (peaks[1] > peaks[0]) == SCHEDULES[kind].holds_all


# F, B, W, pair. The split forms assume that a gradient of weights fits into the gap of a forward pass (W <= F); that of
# DualPipe assumes F = B - W = W, and a pair that takes no longer than its two passes one after the other.
ANY = [(1.0, 2.0, 1.0, 3.0), (1.0, 2.0, 0.6, 3.0), (2.0, 2.0, 0.5, 4.0), (1.0, 3.0, 1.0, 4.0), (1.0, 2.6, 0.9, 3.0)]
EQUAL = [(1.0, 2.0, 1.0, 3.0), (1.0, 2.0, 1.0, 2.5), (1.0, 2.0, 1.0, 2.1), (0.7, 1.4, 0.7, 2.0)]


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_the_bubble_is_the_published_one(kind, p, rounds):
    virtuals = [2, 3] if SCHEDULES[kind].virtual else [1]
    for virtual in virtuals:
        schedule = build_schedule(kind, num_ranks=p, num_micro_batches=rounds * p, virtual=virtual)
        for F, B, W, pair in EQUAL if SCHEDULES[kind].overlaps_pairs else ANY:
            seconds = equal_seconds(forward=F / virtual, backward=B / virtual, weight=W / virtual, pair=pair)
            bubble = walk_schedule(schedule, seconds=seconds).bubble_P.max()
            expected = PUBLISHED[kind](p, virtual, F, B, W, pair)
            assert bubble == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_unequal_stages_differ_from_the_closed_form(kind):
    virtual = chunks_of(kind)
    schedule = build_schedule(kind, num_ranks=4, num_micro_batches=12, virtual=virtual)
    equal = equal_seconds(forward=1.0, backward=2.0, weight=1.0)
    even = walk_schedule(schedule, seconds=equal)
    uneven = walk_schedule(schedule, seconds=lambda rank, action: equal(rank, action) * (1.3 if rank == 1 else 1.0))
    expected = virtual * PUBLISHED[kind](4, virtual, 1, 2, 1, 3)
    assert even.bubble_P.max() == pytest.approx(expected)
    assert uneven.bubble_P.max() > 1.1 * expected
    assert uneven.bubble_P.min() < uneven.bubble_P.max()


@pytest.mark.parametrize("kind", KINDS)
def test_slow_links_only_lengthen_a_step(kind):
    schedule = build_schedule(kind, num_ranks=4, num_micro_batches=12, virtual=chunks_of(kind))
    seconds = equal_seconds(forward=1.0, backward=2.0, weight=1.0)
    times = [walk_schedule(schedule, seconds=seconds, p2p_seconds=delay).seconds for delay in (0.0, 0.1, 1.0)]
    assert times[0] < times[1] < times[2]


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_peak_activations_are_the_published_ones(p):
    def peak(kind, virtual=1):
        return peak_live_P(build_schedule(kind, num_ranks=p, num_micro_batches=4 * p, virtual=virtual))

    assert peak("1f1b") == list(range(p, 0, -1))
    assert peak("zb_h1") == [p] * p
    assert peak("dualpipe") == [p + 1] * p
    assert peak("gpipe") == [4 * p] * p
    # Megatron's count: warm-up of (v - 1) p + 2 (p - 1 - r) chunks and one more, in units of a v-th of a rank's layers.
    assert peak("interleaved", 2) == [p + 2 * (p - 1 - rank) + 1 for rank in range(p)]


@pytest.mark.parametrize(("p", "virtual"), [(1, 1), (1, 2), (2, 1), (2, 3), (4, 2)])
def test_combined_1f1b_pairs_all_but_the_warm_up_and_hides_what_a_pair_hides(p, virtual):
    schedule = build_schedule("combined_1f1b", num_ranks=p, num_micro_batches=8 * p, virtual=virtual)
    for rank, actions in enumerate(schedule.actions):
        ahead = (virtual - 1) * p + 2 * (p - 1 - rank) + 1
        assert [action.is_pair for action in actions] == [
            ahead <= place < 8 * p * virtual for place in range(len(actions))
        ]
        for forward, backward in (action.works for action in actions if action.is_pair):
            assert (forward.micro_batch, forward.chunk) != (backward.micro_batch, backward.chunk)
    times = [
        walk_schedule(schedule, seconds=equal_seconds(forward=1.0, backward=2.0, weight=1.0, pair=pair)).seconds
        for pair in (3.0, 2.0)
    ]
    pairs = min(sum(action.is_pair for action in actions) for actions in schedule.actions)
    assert times[0] - times[1] >= 0.99 * pairs


def test_dualpipe_overlaps_a_forward_and_a_backward_pass_of_opposite_directions():
    schedule = build_schedule("dualpipe", num_ranks=4, num_micro_batches=16)
    pairs = [action.works for actions in schedule.actions for action in actions if action.is_pair]
    assert len(pairs) > 0.5 * 4 * 16
    for forward, backward in pairs:
        assert (forward.kind, backward.kind) == (Pass.FORWARD, Pass.BACKWARD)
        assert forward.chunk != backward.chunk
        assert (forward.micro_batch < 8) != (backward.micro_batch < 8)


def test_overlap_shortens_dualpipe_by_what_its_pairs_save():
    schedule = build_schedule("dualpipe", num_ranks=8, num_micro_batches=32)
    times = [
        walk_schedule(schedule, seconds=equal_seconds(forward=1.0, backward=2.0, weight=1.0, pair=pair)).seconds
        for pair in (3.0, 2.5, 2.0)
    ]
    assert np.diff(times).max() < 0
    assert times[0] - times[1] == pytest.approx(times[1] - times[2], rel=0.1)


def test_ranks_that_wait_for_each_other_are_noticed():
    schedule = build_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    crossed = replace(schedule, actions=(schedule.actions[0][::-1], schedule.actions[1]))
    with pytest.raises(AssertionError, match="wait for each other"):
        walk_schedule(crossed, seconds=equal_seconds(forward=1.0, backward=2.0, weight=1.0))
