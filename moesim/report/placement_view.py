"""What `moesim placement` shows and writes: which rank holds which expert, and what that does to the load of ranks.

With `--over-training`: how placements age along a recorded training, and what placing anew costs.
Legend: L model layers with a router (prediction layers last), Z slots of all ranks, D ranks of the expert group;
I recorded steps but the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSampler
from moesim.parallel.layer_maps import LayerMaps, rank_loads, recorded_loads
from moesim.parallel.placement import EMPTY_SLOT
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.report.facts import Fact, bytes_column, count, seconds, times
from moesim.report.terminal import Screen, fact_table, indented, number_table, prints, section
from moesim.results.metrics import TrafficFacts
from moesim.results.placement import moving
from moesim.scenario import Scenario, Search
from moesim.scenario.placement import SGLANG, WRITERS, Layers
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
