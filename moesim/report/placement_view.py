"""What `moesim placement` shows and writes: which rank holds which expert, and what that does to the load of ranks.

Legend: L model layers with a router (prediction layers last), X slots of all ranks, D ranks of the expert group.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSampler
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.placement import EMPTY_SLOT
from moesim.report.facts import Fact, count, times
from moesim.report.screen import fact_table, indented, number_table, section, show
from moesim.results.metrics import TrafficFacts
from moesim.scenario import Scenario
from moesim.scenario.placement_file import SGLANG, WRITERS, Layers
from moesim.seeding import stream
from moesim.trace import RoutingTrace
from moesim.trace.metrics import imbalance


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementView:
    """The slots of all layers, and max / mean rows of ranks in one step of one routing sample.

    `contiguous_L`: had each rank neighbouring experts; None where these do not spread evenly.
    """

    scenario: Scenario
    slots_LX: NDArray[np.int64]
    placed_L: NDArray[np.float64]
    contiguous_L: NDArray[np.float64] | None
    placing_sequences: int
    simulated_sequences: int

    @property
    def copies_L(self) -> NDArray[np.int64]:
        """Slots of the expert with most."""
        return np.array([np.bincount(slots_X).max() for slots_X in self.slots_LX])


def place(scenario: Scenario, trace: RoutingTrace) -> PlacementView:
    """Place the experts and count one step. Raises UserError where the trace does not fit, or ranks differ in slots."""
    sampler = TrafficSampler(scenario, trace)
    sample = sampler.draw(stream(scenario.seed, "sample", 0))
    layers = scenario.model.moe_layers + scenario.model.mtp_layers
    tables = [_table(sampler.map_of(layer), sampler) for layer in range(layers)]
    if any((table == EMPTY_SLOT).any() for table in tables):
        raise UserError(f"{scenario.name}: placement.slots: ranks have different numbers of slots, which no file holds")
    facts = TrafficFacts(scenario, [sample])
    before = facts.contiguous_load_LR
    placed_L = imbalance(facts.rank_load_LR)
    return PlacementView(
        scenario=scenario,
        slots_LX=np.stack([table.reshape(-1) for table in tables]),
        placed_L=placed_L,
        contiguous_L=placed_L if before is None and facts.contiguous_rank_rows is not None else _imbalance(before),
        placing_sequences=sampler.placing_sequences[1] - sampler.placing_sequences[0],
        simulated_sequences=sampler.sequences.num_sequences,
    )


def _table(held: ExpertMap | None, sampler: TrafficSampler) -> NDArray[np.int64]:
    return sampler.placement.slot_experts_DP if held is None else held.slot_experts_DP


def _imbalance(load_LR: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if load_LR is None else imbalance(load_LR)


def placement_text(view: PlacementView, software: str) -> str:
    """The file of a program that serves, one of WRITERS."""
    model = view.scenario.model
    layers = Layers(
        moe_layers=model.moe_layer_numbers, num_layers=model.layers, num_ranks=view.scenario.parallelism.expert
    )
    return WRITERS[software][2](view.slots_LX.tolist(), layers)


def placement_json(view: PlacementView) -> dict[str, Any]:
    """Plain values; lists have an entry per layer with experts, those of loads without prediction layers."""
    return {
        "scenario_name": view.scenario.name,
        "kind": view.scenario.placement.kind,
        "ranks": view.scenario.parallelism.expert,
        "slots": view.slots_LX.shape[1],
        "experts": view.scenario.model.experts,
        "layers": list(view.scenario.model.moe_layer_numbers),
        "most_copies": view.copies_L.tolist(),
        "rank_rows": view.placed_L.tolist(),
        "rank_rows_contiguous": None if view.contiguous_L is None else view.contiguous_L.tolist(),
        "placing_sequences": view.placing_sequences,
        "simulated_sequences": view.simulated_sequences,
        SGLANG: view.slots_LX.tolist(),
    }


def print_placement(view: PlacementView) -> None:
    """One screen: the sizes, and a line per layer."""
    show(lambda options: [_head(view), _layers(view)])


def _head(view: PlacementView) -> Any:
    slots, experts, ranks = view.slots_LX.shape[1], view.scenario.model.experts, view.scenario.parallelism.expert
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
    return indented(fact_table(lines))


def _layers(view: PlacementView) -> Any:
    before = [""] * len(view.placed_L) if view.contiguous_L is None else [f"{v:.3f}" for v in view.contiguous_L]
    rows = [
        (str(layer), str(copies), contiguous, f"{placed:.3f}")
        for layer, copies, contiguous, placed in zip(
            view.scenario.model.moe_layer_numbers, view.copies_L, before, view.placed_L, strict=False
        )
    ]
    head = ("layer", "most slots of an expert", "contiguous", "as placed")
    return section("busiest rank / mean, rows of the step", number_table(head, rows))
