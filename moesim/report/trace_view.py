"""A trace on a plan: how its router loads experts and ranks, what is dropped and how far tokens travel.

Legend: L layers of the trained model, E experts, B micro-batches, D ranks of an expert group, P slots of a rank.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel import TrafficSampler
from moesim.results.metrics import balance_warnings
from moesim.scenario import Scenario
from moesim.seeding import stream
from moesim.trace import RoutingTrace
from moesim.trace.metrics import expert_load_LE, first_load_LE, imbalance, mean_distinct_groups_L, uniform_floor

COLD = 0.5  # an expert with less than this share of the mean load is cold


def relative_load_LE(trace: RoutingTrace, *, first: bool) -> NDArray[np.float64]:
    """Rows of an expert / mean rows of its layer, at the first or the last recorded step; before dropping."""
    num_experts = trace.router.num_experts
    load_LE = first_load_LE(trace) if first else expert_load_LE(trace.final, num_experts=num_experts)
    return np.asarray(load_LE / load_LE.mean(axis=1, keepdims=True))


def summarise(scenario: Scenario, trace: RoutingTrace) -> dict[str, Any]:
    """Plain values for people and programs; lists have one entry per layer of the trained model.

    Ranks and drops are those of one routing sample of expert group 0 of `scenario`'s plan: imbalance is max / mean rows
    per rank and micro-batch after dropping, averaged over micro-batches. Raises UserError when the trace does not fit.
    """
    router, final = trace.router, trace.final
    sampler = TrafficSampler(scenario, trace)
    sample = sampler.draw(stream(scenario.seed, "trace-view"))
    arrays_L = [sample.thin_arrays(0, sampler.counted_layer(layer)) for layer in range(trace.num_layers)]
    rank_rows_LBD = np.stack([arrays.slot_rows_BDP(sampler.placement).sum(axis=-1) for arrays in arrays_L])
    window = sampler.placement.num_ranks * scenario.workload.micro_batch * sampler.piece_length
    floor = {"num_groups": router.num_groups, "group_limit": router.group_limit, "top_k": router.top_k}
    curves = trace.curves
    return {
        "router": router.kind,
        "num_experts": router.num_experts,
        "top_k": router.top_k,
        "recorded_steps": [step.step for step in trace.steps],
        "recorded_tokens": final.num_tokens,
        "train_loss": float(curves.train_loss[-1]) if len(curves.train_loss) else None,
        "validation_loss": float(curves.validation_loss[-1]) if len(curves.validation_loss) else None,
        "experts": {
            "imbalance_first": imbalance(relative_load_LE(trace, first=True)).tolist(),
            "imbalance_last": imbalance(relative_load_LE(trace, first=False)).tolist(),
            "cold_share": (relative_load_LE(trace, first=False) < COLD).mean(axis=1).tolist(),
            "uniform_floor": uniform_floor(router.num_experts, tokens=final.num_tokens, **floor),
        },
        "ranks": {
            "imbalance": imbalance(rank_rows_LBD).mean(axis=1).tolist(),
            "uniform_floor": uniform_floor(
                router.num_experts, tokens=window, num_bins=sampler.placement.num_ranks, **floor
            ),
            "window_tokens": window,
        },
        "dropped_share": [
            float(arrays.dropped_rows_B.sum() / max(1, arrays.routed_rows_B.sum())) for arrays in arrays_L
        ],
        "distinct_groups_per_token": mean_distinct_groups_L(final, router).tolist(),
        "warnings": balance_warnings(scenario, trace),
    }
