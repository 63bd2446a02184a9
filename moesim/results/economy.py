"""Throughput, utilisation and money of one optimizer step, and what dropping hides of them.

MFU and price count every token with all K of its experts, whatever is dropped: the less is computed, the better they
look. In the section `effective` a token counts as far as its rows were computed, and a FLOP where it was spent.
"""

from collections.abc import Mapping
from typing import Any

from moesim.scenario import Scenario
from moesim.scenario.flops import forward_flops_per_token, model_flops_per_token
from moesim.scenario.mixed import kinds_of_pools, rank_counts

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 86400.0


def utilisation(scenario: Scenario, step_s: float) -> dict[str, Any]:
    """MFU = model FLOPs / (dense peaks of all ranks * step time), for both counts of attention.

    `peak` names the number format whose peak `causal` and `non_causal` divide by, that of the large matrix products;
    `*_of_bf16_peak` are the same FLOPs over the bf16 peak, so that runs in different formats compare.
    """
    workload = scenario.workload
    cluster = scenario.cluster
    ranks_of = [(cluster.pools[kind].spec, ranks) for kind, ranks in _ranks_of_kinds(scenario).items() if ranks]

    def peak(dtype: str) -> float:
        """Of all ranks together."""
        return sum(ranks * gpu.peak_flops[dtype] for gpu, ranks in ranks_of)

    mfu: dict[str, Any] = {"peak": workload.precision.gemm}
    for count, causal in (("causal", True), ("non_causal", False)):
        flops = scenario.tokens_per_step * model_flops_per_token(
            scenario.model, sequence_length=workload.sequence_length, causal=causal
        )
        mfu[count] = flops / (peak(workload.precision.gemm) * step_s)
        mfu[f"{count}_of_bf16_peak"] = flops / (peak("bf16") * step_s)
    return mfu


def _ranks_of_kinds(scenario: Scenario) -> dict[int, int]:
    """Ranks by kind of GPU, the number of the first pool that has it."""
    found: dict[int, int] = {}
    counts = rank_counts(scenario.cluster, scenario.parallelism)
    for kind, count in zip(kinds_of_pools(scenario.cluster), counts, strict=True):
        found[kind] = found.get(kind, 0) + count
    return found


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


MUCH_DROPPED = 0.10  # share of the rows above which a run warns


def effective(scenario: Scenario, *, kept_share: float, step_s: float) -> dict[str, float | None]:
    """The section `effective` of a result; `kept_share`: computed rows without padding / (tokens * K).

    mfu_causal, mfu_non_causal: MFU without the FLOPs of routed experts that were not spent. usd_per_million_tokens: the
    price of a million tokens with all of their rows; None where none was computed.
    """
    mfu = utilisation(scenario, step_s)
    found: dict[str, float | None] = {"kept_share": kept_share}
    for name, causal in (("causal", True), ("non_causal", False)):
        flops = forward_flops_per_token(
            scenario.model, sequence_length=scenario.workload.sequence_length, causal=causal
        )
        found[f"mfu_{name}"] = mfu[name] * (1.0 - (1.0 - kept_share) * flops["routed_experts"] / sum(flops.values()))
    price = cost(scenario, step_s)["usd_per_million_tokens"]
    return found | {"usd_per_million_tokens": price / kept_share if kept_share else None}


def dropping_warnings(found: Mapping[str, float | None]) -> list[str]:
    """What a reader of a step that leaves many rows out must know; `found` is the section `effective`."""
    missing = 1.0 - (found["kept_share"] or 0.0)
    if missing <= MUCH_DROPPED:
        return []
    return [
        f"{missing:.0%} of the (token, expert) rows are not computed: step time, MFU and price are those of less work "
        f"than the model asks for; compare by the kept rows alone, and with the loss that dropping costs"
    ]
