"""What changes while a step runs: ranks that slow down, links that lose bandwidth, from an instant or a step on.

Routing samples are taken as steps one after the other, so that what begins with a step, or happens in some steps by
chance, is in some samples and not in others.

Legend: K instants at which anything changes, S routing samples, W ranks of the world.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.program.operations import Block, Operation, Run, Transfer
from moesim.program.step_program import Changes, GroupProgram, StepProgram, Task
from moesim.scenario import Scenario
from moesim.scenario.failures import Change, Degraded
from moesim.scenario.pools import ranked_cluster
from moesim.seeding import stream


def changes_in(scenario: Scenario, steps_S: Sequence[int]) -> tuple[Changes, tuple[Scenario, ...]] | None:
    """The changes of the samples of these steps, and the scenario with the links of every state that they come into."""
    cluster, world = scenario.cluster, scenario.parallelism.world_size
    slow, links = cluster.slowdowns, cluster.fabric.changes
    if not slow and not links:
        return None
    happens_JS = np.array([_happens(scenario, number, one, steps_S) for number, one in enumerate((*slow, *links))])
    ends = (instant for one in (*slow, *links) for instant in (one.at, one.until) if instant is not None)
    instants = sorted({0.0, *ends})
    speed_KSW = np.ones((len(instants), len(steps_S), world))
    state_KS = np.zeros((len(instants), len(steps_S)), dtype=np.int64)
    states: list[tuple[Degraded, ...]] = [()]
    domains = np.repeat(*_node_sizes(scenario))[:world]
    for k, instant in enumerate(instants):
        holds_J = [one.holds(instant) for one in (*slow, *links)]
        for number, one in enumerate(slow):
            of_W = np.arange(world) == one.rank if one.rank is not None else domains == one.node
            if holds_J[number]:
                speed_KSW[k] *= np.where(happens_JS[number][:, None] & of_W, one.factor, 1.0)
        for sample in range(len(steps_S)):
            broken = tuple(
                one.degraded
                for number, one in enumerate(links, start=len(slow))
                if holds_J[number] and happens_JS[number, sample]
            )
            if broken not in states:
                states.append(broken)
            state_KS[k, sample] = states.index(broken)
    found = Changes(instants_K=np.array(instants), speed_KSW=speed_KSW, state_KS=state_KS)
    return found, tuple(_with_links(scenario, broken) for broken in states)


def _happens(scenario: Scenario, number: int, one: Change, steps_S: Sequence[int]) -> NDArray[np.bool_]:
    """In which samples a change happens."""
    drawn = stream(scenario.seed, "change", number).random(max(steps_S) + 1)
    return np.array([step >= one.from_step and drawn[step] < one.probability for step in steps_S], dtype=bool)


def _node_sizes(scenario: Scenario) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pools = ranked_cluster(scenario.cluster, scenario.parallelism).pools
    sizes = np.array([pool.gpus_per_node for pool in pools for _ in range(pool.nodes)], dtype=np.int64)
    return np.arange(len(sizes)), sizes


def _with_links(scenario: Scenario, broken: tuple[Degraded, ...]) -> Scenario:
    fabric = scenario.cluster.fabric
    fabric = fabric.model_copy(update={"degraded": (*fabric.degraded, *broken), "changes": ()})
    return scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"fabric": fabric})})


@dataclass(frozen=True, eq=False)
class ChangingTransfer:
    """One transfer with the links in every state; by itself as in the first."""

    states: tuple[Transfer, ...]

    @property
    def alone_R(self) -> NDArray[np.float64]:
        """See `Transfer`."""
        return self.states[0].alone_R

    def finish(self, start_R: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Transfer`."""
        return self.states[0].finish(start_R)


def with_changes(programs: Sequence[StepProgram], changes: Changes) -> StepProgram:
    """One program out of those of every state of the links; groups that share core links do not slow each other."""
    first, collectives = programs[0], [(*program.reductions, *program.gathers) for program in programs]
    seconds = tuple(tuple(each.seconds for each in same) for same in zip(*collectives, strict=True))
    blocks: dict[tuple[Block, ...], Block] = {}
    groups = first.groups
    if len(programs) > 1:
        groups = tuple(_group(same, blocks) for same in zip(*(program.groups for program in programs), strict=True))
    found = replace(changes, collective_seconds=seconds)
    return replace(first, groups=groups, changes=found, compiled=False, contention=None)


def _group(same: Sequence[GroupProgram], blocks: dict[tuple[Block, ...], Block]) -> GroupProgram:
    tasks = tuple(_task(tasks, blocks) for tasks in zip(*(group.tasks for group in same), strict=True))
    return replace(same[0], tasks=tasks, optimizer=_block([group.optimizer for group in same], blocks))


def _task(tasks: Sequence[Task], blocks: dict[tuple[Block, ...], Block]) -> Task:
    first = tasks[0]
    runs = tuple(
        Run(_block([run.block for run in runs], blocks), runs[0].micro_batch, runs[0].backward)
        for runs in zip(*(task.runs for task in tasks), strict=True)
    )
    sends = tuple(
        replace(sent[0], by_state=tuple(each.seconds for each in sent))
        for sent in zip(*(task.sends for task in tasks), strict=True)
    )
    return replace(first, runs=runs, sends=sends)


def _block(same: Sequence[Block], blocks: dict[tuple[Block, ...], Block]) -> Block:
    key = tuple(same)
    if key not in blocks:
        operations = zip(*(block.operations for block in same), strict=True)
        blocks[key] = Block(same[0].name, tuple(map(_operation, operations)))
    return blocks[key]


def _operation(same: Sequence[Operation]) -> Operation:
    transfers_M = tuple(
        ChangingTransfer(each) for each in zip(*(operation.transfers_M for operation in same), strict=True)
    )
    return replace(same[0], transfers_M=transfers_M) if transfers_M else same[0]
