"""The closed form of `ports` as loops for numba: the same sums in the same order as the numpy of `ports`.

Legend: S routing samples, R ranks, C ports (receiving, then sending).
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
    seconds_SRC: FloatArray,
    totals_SC: FloatArray,
    port_latency_SC: FloatArray,
    receive_port_RR: IntArray,
    send_port_RR: IntArray,
    receive_level_SRR: FloatArray,
    send_level_SRR: FloatArray,
    latency_SRR: FloatArray,
    finish_SR: FloatArray,
) -> None:
    """Writes when each rank is done into `finish_SR`; see Ports.finish."""
    num_ranks, num_ports = seconds_SRC.shape[1], seconds_SRC.shape[2]
    later_C, queue_C = np.zeros(num_ports), np.zeros(num_ports)
    for sample in range(len(start_SR)):
        start_R = start_SR[sample]
        for port in range(num_ports):
            later_C[port] = 0.0
            own = two_sided or port >= num_receive
            queue_C[port] = start_R[port % num_ranks] + totals_SC[sample, port] if own else -np.inf
        queued = num_ports if two_sided else num_receive
        for rank in order_SR[sample]:
            for port in range(queued):
                later_C[port] += seconds_SRC[sample, rank, port]
                queue_C[port] = max(queue_C[port], start_R[rank] + later_C[port])
        for rank in range(num_ranks):
            finish_SR[sample, rank] = start_R[rank]
        for port in range(num_ports):
            done = queue_C[port] + port_latency_SC[sample, port]
            finish_SR[sample, port % num_ranks] = max(finish_SR[sample, port % num_ranks], done)
        for source in range(num_ranks):
            last = finish_SR[sample, source]
            for target in range(num_ranks):
                release = max(start_R[source], start_R[target]) if two_sided else start_R[source]
                received = min(
                    queue_C[receive_port_RR[source, target]], release + receive_level_SRR[sample, source, target]
                )
                sent = min(queue_C[send_port_RR[source, target]], release + send_level_SRR[sample, source, target])
                done = max(received, sent) + latency_SRR[sample, source, target]
                last = max(last, done)
                finish_SR[sample, target] = max(finish_SR[sample, target], done)
            finish_SR[sample, source] = max(finish_SR[sample, source], last)
