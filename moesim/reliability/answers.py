"""From simulated days to answers: goodput and its range, lost time by cause, cost per useful token, best interval.

`definitions.yaml` says what every number of `moesim goodput` means. The format is versioned by `schema_version`: it
grows when a number changes its meaning or its name, not when one is added.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.engine.job import SECONDS_PER_DAY, Job, Ledger, draw_failures, run_job
from moesim.errors import ConflictError, InfeasibleError, UserError
from moesim.reliability.job import (
    LEAST_WORK,
    Step,
    daly_seconds,
    daly_steps,
    dearest_node,
    degraded_links,
    expected_share,
    failures_of,
    flaps,
    job_of,
    least_steps,
    recorded_parts,
    saving_of,
    search_steps,
    speeds_of,
    young_seconds,
)
from moesim.results import RunRecord
from moesim.results.definitions import Definition, read_definitions
from moesim.routing.request import ProgressCallback
from moesim.run import simulate
from moesim.scenario import Scenario
from moesim.scenario.failures import ASSUMED, FailureRecord
from moesim.seeding import stream

GOODPUT_DEFINITIONS: Mapping[str, Definition] = read_definitions(Path(__file__).parent / "definitions.yaml")
GOODPUT_SCHEMA_VERSION = 1
MOST_SEEDS = 1_000
SEARCH_FAILURES = 4_000  # that the search for an interval draws in all, about: its optimum scatters by a few per cent
MOST_FAILURES = 1_000_000  # of one draw
MOST_SEARCHED = 256  # draws of the search
RANGE = (5.0, 95.0)  # percentiles of a 90 % range
MOST_DAYS = 3_660.0
WAITS = ("detection", "restart", "repair")


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """`result`: plain values, what --json prints. `ledgers`: one per seed. `job`: the seconds behind them."""

    result: Mapping[str, Any]
    ledgers: tuple[Ledger, ...]
    job: Job


def goodput(
    scenario: Scenario,
    *,
    days: float = 54.0,
    seeds: int = 20,
    progress: ProgressCallback | None = None,
    cache_dir: Path | None = None,
) -> Goodput:
    """Simulate the scenario's step, then `days` of it with failures and checkpoints, `seeds` times.

    `result` of what is returned is what `moesim goodput --json` prints, `ledgers` where the seconds of every draw went.
    Raises UserError, and InfeasibleError where failures leave no time for work.
    """
    if not 0 < days <= MOST_DAYS:
        raise UserError(f"{days:g} days: give more than 0 and at most {MOST_DAYS:,.0f}")
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {seeds} must be 1 to {MOST_SEEDS:,}")
    degraded = degraded_links(scenario)
    record = simulate(scenario, progress=progress, cache_dir=cache_dir)
    seconds = {
        link: float(simulate(slow, progress=progress, cache_dir=cache_dir).result["step_time_s"])
        for link, slow in degraded.items()
    }
    return goodput_of_step(scenario, step_of(record, seconds), days=days, seeds=seeds)


def step_of(record: RunRecord, degraded_s: Mapping[tuple[int, float], float]) -> Step:
    """What a job needs to know of its step."""
    compute_s = float(record.arrays["compute_time_W"].max())
    seconds = float(record.result["step_time_s"])
    return Step(seconds=seconds, compute_s=min(compute_s, seconds), degraded_s=degraded_s)


def goodput_of_step(scenario: Scenario, step: Step, *, days: float, seeds: int) -> Goodput:
    """The same for a step that is simulated already."""
    least = least_steps(scenario, step)
    first = job_of(scenario, step, days=days, interval_steps=least)
    _check_count(first)
    steady = replace(first, speeds=mean_speed(first)) if flaps(scenario) else first  # a search of a thousand draws
    found, points = best_interval(steady, scenario.seed, least=least)
    given = given_steps(scenario, step)
    job = replace(first, interval_steps=found if given is None else given)
    ledgers = tuple(_ledger(scenario, step, job, seed) for seed in range(seeds))
    if float(np.mean([ledger.useful_s for ledger in ledgers])) < LEAST_WORK * job.horizon_s:
        what = f"of {days:g} days {100 * LEAST_WORK:g} % or less is work that is kept"
        raise InfeasibleError(f"failures: {what}; use lower rates, more spares, or shorter detection and restart")
    return Goodput(result=_result(scenario, job, ledgers, found, points), ledgers=ledgers, job=job)


def _ledger(scenario: Scenario, step: Step, job: Job, seed: int) -> Ledger:
    """One draw of failures, and of the times at which something that flaps is slow."""
    drawn = job
    if seed and flaps(scenario):
        speeds = speeds_of(scenario, step, horizon_s=job.horizon_s, rng=stream(scenario.seed, "slow", seed))
        drawn = replace(job, speeds=speeds)
    return run_job(drawn, draw_failures(drawn, stream(scenario.seed, "failures", seed)))


def mean_speed(job: Job) -> tuple[tuple[float, float]]:
    """One speed for all days: the mean of those that the job has, over time."""
    starts_S = np.array([min(start, job.horizon_s) for start, _ in job.speeds] + [job.horizon_s])
    return ((0.0, float(np.average([factor for _, factor in job.speeds], weights=np.diff(starts_S)))),)


def given_steps(scenario: Scenario, step: Step) -> int | None:
    """The scenario's interval in whole steps; None for best. Raises ConflictError where writing takes longer."""
    wanted, least = failures_of(scenario).checkpoint.interval, least_steps(scenario, step)
    if wanted == "best":
        return None
    steps = wanted if isinstance(wanted, int) else max(1, round(wanted / step.seconds))
    if steps < least:
        what = f"a checkpoint takes {saving_of(scenario).write_s:.3g} s to write, longer than {steps} steps"
        raise ConflictError(f"failures.checkpoint.interval: {what}; use {least} steps or more")
    return steps


