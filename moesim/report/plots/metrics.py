"""The numbers of a result by their dotted path: what they are called, in which unit, and which way is better.

And settings by their dotted key: what a point has of one, what it is called, and how its value is written.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.report import facts
from moesim.report.categories import CATEGORIES, category
from moesim.units import format_bytes

Result = Mapping[str, Any]

LOWER, NEITHER, HIGHER = -1, 0, 1


@dataclass(frozen=True)
class Metric:
    """One number of a result. `quantity` decides its unit; `better` is +1 where more is better and -1 where less is."""

    path: str
    label: str
    quantity: str = "number"
    better: int = NEITHER

    def of(self, result: Result) -> float | None:
        """Its value in one result, None where the result has none."""
        derived = DERIVED.get(self.path)
        return derived[1](result) if derived else _number_at(result, self.path)


def is_number(value: Any) -> bool:
    """Whether an axis can place the value; a flag is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_at(result: Any, path: str) -> float | None:
    for key in path.split("."):
        if not isinstance(result, Mapping) or key not in result:
            return None
        result = result[key]
    return float(result) if is_number(result) and math.isfinite(result) else None


def _family_share(result: Result, family: str) -> float | None:
    parts, step_s = result.get("attribution_s"), _number_at(result, "step_time_s")
    if not parts or not step_s:
        return None
    return float(sum(value for key, value in parts.items() if category(key).family == family)) / step_s


def _tokens_per_step(result: Result) -> float | None:
    rate, step_s = _number_at(result, "tokens_per_second"), _number_at(result, "step_time_s")
    return rate * step_s if rate and step_s else None


def _bytes_per_token(result: Result, tier: str) -> float | None:
    total, tokens = _number_at(result, f"communication.{tier}"), _tokens_per_step(result)
    return None if total is None or not tokens else total / tokens


def _sent_per_token(result: Result) -> float | None:
    ways = [_bytes_per_token(result, f"{way}_bytes") for way in ("dispatch", "combine")]
    return None if None in ways else sum(way for way in ways if way is not None)


def _imbalance_share(result: Result) -> float | None:
    lost, step_s = _number_at(result, "imbalance.cost_s"), _number_at(result, "step_time_s")
    return None if lost is None or not step_s else lost / step_s


