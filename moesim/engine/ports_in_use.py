"""What is open on the ports of ranks, and when what comes second has passed them.

Transfers on a token's way (dispatch, combine, exchanges of tensor ranks) go first: they are many messages beside one,
and a layer waits for them. Each moves its bytes at a steady pace in the last part of its span, in which all its ranks
are there. What is open beside them (p2p sends, collectives on gradients and parameters) passes a port in what they
leave, one behind the other, so that no port passes more than it can at any instant.

Spans of large steps go when their action has ended. What is asked of them later is copied then, and forgotten once all
that is yet to pass begins behind it.

Legend: K ports of a rank, S routing samples, R ranks of the group, N rows, M micro-batches that take
turns, L labels, B transfers.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.engine.executor_steps import Labels
from moesim.kernels import BesideSend
from moesim.network import RankPorts
from moesim.network.rank_ports import Busy, Windows, through
from moesim.program.collectives import PeerCollective
from moesim.program.contention import each_port_seconds, port_shares
from moesim.program.operations import Kind, Operation, Transfer
from moesim.program.step_program import GroupProgram
from moesim.results.spans import SpanRecorder

FloatArray = NDArray[np.float64]
NO_ROW, UNKNOWN = -1, -2
NEXT_ROWS = 8  # among which the first kernel of an action is


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
        self._kernel_of: dict[int, Operation | None] = {}  # by number of a label
        # By number of a label its row in what follows, NO_ROW or UNKNOWN; of a row the numbers of its transfers, which
        # take turns, and how many they are.
        self._row_L = np.zeros(0, dtype=np.int64)
        self._turns_N, self._number_NM = np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.int64)
        # Of labels one behind the other the places of those with a row, these rows and how many take turns.
        self._among: dict[bytes, tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]] = {}
        shape = (recorder.start_NSR.shape[1], *ports.link_KR.shape)
        self._busy, self._numbers_of = Busy(shape), dict[tuple[Transfer, ...], list[int]]()
        self._under_way = Windows(shape, backwards=True)  # transfers behind the actions that have ended
        self._moved = Windows(shape, backwards=True)  # those of actions that have ended
        self.passages = Windows(shape)  # between groups
        self.collectives = Windows(shape)  # of layers
        self._shares: dict[PeerCollective, FloatArray] = {}
        self.held_SR = np.zeros(recorder.start_NSR.shape[1:])  # until when sends that cannot be later take a port
        self.next_kernel = NextKernel()  # behind what is sent now

    @cached_property
    def moves_bytes(self) -> bool:
        """Whether any transfer on a token's way uses a port."""
        numbers = [number for each in self._transfers_of.values() for number in self._numbers(each)]
        return bool(self._busy.longest_BSR[numbers].any())

    def ended(self) -> None:
        """An action has ended: its spans stay as they are, and may go."""
        action = self._recorder.actions[-1]
        self._add_transfers(self._moved, action.first, action.last)
        self.next_kernel.found = self._first_kernel(action.first, action.last)
        self.next_kernel = NextKernel()

    def forget(self, until: float) -> None:
        """All that is yet to pass begins then or later."""
        for windows in (self._moved, self.passages, self.collectives):
            windows.forget(until)

    def through(self, begin_SR: FloatArray, work_SR: FloatArray, shares_KR: FloatArray) -> FloatArray | None:
        """When what begins at `begin_SR` has passed; None where nothing is in the way.

        Alone it takes `work_SR` seconds ([S, R] or [R]), and at most `shares_KR` of each port.
        """
        self._under_way.clear()
        self._add_transfers(self._under_way, *self._running)
        beside = self._under_way, self._moved, self.passages, self.collectives
        return through(begin_SR, work_SR, shares_KR, beside, compiled=self._compiled)

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
        if not beside_SR.any():
            return None
        later_SR = sends[kernel.family].later(alone_SR, kernel=(finish_SR - start_SR) / max(1.0, kernel.launches))
        return np.where(beside_SR, later_SR, 0.0)

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
        self.collectives.add(begin_SR, end_SR, self._shares[prepared], compiled=self._compiled)
        return end_SR

    def let_through(self, begin_SR: FloatArray, end_SR: FloatArray, shares_KR: FloatArray) -> None:
        """From now on this has its part of the ports; whatever is in its way comes later."""
        self.passages.add(begin_SR, end_SR, shares_KR, compiled=self._compiled)

    def hold(self, end_SR: FloatArray) -> None:
        """Transfers that are yet to begin wait until then."""
        np.maximum(self.held_SR, end_SR, out=self.held_SR)

    @property
    def _running(self) -> tuple[int, int]:
        """The rows behind the last action that has ended: the first, and that behind the last."""
        actions = self._recorder.actions
        return actions[-1].last if actions else 0, self._recorder.count

    def _add_transfers(self, windows: Windows, first: int, last: int) -> None:
        """Those among some rows that use ports."""
        recorder = self._recorder
        if first == last:
            return
        label_N = recorder.label_N[first:last]
        key = label_N.tobytes()
        if key not in self._among:  # of a few kinds of action
            of_row_N = self._rows(label_N)
            chosen_N = np.flatnonzero(of_row_N >= 0)
            self._among[key] = chosen_N, of_row_N[chosen_N], self._turns_N[of_row_N[chosen_N]]
        chosen_N, of_row_N, turns_N = self._among[key]
        if len(chosen_N):
            rows_N = first + chosen_N
            number_N = self._number_NM[of_row_N, recorder.micro_batch_N[rows_N] % turns_N]
            spans = recorder.start_NSR, recorder.finish_NSR, recorder.own_NSR
            windows.add_transfers(rows_N, number_N, spans, self._busy, compiled=self._compiled)

    def _numbers(self, transfers_M: tuple[Transfer, ...]) -> list[int]:
        """Those of transfers among the busy ones."""
        numbers = self._numbers_of.get(transfers_M)
        if numbers is None:
            found = each_port_seconds(transfers_M, self.ports)
            numbers = self._numbers_of[transfers_M] = [self._busy.add(seconds_SKR) for seconds_SKR in found]
        return numbers

    def _rows(self, label_N: NDArray[np.int32]) -> NDArray[np.int64]:
        """The row of every label; none where its transfers keep no port busy."""
        labels = self._labels.all()
        if len(self._row_L) < len(labels):
            self._row_L = np.append(self._row_L, np.full(len(labels) - len(self._row_L), UNKNOWN))
        row_N = self._row_L[label_N]
        if row_N.min() > UNKNOWN:
            return row_N
        for number in dict.fromkeys(label_N[row_N == UNKNOWN].tolist()):
            transfers_M = self._transfers_of.get(labels[number], ())
            numbers = self._numbers(transfers_M) if transfers_M else []
            busy = bool(numbers) and self._busy.longest_BSR[numbers].any()
            self._row_L[number] = self._add_turns(numbers) if busy else NO_ROW
        return self._row_L[label_N]

    def _add_turns(self, numbers: list[int]) -> int:
        """The row of a label whose transfers have these numbers."""
        row, turns = self._number_NM.shape
        longer = np.zeros((row + 1, max(turns, len(numbers))), dtype=np.int64)
        longer[:row, :turns], longer[row, : len(numbers)] = self._number_NM, numbers
        self._turns_N, self._number_NM = np.append(self._turns_N, len(numbers)), longer
        return row

    def _first_kernel(self, first: int, last: int) -> tuple[Operation, FloatArray, FloatArray] | None:
        """That of an action with these rows, its start and its finish."""
        recorder = self._recorder
        for row, number in enumerate(recorder.label_N[first : min(first + NEXT_ROWS, last)].tolist(), start=first):
            if number not in self._kernel_of:
                self._kernel_of[number] = self._kernels.get(self._labels.all()[number])
            if (kernel := self._kernel_of[number]) is not None:
                return kernel, recorder.start_NSR[row].copy(), recorder.finish_NSR[row].copy()
        return None
