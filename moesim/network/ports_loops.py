"""The closed form of `ports` as loops for numba: the same sums in the same order as the numpy of `ports`.

Legend: S matrices (routing samples), R ranks, F flows, P ports of one side.
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
    source_F: IntArray,
    target_F: IntArray,
    latency_F: FloatArray,
    first_of_source_R: NDArray[np.int64],
    first_of_target_R: NDArray[np.int64],
    by_target_F: IntArray,
    receive_port_F: IntArray,
    receive_owner_P: IntArray,
    receive_SF: FloatArray,
    receive_level_SF: FloatArray,
    receive_total_SP: FloatArray,
    receive_latency_SP: FloatArray,
    send_port_F: IntArray,
    send_owner_P: IntArray,
    send_SF: FloatArray,
    send_level_SF: FloatArray,
    send_total_SP: FloatArray,
    send_latency_SP: FloatArray,
    finish_SR: FloatArray,
) -> None:
    """Writes when each rank is done into `finish_SR`; see Ports.finish. `order_SR`: ranks, the latest first."""
    received_P, sent_P = np.empty(len(receive_owner_P)), np.empty(len(send_owner_P))
    later_P = np.empty(max(len(received_P), len(sent_P)))
    for sample in range(len(start_SR)):
        start_R, finish_R = start_SR[sample], finish_SR[sample]
        later_P[:] = 0.0
        for port in range(len(received_P)):
            received_P[port] = start_R[receive_owner_P[port]] + receive_total_SP[sample, port] if two_sided else -np.inf
        for rank in order_SR[sample]:
            for flow in range(first_of_source_R[rank], first_of_source_R[rank + 1]):
                if receive_level_SF[sample, flow] > -np.inf:
                    port = receive_port_F[flow]
                    later_P[port] += receive_SF[sample, flow]
                    received_P[port] = max(received_P[port], start_R[rank] + later_P[port])
        later_P[:] = 0.0
        for port in range(len(sent_P)):
            sent_P[port] = start_R[send_owner_P[port]] + send_total_SP[sample, port]
        if two_sided:
            for rank in order_SR[sample]:
                for index in range(first_of_target_R[rank], first_of_target_R[rank + 1]):
                    flow = by_target_F[index]
                    if send_level_SF[sample, flow] > -np.inf:
                        port = send_port_F[flow]
                        later_P[port] += send_SF[sample, flow]
                        sent_P[port] = max(sent_P[port], start_R[rank] + later_P[port])
        finish_R[:] = start_R
        for port in range(len(received_P)):
            owner = receive_owner_P[port]
            finish_R[owner] = max(finish_R[owner], received_P[port] + receive_latency_SP[sample, port])
        for port in range(len(sent_P)):
            owner = send_owner_P[port]
            finish_R[owner] = max(finish_R[owner], sent_P[port] + send_latency_SP[sample, port])
        for flow in range(len(source_F)):
            source, target = source_F[flow], target_F[flow]
            release = max(start_R[source], start_R[target]) if two_sided else start_R[source]
            received = min(received_P[receive_port_F[flow]], release + receive_level_SF[sample, flow])
            sent = min(sent_P[send_port_F[flow]], release + send_level_SF[sample, flow])
            done = max(received, sent) + latency_F[flow]
            finish_R[source] = max(finish_R[source], done)
            finish_R[target] = max(finish_R[target], done)
