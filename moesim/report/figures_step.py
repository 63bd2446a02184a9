"""Figures of the whole step: its pipeline as a Gantt chart, and the memory of its pipeline ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from moesim.report import span_views
from moesim.report.figures import blank, time_unit
from moesim.report.span_views import Bar

PASSES = {  # kind -> label, colour: blue, orange, green-blue and purple differ under every common colour blindness
    span_views.FORWARD: ("forward", "#2474b5"),
    span_views.BACKWARD: ("backward", "#e07b1a"),
    span_views.INPUT: ("backward, inputs", "#b85300"),
    span_views.WEIGHT: ("backward, weights", "#f6bf7e"),
    span_views.PAIR: ("forward and backward overlapped", "#7a4fa3"),
    span_views.REDUCE: ("gradients and parameters between ranks", "#d9b310"),
    span_views.UPDATE: ("optimizer", "#4d5561"),
}
PARTS = {  # kind of memory -> colour
    "weights": "#0b4f8a",
    "gradients": "#2474b5",
    "optimizer states": "#7db9ea",
    "activations": "#b85300",
    "dispatch buffers": "#e07b1a",
    "inside one layer": "#f6bf7e",
    "allocator": "#a3aab4",
    "reserved": "#7a828e",
}
_MAX_NUMBERED = 16  # micro-batches up to which bars carry their numbers


def gantt(bars: Sequence[Bar]) -> go.Figure:
    """A row per pipeline rank, first stage on top; the gaps are bubbles."""
    num_ranks = 1 + max(bar.pipeline_rank for bar in bars)
    numbered = len({m for bar in bars for m in bar.micro_batches}) <= _MAX_NUMBERED
    scale, unit = time_unit(max(bar.finish for bar in bars))
    figure = blank(height=int(np.clip(170 + 34 * num_ranks, 240, 900)), x=f"{unit} of the step", y="pipeline rank")
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
    figure = blank(height=int(np.clip(170 + 34 * len(parts), 240, 900)), x="GB on the fullest rank", y="pipeline rank")
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
