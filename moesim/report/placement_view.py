"""What `moesim placement` shows and writes: which rank holds which expert, and what that does to the load of ranks.

Behind it the figures of a report: the map of slots with copies marked, and the step by the age of its placement and by
the interval between two. With `--over-training`: how placements age along a recorded training, and what placing anew
costs.
Legend: L model layers with a router (prediction layers last), Z slots of all ranks, D ranks of the expert group;
I recorded steps but the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSampler
from moesim.parallel.layer_maps import LayerMaps
from moesim.parallel.placement import EMPTY_SLOT
from moesim.parallel.replacing import rank_loads, recorded_loads
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.report import figures
from moesim.report.facts import Fact, bytes_column, count, seconds, times
from moesim.report.terminal import Screen, fact_table, indented, number_table, prints, section
from moesim.results.metrics import TrafficFacts
from moesim.results.placement import moving
from moesim.scenario import Scenario, Search
from moesim.scenario.placement_files import SGLANG, WRITERS, Layers
from moesim.seeding import stream
from moesim.trace import RoutingTrace
from moesim.trace.metrics import imbalance


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementView:
    """The slots of all layers, and max / mean rows of ranks in one step of one routing sample.

    `contiguous_L`: had each rank neighbouring experts; None where these do not spread evenly.
    """

    scenario: Scenario
    slots_LZ: NDArray[np.int64]
    placed_L: NDArray[np.float64]
    contiguous_L: NDArray[np.float64] | None
    placing_sequences: int
    simulated_sequences: int

    @property
    def copies_L(self) -> NDArray[np.int64]:
        """Slots of the expert with most."""
        return np.array([np.bincount(slots_Z).max() for slots_Z in self.slots_LZ])


def place(scenario: Scenario, trace: RoutingTrace) -> PlacementView:
    """Place the experts and count one step. Raises UserError where the trace does not fit, or ranks differ in slots."""
    sampler = TrafficSampler(scenario, trace)
    sample = sampler.draw(stream(scenario.seed, "sample", 0))
    layers = scenario.model.moe_layers + scenario.model.mtp_layers
    maps = [sampler.map_of(layer) for layer in range(layers)]
    tables = [sampler.placement.slot_experts_DP if held is None else held.slot_experts_DP for held in maps]
    if any((table == EMPTY_SLOT).any() for table in tables):
        raise UserError(f"{scenario.name}: placement.slots: ranks have different numbers of slots, which no file holds")
    facts = TrafficFacts(scenario, [sample])
    before = facts.contiguous_load_LR
    placed_L = imbalance(facts.rank_load_LR)
    return PlacementView(
        scenario=scenario,
        slots_LZ=np.stack([table.reshape(-1) for table in tables]),
        placed_L=placed_L,
        contiguous_L=imbalance(before)
        if before is not None
        else None
        if facts.contiguous_rank_rows is None
        else placed_L,
        placing_sequences=sampler.placing_sequences[1] - sampler.placing_sequences[0],
        simulated_sequences=sampler.sequences.num_sequences,
    )


def placement_text(view: PlacementView, software: str) -> str:
    """The file of a program that serves, one of WRITERS."""
    model = view.scenario.model
    layers = Layers(
        moe_layers=model.moe_layer_numbers, num_layers=model.layers, num_ranks=view.scenario.parallelism.expert
    )
    return WRITERS[software][2](view.slots_LZ.tolist(), layers)


def placement_json(view: PlacementView) -> dict[str, Any]:
    """Plain values; lists have an entry per layer with experts, those of loads without prediction layers."""
    return {
        "scenario_name": view.scenario.name,
        "kind": view.scenario.placement.kind,
        "ranks": view.scenario.parallelism.expert,
        "slots": view.slots_LZ.shape[1],
        "experts": view.scenario.model.experts,
        "layers": list(view.scenario.model.moe_layer_numbers),
        "most_copies": view.copies_L.tolist(),
        "rank_rows": view.placed_L.tolist(),
        "rank_rows_contiguous": None if view.contiguous_L is None else view.contiguous_L.tolist(),
        "placing_sequences": view.placing_sequences,
        "simulated_sequences": view.simulated_sequences,
        SGLANG: view.slots_LZ.tolist(),
    }


@prints
def print_placement(view: PlacementView) -> Screen:
    """One screen: the sizes, and a line per layer."""
    slots, experts, ranks = view.slots_LZ.shape[1], view.scenario.model.experts, view.scenario.parallelism.expert
    lines = [
        Fact("placement", view.scenario.placement.kind, f"of {experts} experts on {ranks} ranks"),
        Fact("slots", count(slots), f"{slots // ranks} a rank, {slots - experts} of them for copies"),
    ]
    if view.placing_sequences:
        judged = f"judged on {view.simulated_sequences}"
        lines.append(Fact("made from", f"{view.placing_sequences} sequences", judged))
    if view.contiguous_L is not None:
        lines.append(Fact("ranks, contiguous", times(float(view.contiguous_L.mean())), "busiest / mean, whole step"))
    lines.append(Fact("ranks, as placed", times(float(view.placed_L.mean())), "busiest / mean, whole step"))
    before = [""] * len(view.placed_L) if view.contiguous_L is None else [f"{v:.3f}" for v in view.contiguous_L]
    rows = [
        (str(layer), str(copies), contiguous, f"{placed:.3f}")
        for layer, copies, contiguous, placed in zip(
            view.scenario.model.moe_layer_numbers, view.copies_L, before, view.placed_L, strict=False
        )
    ]
    head = ("layer", "most slots of an expert", "contiguous", "as placed")
    return [indented(fact_table(lines)), section("busiest rank / mean, rows of the step", number_table(head, rows))]


@dataclass(frozen=True, kw_only=True)
class PlacementAges:
    """One recorded step: max / mean rows of ranks, mean over the layers of the trace, under placements of several ages.

    `first`: placed at the first recorded step, `previous`: at the one before, `anew`: at this one. `contiguous`:
    neighbouring experts; None where they do not spread evenly. `moved_bytes`, `moving_s`: from the previous placement
    to the new one, all ranks, and as long as the slowest takes with nothing beside it; the ranks of a node are
    renumbered so that experts stay.
    """

    step: int
    contiguous: float | None
    first: float
    previous: float
    anew: float
    moved_bytes: float
    moving_s: float


def compare_placement_ages(scenario: Scenario, trace: RoutingTrace) -> list[PlacementAges]:
    """Every recorded step but the first. Raises UserError where nothing is placed by rows, or one step was recorded."""
    loads = recorded_loads(trace)
    sampler = TrafficSampler(scenario, trace)
    if not sampler.placing_sequences[1]:
        what = f"placement.kind: {scenario.placement.kind} places by no rows"
        raise UserError(f"{scenario.name}: {what}; --over-training needs eplb")
    if isinstance(scenario.placement, Search):
        what = "placement.kind: search looks at tokens, of which a trace keeps the last step's alone"
        raise UserError(f"{scenario.name}: {what}; use eplb with --over-training")
    if len(loads) < 2:
        raise UserError(f"{scenario.name}: the trace has one recorded step; --over-training compares several")
    steps = sorted(loads)
    maps = {step: sampler.maps_of(loads[step]) for step in steps}
    fabric = scenario_fabric(scenario, scenario_kernels(scenario))
    found = []
    for before, step in pairwise(steps):
        moved, moving_s = moving(sampler, fabric, maps[before], maps[step])
        found.append(
            PlacementAges(
                step=step,
                contiguous=_contiguous(scenario, loads[step]),
                first=_placed(maps[steps[0]], loads[step]),
                previous=_placed(maps[before], loads[step]),
                anew=_placed(maps[step], loads[step]),
                moved_bytes=moved,
                moving_s=moving_s,
            )
        )
    return found


def _placed(maps: LayerMaps, load_LE: NDArray[np.float64]) -> float:
    loads = [rank_loads(held, load_E) for held, load_E in zip(maps.maps, load_LE, strict=True)]
    return float(imbalance(np.stack(loads)).mean())


def _contiguous(scenario: Scenario, load_LE: NDArray[np.float64]) -> float | None:
    ranks = scenario.parallelism.expert
    if load_LE.shape[1] % ranks:
        return None
    return float(imbalance(load_LE.reshape(len(load_LE), ranks, -1).sum(axis=2)).mean())


def drift_json(aged: Sequence[PlacementAges]) -> list[dict[str, Any]]:
    """Plain values, one mapping per recorded step."""
    return [vars(each) for each in aged]


@prints
def print_drift(aged: Sequence[PlacementAges]) -> Screen:
    """A line per recorded step."""
    in_bytes = bytes_column([each.moved_bytes for each in aged])
    rows = [
        (
            str(each.step),
            "" if each.contiguous is None else f"{each.contiguous:.3f}",
            f"{each.first:.3f}",
            f"{each.previous:.3f}",
            f"{each.anew:.3f}",
            in_bytes(each.moved_bytes),
            seconds(each.moving_s),
        )
        for each in aged
    ]
    head = ("training step", "contiguous", "placed at first", "one record ago", "anew", "moved", "in")
    title = "busiest rank / mean as the router trains, by when experts were placed"
    return [section(title, number_table(head, rows))]


_LARGEST_LABELLED = 2_000  # slots of all layers up to which each shows its expert
_COPIES = ("#e8e8e6", "#c6dbef", "#6baed6", "#2171b5", "#08306b")  # of one slot, two, three, four, five or more
_EMPTY = -1
_LINE = "#2474b5"


def _milliseconds(points: Sequence[Mapping[str, Any]], key: str = "step_time_s") -> list[float]:
    return [1e3 * point[key] for point in points]


def by_age(found: Mapping[str, Any]) -> go.Figure:
    """Simulated steps by the age of their placement, beside the step with neighbouring experts."""
    figure = figures.empty_figure(height=340, x="training steps since experts were placed", y="ms of a step")
    points = found["ages"]
    figure.add_scatter(
        x=[point["age"] for point in points],
        y=_milliseconds(points),
        mode="markers",
        name="simulated",
        marker={"color": _LINE, "size": 8},
        hovertemplate="%{x:.4g} steps ago: %{y:.4g} ms<extra></extra>",
    )
    figure.add_scatter(
        x=[point["age"] for point in points],
        y=_milliseconds(points, "mean_step_time_s"),
        mode="lines",
        name="nearest curve that never falls",
        line={"color": _LINE, "width": 2},
        hoverinfo="skip",
    )
    if found["contiguous_step_time_s"] is not None:
        _level(figure, found["contiguous_step_time_s"], (0, points[-1]["age"]), name="experts in order", dash="dot")
    figure.update_layout(showlegend=True)
    return figure


def by_interval(found: Mapping[str, Any]) -> go.Figure:
    """Mean step by interval, with those of experts placed once and in order, the best and the chosen one marked."""
    figure = figures.empty_figure(
        height=340, x="training steps between two placings", y="ms of a step, moving included"
    )
    points = found["intervals"]
    figure.add_scatter(
        x=[point["every"] for point in points],
        y=_milliseconds(points),
        mode="lines+markers",
        name="placed anew",
        line={"color": _LINE, "width": 2},
        hovertemplate="every %{x} steps: %{y:.4g} ms<extra></extra>",
    )
    ends = (points[0]["every"], points[-1]["every"])
    _level(figure, found["never_step_time_s"], ends, name="placed once", dash="dash")
    if found["contiguous_step_time_s"] is not None:
        _level(figure, found["contiguous_step_time_s"], ends, name="experts in order", dash="dot")
    marks = [(found["every"], found["step_time_s"], "chosen", "#1d2229")]
    if found["best_every"] is not None:
        marks.append((found["best_every"], found["best_step_time_s"], "best", "#b3256b"))
    for every, step_s, name, colour in marks:
        figure.add_scatter(
            x=[every],
            y=[1e3 * step_s],
            mode="markers",
            name=f"{name}: every {every} steps",
            marker={"color": colour, "size": 11, "symbol": "diamond"},
        )
    figure.update_xaxes(type="log")
    figure.update_layout(showlegend=True)
    return figure


def _level(figure: go.Figure, step_s: float, ends: tuple[float, float], *, name: str, dash: str) -> None:
    figure.add_scatter(
        x=list(ends),
        y=[1e3 * step_s] * 2,
        mode="lines",
        name=name,
        line={"color": "#7a828e", "width": 1.5, "dash": dash},
        hovertemplate=f"{name}: %{{y:.4g}} ms<extra></extra>",
    )


def slot_map(slots_LDP: NDArray[np.int64], *, first_layer: int) -> go.Figure:
    """Heat map of layer x slot, ranks side by side with lines between them."""
    layers, ranks, per_rank = slots_LDP.shape
    slots_LZ = slots_LDP.reshape(layers, -1)
    copies_LZ = copies_of_slots(slots_LZ)
    steps = len(_COPIES)
    scale = [(edge / steps, colour) for step, colour in enumerate(_COPIES) for edge in (step, step + 1)]
    figure = figures.layer_map(layers, x="rank")
    show = slots_LZ.size <= _LARGEST_LABELLED
    rank_LZ = np.broadcast_to(np.arange(ranks).repeat(per_rank), slots_LZ.shape)
    figure.add_heatmap(
        y=np.arange(first_layer, first_layer + layers),
        z=np.where(copies_LZ > 0, np.minimum(copies_LZ, steps), np.nan),
        customdata=np.stack([slots_LZ, rank_LZ, copies_LZ], 2),
        text=np.where(slots_LZ == _EMPTY, "", slots_LZ.astype(str)) if show else None,
        texttemplate="%{text}" if show else None,
        zmin=0.5,
        zmax=steps + 0.5,
        colorscale=scale,
        colorbar=figures.colour_bar(
            "slots of the expert",
            tickvals=list(range(1, steps + 1)),
            ticktext=[*map(str, range(1, steps)), f"\u2265 {steps}"],
        ),
        hovertemplate="layer %{y}, rank %{customdata[1]}<br>expert %{customdata[0]}, in %{customdata[2]} slots"
        "<extra></extra>",
    )
    every = max(1, -(-ranks // 16))
    named = np.arange(0, ranks, every)
    figure.update_xaxes(tickvals=named * per_rank + (per_rank - 1) / 2, ticktext=[str(rank) for rank in named])
    for rank in range(1, ranks):
        figure.add_vline(x=rank * per_rank - 0.5, line={"width": 2, "color": "#ffffff" if ranks > 16 else "#1d2229"})
    return figure


def copies_of_slots(slots_LZ: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many slots of its layer hold the expert of each slot, 0 for an empty one."""
    copies = [np.bincount(slots_Z + 1)[slots_Z + 1] * (slots_Z != _EMPTY) for slots_Z in slots_LZ]
    return np.stack(copies)
