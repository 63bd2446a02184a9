"""From what happened on the clock to answers: latencies, throughput, price, memory, and the largest load."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InfeasibleError, UserError
from moesim.serving.clock import Served, run_clock
from moesim.serving.costs import StepCosts
from moesim.serving.fleet import Pool, fleet_gpus, pools_of, run_fleet
from moesim.serving.memory import ServingMemoryReport, layout_of
from moesim.serving.pool_answers import SHARES, pool_answers, shares_of
from moesim.serving.requests import Requests, draw_requests
from moesim.serving.schema import ServingScenario, Slo, TraceArrivals

LEAST_ANSWERS = 5.0  # times as long as an answer takes must requests come, for a steady load
RANGED = (  # headline numbers whose least and most over seeds are given, beside the latencies, in the order of a page
    "good_share", "good_requests_per_second", "requests_per_second", "output_tokens_per_second",
    "tokens_per_second_per_gpu", "tokens_per_second_per_user", "usd_per_million_output_tokens",
    "usd_per_million_tokens", "usd_per_million_input_tokens", "usd_per_million_new_input_tokens",
    "usd_per_million_generated_tokens",
)  # fmt: skip
LATENCIES = ("ttft_s", "tpot_s", "latency_s")
NARROW = 0.02  # of the largest load, when the search ends
MOST_REQUESTS = 100_000  # of one draw that the search for a largest load makes longer: a minute of CPU


class Deployment:
    """A scenario with its tables of costs and its memory, which many loads can be served on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.scenario = scenario
        self.pools: tuple[Pool, ...] = pools_of(scenario)
        self.memory: ServingMemoryReport = self.pools[-1].memory
        self.costs: StepCosts = self.pools[-1].costs

    def requests(self, seed: int, *, number: int | None = None) -> Requests:
        """The requests of one seed, or so many. Raises InfeasibleError where one of them can never be held."""
        load = self.scenario.workload
        load = load if number is None else load.model_copy(update={"requests": number})
        requests = draw_requests(load, seed=seed)
        for pool in self.pools:
            _check_longest(pool, requests)
        return requests

    def serve(self, requests: Requests) -> Served:
        """Answer them all."""
        if len(self.pools) == 1 and self.pools[0].replicas == 1:
            return run_clock(self.costs, requests, memory=self.memory)
        return run_fleet(self.pools, requests)


def _check_longest(pool: Pool, requests: Requests) -> None:
    answer_N = 1 if pool.name == "prefill" else requests.output_N
    longest = int((requests.input_N + answer_N).max())
    speculation = pool.scenario.engine.speculation
    most = longest + (len(speculation.acceptance) + 1 if speculation else 1)
    if layout_of(pool.scenario).pages(most) > pool.memory.pages:
        raise InfeasibleError(
            f"memory: a request of {longest:,} tokens does not fit into the {pool.memory.kv_tokens:,} tokens of "
            "keys and values that a rank holds; use more ranks, workload.weights: int4, kv: fp8, or shorter ones"
        )


def serve(scenario: ServingScenario) -> dict[str, Any]:
    """The answers for the scenario's own seed, as plain numbers and lists. Raises UserError and InfeasibleError."""
    deployment = Deployment(scenario)
    requests = deployment.requests(scenario.seed)
    return _result(deployment, requests, deployment.serve(requests))


def answers_at(deployment: Deployment, requests: Requests) -> dict[str, Any]:
    """The answers of a deployment for requests of its own, such as a share of its scenario's."""
    return _result(deployment, requests, deployment.serve(requests))


def serve_seeds(scenario: ServingScenario, seeds: int) -> dict[str, Any]:
    """As `serve`, with `ranges`: the least and most of the headline numbers over seeds seed, seed + 1 ..."""
    deployment = Deployment(scenario)
    return _over_seeds(deployment, _draws(deployment, seeds))


def _draws(deployment: Deployment, seeds: int) -> list[Requests]:
    first = deployment.scenario.seed
    return [deployment.requests(seed) for seed in range(first, first + seeds)]


