"""What is open on the ports of one group's ranks, and when what comes second has passed them.

Transfers on a token's way (dispatch, combine, exchanges of tensor ranks) go first: they are many messages beside one,
and a layer waits for them. Each moves its bytes at a steady pace in the last part of its span, in which all its ranks
are there. What is open beside them (p2p sends, collectives on gradients and parameters) passes a port in what they
leave, one behind the other, so that no port passes more than it can at any instant.

Legend: K ports of a rank, S routing samples, R ranks of the group, W windows.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.executor_steps import Labels
from moesim.kernels import BesideSend
from moesim.network import RankPorts
from moesim.network.rank_ports import passed
from moesim.program.group_collectives import PeerCollective
from moesim.program.operations import Kind, Operation, Transfer
from moesim.program.ports import port_seconds, port_shares
from moesim.program.step_program import GroupProgram
from moesim.results.spans import SpanRecorder

FloatArray = NDArray[np.float64]
ROUND_OFF = 1e-9  # of what a transfer takes alone
NEXT_ROWS = 8  # among which the first kernel of an action is
KEPT = 32  # passages: what went through before these is over


class _Passage(NamedTuple):
    """What was let through, or a transfer on a token's way (in `row`, by its `place` in the tables of ports).

    From its first rank to its last; what was let through has a row and a place of -1.
    """

    opens: float
    closes: float
    row: int
    place: int
    begin_SR: FloatArray | None = None
    end_SR: FloatArray | None = None
    work_SR: FloatArray | None = None
    shares_KR: FloatArray | None = None


class _Moved(NamedTuple):
    """Transfers on a token's way: their places, when they are open, and for how long ([W, S, R] each)."""

    place_W: list[int]
    opens_WSR: FloatArray
    closes_WSR: FloatArray
    longest_WSR: FloatArray


