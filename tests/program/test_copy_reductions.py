"""Copies of experts in a step: their gradients are reduced, and nothing else is where there are none."""

import numpy as np
import pytest

from moesim.kernels import kernel_model
from moesim.network import all_reduce_seconds, build_fabric
from moesim.parallel.memory_parameters import expert_slice_parameters
from moesim.program import build_program
from moesim.program.reductions import Reduction
from moesim.run import draw_samples, obtain_trace, simulate
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.dispatch import DIRECT
from moesim.scenario.placement import Layers, tensorrt_llm_text


def reductions(scenario) -> dict[str, list[Reduction]]:
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    samples = draw_samples(scenario, obtain_trace(scenario))[0]
    program = build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples)
    found: dict[str, list[Reduction]] = {}
    for reduction in program.reductions:
        found.setdefault(reduction.name, []).append(reduction)
    return found


def test_only_copies_are_reduced(small) -> None:
    for placement, count in (
        ({"kind": "contiguous"}, 0),
        ({"kind": "eplb"}, 0),
        ({"kind": "eplb", "redundant_experts": 4}, 1),
    ):
        assert len(reductions(small({"placement": placement})).get("all_reduce.copies", ())) == count


def test_two_copies_of_everything_cost_an_all_reduce_of_pairs(small) -> None:
    """Slot x holds expert x mod E: ranks r and r + 2 hold the same, and reduce it as rings of two do, in two calls."""
    fabric = {"nvlink_efficiency": 0.8}  # the same for all calls
    stated = {"gpu": "h200", "nodes": 1, "gpus_per_node": 4, "fabric": fabric}
    doubled = {"kind": "contiguous", "redundant_experts": small().model.experts}
    scenario = small({"placement": doubled, "cluster": stated})
    (reduction,) = reductions(scenario)["all_reduce.copies"]
    model, fabric = scenario.model, build_fabric(scenario.cluster)
    per_rank = scenario.slots_per_rank * model.moe_layers * expert_slice_parameters(scenario)
    size = per_rank * BYTES_PER_ELEMENT[scenario.workload.precision.gradients]
    ring = all_reduce_seconds(fabric, [0, 2], size, algorithm="ring").seconds
    second_call = fabric.parameters.of_dispatch(DIRECT).call_seconds
    assert reduction.seconds == pytest.approx(ring + second_call, rel=1e-9)
    assert [len(ranks) for ranks in reduction.members] == [scenario.parallelism.expert] * len(reduction.members)


def test_shards_of_gradients_are_reduced_as_shards(small) -> None:
    copies = {"placement": {"kind": "contiguous", "redundant_experts": 4}, "parallelism.expert": 2}
    whole, shards = (
        reductions(small(copies | {"parallelism.zero": {"dense": stage, "expert": stage}}))["all_reduce.copies"][0]
        for stage in (0, 1)
    )
    assert shards.seconds < whole.seconds
    assert shards.seconds > whole.seconds / 2  # calls and latencies stay


def test_a_pipeline_rank_reduces_the_layers_that_it_holds(small) -> None:
    changes = {
        "cluster.nodes": 2,
        "parallelism.pipeline": 2,
        "placement": {"kind": "contiguous", "redundant_experts": 4},
    }
    found = reductions(small(changes))["all_reduce.copies"]
    assert len(found) == 2
    ranks = [set(np.concatenate(reduction.members).tolist()) for reduction in found]
    assert not ranks[0] & ranks[1] and ranks[0] | ranks[1] == set(range(8))


def test_the_step_of_a_hot_expert_is_faster_with_copies_of_it(small) -> None:
    experts = small().model.experts
    hot = {"routing": {"kind": "popularity", "counts": [8.0 * experts, *[1.0] * (experts - 1)]}}
    alone = simulate(small(hot)).result
    copied = simulate(small(hot | {"placement": {"kind": "eplb", "redundant_experts": 4}})).result
    assert copied["imbalance"]["rank_rows"] < 0.8 * alone["imbalance"]["rank_rows"]
    assert copied["attribution_s"]["experts"] + copied["attribution_s"]["imbalance_wait"] < (
        alone["attribution_s"]["experts"] + alone["attribution_s"]["imbalance_wait"]
    )
    assert copied["attribution_s"]["data_parallel"] > alone["attribution_s"]["data_parallel"]
    assert copied["memory"]["peak_bytes"] != alone["memory"]["peak_bytes"]


def test_slow_ranks_get_fewer_rows(small) -> None:
    speeds = [1.0, 1.0, 0.5, 1.0]
    placement = {"kind": "by_speed", "speeds": speeds, "made_on": "same"}
    counts = [10.0 * 0.8**expert for expert in range(16)]
    record = simulate(small({"placement": placement, "routing": {"kind": "popularity", "counts": counts}}))
    share_R = record.arrays["rank_load_LR"].mean(axis=0) / 4
    assert share_R[2] < 0.75 * share_R[[0, 1, 3]].min()
    assert record.result["placement"]["rank_rows_by_speed"] < 1.15
    assert any("simulated as fast as cluster.speeds" in text for text in record.result["warnings"])


def test_slots_in_the_place_of_experts_change_no_bit(small, tmp_path) -> None:
    """A map with each expert in its usual slot is counted by slots, and gives the result of counting by experts."""
    path = tmp_path / "usual.yaml"
    path.write_text(tensorrt_llm_text([range(16)] * 3, Layers(moe_layers=(1, 2, 3), num_layers=4, num_ranks=1)))
    rows = [[8.0, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1], [1.0] * 12 + [9.0] * 4, [1.0 + e for e in range(16)]]
    for changes in (
        {},
        {"capacity": {"kind": "device", "factor": 1.0}},
        {"capacity": {"kind": "expert", "factor": 1.25}},
    ):
        routed = {
            "routing": {"kind": "popularity", "counts": rows},
            "cluster.nodes": 2,
            "cluster.gpus_per_node": 2,
        } | changes
        by_slots, by_experts = (
            simulate(small(routed | {"placement": placement})).result
            for placement in ({"kind": "explicit", "file": str(path)}, {"kind": "contiguous"})
        )
        for key in ("step_time_s", "step_time_range_s", "attribution_s", "communication", "imbalance", "memory"):
            assert by_slots[key] == by_experts[key], key
