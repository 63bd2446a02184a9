"""The ports of ranks, and how long what comes second takes to pass them.

A port is a link that can be a bottleneck and that the traffic of one rank alone enters or leaves by: an NVLink port or
a NIC, each direction by itself. Links above them are in `moesim.network.contention`.

Legend: K ports of a rank (padded), R ranks of a group, W ranks of the fabric, in sums windows, V those of them that are
looked at, S routing samples, X links, F flows, Q (flow, port) pairs, B transfers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric
from moesim.network.ladder import NONE
from moesim.network.ports import loops

FloatArray = NDArray[np.float64]
ROUND_OFF = 1e-12  # of a port: what sums leave over
NO_LATER = 1e-9  # of what a transfer takes alone: round-off


class _Hops(NamedTuple):
    """Which flow passes which port, counted through [K, R], with which share of its bytes."""

    flow_Q: NDArray[np.int64]
    place_Q: NDArray[np.int64]
    share_Q: FloatArray  # over the port's bytes/s


class RankPorts:
    """The ports of the ranks of a group."""

    def __init__(self, fabric: Fabric, ranks_R: NDArray[np.integer], *, compiled: bool = False) -> None:
        """`compiled`: sums are worked out by loops of numba."""
        self.fabric, self.ranks_R, self._compiled = fabric, ranks_R, compiled
        self.link_KR = fabric.port_links_KW[:, ranks_R]
        self._place_X = np.full(len(fabric.links) + 1, NONE)
        self._place_X[self.link_KR.ravel()] = np.arange(self.link_KR.size)
        self._place_X[NONE] = NONE
        self._hops: dict[
            tuple[bytes, bytes, bool, int], _Hops
        ] = {}  # by fabric, which keeps those that it is reached as

    def seconds(
        self,
        source_F: NDArray[np.integer],
        target_F: NDArray[np.integer],
        bytes_SF: FloatArray,
        *,
        avoid_nvlink: bool = False,
        reached: Fabric | None = None,
    ) -> FloatArray:
        """How long flows between ranks of the fabric keep each port busy, [S, K, R].

        `reached`: the fabric's links as the flows' software finds them (see Fabric.reached_by).
        """
        hops = self._of_flows(source_F, target_F, avoid_nvlink, reached or self.fabric)
        ports = self.link_KR.size
        if self._compiled and (compiled_loops := loops("rank_ports_loops")) is not None:
            found_SP: FloatArray = compiled_loops.port_seconds(
                np.ascontiguousarray(bytes_SF, dtype=np.float64), *hops, ports
            )
            return found_SP.reshape(-1, *self.link_KR.shape)
        seconds_SQ = bytes_SF[:, hops.flow_Q] * hops.share_Q
        busy_SP = np.empty((len(seconds_SQ), ports))
        for sample, seconds_Q in enumerate(seconds_SQ):
            busy_SP[sample] = np.bincount(hops.place_Q, weights=seconds_Q, minlength=ports)
        return busy_SP.reshape(-1, *self.link_KR.shape)

    def of_links(self, values_X: FloatArray) -> FloatArray:
        """What of values of the fabric's links belongs to each port, [K, R]; 0 where a rank has fewer ports."""
        of_port_KR: FloatArray = np.append(values_X, 0.0)[self.link_KR.astype(np.intp)]
        return of_port_KR

    def _of_flows(
        self, source_F: NDArray[np.integer], target_F: NDArray[np.integer], avoid_nvlink: bool, reached: Fabric
    ) -> _Hops:
        key = source_F.tobytes(), target_F.tobytes(), avoid_nvlink, id(reached)
        if key not in self._hops:
            path_FP, flow_F, share_F = self.fabric.split_routes(source_F, target_F, avoid_nvlink=avoid_nvlink)
            place_FP = self._place_X[path_FP]
            on_port_Q = np.nonzero(place_FP != NONE)
            flow_Q, place_Q = on_port_Q[0], place_FP[on_port_Q]
            pace_Q = share_F[flow_Q] / reached.capacity_X[self.link_KR.ravel()[place_Q]]
            self._hops[key] = _Hops(flow_F[flow_Q].astype(np.int64), place_Q.astype(np.int64), pace_Q)
        return self._hops[key]