# path -> (Metric, how it follows from a result); what result.json does not hold as such
DERIVED: dict[str, tuple[Metric, Callable[[Result], float | None]]] = {
    metric.path: (metric, value)
    for metric, value in (
        (Metric("derived.compute_share", "computing", "share", HIGHER), lambda r: _family_share(r, "compute")),
        (
            Metric("derived.communication_share", "exposed communication", "share", LOWER),
            lambda r: _family_share(r, "communication"),
        ),
        (Metric("derived.waiting_share", "waiting", "share", LOWER), lambda r: _family_share(r, "waiting")),
        (Metric("derived.imbalance_cost_share", "cost of imbalance", "share", LOWER), _imbalance_share),
        (
            Metric("derived.bytes_per_token", "sent per token and step", "bytes", LOWER),
            _sent_per_token,
        ),
        (
            Metric("derived.inter_node_bytes_per_token", "sent between nodes per token and step", "bytes", LOWER),
            lambda r: _bytes_per_token(r, "inter_node_bytes"),
        ),
    )
}
_KNOWN = {
    metric.path: metric
    for metric in (
        Metric("step_time_s", "step time", "time", LOWER),
        Metric("balanced_step_time_s", "step time with equal loads", "time", LOWER),
        Metric("tokens_per_second", "tokens per second", "rate", HIGHER),
        Metric("tokens_per_second_per_gpu", "tokens per second and GPU", "rate", HIGHER),
        Metric("mfu.causal", "MFU of the GEMMs' peak (causal attention)", "share", HIGHER),
        Metric("mfu.non_causal", "MFU of the GEMMs' peak (non-causal attention)", "share", HIGHER),
        Metric("mfu.causal_of_bf16_peak", "MFU of the bf16 peak (causal attention)", "share", HIGHER),
        Metric("mfu.non_causal_of_bf16_peak", "MFU of the bf16 peak (non-causal attention)", "share", HIGHER),
        Metric("cost.usd_per_million_tokens", "USD per million tokens", "dollars", LOWER),
        Metric("cost.usd_per_step", "USD per step", "dollars", LOWER),
        Metric("cost.usd_total", "USD for all tokens", "dollars", LOWER),
        Metric("cost.days", "days for all tokens", "number", LOWER),
        Metric("memory.peak_bytes", "peak memory", "bytes", LOWER),
        Metric("memory.fits_share", "samples that fit", "share", HIGHER),
        Metric("dropped_share", "dropped rows", "share", LOWER),
        Metric("effective.kept_share", "computed rows of those that the model asks for", "share", HIGHER),
        Metric("effective.mfu_causal", "MFU by kept rows (causal attention)", "share", HIGHER),
        Metric("effective.mfu_non_causal", "MFU by kept rows (non-causal attention)", "share", HIGHER),
        Metric("effective.usd_per_million_tokens", "USD per million tokens by kept rows", "dollars", LOWER),
        Metric("padded_share", "padded rows", "share", LOWER),
        Metric("router.validation_loss", "held-out loss, nats per byte", "number", LOWER),
        Metric("router.train_loss", "training loss, nats per byte", "number", LOWER),
        Metric("imbalance.expert", "experts, busiest / mean", "ratio", LOWER),
        Metric("imbalance.rank_rows", "rows of ranks, busiest / mean", "ratio", LOWER),
        Metric("imbalance.rank_bytes", "bytes of ranks, busiest / mean", "ratio", LOWER),
        Metric("imbalance.rank_time", "computing time of ranks, slowest / mean", "ratio", LOWER),
        Metric("imbalance.cost_s", "cost of imbalance", "time", LOWER),
        Metric("placement.rank_rows_contiguous", "rows of ranks with experts in order, busiest / mean", "ratio", LOWER),
        Metric("placement.replacing.step_time_s", "step time, moving experts included", "time", LOWER),
        Metric("placement.replacing.moving_per_step_s", "moving experts, per step", "time", LOWER),
        Metric("placement.replacing.never_step_time_s", "step time, experts placed once", "time", LOWER),
        Metric("placement.replacing.best_step_time_s", "step time at the best interval", "time", LOWER),
        Metric("placement.copy_gradient_bytes", "gradients between copies per step", "bytes", LOWER),
        Metric("communication.copies_per_token", "copies per token and layer", "number", LOWER),
        Metric("communication.dispatch_bytes", "dispatched per step", "bytes", LOWER),
        Metric("communication.combine_bytes", "combined per step", "bytes", LOWER),
        Metric("communication.intra_node_bytes", "inside nodes per step", "bytes", LOWER),
        Metric("communication.inter_node_bytes", "between nodes per step", "bytes", LOWER),
        Metric("gpus", "GPUs", "count"),
        *(Metric(f"attribution_s.{part.key}", part.label, "time", LOWER) for part in CATEGORIES),
        *(metric for metric, _ in DERIVED.values()),
    )
}
HEADLINE = (
    "step_time_s",
    "tokens_per_second",
    "mfu.causal",
    "cost.usd_per_million_tokens",
    "memory.peak_bytes",
)


def metric(path: str) -> Metric:
    """The metric of a dotted path; the unit of one that is not listed follows from the end of its name."""
    if path in _KNOWN:
        return _KNOWN[path]
    label = path.replace(".", ", ").replace("_", " ")
    endings = {"_s": "time", "_bytes": "bytes", "_share": "share", "_gb": "number"}
    quantity = next((kind for ending, kind in endings.items() if path.endswith(ending)), "number")
    return Metric(path, label.removesuffix(" s") if quantity == "time" else label, quantity)


def paths_of(results: Sequence[Result]) -> list[str]:
    """Dotted paths of all numbers that any of the results holds, and of those that follow from them."""
    found = dict.fromkeys(path for result in results for path in _paths(result))
    derived = [path for path, (_, value) in DERIVED.items() if any(value(result) is not None for result in results)]
    return [path for path in found if path != "schema_version"] + derived


