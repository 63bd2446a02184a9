"""From what happened on the clock to answers: latencies, throughput, price, memory, and the largest load.

First those of one pool of instances: steps, time by part, memory, imbalance, and what happened over time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InfeasibleError, UserError
from moesim.seeding import stream
from moesim.serving.clock import Served
from moesim.serving.costs import StepCosts
from moesim.serving.fleet import Deployment, Pool, fleet_gpus
from moesim.serving.requests import Requests
from moesim.serving.schema import ServingScenario
from moesim.serving.steady import (
    LEAST_ANSWERS,
    NARROW,
    carried_share,
    growth,
    met,
    served_steadily,
    span_and_answer,
    tpot,
)

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MOST_POINTS = 2_000  # of the timeline
MOST_MOMENTS = 200  # of the pages of every group


def pool_answers(pool: Pool, served: Served, seconds: float) -> dict[str, Any]:
    """The answers of a pool over `seconds` of service."""
    costs, memory = pool.costs, pool.memory
    steps = np.array(served.step_seconds or [0.0])
    tokens = np.array(served.step_tokens or [0])
    rows = np.array(served.step_rows or [0])
    weights = steps if steps.sum() else np.ones_like(steps)
    busy = float(steps.sum()) or 1.0
    mean_tokens, mean_rows = float(np.average(tokens, weights=weights)), float(np.average(rows, weights=weights))
    pages = memory.pages * len(served.batches) / served.num_sets
    spread = costs.experts is not None and costs.together
    return {
        "name": pool.name,
        "replicas": pool.replicas,
        "gpus": pool.gpus,
        "step_s": shares_of(steps),
        "steps": len(served.step_seconds),
        "busy_share": min(1.0, busy / (seconds * served.num_sets)),
        "tokens_per_step": mean_tokens,
        "generated_per_step": float(np.average(served.step_generated or [0], weights=weights)),
        "prompt_time_share": float(np.average(1.0 - rows / np.maximum(tokens, 1), weights=weights)),
        "time_s": dict(served.parts),
        "rank_rows_imbalance": costs.experts.at(mean_tokens, mean_rows).imbalance
        if spread and costs.experts is not None
        else None,
        "preempted": served.count("preempted"),
        "swapped": served.count("swapped"),
        "memory": asdict(memory),
        "kv_peak_share": max(served.step_pages, default=0) / pages,
        "timeline": _timeline(served),
        "kv_share_over_time": _held_over_time(served, pool.replicas * pool.scenario.parallelism.data, memory.pages),
        "expert_rows_over_time": _rows_over_time(pool, served),
        "kernels_rest_on": list(costs.rests_on),
    }


def shares_of(values_N: NDArray[np.float64]) -> dict[str, float]:
    """Mean and quantiles."""
    return {"mean": float(values_N.mean())} | {
        name: float(np.quantile(values_N, share)) for name, share in SHARES.items()
    }


def _timeline(served: Served) -> dict[str, list[float]]:
    """Every so many steps: when it ended, its length, tokens, waiting requests and pages."""
    every = max(1, -(-len(served.step_end) // MOST_POINTS))
    columns = ("end", "seconds", "tokens", "generated", "waiting", "pages")
    return {name: [float(value) for value in getattr(served, f"step_{name}")[::every]] for name in columns}


def _held_over_time(served: Served, groups: int, pages: int) -> dict[str, Any]:
    """The share of its pages that every data group held at moments at equal distances: [moments, groups]."""
    room = pages * len(served.batches) / groups
    ends = np.array(served.step_end or [0.0])
    moments = np.linspace(0.0, ends.max(), min(MOST_MOMENTS, len(ends)) + 1)[1:]
    share_MD = np.zeros((len(moments), groups))
    held_D, step = np.zeros(groups), 0
    order = np.argsort(ends, kind="stable")
    for moment, until in enumerate(np.searchsorted(ends[order], moments, side="right")):
        for place in order[step : min(int(until), len(served.step_held))]:
            first, values_D = served.step_held[place]
            held_D[first : first + len(values_D)] = values_D
        step = int(until)
        share_MD[moment] = held_D / room
    return {"seconds": moments.tolist(), "share": np.round(share_MD, 4).tolist()}


def _rows_over_time(pool: Pool, served: Served) -> dict[str, Any] | None:
    """Rows of every rank, or of every expert where ranks do not share them, over their mean, at moments [moments, ...].

    Each is one draw of routing in one layer for a step of the size that there was; steps last as their mean over draws
    and layers says. Null without experts or steps.
    """
    experts, scenario = pool.costs.experts, pool.scenario
    if experts is None or not served.step_end:
        return None
    ends, rng = np.array(served.step_end), stream(scenario.seed, "expert rows over time", pool.name)
    order = np.argsort(ends, kind="stable")
    moments = np.linspace(0.0, ends.max(), min(MOST_MOMENTS, len(ends)) + 1)[1:]
    found = []
    for place in np.minimum(np.searchsorted(ends[order], moments), len(ends) - 1):
        step = order[place]
        rows = experts.drawn_rows(int(served.step_tokens[step]), int(served.step_rows[step]), rng)
        found.append(np.round(rows / max(rows.mean(), 1e-9), 3).tolist())
    return {"of": "rank" if pool.costs.together else "expert", "seconds": moments.tolist(), "times_mean": found}


RANGED = (  # headline numbers whose least and most over seeds are given, beside the latencies, in the order of a page
    "good_share", "good_requests_per_second", "requests_per_second", "output_tokens_per_second",
    "tokens_per_second_per_gpu", "tokens_per_second_per_user", "usd_per_million_output_tokens",
    "usd_per_million_tokens", "usd_per_million_input_tokens", "usd_per_million_new_input_tokens",
    "usd_per_million_generated_tokens",
)  # fmt: skip
LATENCIES = ("ttft_s", "tpot_s", "latency_s")


def serve(scenario: ServingScenario) -> dict[str, Any]:
    """The answers for the scenario's own seed, as plain numbers and lists. Raises UserError and InfeasibleError."""
    deployment = Deployment(scenario)
    requests = deployment.requests(scenario.seed)
    return answers_of(deployment, requests, deployment.serve(requests))


