"""From what happened on the clock to answers: latencies, throughput, price, memory, and the largest load."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InfeasibleError, UserError
from moesim.serving.clock import Served, run_clock
from moesim.serving.costs import StepCosts
from moesim.serving.memory import ServingMemoryReport, layout_of, memory_of
from moesim.serving.requests import Requests, draw_requests
from moesim.serving.schema import ServingScenario, Slo

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MOST_POINTS = 2_000  # of the timeline
MOST_MOMENTS = 200  # of the pages of every group
LEAST_ANSWERS = 5.0  # times as long as an answer takes must requests come, for a steady load
NARROW = 0.02  # of the largest load, when the search ends


class Deployment:
    """A scenario with its tables of costs and its memory, which many loads can be served on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.scenario = scenario
        self.memory: ServingMemoryReport = memory_of(scenario)
        self.costs = StepCosts(scenario)

    def requests(self, seed: int) -> Requests:
        """The requests of one seed. Raises InfeasibleError where one of them can never be held."""
        load = self.scenario.workload
        requests = draw_requests(load, seed=seed)
        longest = int((requests.input_N + requests.output_N).max())
        speculation = self.scenario.engine.speculation
        most = longest + (len(speculation.acceptance) + 1 if speculation else 1)
        if layout_of(self.scenario).pages(most) > self.memory.pages:
            raise InfeasibleError(
                f"memory: a request of {longest:,} tokens does not fit into the {self.memory.kv_tokens:,} tokens of "
                "keys and values that a rank holds; use more ranks, workload.weights: int4, kv: fp8, or shorter ones"
            )
        return requests

    def serve(self, requests: Requests) -> Served:
        """Answer them all."""
        return run_clock(self.costs, requests, memory=self.memory)


def serve(scenario: ServingScenario) -> dict[str, Any]:
    """The answers for the scenario's own seed, as plain numbers and lists. Raises UserError and InfeasibleError."""
    deployment = Deployment(scenario)
    requests = deployment.requests(scenario.seed)
    return _result(deployment, requests, deployment.serve(requests))


def serve_seeds(scenario: ServingScenario, seeds: int) -> dict[str, Any]:
    """As `serve`, with `ranges`: the least and most of the headline numbers over seeds seed, seed + 1 ..."""
    deployment = Deployment(scenario)
    results = []
    for seed in range(scenario.seed, scenario.seed + seeds):
        requests = deployment.requests(seed)
        results.append(_result(deployment, requests, deployment.serve(requests)))
    first = results[0]
    ranges = {
        f"{latency}.{share}": [
            min(each[latency][share] for each in results),
            max(each[latency][share] for each in results),
        ]
        for latency in ("ttft_s", "tpot_s", "latency_s")
        for share in SHARES
    }
    for key in ("output_tokens_per_second", "usd_per_million_output_tokens"):
        ranges[key] = [min(each[key] for each in results), max(each[key] for each in results)]
    return first | {"seeds": seeds, "ranges": ranges}


def largest_load(scenario: ServingScenario) -> dict[str, Any]:
    """The most requests per second of which `workload.slo.share` meet the limits, and the answers at that load.

    Doubling, then bisection to 2 %, over how fast the same requests come. Raises UserError without limits and
    InfeasibleError where they are missed by requests that come alone.
    """
    slo = scenario.workload.slo
    if slo.ttft is None and slo.tpot is None:
        raise UserError(
            "workload.slo: a largest load needs a limit; set workload.slo.ttft or workload.slo.tpot (seconds)"
        )
    deployment = Deployment(scenario)
    requests = deployment.requests(scenario.seed)
    rate = (len(requests) - 1) / max(float(requests.arrival_N[-1]), 1e-9)

    def meets(factor: float) -> bool:
        at = requests.faster(factor)
        return _good(deployment.serve(at), at, slo) >= slo.share

    low = 1.0
    while not meets(low):
        low /= 4.0
        if low < 1e-4:
            raise InfeasibleError(
                "workload.slo: missed even by requests that come alone; loosen workload.slo or use more ranks"
            )
    high = 2.0 * low
    while meets(high) and high < 1e6:
        low, high = high, 2.0 * high
    while high > low * (1.0 + NARROW):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    at = requests.faster(low)
    return _result(deployment, at, deployment.serve(at)) | {"largest_requests_per_second": rate * low}


def _good(served: Served, requests: Requests, slo: Slo) -> float:
    """The share of requests that met the limits."""
    good_N = np.ones(len(requests), dtype=bool)
    if slo.ttft is not None:
        good_N &= served.first_N - requests.arrival_N <= slo.ttft
    if slo.tpot is not None:
        good_N &= _tpot_N(served, requests) <= slo.tpot
    return float(good_N.mean())


def _tpot_N(served: Served, requests: Requests) -> NDArray[np.float64]:
    return np.asarray((served.done_N - served.first_N) / np.maximum(requests.output_N - 1, 1))


