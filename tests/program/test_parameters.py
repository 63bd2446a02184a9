"""ZeRO 2 and 3: what is gathered and scattered, when, and what it costs; copies of experts sum their gradients."""

import itertools

import numpy as np
import pytest

from moesim.engine import simulate_step
from moesim.kernels import kernel_model
from moesim.network import all_reduce_seconds, build_fabric
from moesim.parallel import TrafficSampler
from moesim.parallel.memory.parameters import expert_slice_parameters, local_parameters
from moesim.parallel.mesh import Mesh
from moesim.program import StepProgram, build_program
from moesim.program.collectives import Reduction
from moesim.program.operations import Block, Kind
from moesim.program.parameters import ParameterGroups
from moesim.results import CATEGORIES, attribute
from moesim.run import draw_samples, obtain_trace, simulate
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.dispatch import DIRECT
from moesim.scenario.placement_files import Layers, tensorrt_llm_text
from moesim.schedules import build_schedule
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

DENSE = {"model.experts": 0, "model.top_k": 0, "model.shared_experts": 0, "model.expert_intermediate": 0,
         "model.dense_layers": 4, "routing": {"kind": "uniform"}}  # fmt: skip


def program_of(scenario) -> StepProgram:
    samples = []
    if scenario.model.experts:
        samples = [TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test"))]
    kernels = kernel_model("h200", "roofline")
    return build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples)


def collectives(blocks: list[Block]) -> list[tuple[str, float]]:
    """Names and bytes that a rank sends."""
    operations = [operation for block in blocks for operation in block.operations]
    return [(o.label.name, o.transfers_M[0].sent_bytes) for o in operations if o.kind is Kind.COLLECTIVE]


