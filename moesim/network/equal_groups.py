"""Groups of ranks that the fabric treats alike, so that what is prepared for one serves the others.

Legend: R ranks of the group, F pairs of them, P hops, U distinct links.
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
        used_U, first_U, number_Q = np.unique(path_FP, return_index=True, return_inverse=True)
        order_U = np.argsort(first_U)
        place_U = np.empty(len(order_U), dtype=np.int32)
        place_U[order_U] = np.arange(len(order_U), dtype=np.int32)
        links_U = used_U[order_U]
        digest.update(place_U[number_Q.reshape(-1)].tobytes())
        for kind_X, none in (
            (fabric.capacity_X, np.inf),
            (fabric.latency_X, 0.0),
            (fabric.redundant_X.astype(np.float64), -1.0),
        ):
            digest.update(np.where(links_U == NONE, none, kind_X[links_U]).tobytes())
    return digest.digest()
