"""Experts on ranks of different speeds: rows in proportion to speed, so that all take about equally long.

Experts with the largest load per copy are copied as by EPLB; then slots are dealt, the heaviest first, each to the rank
that would be done with it first among those with room, ties to the first one. With equal speeds that is EPLB's global
policy. Legend: L layers, E experts, X slots of all ranks, D ranks, I slots to deal.
"""

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.eplb import copy_heaviest, count_copies

Ints = NDArray[np.int64]


def place_by_speed(load_LE: NDArray[np.generic], *, num_slots: int, speed_D: NDArray[np.float64]) -> Ints:
    """The expert in every slot, int64 [L, X]; each rank has as many slots as any other."""
    load = np.asarray(load_LE, dtype=np.float32)
    layers, experts = load.shape
    room, rest = divmod(num_slots, len(speed_D))
    assert rest == 0 and num_slots >= experts
    copied_LX = copy_heaviest(load, num_slots=num_slots)
    each_LE = np.divide(load, count_copies(copied_LX, num_experts=experts), dtype=np.float32)
    speed = speed_D.astype(np.float32)
    slots_LX = np.empty_like(copied_LX)
    for layer in range(layers):
        weight_I = each_LE[layer, copied_LX[layer]]
        held: list[list[int]] = [[] for _ in speed_D]
        load_D = np.zeros(len(speed_D), dtype=np.float32)
        for item in np.argsort(-weight_I, kind="stable").tolist():
            ends_D = (load_D + weight_I[item]) / speed
            ends_D[[len(rank) == room for rank in held]] = np.inf
            rank = int(ends_D.argmin())
            held[rank].append(int(copied_LX[layer, item]))
            load_D[rank] += weight_I[item]
        slots_LX[layer] = np.concatenate(held)
    return slots_LX
