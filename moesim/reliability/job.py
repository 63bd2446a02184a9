"""The seconds and rates of a job, from its scenario and the simulated step; and its goodput in closed form.

The closed form is for screens over thousands of layouts and for the best time between checkpoints. With a cost of d
seconds per checkpoint and M seconds between failures, what a checkpoint costs per second of work is d / t and what a
failure throws away about t / 2M. Young (CACM 17(9), 1974) balances the two; Daly (FGCS 22(3), 2006) adds higher orders.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moesim.engine.job import SECONDS_PER_DAY, Job, JobCause
from moesim.errors import ConflictError, InfeasibleError, UserError
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.failures import Degraded, FailureRecord, Failures, Slow, record_of_gpu
from moesim.scenario.flops import parameters
from moesim.scenario.pools import rank_counts
from moesim.seeding import stream
from moesim.units import format_seconds

LEAST_WORK = 1e-3  # share of the time that must be left for work
MOST_EPISODES = 100_000  # of one draw


@dataclass(frozen=True, kw_only=True)
class Step:
    """The simulated step: its seconds, those of the rank that computes longest, and the step with slow links.

    degraded_s: seconds of the step by (node, factor).
    """

    seconds: float
    compute_s: float
    degraded_s: Mapping[tuple[int, float], float]


def failures_of(scenario: Scenario) -> Failures:
    """The section, or its defaults."""
    return scenario.failures or Failures()


@dataclass(frozen=True, kw_only=True)
class RecordedParts:
    """Parts of the job whose failures one record tells of: its pools' GPUs, NICs and nodes with ranks."""

    record: FailureRecord
    gpus: int
    nodes: int
    kinds: tuple[str, ...]


