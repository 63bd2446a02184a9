"""The lockstep executor: one vector of clocks per stream, a position per (routing sample, rank).

    compute:   start = max(chain, stream, host issue);  finish = start + duration, slower while a transfer is open
    transfer:  start = max(chain, stream, host issue);  finish = transfer.finish(start), later for compute beside it
    read-back: the host waits for chain and stream

Every compute operation that runs beside a transfer is listed behind it and every transfer directly behind what feeds
it, so one walk in list order is exact: when a compute operation is placed, each transfer that can overlap it is known.
What waits for a transfer is listed behind the compute beside it, so that its end can still move.

Legend: N kernels, F families of kernels, S routing samples, R ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.conditions import Conditions
from moesim.engine.executor_steps import Labels, Step
from moesim.engine.lateness import Among, Lateness
from moesim.engine.ports_in_use import PortsInUse
from moesim.engine.segments import (
    COMMUNICATION,
    COMPUTE,
    FAMILY_NUMBERS,
    MET,
    NO_TRANSFER,
    NUM_CHAIN_CLOCKS,
    NUM_CLOCKS,
    OPEN_FROM,
    OPEN_UNTIL,
)
from moesim.kernels import Beside, slowed_at, wait_of
from moesim.kernels.jitter import NO_JITTER, Jitter
from moesim.program.changes import ChangingTransfer
from moesim.program.collectives import PeerCollective
from moesim.program.host import FREE_HOST, HostModel
from moesim.program.operations import MAIN, NUM_CHAINS, SIDE, Kind, Run, Transfer
from moesim.program.step_program import FREE, FREE_BESIDE
from moesim.results.spans import Label, Part, SpanRecorder, Stream

FloatArray = NDArray[np.float64]
Handed = tuple[Label, FloatArray, FloatArray]  # what, when it was sent, when it arrives

# Waiting for the slowest of all ranks where no collective between groups does it: nothing of it is the meeting's own.
SINGLE = 1e-6  # round-off of what spans keep in single precision, generously
MEETING = Label("wait for the slowest rank", "bubble", Stream.REDUCTION, -1)


class _Window(NamedTuple):
    """An open transfer: since when, until when, and what it and kernels cost each other."""

    from_SR: FloatArray
    until_SR: FloatArray
    beside_F3R: FloatArray


@cache
def _loops() -> ModuleType:
    from moesim.engine import executor_loops

    return executor_loops


class GroupExecutor:
    """The clocks of one rank group and the walk over its blocks."""

    def __init__(
        self,
        *,
        samples: int,
        ranks: int,
        host: HostModel,
        beside_R: Sequence[Mapping[str, Beside]],
        recorder: SpanRecorder,
        labels: Labels,
        compiled: bool = False,
        beside_collectives_R: Sequence[Mapping[str, Beside]] = (FREE,),
        collective_rate: float = 0.0,
        conditions: Conditions | None = None,
        ranks_R: NDArray[np.int64] | None = None,
        jitter: Jitter = NO_JITTER,
    ) -> None:
        """`beside_collectives_R`: as `beside_R`, where the transfer is a library's collective; absent: these are free.

        `collective_rate`: bytes/s of a rank that they were measured at, see `moesim.kernels.Contention`.
        """
        self.host_model = host
        self.beside_F3R = _facts(beside_R)
        self.collectives_F3R = _facts(beside_collectives_R)
        self._is_free_of_contention = all(
            bool((facts_F3R == np.array(FREE_BESIDE)[:, None]).all())
            for facts_F3R in (self.beside_F3R, self.collectives_F3R)
        )
        self._open_F3R = self._reducing_F3R = self.beside_F3R  # of the latest transfer, and collective of a layer
        self._collective_rate = collective_rate
        self._facts_of: dict[PeerCollective, FloatArray] = {}
        self.recorder = recorder
        self.labels = labels
        self.clocks_KSR = np.zeros((NUM_CLOCKS, samples, ranks))  # numbered in `segments`; parts of it by name:
        self.chains_CSR = self.clocks_KSR[:NUM_CHAIN_CLOCKS]
        self.compute_SR, self.communication_SR = self.clocks_KSR[COMPUTE], self.clocks_KSR[COMMUNICATION]
        self._open_from_SR, self._open_until_SR = self.clocks_KSR[OPEN_FROM], self.clocks_KSR[OPEN_UNTIL]
        self.host_SR = np.zeros((samples, ranks)) - host.ahead
        self.reduced_SR = np.zeros((samples, ranks))  # when the latest collective on gradients or parameters was done
        # The collectives of layers that follow each other without a pause: when they began, and the row of the last.
        self._reducing_from_SR, self._reducing_span = np.zeros((samples, ranks)), -1
        self.last_begin_SR = np.zeros((samples, ranks))  # when the current action began
        self.last_begin = 0.0  # on its first rank
        self._reduces_inside = False  # actions hold collectives on gradients or parameters
        self.records_all = False  # also waits of no length: samples simulated apart then have the same rows
        self._host_is_free = host == FREE_HOST
        self._compiled = compiled and self._host_is_free and conditions is None
        self._conditions, self._ranks_R = conditions, np.arange(ranks) if ranks_R is None else ranks_R
        self._transfer_span = -1  # the row of the latest transfer
        self.lateness: Lateness | None = None  # None: ranks are alike
        self.ports: PortsInUse | None = None  # None: nothing is ever open beside a transfer on a rank's ports
        self._queued: list[tuple[int, PeerCollective]] = []  # collectives of layers that may yet end later: row, it
        if not jitter.is_none:
            self.lateness = Lateness(jitter, clocks_4SR=self.clocks_KSR[MET:])

    @property
    def done_SR(self) -> FloatArray:
        """When each rank has finished its tasks; collectives apart (`reduced_SR`)."""
        done_SR: FloatArray = np.maximum(self.compute_SR, self.communication_SR)
        np.maximum(done_SR, self.chains_CSR.max(axis=0), out=done_SR)
        return done_SR

    def saved(self) -> Callable[[], None]:
        """What brings the clocks back to now; spans since then are written over."""
        clocks_KSR, host_SR, count = self.clocks_KSR.copy(), self.host_SR.copy(), self.recorder.count
        open_ = self._transfer_span, self._open_F3R
        reducing = self._reducing_from_SR, self._reducing_span, self._reducing_F3R
        reduced_SR, recorder, queued = self.reduced_SR, self.recorder, [*self._queued]
        rows = [row for row in (self._transfer_span, self._reducing_span) if row >= 0]  # may still become longer
        rows += [row for row, _ in queued]
        collectives = 0 if self.ports is None else len(self.ports.collectives)
        times = [
            (row, recorder.start_NSR[row].copy(), recorder.finish_NSR[row].copy(), recorder.own_NSR[row].copy())
            for row in rows
        ]
        restore_lateness = self.lateness.saved() if self.lateness is not None else None

        def restore() -> None:
            if restore_lateness is not None:
                restore_lateness()
            self.clocks_KSR[:], self.host_SR[:] = clocks_KSR, host_SR
            recorder.count = count
            self._transfer_span, self._open_F3R = open_
            self._queued = [*queued]
            if self.ports is not None:
                self.ports.collectives.keep(collectives)
            self._reducing_from_SR, self._reducing_span, self._reducing_F3R = reducing
            if self._reduces_inside:
                self.reduced_SR = reduced_SR
            for row, start_SR, finish_SR, own_SR in times:
                recorder.start_NSR[row], recorder.finish_NSR[row], recorder.own_NSR[row] = start_SR, finish_SR, own_SR

        return restore

    def execute(self, runs: Sequence[Run]) -> None:
        """Do one action: a pass, or two passes that overlap."""
        parts = self._execute_packed(runs, whole=True) if self._compiled else self.execute_in_parts(runs)
        for _ in parts:
            pass

    def execute_in_parts(self, runs: Sequence[Run]) -> Iterator[tuple[int, Transfer, FloatArray, FloatArray]]:
        """As `execute`, stopping behind each transfer, which may then be `delay`ed: its chain, it, start and finish."""
        if self._compiled:
            yield from self._execute_packed(runs, whole=False)
            return
        for step in self.labels.steps(tuple(run.block for run in runs), runs=self._host_is_free):
            run = runs[step.which]
            self._take(step, run)
            if step.kind is Kind.TRANSFER:
                transfer = step.transfers_M[run.micro_batch % len(step.transfers_M)]
                yield step.chain, transfer, self._open_from_SR, self._open_until_SR

    def _execute_packed(
        self, runs: Sequence[Run], *, whole: bool
    ) -> Iterator[tuple[int, Transfer, FloatArray, FloatArray]]:
        """`whole`: without a stop behind transfers in which all ranks meet."""
        packed = self.labels.packed(tuple(run.block for run in runs), whole=whole)
        recorder, loops, clocks_KSR = self.recorder, _loops(), self.clocks_KSR
        first, second = micro_batches = runs[0].micro_batch, runs[-1].micro_batch
        of_span = first if first == second else first + packed.which_G * (second - first)
        span = recorder.run(packed.labels_G, of_span).start
        spans = recorder.start_NSR, recorder.finish_NSR, recorder.own_NSR
        jitter_3 = np.zeros(3) if self.lateness is None else self.lateness.loops
        for steps_NC, rows, chain, which, transfers_M in packed.segments:
            now = self.beside_F3R, self._open_F3R, self._transfer_span, chain, span
            durations = *packed.seconds_Q, packed.alike_S, *micro_batches, jitter_3
            opened = loops.advance(clocks_KSR, steps_NC, *durations, *now, *spans)
            if opened >= 0:
                self._transfer_span, self._open_F3R = opened, self.beside_F3R
                if self.lateness is not None:
                    self.lateness.all_have_met()
            span += rows
            if chain != NO_TRANSFER:
                transfer = transfers_M[micro_batches[which] % len(transfers_M)]
                done_SR = transfer.finish(spans[0][span])
                if self.lateness is not None:
                    done_SR = self._with_lateness(transfer, spans[0][span], done_SR)
                loops.settle(clocks_KSR, chain, span, done_SR, transfer.alone_R, *spans)
                self._transfer_span, self._open_F3R = span, self._facts_beside(transfer)
                yield chain, transfer, self._open_from_SR, self._open_until_SR
                span += 1

    def delay(self, chain: int, finish_SR: FloatArray) -> None:
        """The transfer just taken, on `chain`, was slowed by others: it ends later, at `finish_SR`."""
        span = self._transfer_span
        self.recorder.own_NSR[span] += finish_SR - self.communication_SR
        self.recorder.finish_NSR[span] = finish_SR
        self.communication_SR[:] = self.chains_CSR[chain] = self._open_until_SR[:] = finish_SR
        if self.lateness is not None:
            self.lateness.met_SR[:] = finish_SR

    def pass_on(self) -> None:
        """An action has ended that is not the last: all transfers are over, and their spans may go."""
        if self.recorder.pass_on():
            self._transfer_span = -1

    def begin(self, arrived: Sequence[Handed]) -> None:
        """All chains wait until what the next action needs has arrived; waiting for what is on its way is a span."""
        ready_SR = before_SR = np.maximum(self.chains_CSR.max(axis=0), self.compute_SR)
        for label, sent_SR, arrival_SR in arrived:
            if self.records_all or (arrival_SR > ready_SR).any():
                start_SR = np.clip(sent_SR, ready_SR, np.maximum(arrival_SR, ready_SR))
                finish_SR = np.maximum(arrival_SR, ready_SR)
                self.recorder.add(self.labels.number(label), -1, start_SR, finish_SR, finish_SR - start_SR)
                ready_SR = finish_SR
        self.chains_CSR[:] = ready_SR
        self.last_begin_SR, self.last_begin = ready_SR, float(ready_SR.min())
        if self.lateness is not None and arrived:
            self.lateness.met_SR += ready_SR - before_SR  # standing idle is no work

    def wait_for_reductions(self) -> None:
        """All chains wait until the latest collective is done."""
        self.begin([])
        np.maximum(self.chains_CSR, self.reduced_SR, out=self.chains_CSR)
        if self.lateness is not None:
            np.maximum(self.lateness.met_SR, self.chains_CSR[MAIN], out=self.lateness.met_SR)

    def meet_others(self, among: Among) -> None:
        """With no collective between groups to do it in, wait for the slowest of all ranks."""
        if self.lateness is None:
            return
        done_SR = self.done_SR
        late_SR = self.lateness.among_groups(done_SR, among)
        if self._reduces_inside and self._reducing_span >= 0:
            self.recorder.finish_NSR[self._reducing_span] += late_SR
            self.reduced_SR = self.reduced_SR + late_SR
        else:
            start_SR = np.maximum(done_SR, self.reduced_SR)
            finish_SR = np.maximum(done_SR + late_SR, start_SR)
            self.recorder.add(self.labels.number(MEETING), -1, start_SR, finish_SR, np.zeros_like(late_SR))
            self.chains_CSR += late_SR

    def settle_collectives(self) -> None:
        """The collectives of layers so far are done when the transfers beside them leave them room on the ports."""
        queued, self._queued = self._queued, []
        if self.ports is None:
            return
        recorder, before_SR = self.recorder, np.full(self.host_SR.shape, -np.inf)
        for row, prepared in queued:
            finish_SR, own_SR = recorder.finish_NSR[row], recorder.own_NSR[row].astype(np.float64)
            begin_SR = np.maximum(finish_SR - own_SR, before_SR)
            through_SR = self.ports.collective(prepared, begin_SR, own_SR)
            later_SR = np.maximum(np.maximum(begin_SR + own_SR, through_SR) - finish_SR, 0.0)
            later_SR[later_SR <= SINGLE * own_SR] = 0.0
            np.maximum(recorder.start_NSR[row], before_SR, out=recorder.start_NSR[row])
            recorder.own_NSR[row] += np.maximum(through_SR - (begin_SR + own_SR), 0.0)
            recorder.finish_NSR[row] = before_SR = finish_SR + later_SR
            self.reduced_SR = before_SR.copy()

    @property
    def queued_since(self) -> float:
        """When the first of the collectives of layers began that may yet end later; infinite without one."""
        return float(self.recorder.start_NSR[self._queued[0][0]].min()) if self._queued else np.inf

    def finished(self, which: int) -> FloatArray:
        """When pass `which` of the last action handed over what it gives."""
        finish_SR: FloatArray = self.chains_CSR[which * NUM_CHAINS + MAIN].copy()
        return finish_SR

    def _take(self, step: Step, run: Run) -> None:
        if step.launches and not self._host_is_free:
            model = self.host_model
            self.host_SR += step.launches * (model.backward_launch if run.backward else model.forward_launch)
        chains_CSR, chain = self.chains_CSR, step.chain
        match step.kind:
            case Kind.COMPUTE:
                self._compute(step, run.micro_batch)
            case Kind.TRANSFER:
                self._transfer(step, run.micro_batch)
            case Kind.READBACK:
                ready_SR = np.maximum(chains_CSR[chain], self.compute_SR)
                np.maximum(self.host_SR, ready_SR, out=self.host_SR)
                self.host_SR += self.host_model.readback
            case Kind.FORK:
                chains_CSR[chain + SIDE] = chains_CSR[chain]
            case Kind.JOIN:
                np.maximum(chains_CSR[chain], chains_CSR[chain + SIDE], out=chains_CSR[chain])
            case Kind.COLLECTIVE:
                self._reduces_inside = True
                start_SR = np.maximum(chains_CSR[chain], self.reduced_SR)
                prepared = step.transfers_M[0]
                goes_on_SR = (self._reducing_span >= 0) & (start_SR == self.reduced_SR)
                self._reducing_from_SR = np.where(goes_on_SR, self._reducing_from_SR, start_SR)
                self.reduced_SR, own_SR = self._carried(prepared, start_SR)
                plain = _as_before(prepared)
                assert isinstance(plain, PeerCollective)
                self._reducing_span, self._reducing_F3R = self.recorder.count, self._facts_at_rate(plain)
                self._queued.append((self.recorder.count, plain))
                self.recorder.add(int(step.labels_N[0]), run.micro_batch, start_SR, self.reduced_SR, own_SR)
            case Kind.AWAIT:
                self.settle_collectives()
                np.maximum(chains_CSR[chain], self.reduced_SR, out=chains_CSR[chain])

    def _issue(self, step: Step, ready_SR: FloatArray, micro_batch: int) -> FloatArray:
        """When the device may start: it stands still where the host has not issued the operation yet."""
        if self._host_is_free or not (self.records_all or (self.host_SR > ready_SR).any()):
            return ready_SR
        start_SR = np.maximum(ready_SR, self.host_SR)
        if self.lateness is not None:
            self.lateness.paced_SR = np.where(self.host_SR > ready_SR, start_SR, self.lateness.paced_SR)
        if step.kind is Kind.COMPUTE:
            stall = Label("host", "host", Stream.HOST, step.layer, part=Part.STALL)
            self.recorder.add(self.labels.number(stall), micro_batch, ready_SR, start_SR, start_SR - ready_SR)
        return start_SR

    def _compute(self, step: Step, micro_batch: int) -> None:
        elapsed_MNSR, recorder = step.elapsed_MNSR, self.recorder
        elapsed_NSR = elapsed_MNSR[micro_batch % len(elapsed_MNSR)]
        chain_SR, compute_SR = self.chains_CSR[step.chain], self.compute_SR
        start_SR = self._issue(step, np.maximum(chain_SR, compute_SR), micro_batch)
        if self._conditions is not None:
            elapsed_NSR = self._conditions.elapsed(start_SR, elapsed_NSR, self._ranks_R)
        rows = recorder.run(step.labels_N, micro_batch)
        start_NSR, finish_NSR = recorder.start_NSR[rows], recorder.finish_NSR[rows]
        np.add(elapsed_NSR, start_SR, out=finish_NSR)
        if not self._is_free_of_contention:
            if (start_SR < self._open_until_SR).any():
                window = _Window(self._open_from_SR, self._open_until_SR, self._open_F3R)
                self._lengthen(_beside(step.families_N, start_SR, elapsed_NSR, finish_NSR, window))
            if self._reducing_span >= 0 and (start_SR < self.reduced_SR).any():
                window = _Window(self._reducing_from_SR, self.reduced_SR, self._reducing_F3R)
                alone_NSR = finish_NSR - start_SR
                self._lengthen_reductions(_beside(step.families_N, start_SR, alone_NSR, finish_NSR, window))
        start_NSR[0], start_NSR[1:] = start_SR, finish_NSR[:-1]
        np.subtract(finish_NSR, start_NSR, out=recorder.own_NSR[rows], casting="same_kind")
        compute_SR[:] = chain_SR[:] = finish_NSR[-1]

    def _lengthen(self, until_SR: FloatArray) -> None:
        """The latest transfer ends at `until_SR`, and what waits for it, too."""
        before_SR = self._open_until_SR.copy()
        if not (until_SR > before_SR).any():
            return
        span, later_SR = self._transfer_span, until_SR > before_SR
        self.recorder.own_NSR[span] += until_SR - before_SR
        self.recorder.finish_NSR[span] = np.where(later_SR, until_SR, self.recorder.finish_NSR[span])
        for clock_SR in (*self.chains_CSR, self.communication_SR, self._open_until_SR):
            np.copyto(clock_SR, until_SR, where=later_SR & (clock_SR == before_SR))

    def _lengthen_reductions(self, until_SR: FloatArray) -> None:
        """The latest collective of a layer ends at `until_SR`; nothing waits for it yet."""
        span, later_SR = self._reducing_span, until_SR - self.reduced_SR
        self.recorder.own_NSR[span] += later_SR
        self.recorder.finish_NSR[span] += later_SR
        self.reduced_SR = until_SR

    def _facts_beside(self, transfer: Transfer) -> FloatArray:
        """What kernels and this transfer cost each other, by family."""
        return self._facts_at_rate(transfer) if isinstance(transfer, PeerCollective) else self.beside_F3R

    def _facts_at_rate(self, transfer: PeerCollective) -> FloatArray:
        known_F3R = self._facts_of.get(transfer)
        if known_F3R is None:
            known_F3R = self.collectives_F3R.copy()
            alone = float(transfer.alone_R.max())
            rate = transfer.sent_bytes / alone
            known_F3R[:, 1] = slowed_at(known_F3R[:, 1], rate=rate, measured_rate=self._collective_rate)
            known_F3R[:, 2] = wait_of(known_F3R[:, 2], alone=alone)
            self._facts_of[transfer] = known_F3R
        return known_F3R

    def _transfer(self, step: Step, micro_batch: int) -> None:
        prepared = step.transfers_M[micro_batch % len(step.transfers_M)]
        start_SR = self._issue(step, np.maximum(self.chains_CSR[step.chain], self.communication_SR), micro_batch)
        finish_SR, own_SR = self._carried(prepared, start_SR)
        if self.lateness is not None:
            finish_SR = self._with_lateness(prepared, start_SR, finish_SR)
        self.communication_SR[:] = self.chains_CSR[step.chain] = finish_SR
        self._open_from_SR[:], self._open_until_SR[:] = start_SR, finish_SR
        self._transfer_span, self._open_F3R = self.recorder.count, self._facts_beside(_as_before(prepared))
        self.recorder.add(int(step.labels_N[0]), micro_batch, start_SR, finish_SR, own_SR)

    def _with_lateness(self, transfer: Transfer, start_SR: FloatArray, finish_SR: FloatArray) -> FloatArray:
        """When a transfer is done that begins when the slowest rank comes, chips and hosts being what they are."""
        assert self.lateness is not None
        finish_SR = finish_SR + self.lateness.at_transfer(transfer, start_SR)
        self.lateness.met_SR[:] = finish_SR
        return finish_SR

    def _carried(self, prepared: Transfer, start_SR: FloatArray) -> tuple[FloatArray, FloatArray]:
        """When a transfer is done, and its own part."""
        if self._conditions is not None and isinstance(prepared, ChangingTransfer):
            return self._conditions.transfer(prepared, start_SR)
        finish_SR = prepared.finish(start_SR)
        return finish_SR, np.minimum(prepared.alone_R, finish_SR - start_SR)

    def early_collective(
        self, labels: tuple[Label, Label], *, start_SR: FloatArray, finish_SR: FloatArray, own: float | FloatArray
    ) -> None:
        """A collective begun while tasks were left: the part until these were done, and the part behind them."""
        done_SR = np.clip(self.done_SR, start_SR, finish_SR)
        own_SR = np.minimum(own, finish_SR - start_SR)
        behind_SR = np.minimum(own_SR, finish_SR - done_SR)
        self.recorder.add(self.labels.number(labels[0]), -1, start_SR, done_SR, own_SR - behind_SR)
        self.recorder.add(self.labels.number(labels[1]), -1, done_SR, finish_SR, behind_SR)

    def collective(self, label: Label, *, start_SR: FloatArray, finish_SR: FloatArray, own: float | FloatArray) -> None:
        """A collective with ranks outside the group, begun at start and done at finish; `own` seconds are its own."""
        self.reduced_SR = finish_SR
        own_SR = np.minimum(np.full_like(start_SR, own), finish_SR - start_SR)
        self.recorder.add(self.labels.number(label), -1, start_SR, finish_SR, own_SR)


def _as_before(transfer: Transfer) -> Transfer:
    """A transfer on links as they are before the step."""
    return transfer.states[0] if isinstance(transfer, ChangingTransfer) else transfer


def _facts(beside_R: Sequence[Mapping[str, Beside]]) -> FloatArray:
    """[F, 3, R], or [F, 3, 1] where they are the same for all ranks."""
    return np.moveaxis(np.array([[beside[family] for family in FAMILY_NUMBERS] for beside in beside_R]), 0, -1).copy()


def _beside(
    families_N: NDArray[np.int32],
    last_SR: FloatArray,
    elapsed_NSR: FloatArray,
    finish_NSR: FloatArray,
    window: _Window,
) -> FloatArray:
    """A run of kernels that begins at `last_SR`, in part beside an open transfer, of `finish_NSR` without it, which is
    moved on. Returns when the transfer then ends.

    While both run a kernel does 1 / c of its work and the transfer 1 / t of its own in a second. A kernel that was
    there first keeps its SMs for the family's wait, in which it loses nothing and the transfer gains nothing.
    """
    until_SR, before_SR, lost_SR = window.until_SR.copy(), np.zeros_like(last_SR), np.zeros_like(last_SR)
    for kernel, family in enumerate(families_N):
        compute, transfer, wait = window.beside_F3R[family]
        work_SR = elapsed_NSR[kernel] - before_SR
        left_SR = np.maximum(until_SR - np.maximum(last_SR, window.from_SR), 0.0)
        free_SR = np.minimum(np.maximum(window.from_SR - last_SR, 0.0), work_SR)
        waits_SR = (left_SR > 0.0) & (last_SR <= window.from_SR)
        longer_SR = np.where(waits_SR, np.minimum(wait, work_SR - free_SR), 0.0)
        beside_SR = np.minimum(work_SR - (free_SR + longer_SR), left_SR * transfer / compute)
        lost_SR += beside_SR * (compute - 1.0)
        until_SR += longer_SR + beside_SR * (compute * (1.0 - 1.0 / transfer))
        finish_NSR[kernel] += lost_SR
        before_SR, last_SR = elapsed_NSR[kernel], finish_NSR[kernel]
    return until_SR
