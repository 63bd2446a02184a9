"""Transfers of several groups that are open at once and share links.

Legend: K open transfers, X links.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric

FloatArray = NDArray[np.float64]


def slow_downs(fabric: Fabric, demands_KX: Sequence[FloatArray]) -> FloatArray:
    """Progress per second of each open transfer, [K], 1 where its links have capacity to spare.

    `demands_KX`: bytes/s that each transfer puts on each link while alone (`PreparedTransfer.demand_X`). A transfer
    runs at the least capacity / total demand over the links that it uses.
    """
    demands = np.asarray(demands_KX, dtype=np.float64).reshape(-1, len(fabric.links))
    total_X = demands.sum(axis=0)
    share_X = np.minimum(1.0, fabric.capacity_X / np.maximum(total_X, fabric.capacity_X))
    return np.asarray(np.where(demands > 0, share_X, 1.0).min(axis=1, initial=1.0))
