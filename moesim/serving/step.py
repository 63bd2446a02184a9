"""What one step costs, by part; as one batch, or as two halves that hide each other's exchange.

Two batches: one half of a step's requests is computed while dispatch and combine of the other are on their way. With C
seconds of compute of both halves, X of their exchange, and a share f of the SMs that the exchange takes while it lasts,
the layers take max(X, C + f X), and once more the shorter of both in one layer of one half, where nothing is beside it.
C is more than that of whole batches, as weights are read twice. Head, host and swapping stay whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from moesim.serving.batch import Chunk, Formed


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step by part; `hidden`: those of the exchange that compute hides, in no part."""

    projections: float
    attention: float
    experts: float
    exchange: float
    head: float
    draft: float
    swap: float
    host: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing runs beside anything else."""
        return float(sum(getattr(self, part) for part in PARTS))

    def longer(self, seconds: float) -> "StepCost":
        """The same step with an exchange that takes so much longer."""
        return replace(self, exchange=self.exchange + seconds)


PARTS = tuple(part.name for part in fields(StepCost) if part.name != "hidden")


def halves(formed: Sequence[Formed]) -> tuple[list[Formed], list[Formed]]:
    """Every group's step in two: requests that get tokens and parts of prompts cut in the middle."""
    pairs = [(_half(each, upper=False), _half(each, upper=True)) for each in formed]
    return [lower for lower, _ in pairs], [upper for _, upper in pairs]


def _half(each: Formed, *, upper: bool) -> Formed:
    generated = each.generated - each.generated // 2 if not upper else each.generated // 2
    share = generated / each.generated if each.generated else 0.0
    chunks = []
    for chunk in each.chunks:
        first = chunk.tokens - chunk.tokens // 2
        part = (chunk.tokens - first, chunk.before + first) if upper else (first, chunk.before)
        if part[0]:
            chunks.append(Chunk(chunk.job, *part))
    padding = each.padding // 2 if upper else each.padding - each.padding // 2
    keys = tuple(round(keys * share) for keys in each.keys)
    return replace(each, generated=generated, keys=keys, chunks=tuple(chunks), padding=padding, moved=0)


def shown_exchange(compute: float, exchange: float, *, layers: int, taken: float) -> float:
    """Seconds beyond `compute` of both halves that the step takes for their exchange, on `taken` of the SMs."""
    fill = min(compute, exchange) / (2 * max(layers, 1))
    return max(exchange, compute + taken * exchange) - compute + fill


def overlapped(
    formed: Sequence[Formed], plain: Callable[[Sequence[Formed]], StepCost], *, layers: int, taken: float
) -> StepCost:
    """The cost of a step as two batches; `plain`: that of one."""
    whole, lower, upper = plain(formed), *(plain(half) for half in halves(formed))
    parts = {name: getattr(lower, name) + getattr(upper, name) for name in ("projections", "attention", "experts")}
    exchange = lower.exchange + upper.exchange
    shown = shown_exchange(sum(parts.values()), exchange, layers=layers, taken=taken)
    return replace(whole, **parts, exchange=shown, hidden=max(0.0, exchange - shown))
