"""The maps of all layers, where experts have copies, layers differ or a placement is made from the trace.

Legend: E experts, L thin layers of the trace, D ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.by_speed import place_by_speed
from moesim.parallel.eplb import balance_experts
from moesim.parallel.expert_map import ExpertMap, SlotChoice, Split
from moesim.parallel.placement import slot_table
from moesim.scenario import Scenario
from moesim.scenario.placement import BySpeed, Eplb, Explicit, MadeFromRows, keeps_groups

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """One map per counted layer: per layer of the model where `per_model_layer`, else per layer of the trace.

    `moved`: model layers that share a layer of the trace have the same experts together, on other ranks (see
    `moesim.parallel.relabelling`); a map that was given holds as it is.
    """

    maps: tuple[ExpertMap, ...]
    per_model_layer: bool
    moved: bool
    split: Split
    _choices: dict[tuple[int, bytes], SlotChoice] = field(init=False, default_factory=dict, repr=False)

    def choice(self, layer: int, node_of_rank_D: Ints) -> SlotChoice:
        """How rows find their slot in a counted layer, in a group whose ranks lie on these nodes; made once."""
        key = (layer, node_of_rank_D.tobytes())
        if key not in self._choices:
            self._choices[key] = self.maps[layer].choice(self.split, node_of_rank_D)
        return self._choices[key]


def layer_maps(
    scenario: Scenario, *, num_groups: int, num_layers: int, node_of_rank_D: Ints, load_LE: Callable[[], NDArray[Any]]
) -> LayerMaps | None:
    """None where every expert has one slot, the same in all layers, and no router group is torn.

    `num_groups`: of the trace's router; `num_layers`: of the trace. `load_LE` gives the rows to place by.
    """
    placement, model, num_ranks = scenario.placement, scenario.model, scenario.parallelism.expert
    experts = model.experts
    if isinstance(placement, MadeFromRows):
        if isinstance(placement, BySpeed):
            num_slots, speed_D = experts + placement.redundant_experts, np.array(placement.speeds)
            slot_LX = place_by_speed(load_LE(), num_slots=num_slots, speed_D=speed_D)
        else:
            assert isinstance(placement, Eplb)
            slot_LX = _balanced(placement, load_LE(), num_groups=num_groups, node_of_rank_D=node_of_rank_D)
        maps = tuple(ExpertMap(slot_X.reshape(num_ranks, -1), experts) for slot_X in slot_LX)
        # Experts of a slow rank stay on it.
        return LayerMaps(maps, per_model_layer=False, moved=isinstance(placement, Eplb), split=placement.split)
    slots = placement.fixed_slots(num_experts=experts, num_ranks=num_ranks)
    if slots is None:
        assert isinstance(placement, Explicit)
        given = _from_file(placement, scenario)
        return LayerMaps(given, per_model_layer=True, moved=False, split=placement.split)
    even = len(set(map(len, slots))) == 1
    if sum(map(len, slots)) == experts and (num_groups == 1 or (even and keeps_groups(slots, num_groups=num_groups))):
        return None
    one = ExpertMap(slot_table(slots), experts)
    moved = not isinstance(placement, Explicit)
    return LayerMaps((one,) * num_layers, per_model_layer=False, moved=moved, split=placement.split)


def _balanced(placement: Eplb, load_LE: NDArray[Any], *, num_groups: int, node_of_rank_D: Ints) -> Ints:
    """By EPLB; hierarchical only where each node holds as many ranks, one node's behind the other's."""
    nodes = np.bincount(node_of_rank_D)
    in_order = len(set(nodes.tolist())) == 1 and (np.diff(node_of_rank_D) >= 0).all()
    return balance_experts(
        load_LE,
        num_slots=load_LE.shape[1] + placement.redundant_experts,
        num_groups=num_groups,
        num_nodes=len(nodes) if placement.policy == "auto" and in_order else 1,
        num_ranks=len(node_of_rank_D),
    )


def _from_file(placement: Explicit, scenario: Scenario) -> tuple[ExpertMap, ...]:
    """The maps of the model's layers with experts; of a model with fewer layers, as pilots have, those of the last."""
    model, num_ranks = scenario.model, scenario.parallelism.expert
    found = placement.read_file()
    lists = found.of_layers(model.moe_layer_numbers, num_layers=model.layers)
    lists = found.slots[-len(model.moe_layer_numbers) :] if lists is None else lists
    return tuple(ExpertMap(np.array(slots).reshape(num_ranks, -1), model.experts) for slots in lists)
