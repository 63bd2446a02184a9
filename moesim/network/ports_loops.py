"""The closed form of `ports` as loops for numba: the same sums in the same order as the numpy of `ports`.

Legend: S matrices (routing samples), R ranks, F flows, P ports (receiving, then sending), V ranks that feed a rank.
`ends_F4` holds per flow its source, its target, its receiving and its sending port; `flows_SF4` its seconds and its
level at the one and at the other; `ports_SP2` per port the sum of its flows and the longest latency among them.
"""

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


@numba.njit()
def _latest_first(start_R: FloatArray, order_R: NDArray[np.int64]) -> None:
    """Sorts the ranks (Shell's sort: their starts are often nearly in order already)."""
    ranks = len(start_R)
    for rank in range(ranks):
        order_R[rank] = rank
    gap = 1
    while 3 * gap < ranks:
        gap = 3 * gap + 1
    while gap > 0:
        for place in range(gap, ranks):
            rank, hole = order_R[place], place
            while hole >= gap and start_R[order_R[hole - gap]] < start_R[rank]:
                order_R[hole] = order_R[hole - gap]
                hole -= gap
            order_R[hole] = rank
        gap //= 3


@numba.njit()
def _finish(
    start_R: FloatArray,
    order_R: NDArray[np.int64],
    two_sided: bool,
    num_receive: int,
    ends_F4: IntArray,
    latency_F: FloatArray,
    first_of_source_R: NDArray[np.int64],
    first_of_target_R: NDArray[np.int64],
    by_target_F: IntArray,
    owner_P: IntArray,
    flows_F4: FloatArray,
    ports_P2: FloatArray,
    finish_R: FloatArray,
) -> None:
    """Writes when each rank is done in one sample; see Ports.finish. `order_R`: ranks, the latest first."""
    queue_P, later_P = np.empty(len(owner_P)), np.empty(len(owner_P))
    for port in range(len(owner_P)):
        later_P[port] = 0.0
        own = two_sided or port >= num_receive
        queue_P[port] = start_R[owner_P[port]] + ports_P2[port, 0] if own else -np.inf
    for rank in order_R:
        start = start_R[rank]
        for flow in range(first_of_source_R[rank], first_of_source_R[rank + 1]):
            if flows_F4[flow, 1] > -np.inf:
                port = ends_F4[flow, 2]
                later_P[port] += flows_F4[flow, 0]
                queue_P[port] = max(queue_P[port], start + later_P[port])
        if two_sided:
            for index in range(first_of_target_R[rank], first_of_target_R[rank + 1]):
                flow = by_target_F[index]
                if flows_F4[flow, 3] > -np.inf:
                    port = ends_F4[flow, 3]
                    later_P[port] += flows_F4[flow, 2]
                    queue_P[port] = max(queue_P[port], start + later_P[port])
    for rank in range(len(start_R)):
        finish_R[rank] = start_R[rank]
    for port in range(len(owner_P)):
        owner = owner_P[port]
        finish_R[owner] = max(finish_R[owner], queue_P[port] + ports_P2[port, 1])
    for source in range(len(start_R)):
        last = finish_R[source]
        for flow in range(first_of_source_R[source], first_of_source_R[source + 1]):
            target = ends_F4[flow, 1]
            release = max(start_R[source], start_R[target]) if two_sided else start_R[source]
            received = min(queue_P[ends_F4[flow, 2]], release + flows_F4[flow, 1])
            sent = min(queue_P[ends_F4[flow, 3]], release + flows_F4[flow, 3])
            # Its receiver is done no sooner than the port there, and so than `received`; its sender likewise.
            last = max(last, received + latency_F[flow])
            finish_R[target] = max(finish_R[target], sent + latency_F[flow])
        finish_R[source] = max(finish_R[source], last)