def _over_seeds(deployment: Deployment, draws: Sequence[Requests]) -> dict[str, Any]:
    """The answers for the first of several draws, and the ranges over all."""
    results = [_result(deployment, requests, deployment.serve(requests)) for requests in draws]
    ranges = {
        f"{latency}.{share}": [
            min(each[latency][share] for each in results),
            max(each[latency][share] for each in results),
        ]
        for latency in LATENCIES
        for share in SHARES
    }
    for key in RANGED:
        known = [each[key] for each in results if each[key] is not None]  # answers of one token have no time per token
        if known:
            ranges[key] = [min(known), max(known)]
    return results[0] | {"seeds": len(draws), "ranges": ranges}


def largest_load(scenario: ServingScenario, *, seeds: int = 1, worst: bool = False) -> dict[str, Any]:
    """The most requests per second of which `workload.slo.share` meet the limits, and the answers at that load.

    Doubling, then bisection to 2 %, over how fast the requests come. Where they would all have come before an answer is
    over no queue could form and any load would do: a load that is met then is tried again with more of them, until they
    come for `LEAST_ANSWERS` times as long as an answer takes (a log has no more than its own). With several seeds the
    mean over their draws must meet the limits, or with `worst` every draw; the rate is the mean of theirs, and `ranges`
    are as in `serve_seeds`. Raises UserError without limits, InfeasibleError where they are missed by requests that
    come alone.
    """
    slo = scenario.workload.slo
    if slo.ttft is None and slo.tpot is None:
        raise UserError(
            "workload.slo: a largest load needs a limit; set workload.slo.ttft or workload.slo.tpot (seconds)"
        )
    deployment = Deployment(scenario)
    draws = _draws(deployment, seeds)

    def meets(factor: float) -> bool:
        shares = []
        for seed, requests in enumerate(draws, start=scenario.seed):
            at = requests.faster(factor)
            served = deployment.serve(at)
            while _good(served, at, slo) >= slo.share and (number := _steady_number(deployment, at, served)) > len(at):
                draws[seed - scenario.seed] = deployment.requests(seed, number=number)
                at = draws[seed - scenario.seed].faster(factor)
                served = deployment.serve(at)
            shares.append(_good(served, at, slo))
            if worst and shares[-1] < slo.share:
                return False
        return float(np.mean(shares)) >= slo.share

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
    at_low = [requests.faster(low) for requests in draws]
    rate = float(np.mean([requests.per_second for requests in at_low]))
    result = answers_at(deployment, at_low[0]) if seeds == 1 else _over_seeds(deployment, at_low)
    return result | {"largest_requests_per_second": rate}


def _steady_number(deployment: Deployment, requests: Requests, served: Served) -> int:
    """How many requests must come at this pace to show a steady load; of a log as many as it has."""
    if isinstance(deployment.scenario.workload.arrivals, TraceArrivals):
        return len(requests)
    span, answer = _span_and_answer(requests, served)
    wanted = min(MOST_REQUESTS, math.ceil(1.1 * LEAST_ANSWERS * answer * requests.per_second))
    return wanted if span < LEAST_ANSWERS * answer else len(requests)