def recorded_parts(scenario: Scenario) -> tuple[RecordedParts, ...]:
    """The published records behind the rates, each with the parts of the pools that it stands for."""
    found: dict[str, RecordedParts] = {}
    counts = rank_counts(scenario.cluster, scenario.parallelism)
    for pool, gpus in zip(scenario.cluster.pools, counts, strict=True):
        if not gpus:
            continue
        record = failures_of(scenario).record_for(record_of_gpu(pool.gpu_name))
        known = found.get(record.name, RecordedParts(record=record, gpus=0, nodes=0, kinds=()))
        kinds = tuple(dict.fromkeys((*known.kinds, pool.gpu_name)))
        nodes = known.nodes + -(-gpus // pool.gpus_per_node)
        found[record.name] = RecordedParts(record=record, gpus=known.gpus + gpus, nodes=nodes, kinds=kinds)
    return tuple(found.values())


def num_nodes(scenario: Scenario) -> int:
    """Nodes that the job's ranks are on."""
    return sum(parts.nodes for parts in recorded_parts(scenario))


def dearest_node(scenario: Scenario) -> float:
    """USD per hour of a spare node, which may have to stand in for one of any pool."""
    return max(pool.gpus_per_node * pool.usd_per_gpu_hour for pool in scenario.cluster.pools)


def job_causes(scenario: Scenario) -> tuple[JobCause, ...]:
    """Failures of the whole job by cause: those of the records, by the parts of their pools, and the scenario's own.

    What strikes the whole job comes from each record by its share of the GPUs.
    """
    failures, world = failures_of(scenario), scenario.parallelism.world_size
    causes: dict[str, JobCause] = {}
    for parts in recorded_parts(scenario):
        counts: dict[str, float] = _counts(scenario, gpus=parts.gpus, nodes=parts.nodes) | {"job": parts.gpus / world}
        for cause in parts.record.causes:
            rate = failures.factor * parts.record.per_hour(cause) * counts[cause.per] / 3600
            before = causes.get(cause.name)
            causes[cause.name] = JobCause(
                name=cause.name,
                per_second=rate + (before.per_second if before else 0.0),
                broken=cause.broken or (before is not None and before.broken),
            )
    of_job = _counts(scenario, gpus=world, nodes=num_nodes(scenario)) | {"job": 1}
    for own in failures.causes:
        causes[own.name] = JobCause(name=own.name, per_second=of_job[own.per] / own.every, broken=own.broken)
    return tuple(cause for cause in causes.values() if cause.per_second > 0)


def _counts(scenario: Scenario, *, gpus: int, nodes: int) -> dict[str, float]:
    """Parts by kind; NICs as the fabric says."""
    each = scenario.cluster.fabric.nics_per_node
    return {"gpu": gpus, "nic": gpus if each is None else nodes * each, "node": nodes}


def checkpoint_bytes(scenario: Scenario) -> float:
    """Weights, master copy and both moments of every parameter, each once, prediction layers included."""
    count = parameters(scenario.model)
    precision, size = scenario.workload.precision, BYTES_PER_ELEMENT
    each = size[precision.weights] + 2 * size[precision.optimizer] + size["fp32"] * (precision.master == "fp32")
    return (count.total + count.mtp) * each


@dataclass(frozen=True, kw_only=True)
class Saving:
    """One checkpoint: its bytes, seconds to write and to read it, and seconds that the job stands."""

    bytes: float
    write_s: float
    read_s: float
    blocking_s: float


def saving_of(scenario: Scenario) -> Saving:
    """How long a checkpoint takes. Each rank copies and writes an equal share."""
    section, nodes = failures_of(scenario).checkpoint, num_nodes(scenario)
    size = checkpoint_bytes(scenario) if section.size is None else section.size
    writes = min(section.write_total or math.inf, nodes * section.write_per_node)
    each = section.read_per_node or section.write_per_node
    reads = min(section.read_total or section.write_total or math.inf, nodes * each)
    copy_s = size / scenario.parallelism.world_size / section.copy_bandwidth
    return Saving(
        bytes=size,
        write_s=size / writes,
        read_s=size / reads,
        blocking_s=copy_s if section.asynchronous else size / writes,
    )


def droppable_units(scenario: Scenario) -> int:
    """Equal parts of the job that it can go on without: whole expert groups of data-parallel ranks, all stages."""
    mesh = scenario.parallelism
    group = math.lcm(mesh.context * mesh.tensor, mesh.expert * mesh.expert_tensor)
    return mesh.stage_ranks // group


def check_failures(scenario: Scenario) -> None:
    """Raises ConflictError for a job that is to shrink and cannot."""
    if failures_of(scenario).without_spare == "shrink" and droppable_units(scenario) == 1:
        what = "the ranks are one expert group of data-parallel ranks, of which none can be left out"
        raise ConflictError(f"failures.without_spare: shrink: {what}; use wait, or more data-parallel ranks")


def job_of(scenario: Scenario, step: Step, *, days: float, interval_steps: int) -> Job:
    """The job of `days` with a checkpoint every `interval_steps`. Raises ConflictError and InfeasibleError."""
    failures, saving = failures_of(scenario), saving_of(scenario)
    check_failures(scenario)
    job = Job(
        step_s=step.seconds,
        interval_steps=interval_steps,
        horizon_s=days * SECONDS_PER_DAY,
        causes=job_causes(scenario),
        blocking_s=saving.blocking_s,
        write_s=saving.write_s if failures.checkpoint.asynchronous else 0.0,
        detection_s=failures.detection,
        restart_s=failures.restart,
        load_s=saving.read_s,
        spares=failures.spares,
        repair_s=failures.repair or 0.0,
        shrinks=failures.without_spare == "shrink",
        units=droppable_units(scenario),
        speeds=speeds_of(scenario, step, horizon_s=days * SECONDS_PER_DAY, rng=stream(scenario.seed, "slow", 0)),
    )
    require_time(job)
    return job


def require_time(job: Job) -> None:
    """Raises InfeasibleError where failures hardly ever leave the time to recover and to save one step."""
    needed = job.detection_s + job.restart_s + job.load_s + job.step_s + job.blocking_s + job.write_s
    if job.per_second * needed <= -math.log(LEAST_WORK):
        return
    what = f"a failure every {_time(1 / job.per_second)} leaves no time for work: recovery and a saved step take"
    raise InfeasibleError(f"failures: {what} {_time(needed)}; use lower rates, fewer GPUs or a faster recovery")


def _time(seconds: float) -> str:
    return format_seconds(seconds, digits=3) if seconds < 120 else f"{seconds / 60:,.1f} min"


def least_steps(scenario: Scenario, step: Step) -> int:
    """Steps between checkpoints at least: one is written before the next begins."""
    saving = saving_of(scenario)
    left = saving.write_s - saving.blocking_s if failures_of(scenario).checkpoint.asynchronous else 0.0
    return max(1, math.ceil(left / step.seconds))


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One time at which something is slow, in seconds of the job."""

    start: float
    end: float
    slow: Slow


def episodes_of(failures: Failures, *, horizon_s: float, rng: np.random.Generator) -> list[Episode]:
    """Every slow time of the job; what flaps is drawn. Raises UserError for more than MOST_EPISODES."""
    found: list[Episode] = []
    for number, slow in enumerate(failures.slow):
        if slow.every is None or slow.lasts is None:
            found.append(Episode(start=slow.start, end=slow.start + (slow.lasts or math.inf), slow=slow))
            continue
        expected = max(0.0, horizon_s - slow.start) / (slow.every + slow.lasts)
        if expected > MOST_EPISODES:
            what = f"about {expected:,.0f} times are expected, at most {MOST_EPISODES:,} are simulated"
            raise UserError(f"failures.slow.{number}.every: {what}; use fewer days, or jitter")
        at = slow.start + rng.exponential(slow.every)
        while at < horizon_s:
            found.append(Episode(start=at, end=at + slow.lasts, slow=slow))
            at += slow.lasts + rng.exponential(slow.every)
    return found


def flaps(scenario: Scenario) -> bool:
    """Whether draws differ in when something is slow."""
    return any(slow.every is not None for slow in failures_of(scenario).slow)


def speeds_of(
    scenario: Scenario, step: Step, *, horizon_s: float, rng: np.random.Generator
) -> tuple[tuple[float, float], ...]:
    """From when on a step takes how many times as long: slow ranks, slow links, jitter of all ranks.

    The longest of n exponential delays of mean m is m (1 + 1/2 + ... + 1/n) in the mean. Of slow ranks the slowest
    counts; the delays of links add up.
    """
    failures = failures_of(scenario)
    share, ranks = step.compute_s / step.seconds, scenario.parallelism.world_size
    always = failures.jitter * share * sum(1 / number for number in range(1, ranks + 1))
    episodes = episodes_of(failures, horizon_s=horizon_s, rng=rng)
    changes: dict[float, list[tuple[Slow, int]]] = {0.0: []}
    for each in episodes:
        changes.setdefault(each.start, []).append((each.slow, 1))
        if each.end < math.inf:
            changes.setdefault(each.end, []).append((each.slow, -1))
    active: Counter[tuple[str, int, float]] = Counter()
    found = []
    for moment in sorted(changes):
        for slow, step_of_count in changes[moment]:
            active[slow.part, slow.node, slow.factor] += step_of_count
        found.append((moment, 1.0 + always + _delay(active, share, step)))
    return tuple(found)


def _delay(active: Counter[tuple[str, int, float]], share: float, step: Step) -> float:
    here = [key for key, count in active.items() if count > 0]
    ranks = max((1 / factor - 1 for part, _, factor in here if part == "rank"), default=0.0)
    links = {(node, factor) for part, node, factor in here if part == "node_links"}
    return share * ranks + sum(max(0.0, step.degraded_s[link] / step.seconds - 1) for link in sorted(links))


def degraded_links(scenario: Scenario) -> dict[tuple[int, float], Scenario]:
    """The scenario with the links of one node slow, by (node, factor). Raises ConflictError for a node there is not."""
    nodes = sum(pool.nodes for pool in scenario.cluster.pools)
    found: dict[tuple[int, float], Scenario] = {}
    for number, slow in enumerate(failures_of(scenario).slow):
        if slow.part != "node_links":
            continue
        if slow.node >= nodes:
            raise ConflictError(f"failures.slow.{number}.node: node {slow.node} of nodes 0 to {nodes - 1}")
        fabric = scenario.cluster.fabric
        worse = (*fabric.degraded, Degraded(node=slow.node, factor=slow.factor))
        cluster = scenario.cluster.model_copy(update={"fabric": fabric.model_copy(update={"degraded": worse})})
        found[slow.node, slow.factor] = scenario.model_copy(update={"cluster": cluster})
    return found


POINTS = 17  # simulated intervals
WIDTH = 8.0  # times longer and shorter than Young's
NEAR = 1.5  # times the least overhead up to which points shape the fit


def young_seconds(*, cost_s: float, between_failures_s: float) -> float:
    """Work between checkpoints: sqrt(2 d M)."""
    return math.sqrt(2 * cost_s * between_failures_s)


def daly_seconds(*, cost_s: float, between_failures_s: float) -> float:
    """Work between checkpoints: sqrt(2 d M) (1 + x / 3 + x^2 / 9) - d with x = sqrt(d / 2M), and M for d >= 2M."""
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    x = math.sqrt(cost_s / (2 * between_failures_s))
    return young_seconds(cost_s=cost_s, between_failures_s=between_failures_s) * (1 + x / 3 + x**2 / 9) - cost_s


def search_steps(
    overhead: Callable[[int], float], *, around: float, least: int, most: int
) -> tuple[int, list[tuple[int, float]]]:
    """The whole number of steps with the least overhead, and the simulated (steps, overhead) that it comes from.

    Points around a first guess are simulated; through those near the best one goes a / t + b t + c, the form that the
    costs of checkpoints and of lost work have. Single points scatter, the fit does not.
    """
    first = max(least, min(most, round(around)))
    low, high = max(least, first / WIDTH), max(least, min(most, first * WIDTH))
    steps = sorted({max(least, round(each)) for each in np.geomspace(low, high, POINTS)})
    points = [(each, overhead(each)) for each in steps]
    best = min(value for _, value in points)
    near = [(each, value) for each, value in points if value <= best + (NEAR - 1) * max(best, 1e-9)]
    if len(near) < 4:
        return min(points, key=lambda point: point[1])[0], points
    t_P = np.array([each for each, _ in near], dtype=np.float64)
    value_P = np.array([value for _, value in near])
    design = np.stack([1 / t_P, t_P, np.ones_like(t_P)], axis=1) / value_P[:, None]
    (a, b, _), *_ = np.linalg.lstsq(design, np.ones_like(t_P), rcond=None)
    if a <= 0:  # checkpoints cost nothing: as often as possible
        return steps[0], points
    found = math.sqrt(a / b) if b > 0 else float(steps[-1])
    return int(max(steps[0], min(steps[-1], round(found)))), points


def expected_share(job: Job) -> float:
    """Expected share of the time that is kept work, when failures have no memory and never lack a spare: exact where
    nobody waits for repairs.

    Work of t seconds with a checkpoint of d takes M exp(R / M) (exp((t + d) / M) - 1) seconds with M between failures
    and R for recovery (Daly, FGCS 22(3), 2006); a checkpoint on its way to storage loses its write time as well.
    """
    slow = job.speeds[0][1]
    work, pause = job.interval_s * slow, job.blocking_s
    if job.per_second == 0:
        return job.interval_s / (work + pause)
    recovery = (job.detection_s + job.restart_s + job.load_s + job.write_s) * job.per_second
    if recovery > 50:
        return 0.0
    cycle = math.expm1(min(500.0, (work + pause) * job.per_second))
    return job.interval_s * job.per_second / (math.exp(recovery) * cycle)


def daly_steps(job: Job, *, least: int) -> int:
    """Steps between checkpoints by Daly's formula; as few as may be where checkpoints cost nothing."""
    if job.per_second == 0:
        return max(least, int(job.horizon_s // job.step_s))
    seconds = daly_seconds(cost_s=job.blocking_s, between_failures_s=1 / job.per_second)
    return max(least, round(seconds / job.step_s))
