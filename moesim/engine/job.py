"""A training job over days as SimPy processes: it works, saves, fails, recovers and goes on.

One process is the job; others let failures come, nodes return from repair and the speed of a step change. While
nothing happens work and checkpoints are counted in closed form, so that a year costs as many events as its failures.
Every second of the job is in one account of the `Ledger`.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import simpy
from numpy.typing import NDArray

SECONDS_PER_DAY = 86400.0
INSTANT = 1e-4  # seconds that the rounding of a clock of centuries may leave over
REJOIN = "nodes rejoin"  # what a planned restart is booked on


@dataclass(frozen=True, kw_only=True)
class JobCause:
    """Failures of one cause in all parts of the job together."""

    name: str
    per_second: float
    broken: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """All seconds and numbers of one job.

    step_s: of a step at full size and speed. interval_steps: work between checkpoints. blocking_s: how long the job
    stands for one; write_s: after that, until it can be read. load_s: reading it. spares: nodes that stand by, None: no
    end of them. units: equal parts of the job that can be left out one by one, 1: none. speeds: from when on
    a step takes how many times as long, the first from 0 on, each at least 1.
    """

    step_s: float
    interval_steps: int
    horizon_s: float
    causes: tuple[JobCause, ...] = ()
    blocking_s: float = 0.0
    write_s: float = 0.0
    detection_s: float = 0.0
    restart_s: float = 0.0
    load_s: float = 0.0
    spares: int | None = None
    repair_s: float = 0.0
    shrinks: bool = False
    units: int = 1
    speeds: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    @property
    def per_second(self) -> float:
        """Failures of all causes."""
        return sum(cause.per_second for cause in self.causes)

    @property
    def interval_s(self) -> float:
        """Work between checkpoints at full speed."""
        return self.interval_steps * self.step_s


@dataclass(frozen=True, kw_only=True)
class FailureTimes:
    """When failures come (sorted, seconds) and of which cause: [F] each."""

    at_F: NDArray[np.float64]
    cause_F: NDArray[np.int64]


def draw_failures(job: Job, rng: np.random.Generator) -> FailureTimes:
    """A Poisson process of all causes together over the whole horizon, each failure with a cause by its rate."""
    rates_C = np.array([cause.per_second for cause in job.causes], dtype=np.float64)
    total = float(rates_C.sum())
    if total == 0:
        return FailureTimes(at_F=np.zeros(0), cause_F=np.zeros(0, dtype=np.int64))
    count = int(rng.poisson(total * job.horizon_s))
    at_F = np.sort(rng.uniform(0.0, job.horizon_s, count))
    return FailureTimes(at_F=at_F, cause_F=rng.choice(len(rates_C), size=count, p=rates_C / total))


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where the seconds went. useful + slowed + checkpoint + lost + detection + restart + repair = the horizon.

    useful: kept work at full speed; slowed: what it took longer. lost: work that a failure threw away.
    The last four are by cause. kept: (seconds, useful seconds kept until then), the points of a line.
    """

    useful_s: float
    slowed_s: float
    checkpoint_s: float
    lost_s: Mapping[str, float]
    detection_s: Mapping[str, float]
    restart_s: Mapping[str, float]
    repair_s: Mapping[str, float]
    checkpoints: int
    failures: Mapping[str, int]
    days_with_failures: int
    kept: tuple[tuple[float, float], ...]


def run_job(job: Job, failures: FailureTimes) -> Ledger:
    """The job from 0 to its horizon."""
    assert job.interval_steps >= 1 and job.step_s > 0
    assert job.interval_s + job.blocking_s >= job.write_s * (1 - 1e-9), "a checkpoint is written before the next begins"
    env = simpy.Environment()
    run = _Run(env, job)
    run.process = env.process(run.live())
    env.process(_failures(env, run, failures))
    env.process(_speeds(env, run))
    env.run(until=job.horizon_s)
    run.end()
    return run.ledger(failures)


Waiting = Literal["detection", "restart", "repair"]


@dataclass
class _Work:
    """Work in seconds at full speed (nominal) and as it took (actual)."""

    nominal: float = 0.0
    actual: float = 0.0

    def add(self, other: "_Work") -> None:
        self.nominal += other.nominal
        self.actual += other.actual

    def take(self) -> "_Work":
        """All of it; nothing is left."""
        taken = _Work(self.nominal, self.actual)
        self.nominal = self.actual = 0.0
        return taken