def serve_seeds(scenario: ServingScenario, seeds: int) -> dict[str, Any]:
    """As `serve`, with `ranges`: the least and most of the headline numbers over seeds seed, seed + 1 ..."""
    deployment = Deployment(scenario)
    return _over_seeds(deployment, _draws(deployment, seeds))


def _draws(deployment: Deployment, seeds: int) -> list[Requests]:
    first = deployment.scenario.seed
    return [deployment.requests(seed) for seed in range(first, first + seeds)]


def _over_seeds(deployment: Deployment, draws: Sequence[Requests], *, ranges: bool = True) -> dict[str, Any]:
    """The answers for the first of several draws, and the ranges over all where they are wanted."""
    results = [answers_of(deployment, requests, deployment.serve(requests)) for requests in draws]
    if not ranges:
        return results[0]
    found = {
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
            found[key] = [min(known), max(known)]
    return results[0] | {"seeds": len(draws), "ranges": found}


def largest_load(scenario: ServingScenario, *, seeds: int = 1, worst: bool = False) -> dict[str, Any]:
    """The most requests per second of which `workload.slo.share` meet the limits, and the answers at that load.

    Doubling, then bisection to 2 %, over how fast the requests come, of what is carried: see `served_steadily`. With
    several seeds the mean over their draws must meet the limits, or with `worst` every draw; the rate is the mean of
    theirs, and `ranges` are as in `serve_seeds`. Raises UserError without limits, InfeasibleError where they are missed
    by requests that come alone.
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
        for place, requests in enumerate(draws):
            drawn, served = served_steadily(deployment, requests, seed=scenario.seed + place, factor=factor)
            shares.append(carried_share(served, drawn.faster(factor), slo))
            draws[place] = drawn if shares[-1] else requests  # not those that show an overload
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
    return _over_seeds(deployment, at_low, ranges=seeds > 1) | {"largest_requests_per_second": rate}


def answers_of(deployment: Deployment, requests: Requests, served: Served) -> dict[str, Any]:
    """The answers of a deployment to requests that were served, as plain numbers and lists."""
    scenario, costs = deployment.scenario, deployment.costs
    gpus = fleet_gpus(scenario)
    seconds = float(served.done_N.max())
    output, prompt = int(requests.output_N.sum()), int(requests.input_N.sum())
    usd = scenario.cluster.usd_per_hour * seconds / 3600.0
    good = float(met(served, requests, scenario.workload.slo).mean())
    several_N = requests.output_N > 1
    tpot_N = tpot(served, requests)[several_N] if several_N.any() else np.zeros(1)
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
        "cluster_gpus": scenario.cluster.num_gpus,
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
        **_latencies(requests, served, slice(None)),
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
    classes = ((int(number), requests.class_N == number) for number in np.unique(requests.class_N).tolist())
    return [
        {"class": number, "requests": int(of_N.sum()), **_latencies(requests, served, of_N)} for number, of_N in classes
    ]


def _latencies(requests: Requests, served: Served, chosen: NDArray[np.bool_] | slice) -> dict[str, Any]:
    """Means and quantiles over some requests; of the time per token of those with several."""
    tpot_N = tpot(served, requests)[chosen][requests.output_N[chosen] > 1]
    return {
        "ttft_s": shares_of((served.first_N - requests.arrival_N)[chosen]),
        "tpot_s": shares_of(tpot_N if len(tpot_N) else np.zeros(1)),
        "latency_s": shares_of((served.done_N - requests.arrival_N)[chosen]),
    }


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
    span, answer = span_and_answer(requests, served)
    found = []
    if requests.left_out:
        found.append(
            f"lines of the log that ask for no token of a prompt or an answer were left out: {requests.left_out:,}"
        )
    if span < LEAST_ANSWERS * answer:
        found.append(
            f"requests come for {span:.3g} s and an answer takes {answer:.3g} s: no steady load is seen; raise "
            "workload.requests (if answers take still longer then, more comes than goes: lower the rate)"
        )
    elif (grows := growth(served, requests)) > NARROW:
        found.append(
            f"more comes than goes: an answer takes {grows:.2g} s longer for each second of requests, so that "
            "latencies depend on workload.requests; lower the rate, or use more GPUs"
        )
    return found


def _dropped_share(costs: StepCosts, served: Served) -> float:
    """Of all rows that experts were sent, over all steps."""
    if costs.experts is None or costs.scenario.engine.capacity_factor is None:
        return 0.0
    pairs = zip(served.step_tokens, served.step_rows, strict=True)
    shares = [costs.experts.at(tokens, generated).dropped for tokens, generated in pairs]
    return float(np.average(shares, weights=served.step_tokens))
