"""The numbers of a result by their dotted path, and how they look in every plot.

What they are called, in which unit, and which way is better; colours, markers, axes with their units, and the text
under the pointer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moesim.report import facts
from moesim.report.categories import CATEGORIES, category
from moesim.report.plots.choice import AxisKey, Variable
from moesim.report.plots.points import (
    MISSING,
    Axis,
    Collection,
    Estimate,
    Group,
    is_number,
    plain,
    short_names,
    text_of,
)
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
        Metric("mfu.causal", "MFU of the products' peak (causal attention)", "share", HIGHER),
        Metric("mfu.non_causal", "MFU of the products' peak (non-causal attention)", "share", HIGHER),
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


# blue, orange, green-blue, magenta, purple, yellow, grey, brown: distinct under every common colour blindness
CATEGORICAL = ("#2474b5", "#e07b1a", "#0a7f86", "#b3256b", "#7a4fbf", "#d9b310", "#7a828e", "#9c5f2e")
SEQUENTIAL = ("#fde0a1", "#f6b26b", "#ea7f52", "#cf4f5c", "#a0316a", "#6b2170", "#3a1660")  # light to dark
MARKERS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
FRONT = "#6b7480"
_ORDERED_FROM = 4  # numeric values from which on colours run from light to dark
_NEAR_ZERO = 0.4
_LOG_FROM = 6.0  # largest / smallest value from which on an axis is logarithmic
_MOST_TICKS = 14
_LONGEST_HOVER = 90
_ROUND_OFF = 1e-6
_MANTISSAS = ((1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
_FEWEST_TICKS = 4


def colours(axis: Axis | None) -> list[str]:
    """A colour for every value of the axis."""
    if axis is None:
        return [CATEGORICAL[0]]
    count = len(axis.values)
    if count >= _ORDERED_FROM and len(axis.keys) == 1 and all(is_number(value[0]) for value in axis.values):
        places = np.linspace(0.15, 1.0, count) * (len(SEQUENTIAL) - 1)
        return [_between(place) for place in places]
    return [CATEGORICAL[index % len(CATEGORICAL)] for index in range(count)]


def _between(place: float) -> str:
    low = min(int(place), len(SEQUENTIAL) - 2)
    ends = [[int(SEQUENTIAL[low + side][start : start + 2], 16) for start in (1, 3, 5)] for side in (0, 1)]
    mixed = [round(a + (place - low) * (b - a)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def translucent(colour: str, share: float) -> str:
    """`#rrggbb` as an rgba() of that opacity."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def name_of(variable: Variable, collection: Collection) -> str:
    """What a variable is called on the page."""
    if isinstance(variable, Metric):
        return variable.label
    if variable.axis.labelled or variable.key == variable.axis.keys[0]:
        return variable.axis.name
    return short_names([key for axis in collection.axes for key in axis.keys])[variable.key]


def title_of(variable: Metric, unit: Unit) -> str:
    """The title of an axis: label and unit."""
    return plain(variable.label + unit.title)


def is_log(values: Sequence[float], *, ratio: float = _LOG_FROM) -> bool:
    """Whether an axis over these values is better logarithmic: all positive and spread wide."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= ratio


def set_metric_axis(
    update: Any,
    variable: Metric,
    values: Sequence[float],
    unit: Unit,
    *,
    titled: bool = True,
    log_from: float = _LOG_FROM,
) -> None:
    """Scale, ticks and title of an axis over the drawn (already scaled) `values` of a metric.

    Linear axes begin at zero where the values come near it anyway.
    """
    if titled:
        update(title={"text": title_of(variable, unit)})
    prefix = "$" if variable.quantity == "dollars" else ""
    if is_log(values, ratio=log_from):
        ticks = log_ticks(min(values), max(values))
        update(type="log", tickvals=ticks, ticktext=[prefix + tick_text(tick) for tick in ticks], minor={"ticks": ""})
    else:
        update(tickprefix=prefix, tickformat="~s" if variable.quantity == "rate" else "", exponentformat="SI")
        if values and 0 <= min(values) < _NEAR_ZERO * max(values):
            update(rangemode="tozero")
        middle = max(map(abs, values), default=0.0)
        if values and max(values) - min(values) < _ROUND_OFF * middle:  # or the ticks would show rounding
            update(range=[0.9 * values[0], 1.1 * values[0]] if values[0] > 0 else [1.1 * values[0], 0.9 * values[0]])


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from a little below `low` to a little above `high`."""
    exponents = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    for mantissas in _MANTISSAS:
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low / 1.6 <= m * 10.0**e <= high * 1.6]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return ticks