def _span_and_answer(requests: Requests, served: Served) -> tuple[float, float]:
    """Seconds in which requests come, and that one is under way in the mean."""
    return float(requests.arrival_N[-1]), float((served.done_N - requests.arrival_N).mean())


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
    gpus = fleet_gpus(scenario)
    seconds = float(served.done_N.max())
    output, prompt = int(requests.output_N.sum()), int(requests.input_N.sum())
    usd = scenario.cluster.usd_per_hour * seconds / 3600.0
    good = _good(served, requests, scenario.workload.slo)
    several_N = requests.output_N > 1
    tpot_N = _tpot_N(served, requests)[several_N] if several_N.any() else np.zeros(1)
    pools = [
        pool_answers(pool, each, seconds)
        for pool, each in zip(deployment.pools, (*served.earlier, served), strict=True)
    ]
    last = {key: value for key, value in pools[-1].items() if key not in ("name", "replicas", "gpus")}
    last["time_s"] = {part: sum(pool["time_s"][part] for pool in pools) for part in last["time_s"]}
    last["kernels_rest_on"] = list(dict.fromkeys(source for pool in pools for source in pool["kernels_rest_on"]))
    answered, rows = served.count("answered"), served.count("rows")
    prompts = (served.earlier or (served,))[0]
    hit_share = prompts.count("found_tokens") / max(1, prompts.count("prompt_tokens"))
    cached = round(hit_share * prompt)  # never all: the last token of a prompt is computed
    return {
        "schema_version": 1,
        "kind": "serving",
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
        "output_tokens_per_second_per_gpu": output / seconds / gpus,
        "tokens_per_second_per_gpu": (output + prompt) / seconds / gpus,
        "tokens_per_second_per_user": 1.0 / float(tpot_N.mean()) if several_N.any() else None,
        "cached_input_tokens": cached,
        "usd_per_million_new_input_tokens": usd * _prompt_share(pools) / (prompt - cached) * 1e6,
        "usd_per_million_input_tokens": usd * _prompt_share(pools) / prompt * 1e6,
        "usd_per_million_generated_tokens": usd * (1.0 - _prompt_share(pools)) / output * 1e6,
        "usd_per_million_output_tokens": usd / output * 1e6,
        "usd_per_million_tokens": usd / (output + prompt) * 1e6,
        "ttft_s": shares_of(served.first_N - requests.arrival_N),
        "tpot_s": shares_of(tpot_N),
        "latency_s": shares_of(served.done_N - requests.arrival_N),
        "classes": _classes(requests, served),
        **last,
        "dropped_share": _dropped_share(costs, served),
        "prefix_hit_share": hit_share,
        "tokens_per_request_step": served.count("given") / answered if answered else 1.0,
        "padding_share": served.count("padding") / max(1, rows),
        "pools": pools,
        "transfer": _transfer(served),
        "warnings": _warnings(requests, served),
        "routing_rests_on": scenario.routing.kind if scenario.model.experts else "no experts",
    }  # fmt: skip


def _classes(requests: Requests, served: Served) -> list[dict[str, Any]]:
    """The latencies of every class, the most urgent first; none where all requests are alike."""
    if requests.class_N is None:
        return []
    tpot_N, found = _tpot_N(served, requests), []
    for number in np.unique(requests.class_N).tolist():
        of_N = requests.class_N == number
        several_N = of_N & (requests.output_N > 1)
        found.append(
            {
                "class": int(number),
                "requests": int(of_N.sum()),
                "ttft_s": shares_of((served.first_N - requests.arrival_N)[of_N]),
                "tpot_s": shares_of(tpot_N[several_N] if several_N.any() else np.zeros(1)),
                "latency_s": shares_of((served.done_N - requests.arrival_N)[of_N]),
            }
        )
    return found


def _prompt_share(pools: Sequence[Mapping[str, Any]]) -> float:
    """Of what the GPUs are paid for, the share of prompts: that of their own GPUs, else that of tokens in the steps."""
    if len(pools) > 1:
        return float(pools[0]["gpus"] / sum(pool["gpus"] for pool in pools))
    return float(pools[0]["prompt_time_share"])


def _transfer(served: Served) -> dict[str, Any] | None:
    """Keys and values between instances: tokens, bytes, seconds on the link and those that requests waited."""
    moved = served.transfers
    if moved is None:
        return None
    seconds, shown = (np.array(values or [0.0]) for values in (moved.seconds, moved.shown))
    return {
        "tokens": moved.tokens,
        "bytes": moved.bytes,
        "seconds": shares_of(seconds),
        "shown_s": shares_of(shown),
        "fullest_port": moved.fullest_port,
    }


def _warnings(requests: Requests, served: Served) -> list[str]:
    """What a reader must know before trusting the numbers."""
    span, answer = _span_and_answer(requests, served)
    found = []
    if requests.left_out:
        found.append(
            f"lines of the log that ask for no token of a prompt or an answer were left out: {requests.left_out:,}"
        )
    if span < LEAST_ANSWERS * answer:
        found.append(
            f"requests come for {span:.3g} s and an answer takes {answer:.3g} s: no steady load is seen; raise "
            "workload.requests"
        )
    return found


def _dropped_share(costs: StepCosts, served: Served) -> float:
    """Of all rows that experts were sent, over all steps."""
    if costs.experts is None or costs.scenario.engine.capacity_factor is None:
        return 0.0
    pairs = zip(served.step_tokens, served.step_rows, strict=True)
    shares = [costs.experts.at(tokens, generated).dropped for tokens, generated in pairs]
    return float(np.average(shares, weights=served.step_tokens))
