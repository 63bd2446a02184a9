"""What dropping hides: utilisation and price by the rows that were kept.

MFU and price count every token with all K of its experts, whatever is dropped: the less is computed, the better they
look. Here a token counts as far as its rows were computed, and a FLOP where it was spent.
"""

from collections.abc import Mapping

from moesim.results.economy import cost, utilisation
from moesim.scenario import Scenario
from moesim.scenario.flops import forward_flops_per_token

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
