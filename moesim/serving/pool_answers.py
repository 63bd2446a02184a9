"""What one pool of instances did: steps, time by part, memory, imbalance, and what happened over time."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.seeding import stream
from moesim.serving.clock import Served
from moesim.serving.fleet import Pool

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
