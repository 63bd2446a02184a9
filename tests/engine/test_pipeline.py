"""Pipelines: published bubbles read from executed spans, p2p sends, overlap and recomputation."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine.step import simulate_step
from moesim.program.host import FREE_HOST
from moesim.program.operations import Block, Run, compute, interleave, transfer
from moesim.program.step_program import GroupProgram, Sent, StepProgram, Task
from moesim.results import CATEGORIES, Label, Stream, attribute
from moesim.schedules import Pass, build_schedule

FORWARD, BACKWARD, WEIGHT = 1.0, 2.0, 0.75


def block(seconds: float) -> Block:
    return Block("test", (compute(Label("work", "experts", Stream.COMPUTE, 0), seconds, source="roofline"),))


def equal_program(
    kind: str,
    ranks: int,
    micro_batches: int,
    *,
    weight: float = WEIGHT,
    pair: float | None = None,
    slow: int | None = None,
) -> StepProgram:
    """A pipeline whose chunks all take the same time, without communication; rank `slow` takes half as long again."""
    virtual = 2 if kind == "interleaved" else 1
    schedule = build_schedule(kind, num_ranks=ranks, num_micro_batches=micro_batches, virtual=virtual)
    groups = []
    for rank, actions in enumerate(schedule.actions):
        factor = (1.5 if rank == slow else 1.0) / virtual
        seconds = {
            Pass.FORWARD: FORWARD,
            Pass.BACKWARD: BACKWARD,
            Pass.INPUT: BACKWARD - weight,
            Pass.WEIGHT: weight,
        }
        blocks = {kind: block(factor * length) for kind, length in seconds.items()}
        shared = (
            {kind: block(factor * pair * seconds[kind] / (FORWARD + BACKWARD)) for kind in blocks} if pair else blocks
        )
        tasks = []
        for action in actions:
            chosen = shared if action.is_pair else blocks
            runs = tuple(Run(chosen[w.kind], w.micro_batch, w.kind is not Pass.FORWARD) for w in action.works)
            sends = tuple(Sent(p2p=h, which=len(runs) - 1, seconds=0.0) for h in schedule.sends(rank, action))
            tasks.append(Task(runs=runs, receives=schedule.receives(rank, action), sends=sends))
        groups.append(
            GroupProgram(
                number=0, pipeline_rank=rank, ranks_R=np.array([rank]), tasks=tuple(tasks), optimizer=Block("none", ())
            )
        )
    return StepProgram(
        groups=tuple(groups),
        reductions=(),
        gathers=(),
        host=FREE_HOST,
        samples=1,
        source_seconds={},
    )


def worst_bubble(program: StepProgram) -> float:
    """The largest idle time of any rank, read from its spans."""
    outcome = simulate_step(program)
    return max(attribute(table)[CATEGORIES.index("bubble")].max() for table in outcome.tables)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gpipe", lambda p: (p - 1) * (FORWARD + BACKWARD)),
        ("1f1b", lambda p: (p - 1) * (FORWARD + BACKWARD)),
        ("interleaved", lambda p: (p - 1) * (FORWARD + BACKWARD) / 2),
        ("zb_h1", lambda p: (p - 1) * (FORWARD + BACKWARD - 2 * WEIGHT)),
    ],
)
def test_bubbles_equal_the_published_forms(kind, form, ranks):
    assert worst_bubble(equal_program(kind, ranks, 4 * ranks)) == pytest.approx(form(ranks), rel=1e-3)


@pytest.mark.parametrize(("ranks", "pair"), [(4, 3.0), (8, 3.0), (8, 2.6)])
def test_dualpipe_bubble_equals_the_published_form(ranks, pair):
    # The published form holds where the three kinds of pass take equal time: F = B - W = W.
    bubble = worst_bubble(equal_program("dualpipe", ranks, 2 * ranks + 4, weight=1.0, pair=pair))
    assert bubble == pytest.approx((ranks / 2 - 1) * (pair + BACKWARD - 3 * 1.0), rel=1e-3)


def test_a_slow_stage_has_another_bubble_than_the_form():
    even = worst_bubble(equal_program("1f1b", 4, 16))
    uneven = worst_bubble(equal_program("1f1b", 4, 16, slow=2))
    assert uneven > even + 10 * 0.5 * (FORWARD + BACKWARD)


def test_overlapped_passes_fill_each_others_transfers():
    class Fixed:
        alone_R = np.full((1, 1), 1.0)

        def finish(self, start_R: np.ndarray) -> np.ndarray:
            return start_R + 1.0

    def part(name: str) -> Block:
        operation = compute(Label("work", "experts", Stream.COMPUTE, 0), 1.0, source="roofline")
        send = transfer(name, "dispatch_exposed", (Fixed(),), layer=0)
        return Block(name, (operation, send, operation, send, operation))

    order = interleave(part("a"), part("b"))
    assert [which for which, _ in order] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    one_after_the_other = Task(runs=(Run(part("a"), 0, False),)), Task(runs=(Run(part("b"), 0, True),))
    together = (Task(runs=(Run(part("a"), 0, False), Run(part("b"), 0, True))),)
    program = equal_program("1f1b", 1, 1)

    def seconds(tasks: tuple[Task, ...]) -> float:
        group = GroupProgram(number=0, pipeline_rank=0, ranks_R=np.array([0]), tasks=tasks, optimizer=Block("none", ()))
        return float(simulate_step(replace(program, groups=(group,))).step_S[0])

    assert seconds(one_after_the_other) == pytest.approx(10.0)
    assert seconds(together) == pytest.approx(6.0)
