"""Throughput, utilisation and money of one optimizer step."""

from typing import Any

from moesim.scenario import Scenario
from moesim.scenario.flops import model_flops_per_token

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 86400.0


def utilisation(scenario: Scenario, step_s: float) -> dict[str, Any]:
    """MFU = model FLOPs / (ranks * dense peak * step time), for both counts of attention.

    `peak` names the number format whose peak `causal` and `non_causal` divide by, that of the large matrix products;
    `*_of_bf16_peak` are the same FLOPs over the bf16 peak, so that runs in different formats compare.
    """
    workload = scenario.workload
    gpu = scenario.cluster.pools[0].spec
    ranks = scenario.parallelism.world_size
    mfu: dict[str, Any] = {"peak": workload.precision.gemm}
    for count, causal in (("causal", True), ("non_causal", False)):
        flops = scenario.tokens_per_step * model_flops_per_token(
            scenario.model, sequence_length=workload.sequence_length, causal=causal
        )
        mfu[count] = flops / (ranks * gpu.peak_flops[workload.precision.gemm] * step_s)
        mfu[f"{count}_of_bf16_peak"] = flops / (ranks * gpu.peak_flops["bf16"] * step_s)
    return mfu


def cost(scenario: Scenario, step_s: float) -> dict[str, Any]:
    """USD per step, per million tokens and for the token budget, and the days it takes; None without a budget."""
    per_step = scenario.cluster.usd_per_hour * step_s / SECONDS_PER_HOUR
    budget = scenario.workload.train_tokens
    steps = None if budget is None else budget / scenario.tokens_per_step
    return {
        "usd_per_step": per_step,
        "usd_per_million_tokens": per_step / (scenario.tokens_per_step / 1e6),
        "usd_total": None if steps is None else per_step * steps,
        "days": None if steps is None else steps * step_s / SECONDS_PER_DAY,
        "price_source": "; ".join(dict.fromkeys(pool.price_source for pool in scenario.cluster.pools)),
    }
