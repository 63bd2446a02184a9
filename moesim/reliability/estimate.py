"""Goodput in closed form, for screens over thousands of layouts, and the best time between checkpoints: by Young's and
Daly's formulas, and by simulation.

With a cost of d seconds per checkpoint and M seconds between failures, what a checkpoint costs per second of work is
d / t and what a failure throws away about t / 2M. Young (CACM 17(9), 1974) balances the two; Daly (FGCS 22(3), 2006)
adds higher orders.
"""

import math
from collections.abc import Callable

import numpy as np

from moesim.engine.job import Job

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