@pytest.mark.parametrize(
    "layout", [{"data": 4, "expert": 2}, {"data": 2, "tensor": 2, "expert": 2}, {"data": 2, "context": 2, "expert": 1}]
)
@pytest.mark.parametrize(("stage", "gathers"), [(2, 0), (3, 2)])
def test_every_micro_batch_moves_every_parameter(small, layout, stage, gathers):
    scenario = small({"parallelism": {**layout, "zero": {"dense": stage, "expert": stage}}})
    program = program_of(scenario)
    assert len(program.groups) == 1  # all that meet are simulated together
    sent: dict[str, float] = {}
    for name, size in collectives([run.block for task in program.groups[0].tasks for run in task.runs]):
        sent[name] = sent.get(name, 0.0) + size
    local, mesh = local_parameters(scenario, [0]), scenario.parallelism
    for part, count, holders in (
        ("dense", local.dense, mesh.data * mesh.context),
        ("expert", local.expert, 4 // mesh.expert),
    ):
        each = (holders - 1) / holders * count * 2 * scenario.num_micro_batches  # bf16
        assert sent[f"reduce_scatter.{part}"] == pytest.approx(each)
        assert sent.get(f"all_gather.{part}", 0.0) == pytest.approx(gathers * each)
    ends = [collective.name for collective in (*program.reductions, *program.gathers)]
    after = {"all_gather.dense", "all_gather.expert"} if stage == 2 else set()
    assert set(ends) == after | ({"all_reduce.duplicated"} if mesh.tensor > 1 else set())


def test_only_the_ends_are_seen_where_layers_take_longer_than_their_collectives(small):
    changes = {**DENSE, "workload": {"sequence_length": 32768, "micro_batch": 2, "global_batch": 8}}
    layout = {"data": 4, "zero": {"dense": 3, "expert": 0}}
    program = program_of(small({**changes, "parallelism": layout}))
    blocks = [run.block for task in program.groups[0].tasks for run in task.runs]
    assert [block.name for block in blocks] == ["forward", "backward"]
    listed = [[o for o in block.operations if o.kind is Kind.COLLECTIVE] for block in blocks]
    ends = [listed[0][0], listed[1][0], listed[1][-1]]  # the first gathers, and the last scatter
    seconds = sum(float(o.transfers_M[0].alone_R.max()) for o in ends)
    exposed = attribute(simulate_step(program).tables[0])[CATEGORIES.index("data_parallel")].max()
    # The embedding alone does not hide the gather of the layer behind it.
    first = listed[0][1]
    assert seconds <= exposed * (1 + 1e-9)
    assert exposed < seconds + 2 * float(first.transfers_M[0].alone_R.max())


def test_without_overlap_all_of_it_is_seen(small):
    layout = {"data": 4, "zero": {"dense": 3, "expert": 0}}
    scenario = small({**DENSE, "parallelism": layout, "overlap": {"gradient_reduction": False}})
    program = program_of(scenario)
    operations = [o for task in program.groups[0].tasks for run in task.runs for o in run.block.operations]
    seconds = sum(float(o.transfers_M[0].alone_R[0, 0]) for o in operations if o.kind is Kind.COLLECTIVE)
    exposed_R = attribute(simulate_step(program).tables[0])[CATEGORIES.index("data_parallel"), 0]
    assert exposed_R.min() == exposed_R.max() == pytest.approx(seconds)


def test_a_weight_is_there_before_its_layer_and_a_scatter_is_behind_it(small):
    scenario = small({"parallelism": {"data": 4, "expert": 2, "zero": {"dense": 3, "expert": 3}}})
    table = simulate_step(program_of(scenario)).tables[0]
    labels = [table.labels[number] for number in table.label_N]
    first = table.micro_batch_N == 0
    for layer in range(4):
        rows = [row for row, label in enumerate(labels) if label.layer == layer and first[row]]
        gathered = [row for row in rows if labels[row].name.startswith("all_gather")]
        scattered = [row for row in rows if labels[row].name.startswith("reduce_scatter")]
        computed = [row for row in rows if labels[row].category not in ("data_parallel", "tensor")]
        finish, start = table.finish_NSR[:, 0], table.start_NSR[:, 0]
        assert (finish[gathered[0]] <= start[computed[0]] + 1e-12).all()
        assert (start[scattered[0]] >= finish[computed[-1]] - 1e-12).all()


def test_stages_trade_time_for_memory(small):
    """With little work between collectives each stage costs more time, and keeps less."""
    records = [
        simulate(
            small(
                {
                    "parallelism": {"data": 4, "expert": 2, "zero": {"dense": stage, "expert": stage}},
                    "overlap": {"gradient_reduction": False}, "workload.precision": {"gradients": "fp32"},
                    "workload.global_batch": 32, "uncertainty": {"samples": 2}, "memory.reserved": "0 B",
                }
            )
        ).result
        for stage in range(4)
    ]  # fmt: skip
    times, sizes = ([record[key] for record in records] for key in ("step_time_s", "memory"))
    assert times[1] < times[2] < times[3]
    peaks = [size["peak_bytes"] for size in sizes]
    assert all(more > less for more, less in itertools.pairwise(peaks[:3]))
    for record in records:
        assert sum(record["attribution_s"].values()) == pytest.approx(record["step_time_s"], rel=1e-9)
        path = record["critical_path"]
        assert sum(path["seconds"].values()) == pytest.approx(path["step_time_s"], rel=1e-9)


@pytest.mark.parametrize("schedule", [{"kind": "1f1b"}, {"kind": "interleaved", "virtual": 2}, {"kind": "zb_h1"}])
def test_pipelines_pay_in_every_micro_batch(small, schedule):
    layout = {"data": 2, "tensor": 2, "pipeline": 2, "expert": 2, "schedule": schedule}
    common = {"cluster.nodes": 2, "workload.global_batch": 8, "workload.micro_batch": 1, "uncertainty": {"samples": 1}}
    plain, sharded = (
        simulate(small({**common, "parallelism": {**layout, "zero": {"dense": stage, "expert": stage}}})).result
        for stage in (1, 3)
    )
    assert sharded["attribution_s"]["data_parallel"] > plain["attribution_s"]["data_parallel"]
    assert sharded["step_time_s"] > plain["step_time_s"]
    assert sum(sharded["attribution_s"].values()) == pytest.approx(sharded["step_time_s"], rel=1e-9)


def test_a_slow_group_holds_up_the_others_layer_by_layer(small):
    """Expert groups meet in every layer: the wait for the slower one shows as imbalance, not at the end alone."""
    layout = {"data": 4, "expert": 2}
    common = {"uncertainty": {"samples": 1}, "capacity": {"kind": "none"}}
    sharded = simulate(small({**common, "parallelism": {**layout, "zero": {"dense": 3, "expert": 0}}}))
    spans = sharded.pipeline_spans[0]
    assert len(spans.ranks_R) == 4
    rows = [row for row, number in enumerate(spans.label_N) if spans.labels[number].name == "reduce_scatter.dense"]
    waited_N = (spans.finish_NSR - spans.start_NSR - spans.own_NSR)[rows, 0].max(axis=1)
    assert (waited_N > 0).sum() > len(rows) / 2
    assert sharded.result["attribution_s"]["data_parallel"] > 0


def reductions(scenario) -> dict[str, list[Reduction]]:
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    samples = draw_samples(scenario, obtain_trace(scenario))[0]
    program = build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples)
    found: dict[str, list[Reduction]] = {}
    for reduction in program.reductions:
        found.setdefault(reduction.name, []).append(reduction)
    return found


@pytest.mark.parametrize(("dense", "expert"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2)])
def test_an_optimizer_updates_its_shards_and_of_the_rest_all(small, dense: int, expert: int) -> None:
    scenario = small({"parallelism.expert": 2, "parallelism.zero": {"dense": dense, "expert": expert}})
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    schedule = build_schedule("1f1b", num_ranks=1, num_micro_batches=2)
    local, found = local_parameters(scenario, [0]), ParameterGroups(scenario, mesh, schedule).of_rank(0)
    assert found.held == found.reduced == pytest.approx(local.dense + local.expert)
    shards = local.dense / (4 if dense else 1) + local.expert / (2 if expert else 1)
    assert found.updated == pytest.approx(shards)


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
            "uncertainty.samples": 2,
        } | changes
        by_slots, by_experts = (
            simulate(small(routed | {"placement": placement})).result
            for placement in ({"kind": "explicit", "file": str(path)}, {"kind": "contiguous"})
        )
        for key in ("step_time_s", "step_time_range_s", "attribution_s", "communication", "imbalance", "memory"):
            assert by_slots[key] == by_experts[key], key