def _result(deployment: Deployment, requests: Requests, served: Served) -> dict[str, Any]:
    scenario, costs = deployment.scenario, deployment.costs
    gpus = scenario.parallelism.world_size
    seconds = float(served.done_N.max())
    output, prompt = int(requests.output_N.sum()), int(requests.input_N.sum())
    usd = scenario.cluster.usd_per_hour * seconds / 3600.0
    good = _good(served, requests, scenario.workload.slo)
    several_N = requests.output_N > 1
    steps = np.array(served.step_seconds)
    busy = float(steps.sum()) or 1.0
    mean_tokens = float(np.average(served.step_tokens, weights=steps))
    mean_rows = float(np.average(served.step_rows, weights=steps))
    answered, rows = served.count("answered"), served.count("rows")
    return {
        "name": scenario.name,
        "gpus": gpus,
        "requests": len(requests),
        "seconds": seconds,
        "requests_per_second": len(requests) / seconds,
        "good_share": good,
        "good_requests_per_second": good * len(requests) / seconds,
        "input_tokens": prompt,
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "tokens_per_second_per_gpu": (output + prompt) / seconds / gpus,
        "usd_per_million_output_tokens": usd / output * 1e6,
        "usd_per_million_tokens": usd / (output + prompt) * 1e6,
        "ttft_s": _shares(served.first_N - requests.arrival_N),
        "tpot_s": _shares(_tpot_N(served, requests)[several_N] if several_N.any() else np.zeros(1)),
        "latency_s": _shares(served.done_N - requests.arrival_N),
        "step_s": _shares(steps),
        "steps": len(steps),
        "busy_share": min(1.0, busy / (seconds * (1 if costs.together else scenario.parallelism.data))),
        "tokens_per_step": mean_tokens,
        "generated_per_step": float(np.average(served.step_generated, weights=steps)),
        "time_s": dict(served.parts),
        "rank_rows_imbalance": costs.experts.at(mean_tokens, mean_rows).imbalance
        if costs.experts is not None and costs.together
        else None,
        "dropped_share": _dropped_share(costs, served),
        "prefix_hit_share": served.count("found_tokens") / max(1, served.count("prompt_tokens")),
        "tokens_per_request_step": served.count("given") / answered if answered else 1.0,
        "padding_share": served.count("padding") / max(1, rows),
        "preempted": served.count("preempted"),
        "swapped": served.count("swapped"),
        "memory": asdict(deployment.memory),
        "kv_peak_share": max(served.step_pages)
        / (deployment.memory.pages * len(served.batches) / (1 if costs.together else scenario.parallelism.data)),
        "timeline": _timeline(served),
        "kv_share_over_time": _held_over_time(served, scenario.parallelism.data, deployment.memory.pages),
        "warnings": _warnings(requests, served),
        "kernels_rest_on": list(costs.rests_on),
        "routing_rests_on": scenario.routing.kind if scenario.model.experts else "no experts",
    }  # fmt: skip


def _warnings(requests: Requests, served: Served) -> list[str]:
    """What a reader must know before trusting the numbers."""
    span, answer = float(requests.arrival_N[-1]), float((served.done_N - requests.arrival_N).mean())
    if span >= LEAST_ANSWERS * answer:
        return []
    return [
        f"requests come for {span:.3g} s and an answer takes {answer:.3g} s: no steady load is seen; raise "
        "workload.requests"
    ]


def _shares(values_N: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": float(values_N.mean())} | {
        name: float(np.quantile(values_N, share)) for name, share in SHARES.items()
    }


def _dropped_share(costs: StepCosts, served: Served) -> float:
    """Of all rows that experts were sent, over all steps."""
    if costs.experts is None or costs.scenario.engine.capacity_factor is None:
        return 0.0
    pairs = zip(served.step_tokens, served.step_rows, strict=True)
    shares = [costs.experts.at(tokens, generated).dropped for tokens, generated in pairs]
    return float(np.average(shares, weights=served.step_tokens))


def _held_over_time(served: Served, groups: int, pages: int) -> dict[str, Any]:
    """The share of its pages that every data group held at moments at equal distances: [moments, groups]."""
    room = pages * len(served.batches) / groups
    ends = np.array(served.step_end)
    moments = np.linspace(0.0, ends.max(), min(MOST_MOMENTS, len(ends)) + 1)[1:]
    share_MD = np.zeros((len(moments), groups))
    held_D, step = np.zeros(groups), 0
    order = np.argsort(ends, kind="stable")
    for moment, until in enumerate(np.searchsorted(ends[order], moments, side="right")):
        for place in order[step:until]:
            first, values_D = served.step_held[place]
            held_D[first : first + len(values_D)] = values_D
        step = int(until)
        share_MD[moment] = held_D / room
    return {"seconds": moments.tolist(), "share": np.round(share_MD, 4).tolist()}


def _timeline(served: Served) -> dict[str, list[float]]:
    """Every so many steps: when it ended, its length, tokens, waiting requests and pages."""
    every = max(1, -(-len(served.step_end) // MOST_POINTS))
    columns = ("end", "seconds", "tokens", "generated", "waiting", "pages")
    return {name: [float(value) for value in getattr(served, f"step_{name}")[::every]] for name in columns}
