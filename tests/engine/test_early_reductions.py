"""Reductions of a stage's gradients that begin while its rank has passes of other stages to do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine import simulate_step
from moesim.engine.executor import FREE_BESIDE
from moesim.kernels import Beside, kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import StepProgram, build_program
from moesim.program.collectives import Reduction
from moesim.program.host import FREE_HOST
from moesim.program.operations import Block, Run, compute
from moesim.program.step_program import GroupProgram, Task
from moesim.results import CATEGORIES, Label, attribute
from moesim.results.attribution import overlapped_transfer
from moesim.results.critical_path import path_facts
from moesim.results.spans import SpanTable, Stream
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

LAYOUT: dict[str, Any] = {"data": 4, "expert": 2, "pipeline": 2, "zero": {"dense": 1, "expert": 1}}
INTERLEAVED = {"kind": "interleaved", "virtual": 2}
BESIDE = {"overlap": {"gradient_reduction": True}}


def two_replicas(*, early: bool) -> StepProgram:
    """Two data-parallel ranks that leave stage 1 after 2 and 4 s, and stage 0 3 s later; both reductions take 2.5 s."""

    def backward(seconds: float) -> Task:
        work = compute(Label("work", "experts", Stream.COMPUTE, 0), seconds, source="roofline")
        return Task(runs=(Run(Block("backward", (work,)), 0, True),))

    members = (np.array([0, 1]),)
    return StepProgram(
        groups=tuple(
            GroupProgram(
                number=number,
                pipeline_rank=0,
                ranks_R=np.array([number]),
                tasks=(backward(first), backward(3.0)),
                optimizer=Block("none", ()),
                last_tasks={1: 0, 0: 1} if early else {},
            )
            for number, first in enumerate((2.0, 4.0))
        ),
        reductions=tuple(
            Reduction("all_reduce.dense", members, 2.5, "network", buckets, stage)
            for stage, buckets in enumerate((1, 2))
        ),
        gathers=(),
        host=FREE_HOST,
        samples=1,
        source_seconds={},
    )


def spans(table: SpanTable, chosen: Stream) -> list[tuple[float, float]]:
    rows_N = table.rows(chosen)
    pairs = zip(table.start_NSR[rows_N, 0, 0], table.finish_NSR[rows_N, 0, 0], strict=True)
    return [(float(start), float(finish)) for start, finish in pairs]


def exposed(table: SpanTable) -> float:
    return float(attribute(table)[CATEGORIES.index("data_parallel")].max())


def test_two_replicas_by_hand():
    """Stage 1 in two buckets: the first is there at 1 and 2 s, the last at 2 and 4 s. 4 + 2.5 / 2 = 5.25 s."""
    outcome = simulate_step(two_replicas(early=True))
    fast, slow = outcome.tables
    assert spans(fast, Stream.BACKGROUND) == [(1.0, 5.0)]
    assert spans(slow, Stream.BACKGROUND) == [(2.0, 5.25)]
    # The fast rank is done at 5 s, stands still for the rest of stage 1, and then waits for the slow one's stage 0.
    assert spans(fast, Stream.REDUCTION) == [(5.0, 5.25), (5.25, 9.5)]
    assert spans(slow, Stream.REDUCTION) == [(5.25, 5.25), (7.0, 9.5)]
    assert outcome.step_S[0] == 9.5
    assert (exposed(fast), exposed(slow)) == (2.75, 2.5)
    assert overlapped_transfer(slow)["data_parallel"][0, 0] == 3.25
    # All at the end: stage 0 from 7 to 9.5 s, then stage 1.
    late = simulate_step(two_replicas(early=False))
    assert late.step_S[0] == 12.0
    assert [exposed(table) for table in late.tables] == [5.0, 5.0]


def test_reductions_and_the_backward_pass_beside_them_slow_each_other():
    """Stage 1 of the slow replica may begin at 2 s and has kernels until 4 s beside it; nothing else is beside any."""
    free, slowed = (
        simulate_step(replace(two_replicas(early=True), beside_reductions=facts)).step_S[0]
        for facts in (FREE_BESIDE, Beside(compute=1.5, transfer=2.0))
    )
    assert free == 9.5
    # Of its 2.5 s the reduction does half of what it could in 3 s beside kernels, which do 2 s of work in them:
    # done at 2 + 2.5 + 1.5 s, and not before the kernels at 4 + 1 s and a bucket of 1.25 s behind them.
    program = two_replicas(early=True)
    alone = replace(program, reductions=program.reductions[1:], beside_reductions=Beside(compute=1.5, transfer=2.0))
    _, slow = simulate_step(alone).tables
    assert spans(slow, Stream.BACKGROUND) == [(2.0, 6.25)]
    assert slowed >= free


def program_of(scenario: Scenario, *, samples: int = 1) -> StepProgram:
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    return build_program(
        scenario,
        fabric=build_fabric(scenario.cluster),
        kernels=kernel_model("h200", "roofline"),
        samples=[sampler.draw(stream(0, "test", number)) for number in range(samples)],
    )


def all_at_the_end(program: StepProgram) -> StepProgram:
    return replace(program, groups=tuple(replace(group, last_tasks={}) for group in program.groups))


@pytest.mark.parametrize(
    "layout",
    [
        {"schedule": INTERLEAVED},
        {"schedule": INTERLEAVED, "zero": {"dense": 0, "expert": 0}},
        {"schedule": INTERLEAVED, "tensor": 2, "data": 2},
        {"schedule": {"kind": "dualpipe"}},
    ],
)
def test_stages_that_are_done_early_expose_less(small, layout):
    changes = {"cluster.nodes": 2, "parallelism": {**LAYOUT, **layout}, "workload.micro_batch": 1, **BESIDE}
    program = program_of(small({"model.layers": 4, **changes}), samples=2)
    early, late = simulate_step(program), simulate_step(all_at_the_end(program))
    assert (early.step_S < late.step_S).all()
    for one, other in zip(early.tables, late.tables, strict=True):
        assert spans(one, Stream.BACKGROUND) and not spans(other, Stream.BACKGROUND)
        before_CSR, after_CSR = attribute(other), attribute(one)
        row = CATEGORIES.index("data_parallel")
        assert (after_CSR[row] <= before_CSR[row] + 1e-12).all() and after_CSR[row].sum() < before_CSR[row].sum()
        np.testing.assert_allclose(after_CSR.sum(axis=0), early.step_S[:, None] + 0 * after_CSR[0], rtol=1e-9)
        # Passes stay where they are: what is reduced beside them neither slows them nor counts in their gaps.
        hand_offs = CATEGORIES.index("pipeline")
        np.testing.assert_array_equal(after_CSR[hand_offs], before_CSR[hand_offs])
        np.testing.assert_array_equal(*(table.finish_NSR[table.rows(Stream.PIPELINE)] for table in (one, other)))
    facts = path_facts(early.tables, pipeline_ranks=[group.pipeline_rank for group in program.groups])
    assert sum(facts["seconds"].values()) == pytest.approx(float(early.step_S[0]), rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallelism": {**LAYOUT, "schedule": {"kind": "1f1b"}}, **BESIDE},
        {"parallelism": {**LAYOUT, "schedule": {"kind": "zb_h1"}}, **BESIDE},
        {"parallelism": {**LAYOUT, "schedule": INTERLEAVED}, "overlap": {"gradient_reduction": False}},
        {"parallelism": {**LAYOUT, "schedule": INTERLEAVED}},
        # Gradients that are reduced in every pass already occupy the stream of the collectives.
        {"parallelism": {**LAYOUT, "schedule": INTERLEAVED, "zero": {"dense": 2, "expert": 1}}, **BESIDE},
    ],
)
def test_one_stage_or_no_overlap_begins_at_the_end(small, changes):
    program = program_of(small({"model.layers": 4, "cluster.nodes": 2, "workload.micro_batch": 1, **changes}))
    one, other = simulate_step(program), simulate_step(all_at_the_end(program))
    for table, late in zip(one.tables, other.tables, strict=True):
        assert not len(table.rows(Stream.BACKGROUND))
        np.testing.assert_array_equal(table.start_NSR, late.start_NSR)
        np.testing.assert_array_equal(table.finish_NSR, late.finish_NSR)


def test_early_reductions_go_through_shared_links(small):
    """Links between pods that dispatches and gradients share: both are slowed, and no law of a step is broken."""
    changes = {
        "cluster.nodes": 8,
        "cluster.fabric": {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 4.0},
        "parallelism": {"data": 16, "expert": 8, "pipeline": 2, "schedule": INTERLEAVED},
        "workload.global_batch": 32,
        "workload.micro_batch": 1,
        **BESIDE,
    }
    program = program_of(small({"model.layers": 4, **changes}), samples=2)
    contention = program.contention
    assert contention is not None and any(contention.collectives)
    wide = simulate_step(replace(program, contention=replace(contention, capacity_L=1e3 * contention.capacity_L)))
    alone, shared = simulate_step(replace(program, contention=None)), simulate_step(program)
    # One sample after the other what is open on a port is known in its order, of several together by the latest.
    np.testing.assert_allclose(wide.step_S, alone.step_S, rtol=1e-3)
    assert (shared.step_S > alone.step_S).all()
    for table in shared.tables:
        assert spans(table, Stream.BACKGROUND)
        seconds_CSR = attribute(table)
        assert seconds_CSR.min() > -1e-12
        np.testing.assert_allclose(seconds_CSR.sum(axis=0), shared.step_S[:, None] + 0 * seconds_CSR[0], rtol=1e-9)
    facts = path_facts(shared.tables, pipeline_ranks=[group.pipeline_rank for group in program.groups])
    assert sum(facts["seconds"].values()) == pytest.approx(float(shared.step_S[0]), rel=1e-9)