@dataclass
class _Saving:
    """Work since the last checkpoint, on its way to storage, and kept; time moves it on.

    pause_left: seconds that the job still stands for a checkpoint. flight_left: until the one on its way is kept.
    """

    job: Job
    fresh: _Work = field(default_factory=_Work)
    flying: _Work = field(default_factory=_Work)
    kept: _Work = field(default_factory=_Work)
    pause_left: float = 0.0
    flight_left: float = 0.0
    checkpoint_s: float = 0.0
    checkpoints: int = 0

    def advance(self, seconds: float, *, slow: float) -> None:
        """Work and save for so long; a step takes `slow` times as long as at full speed."""
        interval, blocking = self.job.interval_s, self.job.blocking_s
        while seconds > 0:
            if self.pause_left > 0:
                seconds -= self._stand(min(seconds, self.pause_left))
                continue
            cycles = int(seconds // (interval * slow + blocking)) - 1
            if cycles >= 1 and self.fresh.actual == 0:
                self._cycles(cycles, slow)
                seconds -= cycles * (interval * slow + blocking)
                continue
            needed = (interval - self.fresh.nominal) * slow
            part = min(seconds, needed)
            self.fresh.add(_Work(part / slow, part))
            self._fly(part)
            seconds -= part
            if part >= needed - INSTANT:
                self.pause_left = blocking
                if blocking == 0:
                    self._save()

    def until_saved(self, slow: float) -> float:
        """Seconds until the checkpoint of the work at hand can be read."""
        return self.pause_left or (self.job.interval_s - self.fresh.nominal) * slow + self.job.blocking_s

    def lose(self) -> float:
        """Throw away what is not kept; the seconds that it took."""
        self.pause_left = self.flight_left = 0.0
        return self.fresh.take().actual + self.flying.take().actual

    def keep_all(self) -> None:
        """What is at hand counts, at the end."""
        self.kept.add(self.flying.take())
        self.kept.add(self.fresh.take())

    def _stand(self, part: float) -> float:
        self.checkpoint_s += part
        self._fly(part)
        self.pause_left -= part
        if self.pause_left <= INSTANT:
            self.pause_left = 0.0
            self._save()
        return part

    def _fly(self, part: float) -> None:
        if self.flight_left > 0:
            self.flight_left -= part
            if self.flight_left <= INSTANT:
                self.flight_left = 0.0
                self.kept.add(self.flying.take())

    def _save(self) -> None:
        self.kept.add(self.flying.take())
        self.checkpoints += 1
        (self.flying if self.job.write_s > 0 else self.kept).add(self.fresh.take())
        self.flight_left = self.job.write_s

    def _cycles(self, count: int, slow: float) -> None:
        """Whole intervals with their checkpoints, from one checkpoint to another."""
        each = self.job.interval_s
        self.kept.add(self.flying.take())
        self.kept.add(_Work((count - 1) * each, (count - 1) * each * slow))
        self.fresh.add(_Work(each, each * slow))
        self.checkpoint_s += count * self.job.blocking_s
        self.checkpoints += count - 1
        self._save()


class _Run:
    """The job's process and what it knows. `missing`: nodes that it goes on without; `needed`: nodes to replace."""

    def __init__(self, env: simpy.Environment, job: Job) -> None:
        self.env, self.job = env, job
        self.process: simpy.Process
        self.saving = _Saving(job)
        self.spent: dict[str, dict[str, float]] = {name: {} for name in ("lost", "detection", "restart", "repair")}
        self.free, self.missing, self.needed = job.spares or 0, 0, 0
        self.returned = env.event()
        self.slow = job.speeds[0][1]
        self.stopped_by: str | None = None
        self.account: Waiting | None = None  # None: at work
        self.since = 0.0
        self.kept: list[tuple[float, float]] = [(0.0, 0.0)]

    @property
    def pace(self) -> float:
        """How many times as long a step takes as at full size and speed."""
        return self.slow * self.job.units / (self.job.units - self.missing)

    def live(self) -> Generator[Any, Any, None]:
        """Recover if stopped, work, until something interrupts; for ever."""
        while True:
            try:
                if self.stopped_by is not None:
                    yield from self._recover()
                self._turn(None)
                if self.missing and self.free:
                    yield self.env.timeout(self.saving.until_saved(self.pace))
                    yield from self._rejoin()
                else:
                    yield self.env.event()
            except simpy.Interrupt as news:
                self._turn(self.account)
                if isinstance(news.cause, JobCause):
                    self._fail(news.cause)
                elif news.cause is not None:
                    self.slow = float(news.cause)

    def _turn(self, account: Waiting | None) -> None:
        """Book the time since the last turn, and go on in `account`."""
        seconds = self.env.now - self.since
        if self.account is None:
            self.saving.advance(seconds, slow=self.pace)
        else:
            self._book(self.account, seconds)
        self.account, self.since = account, self.env.now
        self.kept.append((self.env.now, self.saving.kept.nominal))

    def _book(self, account: str, seconds: float) -> None:
        accounts, cause = self.spent[account], self.stopped_by or REJOIN
        accounts[cause] = accounts.get(cause, 0.0) + seconds

    def _fail(self, cause: JobCause) -> None:
        self.stopped_by = cause.name
        self._book("lost", self.saving.lose())
        if cause.broken and self.job.spares is not None:
            self.needed += 1
            self.env.process(self._repair())

    def change_speed(self, factor: float) -> None:
        """From now on a step takes `factor` times as long."""
        if self.account is None:
            self.process.interrupt(factor)
        else:
            self.slow = factor

    def _repair(self) -> Generator[Any, Any, None]:
        yield self.env.timeout(self.job.repair_s)
        self.free += 1
        self.returned.succeed()
        self.returned = self.env.event()
        if self.account is None and self.missing:
            self.process.interrupt()

    def _recover(self) -> Generator[Any, Any, None]:
        self._turn("detection")
        yield self.env.timeout(self.job.detection_s)
        while self.needed:
            if self.free:
                self.free, self.needed = self.free - 1, self.needed - 1
            elif self.job.shrinks and self.missing + 1 < self.job.units:
                self.missing, self.needed = self.missing + 1, self.needed - 1
            else:
                self._turn("repair")
                yield self.returned
        yield from self._restart()
        self._turn(None)
        self.stopped_by = None

    def _restart(self) -> Generator[Any, Any, None]:
        """Start again with as many nodes as there are."""
        self._turn("restart")
        back = min(self.missing, self.free)
        self.missing, self.free = self.missing - back, self.free - back
        yield self.env.timeout(self.job.restart_s + self.job.load_s)

    def _rejoin(self) -> Generator[Any, Any, None]:
        """A planned restart behind a checkpoint, once it can be read."""
        self._turn(None)
        yield self.env.timeout(self.saving.flight_left)
        self._turn(None)
        self._book("lost", self.saving.lose())
        yield from self._restart()
        self._turn(None)

    def end(self) -> None:
        """At the horizon what is at hand counts."""
        self._turn(None)
        self.saving.keep_all()
        self.kept[-1] = (self.env.now, self.saving.kept.nominal)

    def ledger(self, failures: FailureTimes) -> Ledger:
        """What was booked."""
        saving, spent = self.saving, {name: MappingProxyType(by) for name, by in self.spent.items()}
        counts = np.bincount(failures.cause_F, minlength=len(self.job.causes))
        return Ledger(
            useful_s=saving.kept.nominal,
            slowed_s=saving.kept.actual - saving.kept.nominal,
            checkpoint_s=saving.checkpoint_s,
            lost_s=spent["lost"],
            detection_s=spent["detection"],
            restart_s=spent["restart"],
            repair_s=spent["repair"],
            checkpoints=saving.checkpoints,
            failures={cause.name: int(n) for cause, n in zip(self.job.causes, counts, strict=True)},
            days_with_failures=len(np.unique(failures.at_F // SECONDS_PER_DAY)),
            kept=tuple(self.kept),
        )


def _failures(env: simpy.Environment, run: _Run, failures: FailureTimes) -> Generator[Any, Any, None]:
    for at, cause in zip(failures.at_F.tolist(), failures.cause_F.tolist(), strict=True):
        yield env.timeout(max(0.0, at - env.now))
        run.process.interrupt(run.job.causes[cause])


def _speeds(env: simpy.Environment, run: _Run) -> Generator[Any, Any, None]:
    for start, factor in run.job.speeds[1:]:
        yield env.timeout(max(0.0, start - env.now))
        run.change_speed(factor)
