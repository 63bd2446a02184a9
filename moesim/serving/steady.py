"""Whether a load is carried: which requests meet their limits, and whether answers take longer and longer."""

import math

import numpy as np
from numpy.typing import NDArray

from moesim.serving.clock import Served
from moesim.serving.fleet import Deployment
from moesim.serving.requests import Requests
from moesim.serving.schema import Slo, TraceArrivals

LEAST_ANSWERS = 5.0  # times as long as an answer takes must requests come, or a reader is warned; in a search for a
SEARCHED_ANSWERS = 8.0  # largest load so many (of 5 it comes out a tenth too large where lengths are log-normal),
LEAST_WAITS = 5.0  # and times as long as a first token may take, for a queue to grow to that
NARROW = 0.02  # of the largest load, when the search ends; and seconds of answers that may grow in a second of service
LONGER = 2  # times that requests which still wait longer and longer are doubled, before it is called an overload,
CLEAR = 0.25  # which it is without that where so many seconds are added in a second
MOST_REQUESTS = 100_000  # of one draw that the search for a largest load makes longer: a minute of CPU


def served_steadily(deployment: Deployment, requests: Requests, *, seed: int, factor: float) -> tuple[Requests, Served]:
    """Serve a draw `factor` times as fast, or a longer draw of its seed; the draw, and what happened.

    Where requests have all come before an answer is over, or before a queue can have grown to the limit of a first
    token, any load would do. A load that meets its limits then is tried again with more of them, until they come
    for `SEARCHED_ANSWERS` times as long as an answer takes and `LEAST_WAITS` times as long as a first token may, and
    twice as many up to `LONGER` times while answers still take longer and longer. A log has no more than its own.
    """
    slo, first, longer = deployment.scenario.workload.slo, len(requests), 0
    is_a_log = isinstance(deployment.scenario.workload.arrivals, TraceArrivals)
    while True:
        at = requests.faster(factor)
        served = deployment.serve(at)
        if met(served, at, slo).mean() < slo.share or is_a_log:
            return requests, served
        grows, number = growth(served, at), _steady_number(deployment, at, served)
        if grows > NARROW and (number <= len(at) or len(at) > first):
            longer = longer + 1 if grows < CLEAR else LONGER + 1
            number = 2 * len(at)  # by their number: answers that wait take longer the more there are
        number = min(number, max(len(at), MOST_REQUESTS))
        if number <= len(at) or longer > LONGER:
            return requests, served
        requests = deployment.requests(seed, number=number)


def _steady_number(deployment: Deployment, requests: Requests, served: Served) -> int:
    """How many requests must come at this pace to show a steady load; of a log as many as it has."""
    span, answer = span_and_answer(requests, served)
    least = max(SEARCHED_ANSWERS * answer, LEAST_WAITS * (deployment.scenario.workload.slo.ttft or 0.0))
    if span >= least:
        return len(requests)
    return max(len(requests), min(MOST_REQUESTS, math.ceil(1.1 * least * requests.per_second)))


def span_and_answer(requests: Requests, served: Served) -> tuple[float, float]:
    """Seconds in which requests come, and that one is under way in the mean."""
    return float(requests.arrival_N[-1]), float((served.done_N - requests.arrival_N).mean())


def growth(served: Served, requests: Requests) -> float:
    """Seconds by which answers of the mean length take longer for each second that requests come; 0: what comes goes.

    From the second quarter of the requests, which found no empty system, to the last, less two standard errors of that.
    Under a lasting overload it is the share by which more comes than goes.
    """
    quarter = len(requests) // 4
    if quarter == 0:
        return 0.0
    ttft_N = served.first_N - requests.arrival_N
    taken_N = ttft_N + tpot(served, requests) * float(requests.output_N.mean() - 1)
    early, late = slice(quarter, 2 * quarter), slice(len(requests) - quarter, None)
    between = float(requests.arrival_N[late].mean() - requests.arrival_N[early].mean())
    error = 2.0 * float(np.sqrt((taken_N[late].var() + taken_N[early].var()) / quarter))
    return (float(taken_N[late].mean() - taken_N[early].mean()) - error) / max(between, 1e-9)


def carried_share(served: Served, requests: Requests, slo: Slo) -> float:
    """The share of requests that met the limits, or of their second half where that is less; 0 under an overload."""
    good_N = met(served, requests, slo)
    if growth(served, requests) > NARROW:
        return 0.0
    return float(min(good_N.mean(), good_N[len(good_N) // 2 :].mean()))


def met(served: Served, requests: Requests, slo: Slo) -> NDArray[np.bool_]:
    """Which requests [N] met the limits."""
    good_N = np.ones(len(requests), dtype=bool)
    if slo.ttft is not None:
        good_N &= served.first_N - requests.arrival_N <= slo.ttft
    if slo.tpot is not None:
        good_N &= tpot(served, requests) <= slo.tpot
    return good_N


def tpot(served: Served, requests: Requests) -> NDArray[np.float64]:
    """Seconds [N] per token of each request behind its first."""
    return np.asarray((served.done_N - served.first_N) / np.maximum(requests.output_N - 1, 1))
