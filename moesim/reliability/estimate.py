"""Goodput in closed form, for screens over thousands of layouts: exact where nobody waits for repairs."""

import math

from moesim.engine.job import Job
from moesim.reliability.interval import daly_seconds


def expected_share(job: Job) -> float:
    """Expected share of the time that is kept work, when failures have no memory and never lack a spare.

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
