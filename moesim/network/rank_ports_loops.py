"""What passes the ports of ranks, as loops for numba: the same sums in the same order as the numpy of `rank_ports`.

Legend: S routing samples, R ranks, K ports of a rank, W windows, V those that are looked at, N rows of spans, B
transfers, F flows, Q (flow, port) pairs, P ports of all ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@numba.njit()
def _sorted_edges(
    begin: float, at_W: FloatArray, use_W: FloatArray, sorted_W: FloatArray, use_of_W: FloatArray
) -> None:
    """Writes the edges of windows in order, none before `begin`; the last windows often come first."""
    windows = len(at_W)
    for count in range(windows):
        window = windows - 1 - count
        at, hole = max(at_W[window], begin), count
        while hole > 0 and sorted_W[hole - 1] >= at:
            hole -= 1
        for place in range(count, hole, -1):
            sorted_W[place], use_of_W[place] = sorted_W[place - 1], use_of_W[place - 1]
        sorted_W[hole], use_of_W[hole] = at, use_W[window]


@numba.njit()
def _is_as_before(opens_WSR: FloatArray, closes_WSR: FloatArray, uses_WSR: FloatArray, sample: int, rank: int) -> bool:
    """Whether a rank's windows are those of the rank before it."""
    for window in range(len(opens_WSR)):
        for values_SR in (opens_WSR[window], closes_WSR[window], uses_WSR[window]):
            if values_SR[sample, rank] != values_SR[sample, rank - 1]:
                return False
    return True


@numba.njit(cache=True)
def passed(
    begin_SR: FloatArray,
    work_SR: FloatArray,
    share_R: FloatArray,
    opens_WSR: FloatArray,
    closes_WSR: FloatArray,
    uses_WSR: FloatArray,
    round_off: float,
) -> FloatArray:
    """`moesim.network.rank_ports.passed`: the same sums in the same order."""
    windows, samples, ranks = opens_WSR.shape
    end_SR = np.empty((samples, ranks))
    opens, more_use, closes, less_use = np.empty(windows), np.empty(windows), np.empty(windows), np.empty(windows)
    for sample in range(samples):
        for rank in range(ranks):
            begin, work, share = begin_SR[sample, rank], work_SR[sample, rank], share_R[rank]
            same = rank > 0 and begin == begin_SR[sample, rank - 1] and work == work_SR[sample, rank - 1]
            if same and share == share_R[rank - 1] and _is_as_before(opens_WSR, closes_WSR, uses_WSR, sample, rank):
                end_SR[sample, rank] = end_SR[sample, rank - 1]
                continue
            _sorted_edges(begin, opens_WSR[:, sample, rank], uses_WSR[:, sample, rank], opens, more_use)
            _sorted_edges(begin, closes_WSR[:, sample, rank], uses_WSR[:, sample, rank], closes, less_use)
            last, used, done, pace = begin, 0.0, 0.0, 1.0
            opened, closed = 0, 0
            while closed < windows:
                is_open = opened < windows and opens[opened] <= closes[closed]
                edge = opens[opened] if is_open else closes[closed]
                more = pace * (edge - last)
                if done + more >= work:
                    break
                done += more
                last = edge
                if is_open:
                    used += more_use[opened]
                    opened += 1
                else:
                    used -= less_use[closed]
                    closed += 1
                left = min(max(1.0 - used, 0.0), 1.0)
                if left < round_off:
                    left = 0.0
                pace = min(1.0, left / share) if share > 0.0 else 1.0
                if closed == windows:
                    pace = 1.0
            end_SR[sample, rank] = last + (work - done) / (pace if pace > 0.0 else 1.0)
    return end_SR


