"""Bytes per link from sums over a byte matrix, without routing its pairs one by one.

Legend: R ranks, B ranks, then switches of one tier (leaves, spines), X links.
"""

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric
from moesim.network.flows import Demand

FloatArray = NDArray[np.float64]


def ladder_link_bytes(fabric: Fabric, demand: Demand) -> FloatArray | None:
    """Bytes over each link [X], mean of the samples; None where routes leave the ladder or forward inside nodes.

    Rows and columns of the matrix are the ports' loads; its sums over leaves and over spines those of the tiers above.
    """
    ladder, ranks_R = fabric.ladder, demand.ranks_R
    if ladder is None or ladder.any_failed or fabric.pxn or demand.avoid_nvlink:
        return None
    if (ladder.plane_R[ranks_R] != ladder.plane_R[ranks_R[0]]).any():
        return None
    far_RR = demand.bytes_SRR[0].copy() if len(demand.bytes_SRR) == 1 else demand.bytes_SRR.mean(axis=0)
    loads_X = np.zeros(len(fabric.links) + 1)  # the last entry takes what has no link
    domain_R = ladder.domain_R[ranks_R]
    by_domain_R = np.argsort(domain_R, kind="stable")
    for members in np.split(by_domain_R, np.flatnonzero(np.diff(domain_R[by_domain_R])) + 1):
        block = np.ix_(members, members)
        near = far_RR[block]
        np.add.at(loads_X, ladder.nvlink_up_R[ranks_R[members]], near.sum(axis=1))
        np.add.at(loads_X, ladder.nvlink_down_R[ranks_R[members]], near.sum(axis=0))
        far_RR[block] = 0.0
    redundant_X = np.append(fabric.redundant_X, True)  # index -1: no link
    sent_R, received_R = far_RR.sum(axis=1), far_RR.sum(axis=0)
    for hop in range(2):
        np.add.at(loads_X, ladder.nic_up_R2[ranks_R, hop], sent_R)
        np.add.at(loads_X, ladder.nic_down_R2[ranks_R, hop], received_R)
    tiers = (
        (ladder.leaf_R, ladder.leaf_up_R, ladder.leaf_down_R),
        (ladder.spine_R, ladder.spine_up_R, ladder.spine_down_R),
    )
    between_BB, first_B = far_RR, ranks_R  # a rank of each switch, and the bytes from switch to switch
    for of_R, up_R, down_R in tiers:
        _, first, switch = np.unique(of_R[first_B], return_index=True, return_inverse=True)
        if len(first) == 1 or all(redundant_X[links[ranks_R]].all() for _, *above in tiers for links in above):
            break
        below = [np.flatnonzero(switch == number) for number in range(len(first))]
        rows = np.stack([between_BB[own].sum(axis=0) for own in below])
        between_BB = np.stack([rows[:, own].sum(axis=1) for own in below], axis=1)
        first_B = first_B[first]
        if not (redundant_X[up_R[ranks_R]].all() and redundant_X[down_R[ranks_R]].all()):
            crossing_BB = between_BB * (1 - np.eye(len(first)))
            np.add.at(loads_X, up_R[first_B], crossing_BB.sum(axis=1))
            np.add.at(loads_X, down_R[first_B], crossing_BB.sum(axis=0))
    return np.where(fabric.redundant_X, 0.0, loads_X[:-1])
