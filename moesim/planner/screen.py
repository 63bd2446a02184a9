"""The fast estimate of a layout: parts per layer, a walked pipeline, collectives, optimizer, and the memory.

Walks through a pipeline are kept from layout to layout. With equal micro-batches the steady state repeats, so long
schedules are extended from two short ones.

What it leaves out: groups and micro-batches differ, here all take as long as the first two of the first group. Every
plan says how far off that is; nothing is ranked by it in the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moesim.network import Fabric, send_recv_seconds
from moesim.parallel import Mesh
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import RoutedRows
from moesim.planner.layer_times import ZERO_SECONDS, LayerTimes, PartSeconds, PassSeconds, TraceOf
from moesim.program.collectives import Reduction
from moesim.program.operations import Operation
from moesim.program.outside_layers import optimizer_block
from moesim.program.parameters import ParameterGroups
from moesim.program.scenario_fabric import scenario_fabric
from moesim.program.software import kernel_list
from moesim.program.writer import KernelWriter
from moesim.recorded.peak import recorded_memory
from moesim.results.spans import Part
from moesim.scenario import PipelineSchedule, Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.stages import stage_lengths, stages_of_ranks
from moesim.schedules import Action, Pass, Schedule, Seconds, Walk, build_schedule

FILLING_MICRO_BATCHES = 2  # per pipeline rank that fill any pipeline: further ones hold no more activations


@lru_cache(maxsize=256)
def prepare_pipeline(kind: str, num_ranks: int, num_micro_batches: int, virtual: int) -> Walk:
    """The walk of one schedule."""
    return Walk.of(build_schedule(kind, num_ranks=num_ranks, num_micro_batches=num_micro_batches, virtual=virtual))


def _kept(seconds: Seconds) -> Seconds:
    """The same seconds, asked for once per rank and kinds of passes: micro-batches are equal."""
    known: dict[tuple[int, tuple[object, ...]], float] = {}

    def kept(rank: int, action: Action) -> float:
        key = rank, tuple((work.kind, work.chunk) for work in action.works)
        if key not in known:
            known[key] = seconds(rank, action)
        return known[key]

    return kept


def short_micro_batches(schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int) -> int:
    """Micro-batches from which on a step of this schedule holds no more activations (some hold all of them)."""
    facts = schedule.facts
    return (
        num_micro_batches
        if facts.holds_all
        else min(num_micro_batches, max(FILLING_MICRO_BATCHES, facts.least_rounds) * pipeline)
    )


def pipeline_finish(
    schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int, seconds: Seconds, p2p_seconds: float
) -> list[float]:
    """When each pipeline rank has done its last action, seconds from the start of the step."""

    kept = _kept(seconds)

    def finish(micro_batches: int) -> list[float]:
        walk = prepare_pipeline(schedule.kind, pipeline, micro_batches, schedule.virtual)
        return walk.finish(kept, p2p_seconds=p2p_seconds)

    short, long = (count * pipeline for count in schedule.facts.settles)
    if num_micro_batches <= long:
        return finish(num_micro_batches)
    pairs = zip(finish(short), finish(long), strict=True)
    times = (num_micro_batches - long) / (long - short)
    return [until + times * (until - early) for early, until in pairs]


class _EndOfStep(NamedTuple):
    """What follows the last backward pass of one pipeline rank; and seconds of every accumulation of gradients."""

    reductions: tuple[Reduction, ...]
    rest: float
    accumulation: float

    def done(self, finish: float, *, last: float, lasts: Mapping[int, "_Last"]) -> float:
        """When the step ends on the rank whose last action took `last` seconds and was done at `finish`.

        `lasts`: for stages whose gradients go as soon as they are made, the action that makes the last of them.
        """
        at_end = _Last(behind=0.0, seconds=last)
        chosen = [(r, lasts.get(r.stage, at_end) if r.buckets else at_end) for r in self.reductions]
        reduced = 0.0
        for reduction, of_stage in sorted(chosen, key=lambda pair: -pair[1].behind):
            made = finish - of_stage.behind
            beside = of_stage.seconds * (1 - 1 / reduction.buckets) if reduction.buckets else 0.0
            begin = max(made - beside, reduced)
            tail = reduction.seconds / reduction.buckets if reduction.buckets else reduction.seconds
            reduced = max(begin + reduction.seconds, max(made, reduced) + tail)
        return max(finish, reduced) + self.rest


class _Last(NamedTuple):
    """The last action that makes gradients of a stage: its seconds, and those of all actions behind it on its rank."""

    behind: float
    seconds: float


def _last_of_stages(schedule: Schedule, rank: int, seconds: Callable[[int, Action], float]) -> dict[int, _Last]:
    """By stage; gaps between the actions behind it are left out."""
    lasts: dict[int, _Last] = {}
    behind = 0.0
    for action in reversed(schedule.actions[rank]):
        took = seconds(rank, action)
        for work in action.works:
            if work.kind in (Pass.BACKWARD, Pass.WEIGHT):
                lasts.setdefault(schedule.stage(rank, work), _Last(behind, took))
        behind += took
    return lasts


@dataclass(frozen=True)
class Screen:
    """The screen of one space. `trace_of` gives the routing of a scenario, once per router."""

    trace_of: TraceOf
    layer_times: LayerTimes = field(init=False)
    _fabrics: dict[object, Fabric] = field(init=False, default_factory=dict, repr=False)
    _ends: dict[object, list[_EndOfStep]] = field(init=False, default_factory=dict, repr=False)
    _peaks: dict[object, float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_times", LayerTimes(self.trace_of))

    def memory(self, scenario: Scenario) -> tuple[float, float]:
        """Bytes that the fullest GPU needs, and those it has."""
        work = scenario.workload
        few = short_micro_batches(
            scenario.parallelism.schedule,
            pipeline=scenario.parallelism.pipeline,
            num_micro_batches=scenario.num_micro_batches,
        )
        # The kind of GPU and the fabric change no tensor, but perhaps its stage.
        router = scenario.router_shape() if scenario.model.experts else None
        layout = scenario.parallelism, stage_lengths(scenario)
        key = layout, work.micro_batch, work.recompute, few, scenario.capacity, scenario.dispatch, router
        if key not in self._peaks:
            self._peaks[key] = peak_bytes(scenario, self.layer_times.rows(scenario), micro_batches=few)
        return self._peaks[key], scenario.cluster.main_pool.spec.memory_bytes

    def step_seconds(self, scenario: Scenario) -> float:
        """Seconds of one optimizer step."""
        parts, ends = self._parts(scenario), self._ends_of_step(scenario)
        mesh = scenario.parallelism
        walk = prepare_pipeline(*_short_schedule(scenario))
        seconds = _durations(scenario, parts, walk.schedule, ends)
        finish = pipeline_finish(
            mesh.schedule,
            pipeline=mesh.pipeline,
            num_micro_batches=scenario.num_micro_batches,
            seconds=seconds,
            p2p_seconds=self._p2p_seconds(scenario),
        )
        if walk.schedule.num_replicas > 1:
            finish = [max(finish)] * len(finish)  # both holders of a stage reduce its gradients together
        lasts: list[dict[int, _Last]] = [{}] * walk.schedule.num_ranks
        if not Mesh(mesh, scenario.cluster).shards_by_layer:
            lasts = [_last_of_stages(walk.schedule, rank, seconds) for rank in range(walk.schedule.num_ranks)]
        return max(
            end.done(done, last=seconds(rank, walk.schedule.actions[rank][-1]), lasts=lasts[rank])
            for rank, (end, done) in enumerate(zip(ends, finish, strict=True))
        )

    def _parts(self, scenario: Scenario) -> PartSeconds:
        return self.layer_times.of(scenario, self._fabric(scenario).parameters)

    def _fabric(self, scenario: Scenario) -> Fabric:
        key = scenario.cluster, scenario.parallelism.world_size
        if key not in self._fabrics:
            self._fabrics[key] = scenario_fabric(scenario, self.layer_times.kernels(scenario))
        return self._fabrics[key]

    def _p2p_seconds(self, scenario: Scenario) -> float:
        mesh = scenario.parallelism
        if mesh.pipeline == 1:
            return 0.0
        size = scenario.tokens_per_rank * scenario.model.hidden * BYTES_PER_ELEMENT["bf16"]
        return send_recv_seconds(self._fabric(scenario), 0, mesh.stage_ranks, size).seconds

    def _ends_of_step(self, scenario: Scenario) -> list[_EndOfStep]:
        mesh = scenario.parallelism
        # Who holds which stage counts, not the order of work.
        alike = mesh.model_copy(update={"schedule": PipelineSchedule()})
        key = scenario.cluster, alike, stages_of_ranks(mesh), stage_lengths(scenario)
        if key not in self._ends:
            self._ends[key] = self._made_ends(scenario, prepare_pipeline(*_short_schedule(scenario)).schedule)
        return self._ends[key]

    def _made_ends(self, scenario: Scenario, schedule: Schedule) -> list[_EndOfStep]:
        kernels, fabric = self.layer_times.kernels(scenario), self._fabric(scenario)
        software = kernel_list(scenario)
        mesh = Mesh(scenario.parallelism, scenario.cluster)
        copies = scenario.slots_per_rank * scenario.parallelism.expert > scenario.model.experts
        sample = self.layer_times.sample(scenario) if copies else None
        parameters = ParameterGroups(scenario, mesh, schedule, map_of=sample.map_of if sample else None)
        reductions, gathers = parameters.reductions(fabric), parameters.gathers(fabric)
        writer = KernelWriter(kernels, dtype=scenario.workload.precision.kernels, part=Part.GRADIENTS)
        ends = []
        for rank in range(schedule.num_ranks):
            of_rank, first = parameters.of_rank(rank), mesh.rank(stage=rank, index=0)
            before, after = software.flat_copies(writer, parameters=of_rank.reduced)
            block = optimizer_block(scenario, kernels, parameters=of_rank.updated, gemms=of_rank.gemms)
            update = block.operations
            gathered = sum(gather.seconds for gather in gathers if first in gather.ranks)
            ends.append(
                _EndOfStep(
                    reductions=tuple(reduction for reduction in reductions if first in reduction.ranks),
                    rest=_total([*before, *after, *update]) + gathered,
                    accumulation=_total(software.accumulation(writer, parameters=of_rank.held, first=False)),
                )
            )
        return ends


def _total(operations: list[Operation]) -> float:
    return sum(float(np.max(operation.seconds_MSR)) for operation in operations if operation.seconds_MSR is not None)


def _short_schedule(scenario: Scenario) -> tuple[str, int, int, int]:
    """The schedule of the scenario with as few micro-batches as show who holds which stage."""
    mesh = scenario.parallelism
    few = min(scenario.num_micro_batches, max(2, mesh.schedule.facts.least_rounds) * mesh.pipeline)
    return mesh.schedule.kind, mesh.pipeline, few, mesh.schedule.virtual


def stage_seconds(scenario: Scenario, parts: PartSeconds) -> list[PassSeconds]:
    """Seconds of one micro-batch through each stage of the model."""
    stages = []
    for number, layers in enumerate(scenario.stage_layers):
        dense = sum(map(scenario.model.is_dense, layers))
        seconds = parts.dense_layer.times(dense) + parts.moe_layer.times(len(layers) - dense)
        seconds += parts.embedding if number == 0 else ZERO_SECONDS
        seconds += parts.head if number == scenario.parallelism.num_stages - 1 else ZERO_SECONDS
        stages.append(seconds)
    return stages


def _durations(
    scenario: Scenario, parts: PartSeconds, schedule: Schedule, ends: list[_EndOfStep]
) -> Callable[[int, Action], float]:
    stages = stage_seconds(scenario, parts)
    beside = scenario.overlap.micro_batches is not False

    def seconds(rank: int, action: Action) -> float:
        total = 0.0
        saved = 0.0
        for work in action.works:
            stage = stages[schedule.stage(rank, work)]
            saved += (stage.forward + stage.backward - stage.pair) / 2 if beside else 0.0
            match work.kind:
                case Pass.FORWARD:
                    total += stage.forward
                case Pass.BACKWARD:
                    total += stage.backward + ends[rank].accumulation
                case Pass.INPUT:
                    total += stage.gradient_of_input + ends[rank].accumulation
                case Pass.WEIGHT:
                    total += stage.gradient_of_weights
        return total - saved * action.is_pair

    return seconds


def peak_bytes(scenario: Scenario, rows: RoutedRows, *, micro_batches: int) -> float:
    """Bytes that the fullest GPU needs, with the `rows` of one rank group on every group.

    Of the step's micro-batches only as many as fill the pipeline: the others hold no more activations.
    """
    mesh, work = scenario.parallelism, scenario.workload
    short = work.model_copy(update={"global_batch": micro_batches * mesh.data * work.micro_batch})
    times = mesh.stage_ranks // rows.rows_SLBW.shape[3]
    tiled = RoutedRows(
        rows_SLBW=np.tile(rows.rows_SLBW, times),
        copies_out_SLBW=np.tile(rows.copies_out_SLBW, times),
        copies_in_SLBW=np.tile(rows.copies_in_SLBW, times),
    )
    shortened = scenario.model_copy(update={"workload": short})
    return memory_report(shortened, tiled, recorded=recorded_memory(scenario)).peak_bytes