@numba.njit(cache=True, error_model="numpy")
def add_transfers(
    rows_N: NDArray[np.int64],
    number_N: NDArray[np.int64],
    start_NSR: FloatArray,
    finish_NSR: FloatArray,
    own_NSR: NDArray[np.float32],
    seconds_BSKR: FloatArray,
    longest_BSR: FloatArray,
    place: int,
    edges_W2: FloatArray,
    rows_WF: FloatArray,
) -> None:
    """`moesim.network.rank_ports.Windows.add_transfers`, from row `place` on."""
    samples, ports, ranks = seconds_BSKR.shape[1:]
    length_R, times = np.empty(ranks), samples * ranks
    for index in range(len(rows_N)):
        row, number, row_F = rows_N[index], number_N[index], rows_WF[place + index]
        opens, closes = np.inf, -np.inf
        for sample in range(samples):
            finish_R, own_R = finish_NSR[row, sample], own_NSR[row, sample]
            longest_R, start_R = longest_BSR[number, sample], start_NSR[row, sample]
            for rank in range(ranks):
                length_R[rank] = max(longest_R[rank], float(own_R[rank]))
                opens, closes = min(opens, start_R[rank]), max(closes, finish_R[rank])
            first = sample * ranks
            begin_R, end_R = row_F[first : first + ranks], row_F[first + times : first + times + ranks]
            for rank in range(ranks):
                begin_R[rank] = finish_R[rank] - length_R[rank]
            for rank in range(ranks):
                end_R[rank] = finish_R[rank]
            for port in range(ports):
                first = times * 2 + (sample * ports + port) * ranks
                share_R, seconds_R = row_F[first : first + ranks], seconds_BSKR[number, sample, port]
                for rank in range(ranks):
                    share_R[rank] = seconds_R[rank] / length_R[rank] if seconds_R[rank] > 0.0 else 0.0
        edges_W2[place + index, 0], edges_W2[place + index, 1] = opens, closes


@numba.njit(cache=True)
def add_window(
    begin_SR: FloatArray,
    end_SR: FloatArray,
    shares_KR: FloatArray,
    place: int,
    edges_W2: FloatArray,
    rows_WF: FloatArray,
) -> None:
    """`moesim.network.rank_ports.Windows.add`, at row `place`."""
    (samples, ranks), ports, row_F = begin_SR.shape, len(shares_KR), rows_WF[place]
    opens, closes, column = np.inf, -np.inf, 0
    for sample in range(samples):
        for rank in range(ranks):
            begin, end = begin_SR[sample, rank], end_SR[sample, rank]
            opens, closes = min(opens, begin), max(closes, end)
            row_F[column], row_F[column + samples * ranks] = begin, end
            column += 1
    edges_W2[place, 0], edges_W2[place, 1] = opens, closes
    column += samples * ranks
    for _ in range(samples):
        for port in range(ports):
            for rank in range(ranks):
                row_F[column] = shares_KR[port, rank]
                column += 1


@numba.njit()
def _find_open(
    edges_W2: FloatArray, first: int, stop: int, backwards: bool, instant: float, row_V: NDArray[np.int64]
) -> int:
    """Writes the rows of what is open after an instant; gives how many there are."""
    found = 0
    for index in range(stop - first):
        row = stop - 1 - index if backwards else first + index
        if edges_W2[row, 1] > instant:
            row_V[found] = row
            found += 1
    return found


@numba.njit()
def _of_port(
    row_F: FloatArray, port: int, ports: int, starts_SR: FloatArray, ends_SR: FloatArray, uses_SR: FloatArray
) -> bool:
    """Writes a window's times and what it takes of a port; whether that is anything."""
    samples, ranks = starts_SR.shape
    uses, column = False, 0
    for sample in range(samples):
        for rank in range(ranks):
            use = row_F[samples * ranks * 2 + (sample * ports + port) * ranks + rank]
            starts_SR[sample, rank], uses_SR[sample, rank] = row_F[column], use
            ends_SR[sample, rank] = row_F[column + samples * ranks]
            uses = uses or use > 0.0
            column += 1
    return uses


@numba.njit()
def _is_in_the_way(row_F: FloatArray, port: int, ports: int, begin_SR: FloatArray, alone_SR: FloatArray) -> bool:
    """Whether a window takes any of a port beside something on any rank."""
    samples, ranks = begin_SR.shape
    for sample in range(samples):
        share = samples * ranks * 2 + (sample * ports + port) * ranks
        starts_R, use_R = row_F[sample * ranks : share], row_F[share : share + ranks]
        ends_R = starts_R[samples * ranks :]
        in_the_way = False
        for rank in range(ranks):
            beside = (starts_R[rank] < alone_SR[sample, rank]) & (ends_R[rank] > begin_SR[sample, rank])
            in_the_way |= beside & (use_R[rank] > 0.0)
        if in_the_way:
            return True
    return False


