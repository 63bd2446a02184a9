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


@numba.njit(cache=True)
def finish(
    start_SR: FloatArray,
    order_SR: NDArray[np.int64],
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
    finish_SR: FloatArray,
) -> None:
    """Writes when each rank is done into `finish_SR`; see Ports.finish. `order_SR`: ranks, the latest first."""
    queue_P, later_P = np.empty(len(owner_P)), np.zeros(len(owner_P))
    for sample in range(len(start_SR)):
        start_R, finish_R = start_SR[sample], finish_SR[sample]
        flows_F4, ports_P2 = flows_SF4[sample], ports_SP2[sample]
        later_P[:] = 0.0
        for port in range(len(owner_P)):
            own = two_sided or port >= num_receive
            queue_P[port] = start_R[owner_P[port]] + ports_P2[port, 0] if own else -np.inf
        for rank in order_SR[sample]:
            start = start_R[rank]
            for flow in range(first_of_source_R[rank], first_of_source_R[rank + 1]):
                if flows_F4[flow, 1] > -np.inf:
                    port = ends_F4[flow, 2]
                    later_P[port] += flows_F4[flow, 0]
                    queue_P[port] = max(queue_P[port], start + later_P[port])
        if two_sided:
            for rank in order_SR[sample]:
                start = start_R[rank]
                for index in range(first_of_target_R[rank], first_of_target_R[rank + 1]):
                    flow = by_target_F[index]
                    if flows_F4[flow, 3] > -np.inf:
                        port = ends_F4[flow, 3]
                        later_P[port] += flows_F4[flow, 2]
                        queue_P[port] = max(queue_P[port], start + later_P[port])
        finish_R[:] = start_R
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
                done = max(received, sent) + latency_F[flow]
                last = max(last, done)
                finish_R[target] = max(finish_R[target], done)
            finish_R[source] = max(finish_R[source], last)


@numba.njit(cache=True)
def join_stages(first_SR: FloatArray, feeders_SRV: IntArray, finish_SR: FloatArray) -> None:
    """A rank is done when its second stage (`finish_SR`, written) and the first stages of its feeders are."""
    for sample in range(len(first_SR)):
        for rank in range(first_SR.shape[1]):
            last = finish_SR[sample, rank]
            for feeder in feeders_SRV[sample, rank]:
                last = max(last, first_SR[sample, feeder])
            finish_SR[sample, rank] = last


@numba.njit(cache=True)
def fill(
    bytes_SF: FloatArray,
    pace_F: FloatArray,
    latency_F: FloatArray,
    port_T: NDArray[np.int64],
    flow_TW: NDArray[np.int64],
    seconds_SF: FloatArray,
    level_SF: FloatArray,
    ports_SP2: FloatArray,
) -> None:
    """Writes what the flows cost at the ports of one table; see SideLoads.fill."""
    num_flows = len(pace_F)
    for sample in range(len(bytes_SF)):
        for row in range(len(port_T)):
            total, latency = 0.0, -np.inf
            for flow in flow_TW[row]:
                if flow < num_flows:
                    seconds_SF[sample, flow] = bytes_SF[sample, flow] * pace_F[flow]
                    total += seconds_SF[sample, flow]
                    if bytes_SF[sample, flow] > 0:
                        latency = max(latency, latency_F[flow])
            ports_SP2[sample, port_T[row], 0] = total
            ports_SP2[sample, port_T[row], 1] = latency
            for flow in flow_TW[row]:
                if flow < num_flows:
                    level = -np.inf
                    if bytes_SF[sample, flow] > 0:
                        level = 0.0
                        for other in flow_TW[row]:
                            if other < num_flows:
                                level += min(seconds_SF[sample, other], seconds_SF[sample, flow])
                    level_SF[sample, flow] = level
