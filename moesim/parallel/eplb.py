"""Balancers of experts: which get copies, and which rank holds which, by DeepSeek's policies (EPLB) and by ranks'
speeds.

EPLB is written from its description (github.com/deepseek-ai/EPLB, README): experts with the largest load per copy are
copied until all slots are taken, and items are packed greedily, the heaviest first into the lightest pack with room.
The hierarchical policy first packs the router's groups of experts to nodes and copies inside each node, so that limits
on nodes per token keep their worth; the global one copies over all ranks. Sums are of 32-bit floats, as there. Of
experts with equal loads the one with the smaller index comes first; the published code sorts with torch's unstable
sort, which beyond 16 items orders equal ones by version and CPU, so that there its own results differ as well.

On ranks of different speeds rows are in proportion to speed, so that all take about equally long: copies as by EPLB;
then slots are dealt, the heaviest first, each to the rank that would be done with it first among those with room, ties
to the first one. With equal speeds that is EPLB's global policy.

Legend: L layers, E experts, Z slots of all ranks, D ranks, N rows of a batch, I items or slots to deal, P packs, Y
slots of a row.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import Mesh
from moesim.scenario import Scenario
from moesim.scenario.placement import MadeFromRows
from moesim.scenario.stages import pools_of_ranks, relative_speeds

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Packing(NamedTuple):
    """Where every item of every row goes: its pack, and its place in the pack, int64 [N, I]."""

    pack_NI: Ints
    place_NI: Ints


def uses_hierarchy(*, num_groups: int, num_nodes: int) -> bool:
    """Whether groups of experts go to nodes as a whole: where they divide evenly; else the global policy holds."""
    return num_groups % num_nodes == 0


def balance_experts(
    load_LE: NDArray[np.generic], *, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Ints:
    """The expert in every slot, int64 [L, Z]; rank r holds slots r*Z/R to (r+1)*Z/R - 1, node by node.

    `load_LE`: rows of every expert, any scale. The sizes must divide: slots and nodes by ranks, experts by groups;
    every expert gets at least one slot (asserted: the checks of a scenario refuse other sizes).
    """
    load = np.asarray(load_LE, dtype=np.float32)
    assert num_slots % num_ranks == 0 and num_ranks % num_nodes == 0 and load.shape[1] % num_groups == 0
    assert num_slots >= load.shape[1], "every expert needs a slot"
    if not uses_hierarchy(num_groups=num_groups, num_nodes=num_nodes):
        num_groups = num_nodes = 1
    expert_of_local_LE = _experts_by_node(load, num_groups=num_groups, num_nodes=num_nodes)
    layers, per_node = len(load), load.shape[1] // num_nodes
    local_load_NE: Floats = np.take_along_axis(load, expert_of_local_LE, axis=1).reshape(-1, per_node)
    copied_NY = copy_heaviest(local_load_NE, num_slots=num_slots // num_nodes)
    copies_NE = count_copies(copied_NY, num_experts=per_node)
    each_NE: Floats = np.divide(local_load_NE, copies_NE, dtype=np.float32)
    slot_load_NY: Floats = np.take_along_axis(each_NE, copied_NY, axis=1)
    packing = pack_evenly(slot_load_NY, num_packs=num_ranks // num_nodes)
    slot_NY = packing.pack_NI * (num_slots // num_ranks) + packing.place_NI
    local_NY = np.empty_like(copied_NY)
    np.put_along_axis(local_NY, slot_NY, copied_NY, axis=1)
    local_LZ = (local_NY.reshape(layers, num_nodes, -1) + per_node * np.arange(num_nodes)[:, None]).reshape(layers, -1)
    return np.take_along_axis(expert_of_local_LE, local_LZ, axis=1)


def pack_evenly(weight_NI: Floats, *, num_packs: int) -> Packing:
    """Items into packs of equally many, the heaviest first into the lightest pack with room, ties to the first.

    Packs of one item take the items in order: nothing could be balanced.
    """
    rows, items = weight_NI.shape
    room, rest = divmod(items, num_packs)
    assert rest == 0, (items, num_packs)
    pack_NI, place_NI = np.empty((2, rows, items), dtype=np.int64)
    if room == 1:
        pack_NI[:], place_NI[:] = np.arange(items), 0
        return Packing(pack_NI, place_NI)
    order_NI = np.argsort(-weight_NI, axis=1, kind="stable")
    sorted_NI = np.take_along_axis(weight_NI, order_NI, axis=1)
    filled_NP = np.zeros((rows, num_packs), dtype=np.int64)
    open_NP = np.zeros((rows, num_packs), dtype=np.float32)  # the weight in each pack, infinite where it is full
    row_N = np.arange(rows)
    for turn in range(items):
        pack_N = open_NP.argmin(axis=1)
        place_N = filled_NP[row_N, pack_N]
        pack_NI[row_N, order_NI[:, turn]], place_NI[row_N, order_NI[:, turn]] = pack_N, place_N
        filled_NP[row_N, pack_N] = place_N + 1
        open_NP[row_N, pack_N] = np.where(place_N + 1 == room, np.inf, open_NP[row_N, pack_N] + sorted_NI[:, turn])
    return Packing(pack_NI, place_NI)


def copy_heaviest(load_NE: Floats, *, num_slots: int) -> Ints:
    """The experts in order, then, one by one, another copy of the one with the largest load per copy: [N, slots]."""
    rows, experts = load_NE.shape
    expert_NY = np.empty((rows, num_slots), dtype=np.int64)
    expert_NY[:, :experts] = np.arange(experts)
    copies_NE = np.ones((rows, experts), dtype=np.float32)
    row_N = np.arange(rows)
    each_NE = load_NE.copy()
    for slot in range(experts, num_slots):
        heaviest_N = each_NE.argmax(axis=1)
        expert_NY[:, slot] = heaviest_N
        copies_NE[row_N, heaviest_N] += 1
        each_NE[row_N, heaviest_N] = load_NE[row_N, heaviest_N] / copies_NE[row_N, heaviest_N]
    return expert_NY


def count_copies(expert_NY: Ints, *, num_experts: int) -> Ints:
    """How many slots of each row hold each expert, int64 [N, E]."""
    rows = len(expert_NY)
    bins = expert_NY + num_experts * np.arange(rows)[:, None]
    return np.bincount(bins.ravel(), minlength=rows * num_experts).reshape(rows, num_experts)


def _experts_by_node(load_LE: Floats, *, num_groups: int, num_nodes: int) -> Ints:
    """The experts of node 0, then of node 1 and so on, int64 [L, E]: groups packed to nodes by their loads."""
    layers, experts = load_LE.shape
    size = experts // num_groups
    load_LG = load_LE.reshape(layers, num_groups, size).sum(axis=2, dtype=np.float32)
    packing = pack_evenly(load_LG, num_packs=num_nodes)
    turn_LG = packing.pack_NI * (num_groups // num_nodes) + packing.place_NI
    group_in_turn_LG = np.argsort(turn_LG, axis=1)
    return np.asarray((group_in_turn_LG[:, :, None] * size + np.arange(size)).reshape(layers, experts))


def speeds_of_group(scenario: Scenario) -> NDArray[np.float64] | None:
    """The speed of every rank of an expert group that experts are placed by [D]; None where all are alike, or unheeded.

    Those that the placement states, or else the cluster's: of the ranks' kinds of GPU, by data sheets, times
    `cluster.speeds`. Where groups differ, which have one placement, it is the mean of their ranks in the same place.
    """
    placement, mesh = scenario.placement, scenario.parallelism
    if not isinstance(placement, MadeFromRows) or not placement.heeds_speeds:
        return None
    if placement.rank_speeds is not None:
        return np.array(placement.rank_speeds)
    factor_W = scenario.cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    speed_W = np.array(relative_speeds(scenario))[list(pools_of_ranks(scenario.cluster, mesh))]
    speed_W = speed_W / speed_W.max() if factor_W is None else factor_W * speed_W / speed_W.max()
    ranks = Mesh(mesh, scenario.cluster)
    groups = np.concatenate([np.array(ranks.expert_groups(stage)) for stage in range(mesh.pipeline)])
    speed_D = speed_W[groups].mean(axis=0)
    return None if np.allclose(speed_D, speed_D[0], rtol=1e-12) else speed_D


def place_by_speed(load_LE: NDArray[np.generic], *, num_slots: int, speed_D: NDArray[np.float64]) -> Ints:
    """The expert in every slot, int64 [L, Z]; each rank has as many slots as any other."""
    load = np.asarray(load_LE, dtype=np.float32)
    layers, experts = load.shape
    room, rest = divmod(num_slots, len(speed_D))
    assert rest == 0 and num_slots >= experts
    copied_LZ = copy_heaviest(load, num_slots=num_slots)
    each_LE = np.divide(load, count_copies(copied_LZ, num_experts=experts), dtype=np.float32)
    speed = speed_D.astype(np.float32)
    slots_LZ = np.empty_like(copied_LZ)
    for layer in range(layers):
        weight_I = each_LE[layer, copied_LZ[layer]]
        held: list[list[int]] = [[] for _ in speed_D]
        load_D = np.zeros(len(speed_D), dtype=np.float32)
        for item in np.argsort(-weight_I, kind="stable").tolist():
            ends_D = (load_D + weight_I[item]) / speed
            ends_D[[len(rank) == room for rank in held]] = np.inf
            rank = int(ends_D.argmin())
            held[rank].append(int(copied_LZ[layer, item]))
            load_D[rank] += weight_I[item]
        slots_LZ[layer] = np.concatenate(held)
    return slots_LZ
