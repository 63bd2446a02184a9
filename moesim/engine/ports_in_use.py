"""What is open on the ports of ranks, and when what comes second has passed them.

Transfers on a token's way (dispatch, combine, exchanges of tensor ranks) go first: they are many messages beside one,
and a layer waits for them. Each moves its bytes at a steady pace in the last part of its span, in which all its ranks
are there. What is open beside them (p2p sends, collectives on gradients and parameters) passes a port in what they
leave, one behind the other, so that no port passes more than it can at any instant.

Spans of large steps go when their action has ended. What is asked of them later is copied then, and forgotten once all
that is yet to pass begins behind it.

Legend: K ports of a rank, S routing samples (1 where all are alike), R ranks of the group, W windows.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, takewhile
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


class Busy(NamedTuple):
    """How long something keeps each port of a rank busy, and the busiest of them [S, R]; which ports it uses at all."""

    seconds_SKR: FloatArray
    longest_SR: FloatArray
    ports: frozenset[int]

    @classmethod
    def of(cls, seconds_SKR: FloatArray) -> "Busy":
        """That of so many seconds."""
        return cls(
            seconds_SKR, seconds_SKR.max(axis=1), frozenset(np.flatnonzero(seconds_SKR.any(axis=(0, 2))).tolist())
        )


class Window(NamedTuple):
    """Something that is open, from its first rank to its last and on each rank: on its ports for `busy` of `length_SR`.

    `work_SR`: what it would take alone, of what came second.
    """

    opens: float
    closes: float
    begin_SR: FloatArray
    end_SR: FloatArray
    busy: Busy
    length_SR: FloatArray | float = 1.0
    work_SR: FloatArray | float = 0.0


class NextKernel:
    """The first kernel of the action behind a send, with its start and finish, once that action has ended."""

    def __init__(self) -> None:
        self.found: tuple[Operation, FloatArray, FloatArray] | None = None


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
        self._busy: dict[Transfer, Busy] = {}
        self._moved: deque[Window] = deque()  # transfers of actions that have ended: they close one behind the other
        self.passages: list[Window] = []  # between groups
        self.collectives: list[Window] = []  # of layers
        self._shares: dict[PeerCollective, FloatArray] = {}
        self.held_SR = np.zeros(recorder.start_NSR.shape[1:])  # until when sends that cannot be later take a port
        self.next_kernel = NextKernel()  # behind what is sent now

    @cached_property
    def moves_bytes(self) -> bool:
        """Whether any transfer on a token's way uses a port."""
        return any(
            self._busy_with(transfer).ports for transfers_M in self._transfers_of.values() for transfer in transfers_M
        )

    def ended(self) -> None:
        """An action has ended: its spans stay as they are, and may go."""
        action = self._recorder.actions[-1]
        self._moved += self._transfers(action.first, action.last)
        self.next_kernel.found = self._first_kernel(action.first, action.last)
        self.next_kernel = NextKernel()

    def forget(self, until: float) -> None:
        """All that is yet to pass begins then or later."""
        while self._moved and self._moved[0].closes <= until:
            self._moved.popleft()
        self.passages = [window for window in self.passages if window.closes > until]
        self.collectives = [window for window in self.collectives if window.closes > until]

    def through(self, begin_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> FloatArray | None:
        """When what begins at `begin_SR` has passed; None where nothing is in the way.

        Alone it takes `work_SR` seconds ([S, R] or [R]), and at most `shares_KR` of each port.
        """
        ports = np.flatnonzero(shares_KR.any(axis=1)).tolist()
        found = [
            window for window in self._open_behind(float(begin_SR.min())) if not window.busy.ports.isdisjoint(ports)
        ]
        if not found:
            return None
        alone_SR = end_SR = begin_SR + work_SR
        until, taken = float(alone_SR.max()), 0
        while (now := sum(window.opens < until for window in found)) > taken:
            taken, some = now, [window for window in found if window.opens < until]
            for port in ports:
                if beside := [window for window in some if port in window.busy.ports]:
                    through_SR = self._passed(begin_SR, alone_SR, shares_KR[port], port, beside)
                    end_SR = np.maximum(end_SR, through_SR)
            until = float(end_SR.max())
        later_SR = end_SR - alone_SR > ROUND_OFF * work_SR
        return np.where(later_SR, end_SR, alone_SR) if later_SR.any() else None

    def late_for_kernel(
        self, behind: NextKernel, sent_SR: FloatArray, alone_SR: FloatArray, sends: Mapping[str, BesideSend]
    ) -> FloatArray | None:
        """How much later for the kernel behind it a message is there that was sent, and alone takes so long.

        It waits for SMs where the kernel runs meanwhile. None where nothing of that was measured, or no kernel came.
        """
        found = behind.found
        if behind is self.next_kernel:  # its action has not ended, and perhaps not begun
            found = self._first_kernel(*self._running)
        if found is None or found[0].family not in sends:
            return None
        kernel, start_SR, finish_SR = found
        beside_SR = (start_SR < sent_SR + alone_SR) & (finish_SR > sent_SR)
        later_SR = sends[kernel.family].later(alone_SR, kernel=(finish_SR - start_SR) / max(1.0, kernel.launches))
        return np.where(beside_SR, later_SR, 0.0) if beside_SR.any() else None

    def collective(self, prepared: PeerCollective, begin_SR: FloatArray, own_SR: FloatArray) -> FloatArray:
        """The same as `through` of a collective of a layer: its ranks are done together, and it has its part then."""
        if prepared not in self._shares:
            self._shares[prepared] = port_shares(prepared, self.ports)
        end_SR = self.through(begin_SR, own_SR, self._shares[prepared])
        if end_SR is None:
            end_SR = begin_SR + own_SR
        else:
            end_SGNI = prepared.peers.split(end_SR)
            end_SR = np.broadcast_to(end_SGNI.max(axis=2, keepdims=True), end_SGNI.shape).reshape(begin_SR.shape)
        self.collectives.append(_passage(begin_SR, end_SR, own_SR, self._shares[prepared]))
        return end_SR

    def let_through(self, begin_SR: FloatArray, end_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> None:
        """From now on this has its part of the ports; whatever is in its way comes later."""
        self.passages.append(_passage(begin_SR, end_SR, work_SR, shares_KR))

    def hold(self, end_SR: FloatArray) -> None:
        """Transfers that are yet to begin wait until then."""
        np.maximum(self.held_SR, end_SR, out=self.held_SR)

    @property
    def _running(self) -> tuple[int, int]:
        """The rows behind the last action that has ended: the first, and that behind the last."""
        actions = self._recorder.actions
        return actions[-1].last if actions else 0, self._recorder.count

    def _open_behind(self, instant: float) -> Iterator[Window]:
        """What is open after an instant."""
        latest_first = chain(reversed(self._transfers(*self._running)), reversed(self._moved))
        yield from takewhile(lambda window: window.closes > instant, latest_first)
        yield from (window for window in chain(self.passages, self.collectives) if window.closes > instant)

    def _transfers(self, first: int, last: int) -> list[Window]:
        """Those among some rows that use ports: they move their bytes for as long as that takes once all are there."""
        recorder, rows, busy_N = self._recorder, [], []
        of_row = zip(recorder.label_N[first:last].tolist(), recorder.micro_batch_N[first:last].tolist(), strict=True)
        for row, (number, micro_batch) in enumerate(of_row, start=first):
            if number not in self._of_number:
                self._of_number[number] = self._transfers_of.get(self._labels.all()[number], ())
            if transfers_M := self._of_number[number]:
                busy = self._busy_with(transfers_M[micro_batch % len(transfers_M)])
                if busy.ports:
                    rows.append(row)
                    busy_N.append(busy)
        if not rows:
            return []
        end_NSR, length_NSR = recorder.finish_NSR[rows], recorder.own_NSR[rows].astype(np.float64)
        for busy, length_SR in zip(busy_N, length_NSR, strict=True):
            np.maximum(busy.longest_SR, length_SR, out=length_SR)
        opens_N, closes_N = recorder.start_NSR[rows].min(axis=(1, 2)).tolist(), end_NSR.max(axis=(1, 2)).tolist()
        of_window = zip(opens_N, closes_N, end_NSR - length_NSR, end_NSR, busy_N, length_NSR, strict=True)
        return [Window(*each) for each in of_window]

    def _busy_with(self, transfer: Transfer) -> Busy:
        if transfer not in self._busy:
            self._busy[transfer] = Busy.of(port_seconds(transfer, self.ports))
        return self._busy[transfer]

    def _first_kernel(self, first: int, last: int) -> tuple[Operation, FloatArray, FloatArray] | None:
        """That of an action with these rows, its start and its finish."""
        recorder = self._recorder
        for row, number in enumerate(recorder.label_N[first : min(first + NEXT_ROWS, last)].tolist(), start=first):
            if number not in self._kernel_of:
                self._kernel_of[number] = self._kernels.get(self._labels.all()[number])
            if (kernel := self._kernel_of[number]) is not None:
                return kernel, recorder.start_NSR[row].copy(), recorder.finish_NSR[row].copy()
        return None

    def _passed(
        self, begin_SR: FloatArray, alone_SR: FloatArray, share_R: FloatArray, port: int, beside: Sequence[Window]
    ) -> FloatArray:
        """When it has passed one port that others use, too."""
        opens_WSR, closes_WSR = (
            np.array([window.begin_SR for window in beside]),
            np.array([window.end_SR for window in beside]),
        )
        uses_WSR = np.array([window.busy.seconds_SKR[:, port] / window.length_SR for window in beside])
        if not ((opens_WSR < alone_SR) & (closes_WSR > begin_SR) & (uses_WSR > 0)).any():
            return alone_SR
        return passed(
            begin_SR,
            alone_SR - begin_SR,
            share_R,
            opens_WSR=opens_WSR,
            closes_WSR=closes_WSR,
            uses_WSR=uses_WSR,
            compiled=self._compiled,
        )


def _passage(begin_SR: FloatArray, end_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> Window:
    """What was let through, which keeps ports busy for a share of every second."""
    share_SKR = np.broadcast_to(shares_KR, (len(begin_SR), *shares_KR.shape))
    return Window(float(begin_SR.min()), float(end_SR.max()), begin_SR, end_SR, Busy.of(share_SKR), work_SR=work_SR)
