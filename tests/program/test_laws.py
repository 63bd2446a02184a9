"""Laws of a simulated step: what must hold whatever the durations are."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from moesim.engine import StepOutcome, simulate_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel import LayerTraffic, TrafficSampler
from moesim.program import build_program
from moesim.results import CATEGORIES, attribute
from moesim.run import draw_samples, obtain_trace, simulate
from moesim.scenario import Scenario
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")


def outcome_of(scenario: Scenario, samples: list) -> StepOutcome:
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    fabric = build_fabric(scenario.cluster)
    return simulate_step(build_program(scenario, fabric=fabric, kernels=kernels, samples=samples))


def sample_of(scenario: Scenario, number: int = 0):
    return TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test", number))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallelism.expert": 2},
        {"dispatch.deduplicate": "per_expert"},
        {"capacity": {"kind": "device", "factor": 1.0}},
        {"capacity": {"kind": "expert", "factor": 1.25, "pad": True}},
        {"implementation.kind": "torch_eager", "dispatch.deduplicate": "per_expert"},
        {"parallelism.zero": {"dense": 1, "expert": 1}, "parallelism.expert": 2},
        {"dispatch.dtype": "fp8"},
        {"cluster.nodes": 2, "parallelism.pipeline": 2},
        {"cluster.nodes": 2, "parallelism.pipeline": 2, "parallelism.schedule": {"kind": "interleaved", "virtual": 2}},
        {"cluster.nodes": 2, "parallelism.pipeline": 2, "parallelism.schedule": {"kind": "zb_h1"}},
        {
            "cluster.nodes": 2,
            "parallelism": {
                "data": 4,
                "expert": 2,
                "pipeline": 2,
                "schedule": {"kind": "dualpipe"},
                "zero": {"dense": 1, "expert": 1},
            },
            "workload.micro_batch": 1,
            "workload.recompute": "full",
            "workload.gradient_clipping": 1.0,
            "overlap": {"gradient_reduction": True},
        },
        {"model.mtp_layers": 1, "cluster.nodes": 2, "parallelism.pipeline": 2, "overlap": {"shared_experts": False}},
        {"placement": {"kind": "eplb", "redundant_experts": 4}},
        {"placement": {"kind": "eplb", "redundant_experts": 4, "split": "nearest"}, "parallelism.expert": 2},
    ],
)
def test_attribution_adds_up_on_every_rank(small, changes):
    scenario = small(changes)
    step = outcome_of(scenario, [sample_of(scenario, number) for number in range(2)])
    for table in step.tables:
        seconds_CSR = attribute(table)
        assert seconds_CSR.min() > -1e-12
        np.testing.assert_allclose(
            seconds_CSR.sum(axis=0), step.step_S[:, None] + np.zeros(table.ranks_R.shape), rtol=1e-9
        )


def test_one_expert_rank_dispatches_nothing(small):
    result = simulate(small({"parallelism.expert": 1})).result
    assert result["communication"]["dispatch_bytes"] == 0
    assert result["attribution_s"]["dispatch_exposed"] == result["attribution_s"]["combine_exposed"] == 0


def test_equal_loads_are_never_waited_for(small):
    scenario = small()
    plain = sample_of(scenario)
    uneven = outcome_of(scenario, [plain]).tables[0]
    even = outcome_of(scenario, [plain.balanced()]).tables[0]
    wait = CATEGORIES.index("imbalance_wait")
    assert attribute(uneven)[wait].max() > 1e-4
    assert attribute(even)[wait].max() < 1e-9


class Renumbered:
    """A routing sample whose ranks, with their tokens and their experts, have been given other numbers."""

    def __init__(self, sample, rank_from_R: np.ndarray) -> None:
        self.sample, self.rank_from_R, self.placement = sample, rank_from_R, sample.placement

    def map_of(self, layer: int) -> None:
        return None

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        return group == other

    def arrays(self, group: int, layer: int, *, stage: int = 0) -> LayerTraffic:
        arrays = self.sample.arrays(group, layer, stage=stage)
        experts = self.placement.slot_experts_DP[self.rank_from_R].reshape(-1)
        rows_BRE = arrays.rows_BRE[:, self.rank_from_R][:, :, experts]
        return replace(
            arrays,
            make_rows=lambda: rows_BRE,
            computed_BE=rows_BRE.sum(axis=1),
            rank_copies_BRD=arrays.rank_copies_BRD[:, self.rank_from_R][:, :, self.rank_from_R],
            node_copies_BRJ=arrays.node_copies_BRJ[:, self.rank_from_R],
        )


def test_renumbering_ranks_within_a_node_renumbers_the_results(small):
    scenario = small()
    sample = sample_of(scenario)
    order = np.array([2, 0, 3, 1])
    first = outcome_of(scenario, [sample]).tables[0]
    second = outcome_of(scenario, [Renumbered(sample, order)]).tables[0]
    np.testing.assert_allclose(second.finish_NSR, first.finish_NSR[:, :, order], rtol=1e-12)
    assert not np.allclose(first.finish_NSR, first.finish_NSR[:, :, order], rtol=1e-6)


class Reordered:
    """A routing sample whose layers come in another order."""

    def __init__(self, sample, layer_from: list[int]) -> None:
        self.sample, self.layer_from, self.placement = sample, layer_from, sample.placement

    def map_of(self, layer: int) -> None:
        return None

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        return group == other

    def arrays(self, group: int, layer: int, *, stage: int = 0) -> LayerTraffic:
        return self.sample.arrays(group, self.layer_from[layer], stage=stage)


def test_layers_in_another_order_do_the_same_in_another_order(small):
    scenario, order = small(), [2, 0, 1]
    sample, first = sample_of(scenario), scenario.model.dense_layers
    kernels, fabric = kernel_model("h200", "roofline"), build_fabric(scenario.cluster)

    def seconds_of_layers(which) -> list[list[np.ndarray]]:
        program = build_program(scenario, fabric=fabric, kernels=kernels, samples=[which])
        forward = next(run.block for task in program.groups[0].tasks for run in task.runs)
        found: list[list[np.ndarray]] = [[] for _ in order]
        for operation in forward.operations:
            if operation.label.layer >= first:
                times = [operation.seconds_MSR] if operation.seconds_MSR is not None else []
                times += [transfer.alone_R for transfer in operation.transfers_M]
                found[operation.label.layer - first] += times
        return found

    plain, changed = seconds_of_layers(sample), seconds_of_layers(Reordered(sample, order))
    for layer, there in enumerate(order):
        for one, other in zip(changed[layer], plain[there], strict=True):
            np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(plain[0], plain[1], strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small):
    def digest(seed: int) -> str:
        record = simulate(small({"seed": seed}))
        parts = [record.spans.finish_NSR, record.arrays["step_time_S"], record.arrays["attribution_CW"]]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    assert digest(1) == digest(1) != digest(2)


def test_samples_in_lockstep_equal_samples_alone(small):
    scenario = small()
    plain, _ = draw_samples(scenario, obtain_trace(scenario))
    together = outcome_of(scenario, plain).step_S
    alone = [outcome_of(scenario, [sample]).step_S[0] for sample in plain]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_groups_wait_for_each_other_at_the_gradient_reduction(small):
    scenario = small({"parallelism.expert": 2})
    step = outcome_of(scenario, [sample_of(scenario)])
    assert len(step.tables) == 2
    reduced = [
        table.finish_NSR[np.flatnonzero([table.labels[n].name == "all_reduce.dense" for n in table.label_N])]
        for table in step.tables
    ]
    assert len(reduced[0]) == 1
    np.testing.assert_array_equal(reduced[0], reduced[1])


def test_merging_kernels_changes_no_time(small):
    scenario = small({"cluster.nodes": 2, "parallelism.pipeline": 2})
    kernels, fabric = kernel_model("h200", "roofline"), build_fabric(scenario.cluster)
    sample = sample_of(scenario)
    fine, coarse = (
        simulate_step(build_program(scenario, fabric=fabric, kernels=kernels, samples=[sample], merge=merge))
        for merge in (False, True)
    )
    np.testing.assert_allclose(coarse.step_S, fine.step_S, rtol=1e-12)
    for one, other in zip(fine.tables, coarse.tables, strict=True):
        assert len(other.label_N) < 0.6 * len(one.label_N)
        np.testing.assert_allclose(attribute(other), attribute(one), atol=1e-10)


def test_a_pipeline_of_one_micro_batch_is_a_chain(small):
    """Without anything to overlap, two stages take as long as one after the other, p2p sends included."""
    changes = {"workload.global_batch": 8, "cluster.nodes": 2}
    whole = outcome_of(small(changes), [sample_of(small(changes))])
    split_scenario = small({**changes, "parallelism.pipeline": 2})
    split = outcome_of(split_scenario, [sample_of(split_scenario)])
    compute = [
        attribute(table)[[CATEGORIES.index(name) for name in ("attention", "experts", "embedding_head")]]
        .sum(axis=0)
        .mean()
        for table in (*whole.tables, *split.tables)
    ]
    assert compute[0] == pytest.approx(compute[1] + compute[2], rel=1e-3)
    bubbles = [attribute(table)[CATEGORIES.index("bubble")].min() for table in split.tables]
    assert min(bubbles) > 0.2 * float(split.step_S[0])