class Busy:
    """How long transfers keep each port of a group's ranks busy; they are numbered as they are added.

    `seconds_BSKR`; `longest_BSR`: at the busiest port.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """`shape`: routing samples, ports and ranks."""
        samples, _, ranks = self.shape = shape
        self.count = 0
        self.seconds_BSKR, self.longest_BSR = np.empty((0, *shape)), np.empty((0, samples, ranks))

    def add(self, seconds_SKR: FloatArray) -> int:
        """The number of a transfer that takes so many seconds (S: 1 if all samples are alike)."""
        number, self.count = self.count, self.count + 1
        if number == len(self.longest_BSR):
            for name in ("seconds_BSKR", "longest_BSR"):
                before = getattr(self, name)
                setattr(self, name, np.concatenate([before, np.empty((max(16, number), *before.shape[1:]))]))
        self.seconds_BSKR[number] = seconds_SKR
        np.max(self.seconds_BSKR[number], axis=1, out=self.longest_BSR[number])
        return number


class Windows:
    """What is open on the ports of a group's ranks, in the order in which it was added, until it is forgotten.

    A window is a row from `first` on. `edges_W2`: when it opens on its first rank and closes on its last; `rows_WF`:
    when it begins and ends on every rank [S, R], and what of each port it takes meanwhile [S, K, R].
    """

    def __init__(self, shape: tuple[int, int, int], *, backwards: bool = False) -> None:
        """`shape`: routing samples, ports and ranks; `backwards`: sums begin with the last one."""
        samples, ports, ranks = self.shape = shape
        self.backwards, self.first, self.stop = backwards, 0, 0
        self.edges_W2, self.rows_WF = np.empty((0, 2)), np.empty((0, samples * ranks * (2 + ports)))

    def __len__(self) -> int:
        return self.stop - self.first

    def clear(self) -> None:
        """Nothing is open."""
        self.first = self.stop = 0

    def keep(self, count: int) -> None:
        """Only the first ones stay."""
        self.stop = self.first + count

    def forget(self, until: float) -> None:
        """What closes by then goes."""
        if self.first == self.stop:
            return
        closes_W = self.edges_W2[self.first : self.stop, 1]
        left = np.flatnonzero(closes_W > until)
        if len(left) == len(closes_W):
            return
        before = len(closes_W) - len(left)
        if len(left) and left[0] == before:  # the first ones
            self.first += before
            return
        for values_Wx in (self.edges_W2, self.rows_WF):
            values_Wx[self.first : self.first + len(left)] = values_Wx[self.first + left]
        self.keep(len(left))

    def room(self, count: int) -> int:
        """Where so many more windows are to be written, which are there from now on."""
        if self.stop + count > len(self.rows_WF):
            kept = len(self)
            rows = max(16, 2 * (kept + count))
            longer_W2, longer_WF = np.empty((rows, 2)), np.empty((rows, self.rows_WF.shape[1]))
            longer_W2[:kept] = self.edges_W2[self.first : self.stop]
            longer_WF[:kept] = self.rows_WF[self.first : self.stop]
            self.edges_W2, self.rows_WF, self.first, self.stop = longer_W2, longer_WF, 0, kept
        place, self.stop = self.stop, self.stop + count
        return place

    def parts(self, rows_VF: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Begin and end [V, S, R] and shares [V, S, K, R] of some rows."""
        samples, _, ranks = self.shape
        begin_VF, end_VF, share_VF = np.split(rows_VF, [samples * ranks, 2 * samples * ranks], axis=1)
        each = -1, samples, ranks
        return begin_VF.reshape(each), end_VF.reshape(each), share_VF.reshape(-1, *self.shape)

    def add(self, begin_SR: FloatArray, end_SR: FloatArray, shares_KR: FloatArray, *, compiled: bool = False) -> None:
        """Something that takes a share of every port from `begin_SR` to `end_SR`."""
        place = self.room(1)
        if compiled and (compiled_loops := loops("rank_ports_loops")) is not None:
            compiled_loops.add_window(begin_SR, end_SR, shares_KR, place, self.edges_W2, self.rows_WF)
            return
        share_SKR = np.broadcast_to(shares_KR, self.shape)
        self.edges_W2[place] = begin_SR.min(), end_SR.max()
        self.rows_WF[place] = np.concatenate([begin_SR.ravel(), end_SR.ravel(), share_SKR.ravel()])

    def add_transfers(
        self,
        rows_N: NDArray[np.int64],
        number_N: NDArray[np.int64],
        spans: tuple[FloatArray, FloatArray, NDArray[np.float32]],
        busy: Busy,
        *,
        compiled: bool = False,
    ) -> None:
        """Transfers by the rows of their spans (start, finish and own seconds) and their numbers in `busy`.

        Each moves its bytes at a steady pace in the last part of its span, once all are there.
        """
        place, count = self.room(len(rows_N)), len(rows_N)
        if compiled and (compiled_loops := loops("rank_ports_loops")) is not None:
            compiled_loops.add_transfers(
                rows_N, number_N, *spans, busy.seconds_BSKR, busy.longest_BSR, place, self.edges_W2, self.rows_WF
            )
            return
        start_NSR, finish_NSR, own_NSR = (values[rows_N] for values in spans)
        length_NSR = np.maximum(busy.longest_BSR[number_N], own_NSR.astype(np.float64))
        seconds_NSKR = busy.seconds_BSKR[number_N]
        share_NSKR = np.divide(
            seconds_NSKR, length_NSR[:, :, None], out=np.zeros_like(seconds_NSKR), where=seconds_NSKR > 0
        )
        self.edges_W2[place : place + count, 0] = start_NSR.min(axis=(1, 2))
        self.edges_W2[place : place + count, 1] = finish_NSR.max(axis=(1, 2))
        each = (finish_NSR - length_NSR, finish_NSR, share_NSKR)
        self.rows_WF[place : place + count] = np.concatenate([values.reshape(count, -1) for values in each], axis=1)