def tick_text(value: float) -> str:
    """`50k`, `2M`, `0.05`."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"


def set_key_axis(update: Any, variable: AxisKey, collection: Collection) -> None:
    """Ticks and title of an axis over the values of a key: at their numbers, or side by side in their order."""
    update(title={"text": plain(name_of(variable, collection))})
    places = key_places(variable)
    texts = [plain(value) for value in variable.axis.texts]
    if not variable.is_numeric:
        update(tickvals=places, ticktext=texts, range=[-0.5, len(places) - 0.5])
        return
    update(type="log" if len(places) > 2 and is_log(places) else "linear")
    if len(places) <= _MOST_TICKS:
        update(tickvals=places, ticktext=texts if variable.axis.labelled else list(map(tick_text, places)))


def key_places(variable: AxisKey) -> list[float]:
    """Where each value of the axis is drawn."""
    values = [value[variable.position] for value in variable.axis.values]
    return [float(value) for value in values] if variable.is_numeric else list(map(float, range(len(values))))


def interval_text(variable: Metric, found: Estimate | None) -> str:
    """A mean with its 90 % interval and the number of runs behind it."""
    if found is None:
        return facts.NOT_KNOWN
    shown = text(variable, found.mean)
    if found.low is not None and found.high is not None:
        shown += f" ({text(variable, found.low)} to {text(variable, found.high)})"
    return shown + (f", {found.count} runs" if found.count > 1 else "")


def hover_text(group: Group, collection: Collection, metrics: Sequence[Metric] = ()) -> str:
    """The whole layout of a group: every key that differs, its numbers, and what they rest on."""
    rank = f", rank {group.rank}" if group.rank is not None else ""
    lines = [f"<b>{plain(label_of(group))}{rank}</b>"]
    for axis, place in zip(collection.axes, group.at, strict=True):
        if axis.texts[place] == MISSING:
            continue
        lines.append(f"{plain(axis.name)}: {plain(axis.texts[place])}")
        if len(axis.keys) > 1:
            values = zip(axis.keys, axis.values[place], strict=True)
            lines += [f"    {plain(key)}: {plain(text_of(value, longest=_LONGEST_HOVER))}" for key, value in values]
    shown = dict.fromkeys([*(m.path for m in metrics), *HEADLINE])
    lines += [
        f"{plain(metric(path).label)}: {interval_text(metric(path), group.estimate(metric(path)))}" for path in shown
    ]
    if group.results:
        lines.append("rests on: " + plain(sources_text(group.results[0])))
    else:
        lines.append(plain(f"{group.status}: {group.points[0].reason}"))
    return "<br>".join(lines)


def label_of(group: Group) -> str:
    """`point 7`, `points 7, 8, 9`, or the folder of a run."""
    if group.points[0].scenario is not None:
        return ", ".join(point.folder for point in group.points)
    numbers = [point.number for point in group.points]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"points {numbers[0]} to {numbers[-1]}"
    return f"point{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def sources_text(result: Any) -> str:
    """Shares of the estimated time by source, largest first: `77 % interpolated, 12 % network`."""
    shares = sorted(result.get("estimate_sources", {}).items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares if share >= 0.005) or facts.NOT_KNOWN


def units_for(collection: Collection, metrics: Sequence[Metric]) -> dict[str, Unit]:
    """One unit for each metric, over all groups."""
    return {
        found.path: unit_for(found, [e.mean for group in collection.done if (e := group.estimate(found)) is not None])
        for found in metrics
    }


def with_pointer(figure: go.Figure) -> go.Figure:
    """Hover labels that hold several lines, aligned to the left."""
    figure.update_layout(hoverlabel={"align": "left", "namelength": -1}, hovermode="closest")
    return figure


def legend_title(axis: Axis | None) -> dict[str, Any]:
    """What the colours of a legend tell apart."""
    return {"text": plain(axis.name) if axis else "", "font": {"size": 13}, "side": "top"}
