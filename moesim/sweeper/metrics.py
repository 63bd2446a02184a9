"""The numbers of a result by dotted path, and which of them a sweep's table shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moesim.results import CATEGORIES

_FLAT = (
    "step_time_s",
    "balanced_step_time_s",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "dropped_share",
    "padded_share",
    "world_size",
    "gpus",
)
_GROUPS = {
    "mfu": ("causal", "non_causal", "causal_of_bf16_peak", "non_causal_of_bf16_peak"),
    "effective": ("kept_share", "mfu_causal", "mfu_non_causal", "usd_per_million_tokens"),
    "attribution_s": CATEGORIES,
    "attribution_balanced_s": CATEGORIES,
    "communication": (
        "dispatch_bytes",
        "combine_bytes",
        "intra_node_bytes",
        "inter_node_bytes",
        "copies_per_token",
        "tensor_bytes",
    ),
    "imbalance": (
        "expert",
        "rank_rows",
        "balancedness",
        "rank_bytes",
        "rank_time",
        "uniform_floor",
        "uniform_floor_rank",
        "whole_step_expert",
        "whole_step_rank_rows",
        "cost_s",
    ),
    "placement": ("slots_per_rank", "most_copies", "rank_rows_contiguous", "copy_gradient_bytes"),
    "placement.replacing": (
        "step_time_s",
        "moving_per_step_s",
        "moving_s",
        "moved_bytes",
        "never_step_time_s",
        "contiguous_step_time_s",
        "best_every",
        "best_step_time_s",
        "pays_from",
    ),
    "memory": ("peak_bytes", "fits_share"),
    "cost": ("usd_per_step", "usd_per_million_tokens", "usd_total", "days"),
    "router": (
        "train_loss",
        "validation_loss",
        "imbalance_first",
        "imbalance_last",
        "trace_coverage",
        "reused_share",
    ),
}
METRICS: tuple[str, ...] = (*_FLAT, *(f"{group}.{name}" for group, names in _GROUPS.items() for name in names))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A metric in the table: its head, its unit and which end is the better one (None: neither).

    `absolute`: a change is a difference and not a share. `beside`: another metric without which it says nothing new.
    """

    path: str
    head: str
    scale: float = 1.0
    pattern: str = "{:.4g}"
    best: Literal["least", "most"] | None = None
    absolute: bool = False
    beside: str | None = None


STANDARD = (
    Column(path="step_time_s", head="step time (s)", pattern="{:.5g}", best="least"),
    Column(path="tokens_per_second", head="tokens/s", pattern="{:,.0f}", best="most"),
    Column(path="cost.usd_per_million_tokens", head="USD/M tokens", pattern="{:.4g}", best="least"),
    Column(path="imbalance.expert", head="expert imb.", pattern="{:.3f}", best="least", absolute=True),
    Column(path="imbalance.rank_rows", head="rank imb.", pattern="{:.3f}", best="least", absolute=True),
    Column(path="dropped_share", head="dropped (%)", scale=100, pattern="{:.2f}", best="least", absolute=True),
    Column(path="effective.usd_per_million_tokens", head="USD/M kept", best="least", beside="dropped_share"),
    Column(path="router.validation_loss", head="held-out loss", pattern="{:.4f}", best="least", absolute=True),
)


def columns(extra: Sequence[str]) -> tuple[Column, ...]:
    """The columns of every sweep, and one for each other metric in `extra`."""
    known = {column.path for column in STANDARD}
    more = [path for path in dict.fromkeys(extra) if path not in known]
    return (*STANDARD, *(_plain_column(path) for path in more))


def _plain_column(path: str) -> Column:
    """Parts of the step may be next to nothing in the reference: their changes are seconds."""
    return Column(path=path, head=path.rpartition(".")[2], absolute=path.startswith("attribution"))