def through(
    begin_SR: FloatArray,
    work_SR: FloatArray,
    shares_KR: FloatArray,
    beside: Sequence[Windows],
    *,
    compiled: bool = False,
) -> FloatArray | None:
    """When what begins at `begin_SR` has passed, [S, R], with all that is `beside` first; None where it is no later.

    Alone it takes `work_SR` seconds ([S, R] or [R]), and at most `shares_KR` of each port. `compiled`: by loops of
    numba, which give the same.
    """
    if compiled and (compiled_loops := loops("rank_ports_loops")) is not None:
        sets = tuple((each.edges_W2, each.rows_WF, each.first, each.stop, each.backwards) for each in beside)
        end_SR, is_later = compiled_loops.through(
            begin_SR, np.atleast_2d(work_SR), shares_KR, sets, NO_LATER, ROUND_OFF
        )
        return end_SR if is_later else None
    instant = float(begin_SR.min())
    opens_V = np.concatenate([_open_behind(instant, windows, windows.edges_W2)[:, 0] for windows in beside])
    rows_VF = np.concatenate([_open_behind(instant, windows, windows.rows_WF) for windows in beside])
    begin_VSR, end_VSR, share_VSKR = beside[0].parts(rows_VF)
    alone_SR = end_SR = begin_SR + work_SR
    until, taken = float(alone_SR.max()), 0
    while (now := int((opens_V < until).sum())) > taken:
        taken = now
        for port in np.flatnonzero(shares_KR.any(axis=1)).tolist():
            beside_V = (opens_V < until) & share_VSKR[:, :, port].any(axis=(1, 2))
            opens_WSR, closes_WSR, uses_WSR = begin_VSR[beside_V], end_VSR[beside_V], share_VSKR[beside_V, :, port]
            if ((opens_WSR < alone_SR) & (closes_WSR > begin_SR) & (uses_WSR > 0)).any():
                passed_SR = passed(
                    begin_SR,
                    alone_SR - begin_SR,
                    shares_KR[port],
                    opens_WSR=opens_WSR,
                    closes_WSR=closes_WSR,
                    uses_WSR=uses_WSR,
                )
                end_SR = np.maximum(end_SR, passed_SR)
        until = float(end_SR.max())
    later_SR = end_SR - alone_SR > NO_LATER * work_SR
    return np.where(later_SR, end_SR, alone_SR) if later_SR.any() else None


def _open_behind(instant: float, windows: Windows, values_Wx: FloatArray) -> FloatArray:
    """The rows of `values_Wx` of what is open after an instant."""
    some = slice(windows.first, windows.stop)
    values_Vx: FloatArray = values_Wx[some][windows.edges_W2[some, 1] > instant]
    return values_Vx[::-1] if windows.backwards else values_Vx


def passed(
    begin_SR: FloatArray,
    work_SR: FloatArray,
    share_R: FloatArray,
    *,
    opens_WSR: FloatArray,
    closes_WSR: FloatArray,
    uses_WSR: FloatArray,
    compiled: bool = False,
) -> FloatArray:
    """When what begins at `begin_SR` has passed a port of each rank that others use, too: [S, R].

    Alone it takes `work_SR` seconds and `share_R` of the port; the others take `uses_WSR` of it in their windows
    and go first. Together they never take more than all of it, and no less while anything is left to do.
    `compiled`: by loops of numba, which give the same.
    """
    if compiled and (compiled_loops := loops("rank_ports_loops")) is not None:
        end_SR: FloatArray = compiled_loops.passed(
            begin_SR, work_SR, share_R, opens_WSR, closes_WSR, uses_WSR, ROUND_OFF
        )
        return end_SR
    windows = len(opens_WSR)
    edges = np.maximum(np.concatenate([opens_WSR, closes_WSR]), begin_SR)
    order = edges.argsort(axis=0, kind="stable")
    change = np.take_along_axis(np.concatenate([uses_WSR, -uses_WSR]), order, axis=0)
    edges = np.concatenate([begin_SR[None], np.take_along_axis(edges, order, axis=0)])
    left = np.clip(1.0 - np.cumsum(change, axis=0), 0.0, 1.0)
    left[left < ROUND_OFF] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(share_R > 0, np.minimum(1.0, left / share_R), 1.0)
    rate = np.concatenate([np.ones((1, *begin_SR.shape)), rate])
    rate[-1] = 1.0  # behind the last window
    done = np.concatenate([np.zeros((1, *begin_SR.shape)), np.cumsum(rate[:-1] * np.diff(edges, axis=0), axis=0)])
    enough = done[1:] >= work_SR
    last = np.where(enough.any(axis=0), enough.argmax(axis=0), 2 * windows)[None]
    edge, before, pace = (np.take_along_axis(each, last, axis=0)[0] for each in (edges, done, rate))
    return np.asarray(edge + (work_SR - before) / np.where(pace > 0, pace, 1.0))