def _paths(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _paths(child, f"{prefix}.{key}" if prefix else str(key))
    elif is_number(value) and math.isfinite(value):
        yield prefix


@dataclass(frozen=True)
class Unit:
    """How the values of a metric are drawn: times `factor`, with `title` behind the label of an axis."""

    factor: float
    title: str


def unit_for(metric: Metric, values: Sequence[float]) -> Unit:
    """The unit that keeps the largest of `values` readable."""
    largest = max((abs(value) for value in values), default=1.0)
    steps = {
        "time": ((1.0, "s"), (1e3, "ms"), (1e6, "µs")),
        "bytes": ((1e-12, "TB"), (1e-9, "GB"), (1e-6, "MB"), (1e-3, "kB"), (1.0, "bytes")),
    }.get(metric.quantity)
    if steps:
        factor, title = next(((f, t) for f, t in steps if largest * f >= 1), steps[-1])
        return Unit(factor, f", {title}")
    return Unit(100.0, ", %") if metric.quantity == "share" else Unit(1.0, "")


def text(metric: Metric, value: float | None) -> str:
    """A value with its unit."""
    if value is None:
        return facts.NOT_KNOWN
    if metric.quantity in ("rate", "count"):
        return f"{value:,.0f}"
    if metric.quantity == "share":
        return facts.percent(value, digits=2)
    shown = _TEXTS.get(metric.quantity)
    return shown(value) if shown else f"{value:,.5g}"


_TEXTS: dict[str, Callable[[float], str]] = {
    "time": facts.seconds,
    "bytes": format_bytes,
    "dollars": facts.dollars,
    "ratio": facts.times,
}


MISSING = "-"  # what a point has of a key that it does not know
_LONGEST = 40
_SIZES = ("data", "context", "tensor", "pipeline", "expert", "expert_tensor")
_VAGUE = ("kind", "limit", "factor", "name", "expert", "device", "communication", "file", "dtype", "model", "preset")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as dotted keys; lists of plain values stay whole."""
    if isinstance(value, Mapping):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in items:
        found |= flatten(child, f"{prefix}.{key}" if prefix else key)
    return found


def value_at(flat: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in flattened data; `cluster.gpu` also means `cluster.pools.0.gpu`."""
    section, _, rest = key.partition(".")
    for name in (key, f"cluster.pools.0.{rest}" if section == "cluster" else key):
        if name in flat:
            return flat[name]
        below = {inner.removeprefix(name + "."): value for inner, value in flat.items() if inner.startswith(name + ".")}
        if below:
            return below
    return MISSING


def text_of(value: Any, *, longest: int = _LONGEST) -> str:
    """A value as a person writes it; what is longer than `longest` loses its head, as a path does, or its tail."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, Mapping):
        parts = [(key, text_of(child, longest=longest)) for key, child in value.items()]
        text = ", ".join(child if key == "kind" else f"{key} {child}" for key, child in parts) or "nothing"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(text_of(child, longest=longest) for child in value) or "nothing"
    else:
        text = str(value)
    text = "".join(char if char.isprintable() else " " for char in text)
    if len(text) <= longest:
        return text
    return "…" + text[1 - longest :] if isinstance(value, str) else text[: longest - 1] + "…"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key without the front parts that are not needed to tell the keys apart: `routing.seed` -> `seed`.

    Underscores become blanks; a part that says nothing alone, as `kind`, keeps the one before it.
    """
    unique = [key.removeprefix("$").split(".") for key in dict.fromkeys(keys)]
    names = {}
    for key, parts in zip(dict.fromkeys(keys), unique, strict=True):
        if parts[:-1] == ["parallelism"] and parts[-1] in _SIZES:
            names[key] = parts[-1].replace("_", " ") + " parallel"
            continue
        length = 2 if parts[-1] in _VAGUE and len(parts) > 1 else 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in unique) > 1:
            length += 1
        names[key] = " ".join(parts[-length:]).replace("_", " ")
    return names


def plain(text: str) -> str:
    """A text as plotly shows it: what plotly would read as a tag or an entity is escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
