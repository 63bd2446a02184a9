"""The figures of a report: numbers in, plotly figures out. No text of a user ever enters a figure.

The last are of the whole step: its pipeline as a Gantt chart, and the memory of its pipeline ranks.
Legend: C attribution categories, E experts, L layers, N spans, R ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moesim.report.categories import FAMILIES, PARTS, PASSES, category, in_order
from moesim.report.passes import Bar, Window
from moesim.trace import TrainingCurves

FloatArray = NDArray[np.float64]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
_INK = "#3d444d"
_GRID = "rgba(128,128,128,0.25)"
_LOOK: dict[str, Any] = {  # given whole to a new figure, as changing one takes ten times as long
    "margin": {"l": 70, "r": 20, "t": 16, "b": 56},
    "font": {"family": FONT, "size": 13, "color": _INK},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel": {"bgcolor": "#1d2229", "bordercolor": "#1d2229", "font": {"color": "#ffffff", "family": FONT}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#a3aab4", "activecolor": "#7a828e"},
}
_AXIS: dict[str, Any] = {"title": {"font": {"size": 13}}, "gridcolor": _GRID, "zeroline": False, "automargin": True}
_MAX_LABELLED_RANKS = 16
_HOT_AND_COLD = [  # blue is cold, orange is hot, grey is the mean: distinct under every common colour blindness
    (0.0, "#08306b"),
    (0.25, "#4292c6"),
    (0.5, "#e8e8e6"),
    (0.75, "#f28e2b"),
    (1.0, "#7f2704"),
]
_LEAST_SPAN = 0.1  # of the mean traffic, on both sides of it: equal traffic has one colour
_LOAD_TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def empty_figure(*, height: int, x: str = "", y: str = "") -> go.Figure:
    """A figure in the report's look, `height` pixels high, with titled axes and nothing in it."""
    return go.Figure(layout={"height": height, **_LOOK, "xaxis": _axis(x), "yaxis": _axis(y)})


def _axis(title: str) -> dict[str, Any]:
    return {**_AXIS, "title": {**_AXIS["title"], "text": title}}


def styled(figure: go.Figure, *, height: int) -> go.Figure:
    """The report's look on a figure that may have several panels."""
    figure.update_layout(height=height, **_LOOK)
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(**_AXIS)
    return figure


def colour_bar(title: str, **more: Any) -> dict[str, Any]:
    """The bar beside a heat map that says what its colours are."""
    return {"title": {"text": title, "side": "right", "font": {"size": 13}}, "thickness": 14, "outlinewidth": 0} | more


def time_unit(seconds: float) -> tuple[float, str]:
    """(units per second, name) for an axis that is `seconds` long."""
    return (1.0, "seconds") if seconds >= 10 else (1e3, "milliseconds")


def attribution(
    attribution_s: Mapping[str, float], balanced_s: Mapping[str, float], critical_s: Mapping[str, float]
) -> go.Figure:
    """Stacked bars: the step as routed, with the same rows spread evenly, and its critical path."""
    return steps((("as routed", attribution_s), ("spread evenly", balanced_s), ("critical path", critical_s)))


