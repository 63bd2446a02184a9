"""Groups of ranks that the fabric treats alike, so that what is prepared for one serves the others.

Legend: R ranks of the group, F pairs of them, P hops, Q = F*P, X links, U distinct ones.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric


def group_shape(fabric: Fabric, ranks_R: NDArray[np.int64]) -> bytes:
    """Equal for two groups where equal byte matrices take equal times in every model of sharing.

    A digest of all routes between the ranks with links numbered by first use, of what these links are, and of the
    ranks' nodes. On a custom fabric, where routes are searched for, and beside failed links every group is its own.
    """
    digest = hashlib.sha256(np.unique(fabric.domain_of_rank_R[ranks_R], return_inverse=True)[1].tobytes())
    if fabric.ladder is None or fabric.ladder.any_failed:
        digest.update(np.ascontiguousarray(ranks_R).tobytes())
        return digest.digest()
    source_F, target_F = np.nonzero(~np.eye(len(ranks_R), dtype=bool))
    for avoid_nvlink in (False, True):
        path_FP = fabric.routes(ranks_R[source_F], ranks_R[target_F], avoid_nvlink=avoid_nvlink)
        link_Q = path_FP.ravel()
        place_Q = np.arange(len(link_Q))
        first_X = np.empty(len(fabric.links) + 1, dtype=np.int64)  # of links that are used: the last entry is NONE's
        first_X[link_Q[::-1]] = place_Q[::-1]
        first_Q = first_X[link_Q]
        is_first_Q = first_Q == place_Q
        number_Q = np.cumsum(is_first_Q, dtype=np.int32) - 1
        links_U = link_Q[is_first_Q]
        digest.update(number_Q[first_Q].tobytes())
        for kind_X, none in (
            (fabric.capacity_X, np.inf),
            (fabric.latency_X, 0.0),
            (fabric.redundant_X.astype(np.float64), -1.0),
        ):
            digest.update(np.where(links_U == NONE, none, kind_X[links_U]).tobytes())
    return digest.digest()