class PortsInUse:
    """The traffic of one group: transfers among its spans, and what was let through beside them."""

    def __init__(
        self, ports: RankPorts, group: GroupProgram, recorder: SpanRecorder, labels: Labels, *, compiled: bool = False
    ) -> None:
        """`compiled`: sums are worked out by compiled loops."""
        self.ports, self._compiled = ports, compiled
        self._recorder, self._labels = recorder, labels
        blocks = dict.fromkeys((*(run.block for task in group.tasks for run in task.runs), group.optimizer))
        self._transfers_of = {
            operation.label: operation.transfers_M
            for block in blocks
            for operation in block.operations
            if operation.kind is Kind.TRANSFER
        }
        self._kernels = {o.label: o for block in blocks for o in block.operations if o.kind is Kind.COMPUTE}
        self._kernel_of: dict[int, Operation | None] = {}
        self._of_number: dict[int, tuple[Transfer, ...]] = {}
        # How long transfers keep each port of a rank busy, and the longest of them, by place.
        self._places: dict[Transfer, int] = {}
        self._num_places = 0
        shape = recorder.start_NSR.shape[1:]
        self._seconds, self._longest = np.zeros((len(ports.link_KR), 8, *shape)), np.zeros((8, *shape))
        self._rows: list[_Passage] = []  # of actions that have ended
        self._scanned = 0
        self.passages: list[_Passage] = []  # between groups
        self.collectives: list[_Passage] = []  # of layers
        self._shares: dict[PeerCollective, FloatArray] = {}
        self.held_SR = np.zeros(shape)  # until when sends that cannot be later take a port

    @property
    def moves_bytes(self) -> bool:
        """Whether any transfer on a token's way uses a port."""
        return any(
            self._place(transfer) >= 0 for transfers_M in self._transfers_of.values() for transfer in transfers_M
        )

    def through(self, begin_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> FloatArray | None:
        """When what begins at `begin_SR` has passed; None where nothing is in the way.

        Alone it takes `work_SR` seconds ([S, R] or [R]), and at most `shares_KR` of each port.
        """
        alone_SR = end_SR = begin_SR + work_SR
        found = self._open_behind(float(begin_SR.min()))
        until, taken = float(alone_SR.max()), 0
        ports = np.flatnonzero(shares_KR.any(axis=1)).tolist()
        while (now := sum(each.opens < until for each in found)) > taken:
            taken, some = now, [each for each in found if each.opens < until]
            moved = self._moved(some)
            let = [each for each in some if each.row < 0]
            for port in ports:
                opens_WSR, closes_WSR, uses_WSR = self._windows(moved, let, port, begin_SR.shape)
                if len(opens_WSR):
                    through_SR = self._passed(begin_SR, alone_SR, shares_KR[port], opens_WSR, closes_WSR, uses_WSR)
                    end_SR = np.maximum(end_SR, through_SR)
            until = float(end_SR.max())
        later_SR = end_SR - alone_SR > ROUND_OFF * work_SR
        return np.where(later_SR, end_SR, alone_SR) if later_SR.any() else None

    def late_for_kernel(
        self, row: int, sent_SR: FloatArray, alone_SR: FloatArray, sends: Mapping[str, BesideSend]
    ) -> FloatArray | None:
        """How much later for the first kernel from a row on a message is there that was sent, and alone takes so long.

        It waits for SMs where the kernel runs meanwhile. None where nothing of that was measured, or no kernel came.
        """
        recorder = self._recorder
        numbers = recorder.label_N[row : min(row + NEXT_ROWS, recorder.count)].tolist()
        known = [(behind, kernel) for behind, number in enumerate(numbers, row) if (kernel := self._kernel(number))]
        if not known or known[0][1].family not in sends:
            return None
        behind, kernel = known[0]
        start_SR, finish_SR = recorder.start_NSR[behind], recorder.finish_NSR[behind]
        beside_SR = (start_SR < sent_SR + alone_SR) & (finish_SR > sent_SR)
        later_SR = sends[kernel.family].later(alone_SR, kernel=(finish_SR - start_SR) / max(1.0, kernel.launches))
        return np.where(beside_SR, later_SR, 0.0) if beside_SR.any() else None

    def _kernel(self, number: int) -> Operation | None:
        """The kernel of a label's number."""
        if number not in self._kernel_of:
            self._kernel_of[number] = self._kernels.get(self._labels.all()[number])
        return self._kernel_of[number]

    def collective(self, prepared: PeerCollective, begin_SR: FloatArray, own_SR: FloatArray) -> FloatArray:
        """The same of a collective of a layer: its ranks are done together."""
        if prepared not in self._shares:
            self._shares[prepared] = port_shares(prepared, self.ports)
        end_SR = self.through(begin_SR, own_SR, self._shares[prepared])
        if end_SR is None:
            end_SR = begin_SR + own_SR
        else:
            end_SGNI = prepared.peers.split(end_SR)
            end_SR = np.broadcast_to(end_SGNI.max(axis=2, keepdims=True), end_SGNI.shape).reshape(begin_SR.shape)
        _append(self.collectives, begin_SR, end_SR, own_SR, self._shares[prepared])
        return end_SR

    def let_through(self, begin_SR: FloatArray, end_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> None:
        """From now on this has its part of the ports; whatever is in its way comes later."""
        opens, closes = float(begin_SR.min()), float(end_SR.max())
        self.passages.append(_Passage(opens, closes, -1, -1, begin_SR, end_SR, work_SR, shares_KR))
        if len(self.passages) > 2 * KEPT:
            del self.passages[:KEPT]

    def hold(self, end_SR: FloatArray) -> None:
        """Transfers that are yet to begin wait until then."""
        np.maximum(self.held_SR, end_SR, out=self.held_SR)

    def _open_behind(self, instant: float) -> list[_Passage]:
        """What is open after an instant."""
        actions, recorder = self._recorder.actions, self._recorder
        ended = actions[-1].last if actions else 0
        self._rows += self._transfers(self._scanned, ended)
        self._scanned = max(self._scanned, ended)
        found = [passage for passage in chain(self.passages, self.collectives) if passage.closes > instant]
        for row in chain(reversed(self._transfers(self._scanned, recorder.count)), reversed(self._rows)):
            if row.closes <= instant:
                break
            found.append(row)
        return found

    def _transfers(self, first: int, last: int) -> list[_Passage]:
        """Those among some rows."""
        if first >= last:
            return []
        recorder = self._recorder
        rows, places = [], []
        of_row = zip(recorder.label_N[first:last].tolist(), recorder.micro_batch_N[first:last].tolist(), strict=True)
        for row, (number, micro_batch) in enumerate(of_row, start=first):
            if number not in self._of_number:
                self._of_number[number] = self._transfers_of.get(self._labels.all()[number], ())
            if transfers_M := self._of_number[number]:
                place = self._place(transfers_M[micro_batch % len(transfers_M)])
                if place >= 0:
                    rows.append(row)
                    places.append(place)
        if not rows:
            return []
        opens, closes = recorder.start_NSR[rows].min(axis=(1, 2)), recorder.finish_NSR[rows].max(axis=(1, 2))
        return [_Passage(*each) for each in zip(opens.tolist(), closes.tolist(), rows, places, strict=True)]

    def _moved(self, found: Sequence[_Passage]) -> _Moved:
        """Transfers among these: they move their bytes as long as that takes once all ranks are there."""
        rows = [each.row for each in found if each.row >= 0]
        place_W = [each.place for each in found if each.row >= 0]
        closes_WSR, longest_WSR = self._recorder.finish_NSR[rows], self._longest[place_W]
        np.maximum(longest_WSR, self._recorder.own_NSR[rows], out=longest_WSR)
        return _Moved(place_W, closes_WSR - longest_WSR, closes_WSR, longest_WSR)

    def _windows(
        self, moved: _Moved, let: Sequence[_Passage], port: int, shape: tuple[int, ...]
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """When transfers and what was let through are open on a port, and what they take of it then: [W, S, R] each."""
        uses_WSR = self._seconds[port, moved.place_W] / moved.longest_WSR
        beside = [each for each in let if each.shares_KR is not None and each.shares_KR[port].any()]
        if not beside:
            return moved.opens_WSR, moved.closes_WSR, uses_WSR
        begins, ends = [each.begin_SR for each in beside], [each.end_SR for each in beside]
        uses = [np.broadcast_to(each.shares_KR[port], shape) for each in beside if each.shares_KR is not None]
        parts = zip((moved.opens_WSR, moved.closes_WSR, uses_WSR), (begins, ends, uses), strict=True)
        opens_WSR, closes_WSR, uses_WSR = (np.concatenate([one, np.array(other)]) for one, other in parts)
        return opens_WSR, closes_WSR, uses_WSR

    def _passed(
        self,
        begin_SR: FloatArray,
        alone_SR: FloatArray,
        share_R: FloatArray,
        opens_WSR: FloatArray,
        closes_WSR: FloatArray,
        uses_WSR: FloatArray,
    ) -> FloatArray:
        if not ((opens_WSR < alone_SR) & (closes_WSR > begin_SR) & (uses_WSR > 0)).any():
            return alone_SR
        work_SR = alone_SR - begin_SR
        return passed(
            begin_SR,
            work_SR,
            share_R,
            opens_WSR=opens_WSR,
            closes_WSR=closes_WSR,
            uses_WSR=uses_WSR,
            compiled=self._compiled,
        )

    def _place(self, transfer: Transfer) -> int:
        """Where a transfer stands in the tables; -1 where it keeps no port busy."""
        place = self._places.get(transfer)
        if place is None:
            seconds_SKR = port_seconds(transfer, self.ports)
            place = self._places[transfer] = self._num_places if seconds_SKR.any() else -1
            if place >= 0:
                self._num_places += 1
                if place == len(self._longest):
                    self._seconds = np.concatenate([self._seconds, np.zeros_like(self._seconds)], axis=1)
                    self._longest = np.concatenate([self._longest, np.zeros_like(self._longest)])
                self._seconds[:, place], self._longest[place] = seconds_SKR.swapaxes(0, 1), seconds_SKR.max(axis=1)
        return place


def _append(
    passages: list[_Passage], begin_SR: FloatArray, end_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray
) -> None:
    opens, closes = float(begin_SR.min()), float(end_SR.max())
    passages.append(_Passage(opens, closes, -1, -1, begin_SR, end_SR, work_SR, shares_KR))
    if len(passages) > 2 * KEPT:
        del passages[:KEPT]
