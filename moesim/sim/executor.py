"""The lockstep executor: one vector of clocks per stream, a position per (routing sample, rank).

    compute:   start = max(chain, stream, host issue);  finish = start + duration, slower while a transfer is open
    transfer:  start = max(chain, stream, host issue);  finish = transfer.finish(start)
    read-back: the host waits for chain and stream

Every compute operation that runs beside a transfer is listed behind it and every transfer directly behind what feeds
it, so one walk in list order is exact: when a compute operation is placed, each transfer that can overlap it is known.

Legend: S routing samples, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import Label, SpanRecorder, Stream
from moesim.sim.operations import MAIN, NUM_CHAINS, SIDE, Block, Kind, Operation, Run, interleave

FloatArray = NDArray[np.float64]
Handed = tuple[Label, FloatArray, FloatArray]  # what, when it was sent, when it arrives

MAX_RUNS = 2  # passes that overlap in one action


@dataclass(frozen=True, kw_only=True)
class HostModel:
    """Seconds the host needs per launch in either direction and per read-back; `runs_ahead` when it never limits."""

    forward_launch: float
    backward_launch: float
    readback: float


FREE_HOST = HostModel(forward_launch=0.0, backward_launch=0.0, readback=0.0)


class Labels:
    """The distinct labels of a simulation and their numbers."""

    def __init__(self) -> None:
        self._number: dict[Label, int] = {}

    def number(self, label: Label) -> int:
        """The number of a label, new ones in order of first use."""
        return self._number.setdefault(label, len(self._number))

    def all(self) -> tuple[Label, ...]:
        """Labels by number."""
        return tuple(self._number)


class GroupExecutor:
    """The clocks of one rank group and the walk over its blocks."""

    def __init__(
        self, *, samples: int, ranks: int, host: HostModel, slowdown: float, recorder: SpanRecorder, labels: Labels
    ) -> None:
        self.host_model = host
        self.slowdown = slowdown  # of compute beside an open transfer, >= 1
        self.recorder = recorder
        self.labels = labels
        shape = (samples, ranks)
        self.host_SR = np.zeros(shape)
        self.compute_SR = np.zeros(shape)
        self.communication_SR = np.zeros(shape)
        self.chains_CSR = np.zeros((MAX_RUNS * NUM_CHAINS, *shape))
        self.reduced_SR = np.zeros(shape)  # when the latest collective on gradients or parameters was done
        self.last_begin_SR = np.zeros(shape)  # when the current action began
        self._interleaved: dict[tuple[Block, Block], tuple[tuple[int, Operation], ...]] = {}
        self._open_from_SR = np.zeros(shape)  # the latest transfer: compute placed beside it is slowed
        self._open_until_SR = np.zeros(shape)

    @property
    def done_SR(self) -> FloatArray:
        """When each rank has finished its tasks; collectives apart (`reduced_SR`)."""
        done_SR: FloatArray = np.maximum(self.compute_SR, self.communication_SR)
        return np.maximum(done_SR, self.chains_CSR.max(axis=0), out=done_SR)

    def execute(self, runs: Sequence[Run]) -> None:
        """Do one action: a pass, or two passes that overlap."""
        if len(runs) == 1:
            for operation in runs[0].block.operations:
                self._advance(operation, runs[0], 0)
            return
        pair = (runs[0].block, runs[1].block)
        if pair not in self._interleaved:
            self._interleaved[pair] = interleave(*pair)
        for which, operation in self._interleaved[pair]:
            self._advance(operation, runs[which], which * NUM_CHAINS)

    def begin(self, arrived: Sequence[Handed]) -> None:
        """All chains wait until what the next action needs has arrived; waiting for what is on its way is a span."""
        ready_SR = np.maximum(self.chains_CSR.max(axis=0), self.compute_SR)
        for label, sent_SR, arrival_SR in arrived:
            if (arrival_SR > ready_SR).any():
                start_SR = np.clip(sent_SR, ready_SR, np.maximum(arrival_SR, ready_SR))
                finish_SR = np.maximum(arrival_SR, ready_SR)
                self.recorder.add(self.labels.number(label), -1, start_SR, finish_SR, finish_SR - start_SR)
                ready_SR = finish_SR
        self.chains_CSR[:] = ready_SR
        self.last_begin_SR = ready_SR

    def wait_for_reductions(self) -> None:
        """All chains wait until the latest collective is done."""
        self.begin([])
        np.maximum(self.chains_CSR, self.reduced_SR, out=self.chains_CSR)

    def finished(self, which: int) -> FloatArray:
        """When pass `which` of the last action handed over what it gives."""
        finish_SR: FloatArray = self.chains_CSR[which * NUM_CHAINS + MAIN].copy()
        return finish_SR

    def _advance(self, operation: Operation, run: Run, first_chain: int) -> None:
        launch = self.host_model.backward_launch if run.backward else self.host_model.forward_launch
        if operation.launches:
            self.host_SR += operation.launches * launch
        chain = first_chain + operation.chain
        match operation.kind:
            case Kind.COMPUTE:
                self._compute(operation, chain, run.micro_batch)
            case Kind.TRANSFER:
                self._transfer(operation, chain, run.micro_batch)
            case Kind.READBACK:
                ready_SR = np.maximum(self.chains_CSR[chain], self.compute_SR)
                np.maximum(self.host_SR, ready_SR, out=self.host_SR)
                self.host_SR += self.host_model.readback
            case Kind.FORK:
                self.chains_CSR[first_chain + SIDE] = self.chains_CSR[first_chain + MAIN]
            case Kind.JOIN:
                main_SR = self.chains_CSR[first_chain + MAIN]
                np.maximum(main_SR, self.chains_CSR[first_chain + SIDE], out=main_SR)

    def _issue(self, operation: Operation, ready_SR: FloatArray, micro_batch: int) -> FloatArray:
        """When the device may start: it stands still where the host has not issued the operation yet."""
        if not (self.host_SR > ready_SR).any():
            return ready_SR
        start_SR = np.maximum(ready_SR, self.host_SR)
        if operation.kind is Kind.COMPUTE:
            stall = Label("host", "host", Stream.HOST, operation.label.layer)
            self.recorder.add(self.labels.number(stall), micro_batch, ready_SR, start_SR, start_SR - ready_SR)
        return start_SR

    def _compute(self, operation: Operation, chain: int, micro_batch: int) -> None:
        assert operation.seconds_MSR is not None
        seconds_MSR = operation.seconds_MSR
        duration_SR = seconds_MSR[micro_batch % len(seconds_MSR)]
        chain_SR = self.chains_CSR[chain]
        start_SR = self._issue(operation, np.maximum(chain_SR, self.compute_SR), micro_batch)
        finish_SR = start_SR + duration_SR
        if self.slowdown > 1.0 and (start_SR < self._open_until_SR).any():
            finish_SR = self._slowed_finish(start_SR, duration_SR)
        self.compute_SR = finish_SR
        self.chains_CSR[chain] = finish_SR
        self._record(operation, micro_batch, start_SR, finish_SR, finish_SR - start_SR)

    def _slowed_finish(self, start_SR: FloatArray, work_SR: FloatArray) -> FloatArray:
        """Work before the transfer runs at full speed, beside it at 1 / slowdown, behind it at full speed again."""
        before_SR = np.clip(self._open_from_SR - start_SR, 0.0, work_SR)
        left_SR = work_SR - before_SR
        begin_SR = start_SR + before_SR
        beside_SR = np.minimum(np.maximum(self._open_until_SR - begin_SR, 0.0) / self.slowdown, left_SR)
        return np.asarray(begin_SR + beside_SR * self.slowdown + (left_SR - beside_SR))

    def _transfer(self, operation: Operation, chain: int, micro_batch: int) -> None:
        transfers = operation.transfers_M
        prepared = transfers[micro_batch % len(transfers)]
        chain_SR = self.chains_CSR[chain]
        start_SR = self._issue(operation, np.maximum(chain_SR, self.communication_SR), micro_batch)
        finish_SR = prepared.finish(start_SR)
        self.communication_SR = finish_SR
        self.chains_CSR[chain] = finish_SR
        self._open_from_SR, self._open_until_SR = start_SR, finish_SR
        self._record(operation, micro_batch, start_SR, finish_SR, np.minimum(prepared.alone_R, finish_SR - start_SR))

    def collective(self, label: Label, *, start_SR: FloatArray, finish_SR: FloatArray, own: float) -> None:
        """A collective with ranks outside the group, begun at start and done at finish; `own` seconds are its own."""
        self.reduced_SR = finish_SR
        own_SR = np.minimum(np.full_like(start_SR, own), finish_SR - start_SR)
        self.recorder.add(self.labels.number(label), -1, start_SR, finish_SR, own_SR)

    def _record(
        self, operation: Operation, micro_batch: int, start_SR: FloatArray, finish_SR: FloatArray, own_SR: FloatArray
    ) -> None:
        self.recorder.add(self.labels.number(operation.label), micro_batch, start_SR, finish_SR, own_SR)
