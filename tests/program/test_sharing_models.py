"""The three models of sharing on a whole simulated step, with and without a slow rank."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine import simulate_step
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import StepProgram, build_program
from moesim.program.operations import Block
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.seeding import stream

SLOW_RANK = 3


def program_of(scenario: Scenario) -> StepProgram:
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test", 0))
    kernels = kernel_model("h200", "roofline")
    return build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=[sample])


def with_straggler(program: StepProgram, factor: float) -> StepProgram:
    """The same step with kernels of one rank of each group that take `factor` times as long."""

    def slowed(block: Block, ranks: int) -> Block:
        factor_R = np.where(np.arange(ranks) == SLOW_RANK, factor, 1.0)
        operations = (
            operation
            if operation.seconds_MSR is None
            else replace(operation, seconds_MSR=operation.seconds_MSR * factor_R)
            for operation in block.operations
        )
        return Block(block.name, tuple(operations))

    groups = []
    for group in program.groups:
        blocks = {run.block for task in group.tasks for run in task.runs}
        slow = {block: slowed(block, len(group.ranks_R)) for block in blocks}
        tasks = tuple(
            replace(task, runs=tuple(run._replace(block=slow[run.block]) for run in task.runs)) for task in group.tasks
        )
        groups.append(replace(group, tasks=tasks))
    return replace(program, groups=tuple(groups))


@pytest.mark.parametrize("straggler", [1.0, 1.5])
@pytest.mark.parametrize("nodes", [1, 2])
def test_models_agree_on_whole_steps(small, nodes: int, straggler: float) -> None:
    """`ports` within 2 % of `exact`, `fluid` within 0.5 %, where the core does not block."""
    ranks = 4 * nodes
    seconds = {}
    for model in ("exact", "fluid", "ports"):
        scenario = small(
            {
                "cluster.nodes": nodes,
                "parallelism": {"data": ranks, "expert": ranks},
                "network.model": model,
                "workload.global_batch": 2 * ranks,
            }
        )
        seconds[model] = float(simulate_step(with_straggler(program_of(scenario), straggler)).step_S[0])
    assert seconds["ports"] == pytest.approx(seconds["exact"], rel=0.02)
    assert seconds["fluid"] == pytest.approx(seconds["exact"], rel=0.005)