def steps(named: Sequence[tuple[str, Mapping[str, float]]]) -> go.Figure:
    """A stacked bar of attribution for every (name, seconds by category), the first one on top."""
    rows = tuple(reversed(named))
    scale, unit = time_unit(max(sum(parts.values()) for _, parts in rows))
    figure = empty_figure(height=110 + 60 * len(rows), x=f"{unit} of one step")
    keys = [part.key for part, _ in in_order({key: 1.0 for _, parts in rows for key in parts if parts[key] > 0})]
    for key in keys:
        part = category(key)
        values = np.array([scale * parts.get(key, 0.0) for _, parts in rows])
        shares = np.array([parts.get(key, 0.0) / sum(parts.values()) for _, parts in rows])
        figure.add_bar(
            y=[name for name, _ in rows],
            x=values,
            orientation="h",
            name=part.label,
            marker={"color": part.colour, "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}},
            customdata=shares,
            hovertemplate=f"{part.label}<br>%{{x:.4g}} {unit}, %{{customdata:.1%}}<extra>%{{y}}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35, showlegend=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(showgrid=False, tickfont={"size": 14})
    return figure


def load_map(load_LX: FloatArray, *, first_layer: int, of: str = "expert") -> go.Figure:
    """Heat map of model layer x expert (or rank: `of`): rows / mean rows of the layer; colours follow the logarithm.

    `first_layer` is the number of the first layer with a router.
    """
    layers, columns = load_LX.shape
    figure = layer_map(layers, x=of)
    colour_LX = np.log2(np.clip(load_LX, _LOAD_TICKS[0], _LOAD_TICKS[-1]))
    figure.add_heatmap(
        y=np.arange(first_layer, first_layer + layers),
        z=colour_LX.astype(np.float32),
        customdata=load_LX.astype(np.float32),
        zmin=np.log2(_LOAD_TICKS[0]),
        zmax=np.log2(_LOAD_TICKS[-1]),
        colorscale=_HOT_AND_COLD,
        colorbar=colour_bar(
            "rows / mean", tickvals=np.log2(_LOAD_TICKS), ticktext=["≤ ⅛", "¼", "½", "1", "2", "4", "≥ 8"]
        ),
        hovertemplate=f"layer %{{y}}, {of} %{{x}}<br>%{{customdata:.3f}} of the mean<extra></extra>",
    )
    figure.update_xaxes(range=[-0.5, columns - 0.5])
    return figure


def layer_map(layers: int, *, x: str) -> go.Figure:
    """An empty heat map with a row per layer of the model, the first on top."""
    figure = empty_figure(height=int(np.clip(100 + 16 * layers, 260, 900)), x=x, y="layer of the model")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed", tickformat="d")
    if layers <= _MAX_LABELLED_RANKS:
        figure.update_yaxes(dtick=1)
    return figure


def traffic(bytes_RR: FloatArray) -> go.Figure:
    """Heat map of gigabytes that each rank sends to each other rank in the dispatches of one step."""
    ranks = len(bytes_RR)
    figure = empty_figure(height=460, x="to rank", y="from rank")
    shown_RR = np.where(np.eye(ranks, dtype=bool), np.nan, bytes_RR / 1e9)
    sent = shown_RR[~np.isnan(shown_RR)]
    mean = float(sent.mean()) if len(sent) else 0.0
    figure.add_heatmap(
        z=shown_RR.astype(np.float32),
        zmin=min(float(sent.min(initial=mean)), (1 - _LEAST_SPAN) * mean),
        zmax=max(float(sent.max(initial=mean)), (1 + _LEAST_SPAN) * mean),
        colorscale="Cividis",
        xgap=1 if ranks <= 64 else 0,
        ygap=1 if ranks <= 64 else 0,
        colorbar=colour_bar("GB per step"),
        hovertemplate="rank %{y} to rank %{x}<br>%{z:.4g} GB<extra></extra>",
    )
    _rank_axis(figure.update_xaxes, ranks)
    _rank_axis(figure.update_yaxes, ranks)
    figure.update_xaxes(showgrid=False, constrain="domain")
    figure.update_yaxes(showgrid=False, autorange="reversed", scaleanchor="x", constrain="domain")
    return figure


def waits(waits_RR: FloatArray, ranks_R: NDArray[np.int64]) -> go.Figure:
    """Heat map of milliseconds that each rank [R] waited for each other one and, in the last column, for others."""
    ranks = len(waits_RR)
    figure = empty_figure(height=int(np.clip(160 + 34 * ranks, 280, 700)), x="for rank", y="rank waits")
    names = [str(rank) for rank in ranks_R]
    figure.add_heatmap(
        x=[*names, "others"],
        y=names,
        z=(1e3 * waits_RR).astype(np.float32),
        colorscale=[(0.0, "#f4f4f2"), (1.0, FAMILIES["waiting"])],
        xgap=1 if ranks <= 64 else 0,
        ygap=1 if ranks <= 64 else 0,
        colorbar={"title": {"text": "ms per step", "side": "right", "font": {"size": 13}}, "thickness": 14},
        hovertemplate="rank %{y} waits %{z:.4g} ms for %{x}<extra></extra>",
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure


def _rank_axis(update: Any, ranks: int) -> None:
    update(tickformat="d", **({"dtick": 1} if ranks <= _MAX_LABELLED_RANKS else {}))


def rank_time(seconds_CR: FloatArray, keys: Sequence[str]) -> go.Figure:
    """Stacked bars per rank: milliseconds of the step by family (compute, communication, waiting, overhead)."""
    ranks = seconds_CR.shape[1]
    figure = empty_figure(height=320, x="rank", y="ms of one step")
    families = np.array([category(key).family for key in keys])
    for family, colour in FAMILIES.items():
        value_R = 1e3 * seconds_CR[families == family].sum(axis=0)
        figure.add_bar(
            x=np.arange(ranks),
            y=value_R,
            name=family,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"rank %{{x}}: {family} %{{y:.4g}} ms<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.15 if ranks <= 64 else 0)
    _rank_axis(figure.update_xaxes, ranks)
    return figure


def losses(curves: TrainingCurves) -> go.Figure:
    """Cross entropy of the thin model while its router trained."""
    figure = empty_figure(height=320, x="training step", y="loss, nats per byte")
    figure.add_scatter(
        x=curves.steps,
        y=curves.train_loss,
        name="training text",
        mode="lines",
        line={"color": FAMILIES["compute"], "width": 1.5},
    )
    figure.add_scatter(
        x=curves.validation_steps,
        y=curves.validation_loss,
        name="held-out text",
        mode="lines+markers",
        line={"color": FAMILIES["communication"], "width": 2},
        marker={"size": 7},
    )
    figure.update_traces(hovertemplate="step %{x}: %{y:.4f}<extra>%{fullData.name}</extra>")
    return figure


def training_imbalance(curves: TrainingCurves) -> go.Figure:
    """Max / mean expert load of each training step, averaged over layers."""
    figure = empty_figure(height=320, x="training step", y="busiest expert / mean")
    figure.add_scatter(
        x=curves.steps,
        y=curves.imbalance,
        mode="lines",
        line={"color": FAMILIES["waiting"], "width": 1.5},
        showlegend=False,
        hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )
    return _with_perfect_line(figure)


def _with_perfect_line(figure: go.Figure) -> go.Figure:
    figure.add_hline(y=1.0, line={"dash": "dot", "width": 1, "color": "#808080"})
    return figure


def layer_imbalance(imbalance_by_step: Mapping[int, FloatArray]) -> go.Figure:
    """Busiest expert / mean per layer of the trace, a group of bars per recorded step."""
    figure = empty_figure(height=320, x="layer of the trace", y="busiest expert / mean")
    last = max(imbalance_by_step)
    for step, value_L in imbalance_by_step.items():
        figure.add_bar(
            x=np.arange(len(value_L)),
            y=value_L,
            name=f"after {step} steps",
            marker={"color": FAMILIES["waiting"] if step == last else "#a3aab4"},
            hovertemplate="layer %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.4, showlegend=True)
    figure.update_xaxes(dtick=1)
    return _with_perfect_line(figure)


def timeline(window: Window) -> go.Figure:
    """One row per rank, computation above and transfers below, coloured by category."""
    ranks = window.start_NR.shape[1]
    origin = float(window.start_NR.min())
    figure = empty_figure(
        height=int(np.clip(150 + 40 * ranks, 260, 1000)),
        x=f"microseconds since {1e3 * origin:.4g} ms of the step",
        y="rank",
    )
    categories_N = np.array(window.categories_N)
    for part, _ in in_order(dict.fromkeys(window.categories_N, 1.0)):
        rows_N = np.flatnonzero(categories_N == part.key)
        lane_NR = np.where(window.on_network_N[rows_N], 0.2, -0.2)[:, None] + np.arange(ranks)
        figure.add_bar(
            y=lane_NR.ravel(),
            base=1e6 * (window.start_NR[rows_N] - origin).ravel(),
            x=1e6 * (window.finish_NR[rows_N] - window.start_NR[rows_N]).ravel(),
            width=0.36,
            orientation="h",
            name=part.label.removesuffix(", exposed"),
            marker={"color": part.colour, "line": {"width": 0.5, "color": "rgba(255,255,255,0.6)"}},
            customdata=np.repeat(np.array(window.names_N)[rows_N], ranks),
            hovertemplate="%{customdata}: %{x:.4g} us from %{base:.6g} us<extra></extra>",
        )
    figure.update_layout(barmode="overlay", showlegend=True)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    _rank_axis(figure.update_yaxes, ranks)
    return figure


_MAX_NUMBERED = 16  # micro-batches up to which bars carry their numbers


def gantt(bars: Sequence[Bar]) -> go.Figure:
    """A row per pipeline rank, first stage on top; the gaps are bubbles."""
    num_ranks = 1 + max(bar.pipeline_rank for bar in bars)
    numbered = len({m for bar in bars for m in bar.micro_batches}) <= _MAX_NUMBERED
    scale, unit = time_unit(max(bar.finish for bar in bars))
    figure = empty_figure(
        height=int(np.clip(170 + 34 * num_ranks, 240, 900)), x=f"{unit} of the step", y="pipeline rank"
    )
    for kind, (label, colour) in PASSES.items():
        chosen = [bar for bar in bars if bar.kind == kind]
        if not chosen:
            continue
        names = [" and ".join(str(m) for m in bar.micro_batches if m >= 0) for bar in chosen]
        hover = [f"{label}, micro-batch {name}" if name else label for name in names]
        figure.add_bar(
            y=[bar.pipeline_rank for bar in chosen],
            base=[scale * bar.start for bar in chosen],
            x=[scale * (bar.finish - bar.start) for bar in chosen],
            width=0.8,
            orientation="h",
            name=label,
            marker={"color": colour, "line": {"width": 0.5 if numbered else 0, "color": "rgba(255,255,255,0.7)"}},
            text=[name.replace(" and ", "+") for name in names] if numbered else None,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=hover,
            hovertemplate="%{customdata}: %{x:.4g} from %{base:.6g} " + unit + "<extra>pipeline rank %{y}</extra>",
        )
    figure.update_layout(barmode="overlay", showlegend=True, uniformtext={"minsize": 8, "mode": "hide"})
    figure.update_xaxes(range=[0, scale * max(bar.finish for bar in bars)])
    figure.update_yaxes(autorange="reversed", showgrid=False, tickformat="d", dtick=1)
    return figure


def memory(parts: Sequence[Mapping[str, float]], capacity_bytes: Sequence[float]) -> go.Figure:
    """Stacked bars in GB per pipeline rank by kind of memory, with the capacity of its GPU."""
    figure = empty_figure(
        height=int(np.clip(170 + 34 * len(parts), 240, 900)), x="GB on the fullest rank", y="pipeline rank"
    )
    ranks = list(range(len(parts)))
    for name, colour in PARTS.items():
        values = [part.get(name, 0.0) / 1e9 for part in parts]
        if any(values):
            figure.add_bar(
                y=ranks,
                x=values,
                orientation="h",
                width=0.7,
                name=name,
                marker={"color": colour, "line": {"width": 0.5, "color": "rgba(255,255,255,0.7)"}},
                hovertemplate=f"{name}: %{{x:.4g}} GB<extra>pipeline rank %{{y}}</extra>",
            )
    for rank, capacity in zip(ranks, capacity_bytes, strict=True):
        figure.add_shape(
            type="line", x0=capacity / 1e9, x1=capacity / 1e9, y0=rank - 0.45, y1=rank + 0.45,
            line={"color": "#b3256b", "width": 3},
        )  # fmt: skip
    figure.add_scatter(
        x=[None], y=[None], mode="lines", name="memory of the GPU", line={"color": "#b3256b", "width": 3}
    )
    figure.update_layout(barmode="stack", showlegend=True, legend={"traceorder": "normal"})
    figure.update_xaxes(
        rangemode="tozero", range=[0, 1.04 * max([*capacity_bytes, *(sum(p.values()) for p in parts)]) / 1e9]
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, tickformat="d", dtick=1)
    return figure
