"""Compiled loops serve large groups, numpy small ones: both must compute the same."""

import subprocess
import sys

import numpy as np
import pytest

from moesim.engine import segments, simulate_step
from moesim.engine.samples import _spans_go
from moesim.engine.step import sum_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric, prepare_combine, prepare_dispatch
from moesim.parallel import TrafficSampler
from moesim.program import build_program
from moesim.program.operations import Block
from moesim.results.critical_path import path_facts
from moesim.results.span_sums import GroupSums
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.cluster import Cluster, Fabric, Pool
from moesim.scenario.dispatch import DISPATCH
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

HIERARCHICAL = {"dispatch.algorithm": "hierarchical", "dispatch.deduplicate": "per_node"}


def step_of(scenario: Scenario, *, compiled: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Ends of all spans of each group, and the attribution."""
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    sample = sampler.draw(stream(0, "test", 0))
    program = build_program(
        scenario,
        fabric=build_fabric(scenario.cluster),
        kernels=kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile),
        samples=[sample, sample.balanced()],
    )
    assert program.compiled == compiled
    tables = simulate_step(program).tables
    sums = [GroupSums.of(table, compiled=compiled, with_waits=False) for table in tables]
    return [table.finish_NSR for table in tables], np.stack([each.attribution_CSR for each in sums])


@pytest.mark.parametrize(
    "changes",
    [
        {"dispatch.sm_share": 0.15},
        {"compute.profile": "h200"},
        {"cluster.nodes": 2, "parallelism": {"data": 8, "expert": 8}, **HIERARCHICAL},
        {"cluster.nodes": 2, "parallelism": {"data": 8, "expert": 8}},
        {"dispatch.algorithm": "low_latency", "dispatch.deduplicate": "per_expert"},
        {"parallelism": {"data": 1, "tensor": 4, "expert": 2}, "dispatch.sm_share": 0.15},
        {"parallelism": {"data": 1, "context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}},
        {"implementation.kind": "torch_eager", "dispatch.deduplicate": "per_expert"},
        # Two groups over four nodes slow each other on the leaves' links.
        {
            "cluster.nodes": 4,
            "cluster.fabric": {"preset": "rail_optimised", "oversubscription": 4.0},
            "parallelism": {"data": 16, "expert": 8},
            "workload.global_batch": 32,
        },
    ],
)
def test_compiled_and_interpreted_steps_are_the_same(small, changes, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = small(changes)
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(
            "moesim.program.build.pays_for_compiled_loops", lambda *_, compiled=compiled, **__: compiled
        )
        results.append(step_of(scenario, compiled=compiled))
    (compiled, compiled_parts), (interpreted, interpreted_parts) = results
    for here, there in zip(compiled, interpreted, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-12)
    np.testing.assert_allclose(compiled_parts, interpreted_parts, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["direct", "low_latency", "hierarchical"])
def test_closed_forms_are_the_same_where_the_ends_of_a_link_differ(algorithm: str) -> None:
    """Steps have links that are as fast at both ends, and ranks that come nearly together: here neither is so."""
    slow = [{"node": 1, "factor": 0.5}, {"rail": 2, "factor": 0.3}]
    section = Fabric.model_validate({"preset": "rail_optimised", "degraded": slow})
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=4, gpus_per_node=4),), fabric=section))
    rng = np.random.default_rng(0)
    copies = rng.gamma(1.0, 1e3, (2, 3, 16, 16)) * (1 - np.eye(16)) * (rng.random((16, 16)) < 0.7)
    stages = list(copies) if DISPATCH[algorithm].fans_out else [copies[0]]
    for prepare in (prepare_dispatch, prepare_combine):
        one, other = (
            prepare(fabric, stages, token_bytes=7e3, algorithm=algorithm, compiled=compiled)
            for compiled in (True, False)
        )
        start_SR = rng.random((3, 16)) * other.alone_R.max()
        np.testing.assert_allclose(one.finish(start_SR), other.finish(start_SR), rtol=1e-12)


UNIFORM = {"routing": {"kind": "uniform"}}  # else it is skewed
DUALPIPE = {
    "parallelism": {"data": 4, "expert": 4, "pipeline": 2, "schedule": {"kind": "dualpipe"}, "zero": {"dense": 1}},
    "cluster.nodes": 2,
    "workload.global_batch": 32,
    "implementation.kind": "deepseek",
}
MIXED = {
    "cluster": {
        "pools": [
            {"name": "new", "gpu": "h200", "nodes": 1, "gpus_per_node": 4},
            {"name": "old", "gpu": "h100", "nodes": 1, "gpus_per_node": 4},
        ]
    }
}


@pytest.mark.parametrize(
    "changes",
    [
        {"implementation.kind": "megatron"},
        {"implementation.kind": "megatron", **UNIFORM},
        {"dispatch.algorithm": "low_latency", "dispatch.deduplicate": "per_expert"},
        DUALPIPE,
        {**DUALPIPE, **UNIFORM, "dispatch.sm_share": 0.15},
        {"implementation.kind": "megatron", **MIXED},
        {"implementation.kind": "megatron", "cluster.speeds": {"spread": 0.05}},
    ],
)
def test_ranks_that_are_alike_are_walked_once(small, changes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that nor transfers in the midst of an action change a bit."""
    monkeypatch.setattr("moesim.program.build.pays_for_compiled_loops", lambda *_, **__: True)
    short, short_parts = step_of(small(changes), compiled=True)
    monkeypatch.setattr("moesim.engine.segments.PreparedTransfer", type(None))  # none is taken in the midst

    packed = segments.PackedBlock.__init__

    def each_rank(self: segments.PackedBlock, block: Block, *, whole: bool) -> None:
        packed(self, block, whole=whole)
        self.alike_S = np.zeros(1, dtype=bool)

    monkeypatch.setattr(segments.PackedBlock, "__init__", each_rank)
    full, full_parts = step_of(small(changes), compiled=True)
    for here, there in zip(short, full, strict=True):
        np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(short_parts, full_parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"implementation.kind": "fused", "cluster.nodes": 2, "parallelism": {"data": 8, "expert": 4}},
        {"dispatch.algorithm": "low_latency", "dispatch.deduplicate": "per_expert"},
        {"parallelism": {"data": 1, "tensor": 4, "expert": 2}, "dispatch.sm_share": 0.15},
        DUALPIPE,
        {**DUALPIPE, **UNIFORM, "cluster.nodes": 4, "parallelism": {**DUALPIPE["parallelism"], "data": 8},
         "workload.global_batch": 64},
        {"cluster.nodes": 2, "parallelism": {"data": 4, "expert": 4, "pipeline": 2, "schedule": {"kind": "1f1b"}}},
    ],
)  # fmt: skip
def test_spans_that_go_leave_the_same_sums(small, changes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As spans that are all kept: the attribution, who waited for whom, and the critical path of every sample."""
    monkeypatch.setattr("moesim.program.build.pays_for_compiled_loops", lambda *_, **__: True)
    monkeypatch.setattr("moesim.engine.step.KEPT_SPANS", 0)
    scenario = small(changes)
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    drawn = [sampler.draw(stream(0, "test", number)) for number in range(2)]
    fabric, kernels = build_fabric(scenario.cluster), kernel_model(scenario.cluster.pools[0].spec, "h200")
    for samples in (drawn, [drawn[1], drawn[0].balanced()], [drawn[0].balanced()]):
        program = build_program(scenario, fabric=fabric, kernels=kernels, samples=samples, equal_groups=True)
        assert program.passes_spans_on
        assert _spans_go(scenario, fabric, kernels) == (not len(fabric.common_links_X))
        whole, summed = simulate_step(program), sum_step(program, first=True)
        np.testing.assert_array_equal(summed.step_S, whole.step_S)
        for table, sums in zip(whole.tables, summed.sums, strict=True):
            expected = GroupSums.of(table, compiled=False, with_waits=True)
            for name in ("attribution_CSR", "compute_SR", "busy_SR"):
                np.testing.assert_allclose(getattr(sums, name), getattr(expected, name), atol=1e-12)
            np.testing.assert_array_equal(sums.waits.transfers_RR, expected.waits.transfers_RR)
            assert sums.waits.p2p_R.keys() == {key for key, s_R in expected.waits.p2p_R.items() if s_R.any()}
            for key, seconds_R in sums.waits.p2p_R.items():
                np.testing.assert_array_equal(seconds_R, expected.waits.p2p_R[key])
            assert sums.waits.collectives.keys() == expected.waits.collectives.keys()
            for key, times in sums.waits.collectives.items():
                np.testing.assert_array_equal(times, expected.waits.collectives[key])
        places = [group.pipeline_rank for group in program.groups]
        found = path_facts(summed.tables, pipeline_ranks=places, whole=summed.whole)
        expected_path = path_facts(whole.tables, pipeline_ranks=places)
        assert found["last_rank"] == expected_path["last_rank"]
        assert found["seconds"] == pytest.approx(expected_path["seconds"], abs=1e-12)
        assert found["seconds_by_rank"] == pytest.approx(expected_path["seconds_by_rank"], abs=1e-12)
        for group, table, other in zip(program.groups, summed.tables, whole.tables, strict=True):
            assert summed.whole is not None
            assert table.since_R is None or group.number > 0
            if group.number == 0:
                np.testing.assert_array_equal(table.finish_NSR, other.finish_NSR[:, :1])
                assert table.actions == other.actions
        for which in range(places.count(0)):  # what is simulated again is what it was, until groups meet
            again, kept = summed.whole(which), whole.tables[which :: places.count(0)]
            for table, other in zip(again, kept, strict=True):
                until = other.actions[-1].last
                np.testing.assert_allclose(table.finish_NSR[:until], other.finish_NSR[:until, :1], rtol=1e-12)
    monkeypatch.setattr("moesim.engine.step.KEPT_SPANS", np.inf)  # of one sample, these of all groups are kept
    for table, other in zip(sum_step(program, first=True).tables, whole.tables, strict=True):
        np.testing.assert_array_equal(table.finish_NSR, other.finish_NSR[:, :1])
        assert table.since_R is None


@pytest.mark.parametrize(
    "changes",
    [
        {"implementation.kind": "megatron"},  # the host may limit
        {"implementation.kind": "fused", "cluster.nodes": 2, "parallelism": {"data": 8, "expert": 8},
         "cluster.fabric": {"preset": "rail_optimised", "oversubscription": 4.0}},
        {"implementation.kind": "fused", "parallelism": {"data": 4, "expert": 4, "zero": {"dense": 3, "expert": 0}}},
    ],
)  # fmt: skip
def test_steps_whose_spans_stay_are_told_before_they_are_built(small, changes) -> None:
    scenario = small(changes)
    fabric, kernels = build_fabric(scenario.cluster), kernel_model("h200", "h200")
    assert not _spans_go(scenario, fabric, kernels)


def test_small_groups_do_without_numba() -> None:
    code = """
import sys
import numpy as np
from moesim.network import prepare_transfer, build_fabric
from moesim.results import Label, SpanRecorder, Stream, attribute
from moesim.scenario.cluster import Cluster, Fabric, Pool
from moesim.engine.executor import GroupExecutor
from moesim.program.host import FREE_HOST
from moesim.program.operations import Block, Run, compute, transfer
from moesim.engine.executor_steps import Labels
from moesim.kernels import Beside
from moesim.kernels.families import FAMILIES
fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=1),), fabric=Fabric()))
prepared = prepare_transfer(fabric, np.ones((1, 8, 8)))
beside = dict.fromkeys(FAMILIES, Beside(compute=1.5))
group = GroupExecutor(samples=1, ranks=8, host=FREE_HOST, beside_R=(beside,), labels=Labels(),
                      recorder=SpanRecorder(rows=9, samples=1, ranks=8))
kernel = compute(Label("experts", "experts", Stream.COMPUTE, 0), np.arange(8.0), source="roofline")
group.execute([Run(Block("b", (kernel, transfer("combine", "combine_exposed", (prepared,), layer=0))), 0, False)])
step_S = group.done_SR.max(axis=1)
table = group.recorder.table(labels=group.labels.all(), ranks_R=np.arange(8), step_S=step_S)
assert attribute(table).sum() > 0
assert "numba" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
