"""ZeRO 2 and 3: what is gathered and scattered, when, and what it costs."""

import itertools

import pytest

from moesim.engine import simulate_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.parallel.memory_parameters import local_parameters
from moesim.program import StepProgram, build_program
from moesim.program.operations import Block, Kind
from moesim.results import CATEGORIES, attribute
from moesim.run import obtain_trace, simulate
from moesim.seeding import stream

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
    common = {"cluster.nodes": 2, "workload.global_batch": 16, "workload.micro_batch": 1, "uncertainty": {"samples": 1}}
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
