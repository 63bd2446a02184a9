"""The lines of a plot: groups that differ on one axis only, with a colour, marker and dash for each line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesim.report.plots.choice import AxisKey, Drawing
from moesim.report.plots.groups import Axis, Collection, Estimate, Group
from moesim.report.plots.looks import DASHES, MARKERS, colours


@dataclass(frozen=True)
class Line:
    """Groups that differ on one axis only, in its order."""

    name: str
    colour: str
    symbol: str
    dash: str
    groups: tuple[Group, ...]


def along_axis(collection: Collection, drawing: Drawing) -> Axis:
    """The axis that a line follows: that of x, and for a metric on x the one with most values."""
    if isinstance(drawing.x, AxisKey):
        return drawing.x.axis
    return max((axis for axis in collection.axes if axis is not drawing.colour), key=lambda axis: len(axis.values))


def lines_along(collection: Collection, drawing: Drawing, along: Axis) -> list[Line]:
    """A line for every combination of the other axes; lines of one colour differ in their dashes."""
    column = collection.axes.index(along)
    members: dict[tuple[int, ...], list[Group]] = {}
    for group in collection.done:
        members.setdefault((*group.at[:column], -1, *group.at[column + 1 :]), []).append(group)
    by_colour = colours(drawing.colour)
    colour_column = collection.axes.index(drawing.colour) if drawing.colour else None
    used: dict[int, int] = {}  # how many lines of a colour there are already: they differ in their dashes
    lines = []
    for at in sorted(members):
        index = 0 if colour_column is None else at[colour_column]
        used[index] = used.get(index, -1) + 1
        others = [
            (axis, place)
            for axis, place in zip(collection.axes, at, strict=True)
            if place >= 0 and len(axis.values) > 1
        ]
        own = [axis.texts[place] for axis, place in others if axis is drawing.colour]
        rest = [f"{axis.name} {axis.texts[place]}" for axis, place in others if axis is not drawing.colour]
        lines.append(
            Line(
                name=", ".join([*own, *rest]),
                colour=by_colour[index],
                symbol=MARKERS[index % len(MARKERS)],
                dash=DASHES[used[index] % len(DASHES)],
                groups=tuple(sorted(members[at], key=lambda group: group.at[column])),
            )
        )
    return lines


def error_bars(found: Sequence[Estimate], factor: float, colour: str) -> dict[str, Any] | None:
    """Bars of the 90 % intervals, None where there are none."""
    if all(estimate.low is None for estimate in found):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if e.high is None else (e.high - e.mean) * factor for e in found],
        "arrayminus": [0.0 if e.low is None else (e.mean - e.low) * factor for e in found],
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }
