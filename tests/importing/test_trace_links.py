"""Hand-made traces: who calls whom, in which module and phase, and which gap is whose.

Without a stack, layers are the block that repeats itself; gradients follow their forward operations.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.importing.calibration import step_times
from moesim.importing.trace_file import read_trace
from moesim.importing.trace_links import OpTree, linked, repeated_blocks
from moesim.importing.trace_shapes import knows_traced
from moesim.importing.traced_step import traced_step
from tests.importing.conftest import ENGINE, MAIN


def links(path: Path):
    events = read_trace(path)
    return linked(events, OpTree(events), knows=knows_traced)


def test_phases_follow_the_engine_and_the_optimizer(trace, tmp_path: Path) -> None:
    step = traced_step(trace().step().save(tmp_path / "t.json"))
    assert [(op.name, op.phase) for op in step.ops] == [
        ("mm", "forward"),
        ("mm", "backward"),
        ("mm", "backward"),
        ("_fused_adamw_", "optimizer"),
    ]
    assert step.ops[-1].facts == {"parameters": 32 * 16}
    assert all(op.measured_s == pytest.approx(10e-6) for op in step.ops)


def test_work_behind_the_backward_pass_belongs_to_the_optimizer(trace, tmp_path: Path) -> None:
    made = trace().step(optimizer=False)
    made.kernel(made.op("aten::mul", 400, 20, dims=[[32, 16], []]), 405, 410, 5)
    step = traced_step(made.save(tmp_path / "t.json"))
    assert [(op.name, op.phase) for op in step.ops][-1] == ("mul", "optimizer")


def test_the_outermost_known_operation_counts_once(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.op("aten::contiguous", 40, 30, dims=[[8, 8], []])
    made.op("aten::clone", 41, 28, dims=[[8, 8], []])
    copy = made.op("aten::copy_", 45, 20, dims=[[8, 8], [8, 8], []])
    made.kernel(copy, 46, 60, 3)
    made.kernel(copy, 48, 70, 4)
    (clone,) = (each for each in links(made.save(tmp_path / "t.json")).ops if each.op.name == "aten::clone")
    assert clone.seconds == pytest.approx(7e-6) and [op.name for op in clone.inner] == ["aten::copy_"]


def test_a_gradient_has_the_module_of_its_forward_operation(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.event("python_function", "nn.Module: Model_0", 5, 60, MAIN)
    made.event("python_function", "nn.Module: My_Layer_3", 8, 40, MAIN)
    made.event("python_function", "model.py(3): forward", 9, 30, MAIN)
    step = traced_step(made.save(tmp_path / "t.json"))
    assert {op.module for op in step.ops if op.phase != "optimizer"} == {"Model.*.My_Layer.*"}


def test_a_kernel_without_an_id_is_its_launches_by_time_and_thread(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.op("aten::mul", 400, 20, dims=[[4], [4]], thread=ENGINE)
    made.op("aten::add", 400, 20, dims=[[4], [4]])
    made.kernel(-5, 405, 410, 5, thread=ENGINE)
    found = links(made.save(tmp_path / "t.json"))
    assert found.ops[-1].op.name == "aten::mul" and not found.unexplained


def test_work_that_nothing_launched_is_counted_apart(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.kernel(-5, 4000, 4010, 5)
    step = traced_step(made.save(tmp_path / "t.json"))
    assert step.calibration.unexplained_s == pytest.approx(5e-6)


def test_a_gap_is_the_hosts_where_the_launch_came_late(trace, tmp_path: Path) -> None:
    made = trace()
    op = made.op("aten::mm", 0, 90, dims=[[4, 4], [4, 4]])
    made.kernel(op, 1, 10, 10)  # until 20
    made.kernel(op, 5, 22, 10)  # launched long before: a gap of 2, until 32
    made.kernel(op, 40, 45, 5)  # launched at 41, behind the end: the host was 13 late
    made.kernel(op, 44, 46, 2, stream=8)  # inside of it
    times = step_times(read_trace(made.save(tmp_path / "t.json")), ops=4)
    assert times.gaps_s == pytest.approx(2e-6) and times.late_s == pytest.approx(13e-6)
    assert times.busy_s == pytest.approx(25e-6) and times.span_s == pytest.approx(40e-6)
    assert times.ahead == 3 and times.gap_per_op_s == pytest.approx(2e-6 / 3)  # four operations of a kernel each


def test_parameters_count_once_for_several_micro_batches(trace, tmp_path: Path) -> None:
    made = trace().step(0, optimizer=False).step(1000, optimizer=False).step(2000)
    (optimizer,) = (op for op in traced_step(made.save(tmp_path / "t.json")).ops if op.phase == "optimizer")
    assert optimizer.facts == {"parameters": 32 * 16}


def test_a_collective_is_no_operation_of_the_gpu_alone(trace, tmp_path: Path) -> None:
    made = trace().step()
    message = {"Collective name": "allreduce", "dtype": "Float", "In msg nelems": 50, "Out msg nelems": 50}
    op = made.op("record_param_comms", 60, 10, dims=[[50]], **message, **{"Group size": 4})
    made.kernel(op, 61, 108, 30, stream=9)
    step = traced_step(made.save(tmp_path / "t.json"))
    (found,) = step.calibration.collectives
    assert (found.name, found.bytes, found.ranks, found.count) == ("allreduce", 200, 4, 1)
    assert found.measured_s == pytest.approx(30e-6) and found.exposed_s == pytest.approx(21e-6)


def test_an_operation_on_shards_has_the_shapes_of_one_rank(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.op("aten::add_", 400, 30, dims=[[64, 8], [64, 8]])  # the whole, as a DTensor has it
    inner = made.op("aten::add_", 405, 20, dims=[[16, 8], [16, 8]])
    made.kernel(inner, 406, 420, 3)
    step = traced_step(made.save(tmp_path / "t.json"))
    assert step.ops[-1].reads[0][0] == (16, 8)


def test_parameters_of_one_rank_are_what_is_scattered_to_it(trace, tmp_path: Path) -> None:
    made = trace().step()
    message = {"Collective name": "_reduce_scatter_base", "dtype": "Float", "In msg nelems": 512, "Out msg nelems": 128}
    made.kernel(made.op("record_param_comms", 60, 10, **message), 61, 108, 30, stream=9)
    (optimizer,) = (op for op in traced_step(made.save(tmp_path / "t.json")).ops if op.phase == "optimizer")
    assert optimizer.facts == {"parameters": 128}


TRACE = Path(__file__).parent.parent / "data" / "mixtral-8k.trace.json.gz"


@given(
    head=st.integers(0, 6),
    tail=st.integers(0, 6),
    block=st.integers(2, 9),
    times=st.integers(3, 8),
    seed=st.integers(0),
)
def test_a_stack_of_layers_is_found(head: int, tail: int, block: int, times: int, seed: int) -> None:
    signs = [*(f"h{n}" for n in range(head)), *list(range(block)) * times, *(f"t{n}" for n in range(tail))]
    found = repeated_blocks(signs)
    layers = [number for number in range(times) for _ in range(block)]
    assert found == [None] * head + layers + [None] * tail


@pytest.mark.parametrize("signs", [[], ["a"], list("abcdefgh"), [*range(100), 1, 2, 1, 2]])
def test_what_does_not_repeat_has_no_layers(signs: list) -> None:
    assert repeated_blocks(signs) == [None] * len(signs)


def test_the_layers_of_a_real_trace_have_the_same_operations_both_ways() -> None:
    tree = OpTree(read_trace(TRACE))
    for phase in ("forward", "backward"):
        names = {
            layer: [
                op.name
                for op, place, where in zip(tree.ops, tree.modules, tree.phases, strict=True)
                if where == phase and place == f"layer.{layer}"
            ]
            for layer in range(2)
        }
        assert names[0] == names[1] and len(names[0]) > 200
    backward = [place for place, phase in zip(tree.modules, tree.phases, strict=True) if phase == "backward" and place]
    assert backward.index("layer.1") < backward.index("layer.0")