def kept_share(scenario: Scenario, step: Step, *, days: float) -> float:
    """Goodput in closed form, with Daly's interval where the best is asked for. Raises as goodput_of_step does."""
    job = job_of(scenario, step, days=days, interval_steps=least_steps(scenario, step))
    given = given_steps(scenario, step)
    steps = daly_steps(job, least=job.interval_steps) if given is None else given
    return expected_share(replace(job, interval_steps=steps))


def _check_count(job: Job) -> None:
    expected = job.per_second * job.horizon_s
    if expected > MOST_FAILURES:
        raise UserError(f"failures: {expected:,.0f} failures are expected, at most {MOST_FAILURES:,} are simulated; "
                        "use fewer days")  # fmt: skip


def best_interval(job: Job, seed: int, *, least: int) -> tuple[int, list[tuple[int, float]]]:
    """Steps between checkpoints with the most kept work, and the simulated (steps, share of time without it)."""
    most = max(least, int(job.horizon_s // job.step_s))
    if job.per_second == 0:
        return most, []
    expected = job.per_second * job.horizon_s
    draws = int(min(MOST_SEARCHED, max(1, math.ceil(SEARCH_FAILURES / max(expected, 1e-9)))))
    drawn = [draw_failures(job, stream(seed, "failures", number)) for number in range(draws)]

    def overhead(steps: int) -> float:
        changed = replace(job, interval_steps=steps)
        return 1 - float(np.mean([run_job(changed, failures).useful_s for failures in drawn])) / job.horizon_s

    cost = job.blocking_s or job.write_s
    around = young_seconds(cost_s=cost, between_failures_s=1 / job.per_second) / job.step_s
    return search_steps(overhead, around=around, least=least, most=most)


def _mean(ledgers: Sequence[Ledger], value: Callable[[Ledger], float]) -> float:
    return float(np.mean([value(ledger) for ledger in ledgers]))


def _by_cause(ledgers: Sequence[Ledger], part: Callable[[Ledger], Mapping[str, float]]) -> dict[str, float]:
    names = list(dict.fromkeys(name for ledger in ledgers for name in part(ledger)))
    means = {name: _mean(ledgers, lambda ledger, name=name: part(ledger).get(name, 0.0)) for name in names}  # type: ignore[misc]
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def _result(
    scenario: Scenario, job: Job, ledgers: Sequence[Ledger], found: int, points: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    shares = [ledger.useful_s / job.horizon_s for ledger in ledgers]
    mean = float(np.mean(shares))
    low, high = (float(np.percentile(shares, each)) for each in RANGE)
    tokens = scenario.tokens_per_step * job.horizon_s / job.step_s * mean
    hourly = scenario.cluster.usd_per_hour + (job.spares or 0) * dearest_node(scenario)
    usd = hourly * job.horizon_s / 3600
    budget = scenario.workload.train_tokens
    per_day = tokens / (job.horizon_s / SECONDS_PER_DAY)
    return {
        "schema_version": GOODPUT_SCHEMA_VERSION,
        "kind": "goodput",
        "name": scenario.name,
        "gpus": scenario.cluster.num_gpus,
        "days": job.horizon_s / SECONDS_PER_DAY,
        "seeds": len(ledgers),
        "step_time_s": job.step_s,
        "goodput": mean,
        "goodput_range": [low, high] if len(ledgers) > 1 else None,
        "tokens_per_day": per_day,
        "usd_per_million_useful_tokens": usd / (tokens / 1e6),
        "usd_per_million_tokens_without_failures": scenario.cluster.usd_per_hour * job.step_s / 3600
        / (scenario.tokens_per_step / 1e6),
        "usd_total": None if budget is None else usd / tokens * budget,
        "days_total": None if budget is None else budget / per_day,
        "time_s": _time_parts(ledgers),
        "failures": _mean(ledgers, lambda ledger: sum(ledger.failures.values())),
        "mean_time_between_failures_s": 1 / job.per_second if job.per_second else None,
        "days_with_failures": _mean(ledgers, lambda ledger: ledger.days_with_failures),
        "causes": _causes(job, ledgers),
        "checkpoint": _checkpoint(scenario, job, ledgers, found, points),
        "rests_on": _sources(scenario),
        "warnings": _warnings(scenario),
    }  # fmt: skip


def _time_parts(ledgers: Sequence[Ledger]) -> dict[str, float]:
    """Mean seconds of every account; they add up to the days."""
    parts = {
        "useful": _mean(ledgers, lambda ledger: ledger.useful_s),
        "slowed": _mean(ledgers, lambda ledger: ledger.slowed_s),
        "checkpoint": _mean(ledgers, lambda ledger: ledger.checkpoint_s),
        "lost": _mean(ledgers, lambda ledger: sum(ledger.lost_s.values())),
    }
    for name in WAITS:
        parts[name] = _mean(ledgers, lambda ledger, name=name: sum(getattr(ledger, f"{name}_s").values()))  # type: ignore[misc]
    return parts


def _causes(job: Job, ledgers: Sequence[Ledger]) -> list[dict[str, Any]]:
    """Means of every cause, the costliest first."""
    parts = {name: _by_cause(ledgers, lambda ledger, name=name: getattr(ledger, f"{name}_s"))  # type: ignore[misc]
                for name in ("lost", *WAITS)}  # fmt: skip
    rates = {cause.name: cause for cause in job.causes}
    rows = []
    for name in dict.fromkeys([*rates, *(name for by in parts.values() for name in by)]):
        cause = rates.get(name)
        seconds = {f"{part}_s": by.get(name, 0.0) for part, by in parts.items()}
        rows.append({
            "cause": name,
            "failures": _mean(ledgers, lambda ledger, name=name: ledger.failures.get(name, 0)),  # type: ignore[misc]
            "mean_time_between_s": 1 / cause.per_second if cause else None,
            **seconds,
            "all_s": sum(seconds.values()),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (-row["all_s"], row["cause"]))


def _checkpoint(
    scenario: Scenario, job: Job, ledgers: Sequence[Ledger], found: int, points: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    saving = saving_of(scenario)
    formulas: dict[str, float | None] = {"young_s": None, "daly_s": None}
    if job.per_second and job.blocking_s:
        known = {"cost_s": job.blocking_s, "between_failures_s": 1 / job.per_second}
        formulas = {"young_s": young_seconds(**known), "daly_s": daly_seconds(**known)}
    return {
        "bytes": saving.bytes,
        "asynchronous": failures_of(scenario).checkpoint.asynchronous,
        "write_s": saving.write_s,
        "blocking_s": saving.blocking_s,
        "read_s": saving.read_s,
        "interval_steps": job.interval_steps,
        "interval_s": job.interval_s,
        "checkpoints": _mean(ledgers, lambda ledger: ledger.checkpoints),
        "best_steps": found if points else None,
        "best_s": found * job.step_s if points else None,
        **formulas,
        "searched": [
            {"steps": steps, "interval_s": steps * job.step_s, "goodput": 1 - value} for steps, value in points
        ],
    }


def _sources(scenario: Scenario) -> list[str]:
    """Where rates come from, and which defaults are assumed."""
    failures = failures_of(scenario)
    own = [f"causes of the scenario{': ' + failures.source if failures.source else ''}"] if failures.causes else []
    rates = [_rates(parts.record) for parts in recorded_parts(scenario)]
    checkpoint = failures.checkpoint
    given = {
        "detection": "detection" in failures.model_fields_set,
        "restart": "restart" in failures.model_fields_set,
        "write_per_node": "write_per_node" in checkpoint.model_fields_set,
        "copy_bandwidth": "copy_bandwidth" in checkpoint.model_fields_set or not checkpoint.asynchronous,
    }
    return [*rates, *own, *(f"{key} assumed, {ASSUMED[key]}" for key, known in given.items() if not known)]


def _rates(record: FailureRecord) -> str:
    checked = "" if record.checked else "; quoted, not compared with its text: an assumption"
    return f"rates: {record.name} ({record.source}{checked})" if record.causes else "rates: none published"


def _warnings(scenario: Scenario) -> list[str]:
    return [
        f"rates of {', '.join(parts.record.kinds)} stand in for {gpu}, of which no record is known; "
        "failures.causes says better"
        for parts in recorded_parts(scenario)
        for gpu in parts.kinds
        if parts.record.causes and gpu not in parts.record.kinds
    ]