@numba.njit(cache=True)
def through(
    begin_SR: FloatArray,
    work_SR: FloatArray,
    shares_KR: FloatArray,
    beside: tuple[tuple[FloatArray, FloatArray, int, int, bool], ...],
    no_later: float,
    round_off: float,
) -> tuple[FloatArray, bool]:
    """`moesim.network.rank_ports.through` with the rows of all `beside`, and whether it is later than alone."""
    samples, ranks = begin_SR.shape
    alone_SR, length_SR, end_SR = np.empty((samples, ranks)), np.empty((samples, ranks)), np.empty((samples, ranks))
    instant, until = np.inf, -np.inf
    for sample in range(samples):
        for rank in range(ranks):
            begin = begin_SR[sample, rank]
            end = begin + work_SR[min(sample, len(work_SR) - 1), rank]
            alone_SR[sample, rank], end_SR[sample, rank], length_SR[sample, rank] = end, end, end - begin
            instant, until = min(instant, begin), max(until, end)
    most = 0
    for _, _, first, stop, _ in beside:
        most += stop - first
    row_V, set_V, found = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64), 0
    opens_V = np.empty(most)
    for number, (edges_W2, _, first, stop, backwards) in enumerate(beside):
        before = found
        found += _find_open(edges_W2, first, stop, backwards, instant, row_V[before:])
        set_V[before:found] = number
        for place in range(before, found):
            opens_V[place] = edges_W2[row_V[place], 0]
    room = 0  # for windows of one port
    starts_VSR, ends_VSR, uses_VSR = np.empty((0, 1, 1)), np.empty((0, 1, 1)), np.empty((0, 1, 1))
    taken = 0
    while True:
        now = 0
        for place in range(found):
            now += opens_V[place] < until
        if now == taken:
            break
        taken, latest = now, until
        for port in range(len(shares_KR)):
            is_used, is_in_the_way = False, False
            for rank in range(ranks):
                is_used |= shares_KR[port, rank] > 0.0
            for place in range(found if is_used else 0):
                row_F = beside[set_V[place]][1][row_V[place]]
                if opens_V[place] < until and _is_in_the_way(row_F, port, len(shares_KR), begin_SR, alone_SR):
                    is_in_the_way = True
                    break
            if is_in_the_way:
                if room < found:
                    room = found
                    starts_VSR, ends_VSR = np.empty((room, samples, ranks)), np.empty((room, samples, ranks))
                    uses_VSR = np.empty((room, samples, ranks))
                count = 0
                for place in range(found):
                    row_F = beside[set_V[place]][1][row_V[place]]
                    window = starts_VSR[count], ends_VSR[count], uses_VSR[count]
                    if opens_V[place] < until and _of_port(row_F, port, len(shares_KR), *window):
                        count += 1
                passed_SR = passed(
                    begin_SR, length_SR, shares_KR[port], starts_VSR[:count], ends_VSR[:count], uses_VSR[:count],
                    round_off,
                )  # fmt: skip
                for sample in range(samples):
                    for rank in range(ranks):
                        end_SR[sample, rank] = max(end_SR[sample, rank], passed_SR[sample, rank])
                        latest = max(latest, end_SR[sample, rank])
        until = latest
    is_later = False
    for sample in range(samples):
        for rank in range(ranks):
            work = work_SR[min(sample, len(work_SR) - 1), rank]
            if end_SR[sample, rank] - alone_SR[sample, rank] > no_later * work:
                is_later = True
            else:
                end_SR[sample, rank] = alone_SR[sample, rank]
    return end_SR, is_later


@numba.njit(cache=True)
def port_seconds(
    bytes_SF: FloatArray,
    flow_Q: NDArray[np.int64],
    place_Q: NDArray[np.int64],
    share_Q: FloatArray,
    ports: int,
) -> FloatArray:
    """Seconds of every port, [S, P], with what of each flow's bytes passes it; see `RankPorts.seconds`."""
    busy_SP = np.zeros((len(bytes_SF), ports))
    for sample in range(len(bytes_SF)):
        for hop in range(len(flow_Q)):
            busy_SP[sample, place_Q[hop]] += bytes_SF[sample, flow_Q[hop]] * share_Q[hop]
    return busy_SP