@numba.njit(cache=True)
def finish(
    start_SR: FloatArray,
    two_sided: bool,
    num_receive: int,
    ends_F4: IntArray,
    latency_F: FloatArray,
    first_of_source_R: NDArray[np.int64],
    first_of_target_R: NDArray[np.int64],
    by_target_F: IntArray,
    owner_P: IntArray,
    flows_SF4: FloatArray,
    ports_SP2: FloatArray,
) -> FloatArray:
    """When each rank is done, [S, R]; see Ports.finish."""
    finish_SR = np.empty(start_SR.shape)
    order_R = np.empty(start_SR.shape[1], dtype=np.int64)
    for sample in range(len(start_SR)):
        _latest_first(start_SR[sample], order_R)
        _finish(
            start_SR[sample], order_R, two_sided, num_receive, ends_F4, latency_F, first_of_source_R,
            first_of_target_R, by_target_F, owner_P, flows_SF4[sample], ports_SP2[sample], finish_SR[sample],
        )  # fmt: skip
    return finish_SR


@numba.njit(cache=True)
def finish_stages(
    start_SR: FloatArray,
    feeders_SRV: IntArray,
    two_sided: bool,
    num_receive: int,
    ends_F4: IntArray,
    latency_F: FloatArray,
    first_of_source_R: NDArray[np.int64],
    first_of_target_R: NDArray[np.int64],
    by_target_F: IntArray,
    owner_P: IntArray,
    flows_SF4: FloatArray,
    ports_SP2: FloatArray,
    two_sided_2: bool,
    num_receive_2: int,
    ends_F4_2: IntArray,
    latency_F_2: FloatArray,
    first_of_source_R_2: NDArray[np.int64],
    first_of_target_R_2: NDArray[np.int64],
    by_target_F_2: IntArray,
    owner_P_2: IntArray,
    flows_SF4_2: FloatArray,
    ports_SP2_2: FloatArray,
) -> FloatArray:
    """A rank is done when both its stages (`_2`) and the first stages of its feeders are; see Pipeline.finish."""
    finish_SR = np.empty(start_SR.shape)
    order_R, first_R = np.empty(start_SR.shape[1], dtype=np.int64), np.empty(start_SR.shape[1])
    for sample in range(len(start_SR)):
        start_R, finish_R = start_SR[sample], finish_SR[sample]
        _latest_first(start_R, order_R)
        _finish(
            start_R, order_R, two_sided, num_receive, ends_F4, latency_F, first_of_source_R, first_of_target_R,
            by_target_F, owner_P, flows_SF4[sample], ports_SP2[sample], first_R,
        )  # fmt: skip
        _finish(
            start_R, order_R, two_sided_2, num_receive_2, ends_F4_2, latency_F_2, first_of_source_R_2,
            first_of_target_R_2, by_target_F_2, owner_P_2, flows_SF4_2[sample], ports_SP2_2[sample], finish_R,
        )  # fmt: skip
        for rank in range(len(start_R)):
            for feeder in feeders_SRV[sample, rank]:
                finish_R[rank] = max(finish_R[rank], first_R[feeder])
    return finish_SR


@numba.njit(cache=True)
def fill(
    bytes_SF: FloatArray,
    pace_F: FloatArray,
    latency_F: FloatArray,
    port_T: NDArray[np.int64],
    flow_TW: NDArray[np.int64],
    flows_SF4: FloatArray,
    column: int,
    ports_SP2: FloatArray,
    first: int,
) -> None:
    """Writes what the flows cost at the ports of one table; see SideLoads, and its `fill`."""
    num_flows, width = len(pace_F), flow_TW.shape[1]
    flow_W, alone_W, level_W = np.empty(width, dtype=np.int64), np.empty(width), np.empty(width)
    for sample in range(len(bytes_SF)):
        for row in range(len(port_T)):
            total, latency, count = 0.0, -np.inf, 0
            for flow in flow_TW[row]:
                if flow < num_flows:
                    seconds = bytes_SF[sample, flow] * pace_F[flow]
                    flows_SF4[sample, flow, column], flows_SF4[sample, flow, column + 1] = seconds, -np.inf
                    total += seconds
                    if bytes_SF[sample, flow] > 0:
                        latency = max(latency, latency_F[flow])
                        flow_W[count], alone_W[count] = flow, seconds
                        count += 1
            ports_SP2[sample, first + port_T[row], 0] = total
            ports_SP2[sample, first + port_T[row], 1] = latency
            level_W[:count] = 0.0
            for other in range(count):  # the outer loop: then the inner one is over neighbours in memory
                alone = alone_W[other]
                for place in range(count):
                    level_W[place] += min(alone, alone_W[place])
            for place in range(count):
                flows_SF4[sample, flow_W[place], column + 1] = level_W[place]
