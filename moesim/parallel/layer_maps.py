"""The maps of all layers, where experts have copies, layers differ or a placement is made from the trace.

Legend: E experts, L thin layers of the trace, D ranks of an expert group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.balancers import Prices, balance_experts, place_by_speed, search_ranks, speeds_of_group
from moesim.parallel.expert_map import ExpertMap, SlotChoice, Split, balanced_weights
from moesim.parallel.memory.parameters import expert_slice_parameters
from moesim.parallel.placement import slot_table
from moesim.parallel.traffic import token_bytes
from moesim.scenario import Scenario
from moesim.scenario.cluster import NIC_BANDWIDTH
from moesim.scenario.placement import BySpeed, Eplb, Explicit, MadeFromRows, Search, keeps_groups
from moesim.seeding import stream

Ints = NDArray[np.int64]


MOST_TOKENS = 16_384  # that a search looks at
GEMM_SHARE, LINK_SHARE = 0.6, 0.8  # of peak and bandwidth, about, for the prices of a search


@dataclass(frozen=True, eq=False)
class PlacingRows:
    """Rows to place by: of every expert in each layer, and the choices of the tokens where they are known."""

    load_LE: NDArray[Any]
    ids_LTK: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """One map per counted layer: per layer of the model where `per_model_layer`, else per layer of the trace.

    `moved`: model layers that share a layer of the trace have the same experts together, on other ranks (see
    `moesim.parallel.placement`); a map that was given holds as it is.
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
    scenario: Scenario, *, num_groups: int, num_layers: int, node_of_rank_D: Ints, rows: Callable[[], PlacingRows]
) -> LayerMaps | None:
    """None where every expert has one slot, the same in all layers, and no router group is torn.

    `num_groups`: of the trace's router; `num_layers`: of the trace. `rows` gives those to place by.
    """
    placement, model, num_ranks = scenario.placement, scenario.model, scenario.parallelism.expert
    experts = model.experts
    if isinstance(placement, MadeFromRows):
        given = Given(scenario, placement, rows(), num_groups, node_of_rank_D)
        slot_LZ = PLACERS[type(placement)](given)
        maps = tuple(ExpertMap(slot_Z.reshape(num_ranks, -1), experts) for slot_Z in slot_LZ)
        if placement.split == "weighted":
            maps = _weighted(given, maps)
        moved = placement.ranks_equal and speeds_of_group(scenario) is None
        return LayerMaps(maps, per_model_layer=False, moved=moved, split=placement.split)
    slots = placement.fixed_slots(num_experts=experts, num_ranks=num_ranks)
    if slots is None:
        assert isinstance(placement, Explicit)
        found = _from_file(placement, scenario)
        return LayerMaps(found, per_model_layer=True, moved=False, split=placement.split)
    even = len(set(map(len, slots))) == 1
    if sum(map(len, slots)) == experts and (num_groups == 1 or (even and keeps_groups(slots, num_groups=num_groups))):
        return None
    weights = placement.weights if isinstance(placement, Explicit) else None
    one = ExpertMap(slot_table(slots), experts, None if weights is None else np.concatenate(weights))
    moved = not isinstance(placement, Explicit)
    return LayerMaps((one,) * num_layers, per_model_layer=False, moved=moved, split=placement.split)


@dataclass(frozen=True, eq=False)
class Given:
    """What a placement is made from; node_of_rank_D are the nodes of a group's ranks."""

    scenario: Scenario
    placement: MadeFromRows
    rows: PlacingRows
    num_groups: int
    node_of_rank_D: Ints

    @property
    def num_slots(self) -> int:
        """Slots of all ranks."""
        return int(self.rows.load_LE.shape[1]) + self.placement.redundant_experts

    @property
    def speed_D(self) -> NDArray[np.float64]:
        """Speeds of the group's ranks that the placement counts with; all alike where it has none."""
        speed_D = speeds_of_group(self.scenario)
        return np.ones(len(self.node_of_rank_D)) if speed_D is None else speed_D

    @property
    def num_nodes(self) -> int:
        """Nodes, where each holds as many ranks, one node's behind the other's; else 1: then nodes play no part."""
        ranks_J = np.bincount(self.node_of_rank_D)
        in_order = (np.diff(self.node_of_rank_D) >= 0).all()
        return len(ranks_J) if in_order and len(set(ranks_J.tolist())) == 1 else 1


def _weighted(given: Given, maps: tuple[ExpertMap, ...]) -> tuple[ExpertMap, ...]:
    """The maps with weights of slots for which the rows that they were made from load ranks evenly."""
    speed_D = given.speed_D
    return tuple(
        replace(held, weight_Z=balanced_weights(held, load_E, speed_D=speed_D))
        for held, load_E in zip(maps, given.rows.load_LE, strict=True)
    )


def _by_eplb(given: Given) -> Ints:
    """EPLB, hierarchical where it can be and is not asked to look at all ranks at once."""
    assert isinstance(given.placement, Eplb)
    return _balanced(given, num_nodes=given.num_nodes if given.placement.policy == "auto" else 1)


