"""`moesim placement --over-training`: how placements age along a recorded training, and what placing anew costs.

Legend: I recorded steps but the first, L layers of the trace, D ranks of an expert group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSampler
from moesim.parallel.layer_maps import LayerMaps
from moesim.parallel.replacement import rank_loads, recorded_loads
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.report.facts import bytes_column, seconds
from moesim.report.screen import number_table, section, show
from moesim.results.placement import moving
from moesim.scenario import Scenario, Search
from moesim.trace import RoutingTrace
from moesim.trace.metrics import imbalance


@dataclass(frozen=True, kw_only=True)
class Aged:
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


def age_placements(scenario: Scenario, trace: RoutingTrace) -> list[Aged]:
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
            Aged(
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


def drift_json(aged: Sequence[Aged]) -> list[dict[str, Any]]:
    """Plain values, one mapping per recorded step."""
    return [vars(each) for each in aged]


def print_drift(aged: Sequence[Aged]) -> None:
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
    show(
        lambda options: [
            section("busiest rank / mean as the router trains, by when experts were placed", number_table(head, rows))
        ]
    )
