"""Experts on ranks of different speeds: rows in proportion to speed, so that all take about equally long.

Experts with the largest load per copy are copied as by EPLB; then slots are dealt, the heaviest first, each to the rank
that would be done with it first among those with room, ties to the first one. With equal speeds that is EPLB's global
policy. Legend: L layers, E experts, Z slots of all ranks, D ranks, I slots to deal.
"""

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.eplb import copy_heaviest, count_copies
from moesim.parallel.mesh import Mesh
from moesim.scenario import Scenario
from moesim.scenario.placement import MadeFromRows
from moesim.scenario.stages import pools_of_ranks, relative_speeds

Ints = NDArray[np.int64]


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
