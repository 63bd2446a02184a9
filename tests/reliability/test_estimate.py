"""The closed form of the screen is what the simulation gives in the mean."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine.job import Job, JobCause, draw_failures, run_job
from moesim.reliability.job import daly_steps, expected_share
from moesim.seeding import stream

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
    shares = [run_job(job, draw_failures(job, stream(n, "failures"))).useful_s / job.horizon_s for n in range(6)]
    assert expected_share(job) == pytest.approx(float(np.mean(shares)), rel=0.01)


def test_dalys_steps_are_the_top_of_the_closed_form() -> None:
    best = max(range(1, 400), key=lambda steps: expected_share(replace(JOB, interval_steps=steps)))
    assert daly_steps(JOB, least=1) == pytest.approx(best, rel=0.03)
    assert daly_steps(replace(JOB, blocking_s=0.0), least=4) == 4
