"""Days of training: every second is in one account, failures cost what they must, and are those of the job's GPUs."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.engine.job import FailureTimes, Job, JobCause, Ledger, draw_failures, run_job
from moesim.reliability import Step, goodput_of_step
from moesim.reliability.answers import best_interval
from moesim.reliability.job import (
    daly_seconds,
    daly_steps,
    expected_share,
    job_causes,
    num_nodes,
    recorded_parts,
    young_seconds,
)
from moesim.scenario import Scenario, load_scenario
from moesim.scenario.failures import FAILURE_RECORDS
from moesim.seeding import stream
from moesim.shipped import resolve

DAY = 86400.0
WAITS = ("lost_s", "detection_s", "restart_s", "repair_s")


def job(**changes: Any) -> Job:
    """Thirty days, a failure every three hours that breaks a node."""
    values: dict[str, Any] = {
        "step_s": 10.0,
        "interval_steps": 60,
        "horizon_s": 30 * DAY,
        "causes": (JobCause(name="GPU", per_second=1 / 10_800, broken=True),),
        "blocking_s": 20.0,
        "detection_s": 600.0,
        "restart_s": 300.0,
        "load_s": 15.0,
    }
    return Job(**(values | changes))


def ran(job: Job, seed: int = 0) -> Ledger:
    return run_job(job, draw_failures(job, stream(seed, "failures")))


def at(*seconds: float) -> FailureTimes:
    return FailureTimes(at_F=np.array(seconds), cause_F=np.zeros(len(seconds), dtype=np.int64))


def waited(ledger: Ledger) -> float:
    return sum(sum(getattr(ledger, name).values()) for name in WAITS)


def everything(ledger: Ledger) -> float:
    return ledger.useful_s + ledger.slowed_s + ledger.checkpoint_s + waited(ledger)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 3_000),
    every=st.floats(2_000, 1e6),
    blocking=st.sampled_from([0.0, 0.3, 60.0]),
    write=st.sampled_from([0.0, 9.0]),
    spares=st.sampled_from([None, 0, 3]),
    shrinks=st.booleans(),
    speeds=st.sampled_from([((0.0, 1.0),), ((0.0, 1.25),), ((0.0, 1.0), (1e5, 1.5), (4e5, 1.1))]),
)
def test_every_second_is_in_one_account(seed, steps, every, blocking, write, spares, shrinks, speeds) -> None:
    causes = (JobCause(name="a", per_second=1 / every, broken=True), JobCause(name="b", per_second=1e-5, broken=False))
    what = job(
        interval_steps=steps, causes=causes, blocking_s=blocking, write_s=write, spares=spares,
        repair_s=20_000.0, shrinks=shrinks, units=8, speeds=speeds,
    )  # fmt: skip
    ledger = ran(what, seed)
    assert everything(ledger) == pytest.approx(what.horizon_s, abs=0.5)
    assert min(ledger.useful_s, ledger.slowed_s, ledger.checkpoint_s) >= -1e-6
    assert all(seconds >= 0 for name in WAITS for seconds in getattr(ledger, name).values())
    # the pauses of finished checkpoints, and at most one begun for each failure, speed and at the end
    begun = sum(ledger.failures.values()) + len(speeds) + 1
    assert -1e-3 <= ledger.checkpoint_s - ledger.checkpoints * blocking <= begun * blocking + 1e-3
    kept = [useful for _, useful in ledger.kept]
    assert kept == sorted(kept)


@pytest.mark.parametrize("blocking", [0.0, 7.0, 20.0])
def test_without_failures_only_checkpoints_cost(blocking: float) -> None:
    quiet = job(causes=(), blocking_s=blocking)
    ledger = ran(quiet)
    cycles, rest = divmod(quiet.horizon_s, quiet.interval_s + blocking)
    assert ledger.useful_s == pytest.approx(cycles * quiet.interval_s + min(rest, quiet.interval_s), abs=1e-3)
    assert ledger.useful_s + ledger.checkpoint_s == pytest.approx(quiet.horizon_s, abs=1e-6)
    assert waited(ledger) == 0
    assert set(ledger.kept) == {(0.0, 0.0), (quiet.horizon_s, ledger.useful_s)}  # one straight line to the end


def test_one_failure_by_hand() -> None:
    """Intervals of 600 s with pauses of 20 s: at 1000 s 380 s of the second interval are lost."""
    ledger = run_job(job(horizon_s=5_000.0), at(1_000.0))
    assert ledger.lost_s == {"GPU": pytest.approx(380.0)}
    assert ledger.detection_s == {"GPU": pytest.approx(600.0)}
    assert ledger.restart_s == {"GPU": pytest.approx(315.0)}
    # 5000 - 1000 - 915 = 3085 s: four whole intervals with pauses, and 605 s of a fifth of which 5 are a pause
    assert ledger.checkpoint_s == pytest.approx(20 + 4 * 20 + 5)
    assert ledger.useful_s == pytest.approx(600 + 4 * 600 + 600)


def test_a_failure_while_it_recovers_begins_the_recovery_again() -> None:
    ledger = run_job(job(horizon_s=5_000.0), at(1_000.0, 1_500.0))
    assert ledger.detection_s == {"GPU": pytest.approx(500.0 + 600.0)}
    assert ledger.lost_s == {"GPU": pytest.approx(380.0)}


def test_what_is_not_written_yet_is_lost_too() -> None:
    """Standing 20 s, readable 300 s later: at 800 s the work of the first interval is not."""
    ledger = run_job(job(horizon_s=5_000.0, write_s=300.0), at(800.0))
    assert ledger.lost_s == {"GPU": pytest.approx(600.0 + 180.0)}
    assert run_job(job(horizon_s=5_000.0, write_s=100.0), at(800.0)).lost_s == {"GPU": pytest.approx(180.0)}


def test_without_a_spare_it_waits_or_goes_on_smaller() -> None:
    waits = job(horizon_s=50_000.0, spares=0, repair_s=20_000.0)
    ledger = run_job(waits, at(1_000.0))
    assert ledger.repair_s == {"GPU": pytest.approx(20_000.0 - 600.0)}
    smaller = run_job(replace(waits, shrinks=True, units=4), at(1_000.0))
    assert sum(smaller.repair_s.values()) == 0
    # three of four units work until the node is back at 21,000 s and the job stops behind its next checkpoint
    slowed = (4 / 3 - 1) * 3 / 4 * (21_000.0 - 1_915.0)
    assert slowed * 0.95 < smaller.slowed_s < slowed * 1.1
    assert smaller.restart_s["nodes rejoin"] == pytest.approx(315.0)
    assert smaller.useful_s > ledger.useful_s
    with_spare = run_job(replace(waits, spares=1), at(1_000.0))
    assert with_spare.useful_s > smaller.useful_s


def test_more_failures_never_raise_goodput() -> None:
    def goodput(every: float) -> float:
        what = job(causes=(JobCause(name="GPU", per_second=1 / every, broken=True),))
        return float(np.mean([ran(what, seed).useful_s for seed in range(8)]))

    values = [goodput(every) for every in (1e9, 80_000.0, 20_000.0, 5_000.0, 2_000.0)]
    assert values == sorted(values, reverse=True)


def test_more_spares_and_quicker_repair_never_lower_goodput() -> None:
    def goodput(**changes: Any) -> float:
        values: dict[str, Any] = {"repair_s": 40_000.0, "spares": 0}
        return float(np.mean([ran(job(**values | changes), seed).useful_s for seed in range(4)]))

    by_spares = [goodput(spares=spares) for spares in (0, 1, 2, 4, 8, None)]
    assert by_spares == sorted(by_spares) and by_spares[0] < by_spares[-1]
    by_repair = [goodput(repair_s=seconds) for seconds in (80_000.0, 20_000.0, 5_000.0, 1.0)]
    assert by_repair == sorted(by_repair)
    assert goodput(shrinks=True, units=8) > goodput()  # going on smaller beats standing still


def test_writing_beside_work_beats_standing_for_it() -> None:
    stands, beside = job(blocking_s=120.0), job(blocking_s=5.0, write_s=120.0)
    assert all(ran(beside, seed).useful_s > ran(stands, seed).useful_s for seed in range(4))


@pytest.mark.parametrize("key", ["detection_s", "restart_s", "load_s", "blocking_s"])
def test_longer_pauses_never_raise_goodput(key: str) -> None:
    values = [np.mean([ran(job(**{key: each}), seed).useful_s for seed in range(4)]) for each in (0.0, 200.0, 1_500.0)]
    assert values == sorted(values, reverse=True)


def test_the_same_seed_gives_the_same_ledger() -> None:
    assert plain(ran(job(), 3)) == plain(ran(job(), 3))
    assert plain(ran(job(), 3)) != plain(ran(job(), 4))


def plain(ledger: Ledger) -> dict[str, Any]:
    return {name: dict(value) if hasattr(value, "items") else value for name, value in vars(ledger).items()}


def test_failures_come_at_their_rate_and_by_cause() -> None:
    causes = (JobCause(name="a", per_second=3e-4, broken=True), JobCause(name="b", per_second=1e-4, broken=False))
    what = job(horizon_s=365 * DAY, causes=causes)
    drawn = draw_failures(what, stream(0, "failures"))
    expected = 4e-4 * what.horizon_s
    assert abs(len(drawn.at_F) - expected) < 5 * expected**0.5
    assert np.mean(drawn.cause_F == 0) == pytest.approx(0.75, abs=0.03)


def test_the_best_interval_meets_the_formulas_in_the_simple_case() -> None:
    """Failures without a memory, no time to recover: what Young and Daly assume."""
    known = {"cost_s": 100.0, "between_failures_s": 11_000.0}
    causes = (JobCause(name="GPU", per_second=1 / 11_000.0, broken=False),)
    simple = job(step_s=1.0, blocking_s=100.0, detection_s=0.0, restart_s=0.0, load_s=0.0, causes=causes,
                 horizon_s=2_000 * 11_000.0)  # fmt: skip
    steps, _ = best_interval(simple, 0, least=1)
    assert steps == pytest.approx(young_seconds(**known), rel=0.08)
    assert steps == pytest.approx(daly_seconds(**known), rel=0.04)


@pytest.mark.parametrize("cost", [0.03, 0.1, 0.3])
def test_dalys_interval_is_the_best_of_his_model(cost: float) -> None:
    """A checkpoint of d behind work of t costs M (exp((t + d) / M) - 1) seconds: here with M = 1, per second of t."""
    work = np.linspace(0.01, 3.0, 10_000)
    best = work[(np.expm1(work + cost) / work).argmin()]
    assert daly_seconds(cost_s=cost, between_failures_s=1.0) == pytest.approx(best, rel=0.004)


def test_dearer_checkpoints_and_rarer_failures_make_the_best_interval_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.reliability.answers.SEARCH_FAILURES", 400)  # the difference is twofold

    def best(**changes: Any) -> int:
        return best_interval(job(step_s=1.0, horizon_s=100 * DAY, **changes), 0, least=1)[0]

    rare = (JobCause(name="GPU", per_second=1 / 100_000, broken=False),)
    often = best()
    assert often < best(blocking_s=80.0)
    assert often < best(causes=rare)


@pytest.mark.parametrize(
    ("days", "seeds", "search", "seconds"), [(60, 4, 1_000, 2), pytest.param(365, 20, None, 10, marks=pytest.mark.slow)]
)
def test_a_year_on_sixteen_thousand_gpus_is_quick(
    monkeypatch: pytest.MonkeyPatch, days, seeds, search, seconds
) -> None:
    """CPU seconds of the whole answer, search for an interval and twenty draws, of which ten are promised."""
    if search is not None:
        monkeypatch.setattr("moesim.reliability.answers.SEARCH_FAILURES", search)
    scenario = load_scenario(resolve("llama3-405b-16384xh100", "scenario"))
    started = time.process_time()
    found = goodput_of_step(scenario, Step(seconds=15.0, compute_s=10.0, degraded_s={}), days=days, seeds=seeds)
    assert time.process_time() - started < seconds
    assert found.result["failures"] == pytest.approx(419 / 54 * days, rel=0.05)


KINDS = [record.kinds[0] for record in FAILURE_RECORDS.values() if record.kinds and record.causes][:2]


def on_gpus(*gpus: str) -> Scenario:
    pools = [{"name": f"p{number}", "gpu": gpu, "nodes": 4 // len(gpus)} for number, gpu in enumerate(gpus)]
    mesh = {"data": 32, "expert": 8} | ({"across_pools": "data"} if len(gpus) > 1 else {})
    changes = {"cluster": {"pools": pools}, "parallelism": mesh, "workload.global_batch": 64}
    return moesim.load_scenario("uniform-dropless", changes)


def rates(scenario: Scenario) -> dict[str, float]:
    return {cause.name: cause.per_second for cause in job_causes(scenario)}


def test_two_equal_pools_fail_as_one() -> None:
    assert job_causes(on_gpus("h100", "h100")) == job_causes(on_gpus("h100"))
    assert num_nodes(on_gpus("h100", "h100")) == 4


def test_every_pool_fails_as_its_own_kind() -> None:
    first, second = KINDS
    both = on_gpus(first, second)
    assert [parts.kinds for parts in recorded_parts(both)] == [(first,), (second,)]
    alone, other, mixed = rates(on_gpus(first)), rates(on_gpus(second)), rates(both)
    for name in alone | other:
        assert mixed[name] == pytest.approx((alone.get(name, 0.0) + other.get(name, 0.0)) / 2)


JOB = Job(
    step_s=10.0,
    interval_steps=60,
    horizon_s=200 * 86400.0,
    causes=(JobCause(name="GPU", per_second=1 / 10_800, broken=True),),
    blocking_s=20.0,
    detection_s=600.0,
    restart_s=300.0,
    load_s=15.0,
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"interval_steps": 300}, {"blocking_s": 2.0, "write_s": 200.0}, {"restart_s": 4_000.0},
     {"speeds": ((0.0, 1.3),)}, {"causes": ()}],
    ids=str,
)  # fmt: skip
def test_the_closed_form_meets_the_simulation(changes: dict) -> None:
    job = replace(JOB, **changes)
    shares = [run_job(job, draw_failures(job, stream(n, "failures"))).useful_s / job.horizon_s for n in range(4)]
    assert expected_share(job) == pytest.approx(float(np.mean(shares)), rel=0.01)


def test_dalys_steps_are_the_top_of_the_closed_form() -> None:
    best = max(range(1, 400), key=lambda steps: expected_share(replace(JOB, interval_steps=steps)))
    assert daly_steps(JOB, least=1) == pytest.approx(best, rel=0.03)
    assert daly_steps(replace(JOB, blocking_s=0.0), least=4) == 4