def _balanced(given: Given, *, num_nodes: int) -> Ints:
    return balance_experts(
        given.rows.load_LE,
        num_slots=given.num_slots,
        num_groups=given.num_groups,
        num_nodes=num_nodes,
        num_ranks=len(given.node_of_rank_D),
    )


def _by_speed(given: Given) -> Ints:
    return place_by_speed(given.rows.load_LE, num_slots=given.num_slots, speed_D=given.speed_D)


def _by_search(given: Given) -> Ints:
    """Local search on tokens from all over the rows, from EPLB's slots and from the same in order of experts.

    Where ranks have speeds the slots are those of `by_speed`.
    """
    assert isinstance(given.placement, Search) and given.rows.ids_LTK is not None, "a search looks at tokens"
    every = -(-given.rows.ids_LTK.shape[1] // MOST_TOKENS)
    alike = speeds_of_group(given.scenario) is None
    slot_LZ = _balanced(given, num_nodes=given.num_nodes) if alike else _by_speed(given)
    return np.stack(
        [
            _searched(given, given.placement, expert_Z, ids_TK, layer=layer)
            for layer, (expert_Z, ids_TK) in enumerate(zip(slot_LZ, given.rows.ids_LTK[:, ::every], strict=True))
        ]
    )


def _searched(given: Given, placement: Search, expert_Z: Ints, ids_TK: NDArray[Any], *, layer: int) -> Ints:
    """The experts of all slots of one layer, found from those of EPLB."""
    num_ranks, nodes = len(given.node_of_rank_D), int(given.node_of_rank_D.max()) + 1
    held = ExpertMap(expert_Z.reshape(num_ranks, -1), given.rows.load_LE.shape[1])
    slot_TK = held.choice("even", given.node_of_rank_D).slots(ids_TK[None])[0]
    token_R, _ = np.nonzero(slot_TK >= 0)
    slot_R = slot_TK[slot_TK >= 0]
    ends_Z = np.cumsum(np.bincount(slot_R, minlength=len(expert_Z)))
    rank_Z = np.repeat(np.arange(num_ranks), len(expert_Z) // num_ranks)
    first_Z = np.zeros(len(expert_Z), dtype=bool)
    first_Z[np.unique(expert_Z, return_index=True)[1]] = True
    in_order_Z = np.empty_like(rank_Z)
    in_order_Z[np.lexsort((expert_Z, ~first_Z))] = rank_Z  # copies behind all experts
    ranks_Z, _ = search_ranks(
        np.split(token_R[np.argsort(slot_R, kind="stable")], ends_Z[:-1]),
        [rank_Z, in_order_Z],
        node_D=given.node_of_rank_D,
        speed_D=given.speed_D,
        prices=_prices(
            given.scenario, num_nodes=nodes, traffic=1.0 if placement.traffic is None else placement.traffic
        ),
        num_tokens=len(ids_TK),
        tries=placement.tries,
        rng=stream(given.scenario.seed, "placement", layer),
    )
    return np.asarray(expert_Z[np.lexsort((expert_Z, ranks_Z))])


# How a placement that is made from rows gets the experts of all slots [L, Z].
PLACERS: Mapping[type[MadeFromRows], Callable[[Given], Ints]] = {
    Eplb: _by_eplb,
    BySpeed: _by_speed,
    Search: _by_search,
}


def _prices(scenario: Scenario, *, num_nodes: int, traffic: float = 1.0) -> Prices:
    """Of one row forward and backward, and of one copy of a token on its way out and back in both passes.

    `traffic`: what copies cost is so many times that.
    """
    pool, dispatch, fabric = scenario.cluster.main_pool, scenario.dispatch, scenario.cluster.fabric
    width = scenario.model.row_width
    size = traffic * 2 * (token_bytes(width, dispatch.dtype) + token_bytes(width, dispatch.combine_dtype))
    inside = size / (LINK_SHARE * (fabric.nvlink or pool.spec.nvlink_bandwidth))
    across = size / (LINK_SHARE * (fabric.nic or NIC_BANDWIDTH)) * (num_nodes - 1) / num_nodes
    peak = pool.spec.peak_flops[scenario.workload.precision.gemm]
    row = 6 * expert_slice_parameters(scenario) / (GEMM_SHARE * peak)
    longest = max(inside, across)
    if dispatch.deduplicate == "all_ranks":
        return Prices(row=row, rank_copy=0.0, node_copy=0.0)  # wherever experts lie
    if dispatch.deduplicate == "per_expert":
        return Prices(row=row + longest, rank_copy=0.0, node_copy=0.0)
    if dispatch.deduplicate == "per_rank":
        return Prices(row=row, rank_copy=longest, node_copy=0.0)
    return Prices(row=row, rank_copy=inside, node_copy=across)


def _from_file(placement: Explicit, scenario: Scenario) -> tuple[ExpertMap, ...]:
    """The maps of the model's layers with experts; of a model with fewer layers, as pilots have, those of the last."""
    model, num_ranks = scenario.model, scenario.parallelism.expert
    found = placement.read_file()
    lists = found.of_layers(model.moe_layer_numbers, num_layers=model.layers)
    lists = found.slots[-len(model.moe_layer_numbers) :] if lists is None else lists
    return tuple(ExpertMap(np.array(slots).reshape(num_ranks, -1), model.experts) for slots in lists)
