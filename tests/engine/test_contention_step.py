"""Steps whose expert groups share links: what slows them, what does not, and that the laws of a step still hold."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine import simulate_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import StepProgram, build_program
from moesim.results import attribute
from moesim.results.critical_path import path_facts
from moesim.run import obtain_trace, simulate
from moesim.scenario import Scenario
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

BLOCKING = {"preset": "rail_optimised", "oversubscription": 4.0}
TWO_GROUPS: dict[str, Any] = {
    "cluster.nodes": 4,
    "parallelism": {"data": 16, "expert": 8},
    "workload.global_batch": 32,
}


def program_of(scenario: Scenario, *, samples: int = 1) -> StepProgram:
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    return build_program(
        scenario,
        fabric=build_fabric(scenario.cluster),
        kernels=kernel_model("h200", "roofline"),
        samples=[sampler.draw(stream(0, "test", number)) for number in range(samples)],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cluster.fabric": {"preset": "leaf_spine", "pod_nodes": 1}},
        # One group on each pod: the links between pods carry gradients alone.
        {"cluster.fabric": {"preset": "leaf_spine", "pod_nodes": 2, "oversubscription": 4.0}},
        # Tokens stay on their rail: no leaf passes them on.
        {"cluster.fabric": BLOCKING, "dispatch.algorithm": "hierarchical", "dispatch.deduplicate": "per_node"},
        # One group has nobody to share with.
        {"cluster.fabric": BLOCKING, "parallelism": {"data": 16, "expert": 16}},
    ],
)
def test_groups_with_capacity_to_spare_are_simulated_without_sharing(small, changes):
    assert program_of(small({**TWO_GROUPS, **changes})).contention is None


@pytest.mark.parametrize("model", ["ports", "fluid", "exact"])
def test_groups_on_an_oversubscribed_fabric_slow_each_other(small, model):
    """Two groups over four nodes, 4:1: dispatch and combine take up to twice as long as alone."""
    program = program_of(small({**TWO_GROUPS, "cluster.fabric": BLOCKING, "network.model": model}))
    assert program.contention is not None
    alone = simulate_step(replace(program, contention=None))
    shared = simulate_step(program)

    def in_transfers(outcome) -> float:
        return sum(
            float((table.finish_NSR[row] - table.start_NSR[row]).mean())
            for table in outcome.tables
            for row in range(len(table.label_N))
            if table.labels[table.label_N[row]].name in ("dispatch", "combine")
        )

    assert 1.3 < in_transfers(shared) / in_transfers(alone) <= 2.1
    assert (shared.step_S > 1.2 * alone.step_S).all()


def test_groups_are_not_slowed_where_the_links_have_capacity_for_all(small):
    """The same program through the shared links, with links that can carry everybody: the same digits."""
    program = program_of(small({**TWO_GROUPS, "cluster.fabric": BLOCKING}), samples=2)
    assert program.contention is not None
    wide = replace(program.contention, capacity_L=1e3 * program.contention.capacity_L)
    through_shared_links = simulate_step(replace(program, contention=wide))
    without = simulate_step(replace(program, contention=None))
    np.testing.assert_array_equal(through_shared_links.step_S, without.step_S)
    for shared_links, plain in zip(through_shared_links.tables, without.tables, strict=True):
        np.testing.assert_array_equal(shared_links.finish_NSR, plain.finish_NSR)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"implementation.kind": "torch_eager", "dispatch.deduplicate": "per_expert"},
        {"cluster.nodes": 8, "parallelism": {"data": 16, "expert": 8, "pipeline": 2}},
        {
            "cluster.nodes": 8,
            "parallelism": {"data": 16, "expert": 8, "pipeline": 2, "schedule": {"kind": "dualpipe"}},
            "workload.micro_batch": 1,
            "workload.global_batch": 64,
        },
    ],
)
def test_laws_of_a_step_hold_with_contention(small, changes):
    """Attribution adds up on every rank, the critical path tiles the step, samples do not depend on each other."""
    scenario = small({**TWO_GROUPS, "cluster.fabric": BLOCKING, **changes})
    program = program_of(scenario, samples=2)
    assert program.contention is not None
    outcome = simulate_step(program)
    for table in outcome.tables:
        seconds_CSR = attribute(table)
        assert seconds_CSR.min() > -1e-12
        np.testing.assert_allclose(
            seconds_CSR.sum(axis=0), outcome.step_S[:, None] + np.zeros(table.ranks_R.shape), rtol=1e-9
        )
    facts = path_facts(outcome.tables, pipeline_ranks=[group.pipeline_rank for group in program.groups])
    assert sum(facts["seconds"].values()) == pytest.approx(float(outcome.step_S[0]), rel=1e-9)
    alone = simulate_step(program_of(scenario))
    np.testing.assert_allclose(outcome.step_S[0], alone.step_S[0], rtol=1e-12)


def test_hand_offs_and_reductions_share_links_too(small):
    """Stages on different pods: activations cross the links between them at once from all ranks of all groups."""
    fabric = {"preset": "leaf_spine", "pod_nodes": 2, "oversubscription": 4.0}
    scenario = small({**TWO_GROUPS, "parallelism": {"data": 8, "expert": 4, "pipeline": 2}, "cluster.fabric": fabric})
    program = program_of(scenario)
    assert program.contention is not None and program.contention.p2ps and not program.contention.transfers
    shared, alone = simulate_step(program), simulate_step(replace(program, contention=None))
    assert shared.step_S[0] > alone.step_S[0]


def test_numbers_of_groups_do_not_matter(small):
    program = program_of(small({**TWO_GROUPS, "cluster.fabric": BLOCKING}))
    outcome = simulate_step(program)
    turned = simulate_step(replace(program, groups=program.groups[::-1]))
    for table, other in zip(outcome.tables, turned.tables[::-1], strict=True):
        np.testing.assert_array_equal(table.ranks_R, other.ranks_R)
        np.testing.assert_allclose(table.finish_NSR, other.finish_NSR, rtol=1e-9)


def test_a_run_shows_the_slow_down(small):
    """The whole way from the scenario to the result."""
    changes = {**TWO_GROUPS, "uncertainty": {"samples": 1}}
    blocking = simulate(small({**changes, "cluster.fabric": BLOCKING})).result
    open_core = simulate(small(changes)).result
    for part in ("dispatch_exposed", "combine_exposed"):
        assert blocking["attribution_s"][part] > 1.2 * open_core["attribution_s"][part]
    assert any("slow each other" in warning for warning in blocking["warnings"])
    assert not any("slow each other" in warning for warning in open_core["warnings"])
