"""Serving on a clock: a process lets requests arrive, and one for each set of groups that step together serves them.

A data group of several stages works on as many batches in turn, a stage behind each other: a round lasts as long as the
slowest of them takes through all stages. `BALANCING`: which batch a request that arrives is given to.

Keys and values go from instances for prompts to those that decode through ports that exchanges use, too. A transfer
takes the bytes that the receiving ranks will store, sent by as many ranks side by side as the smaller of both tensor
groups has, on `nic_share` of what a message between them reaches. Those that leave by one port, or come in by one, do
so one after the other. `by_layer`: all but the last layer's share may be sent while the prompt is computed.

No port passes more than its capacity. Of a step of T seconds an exchange keeps the ports of its ranks busy for X. While
both are there they halve a port (a transfer takes no more than its share s of it, g = min(s, 1/2)), so that the step
grows by f X g / (1 - g): f is the part of the step in which transfers that were waiting at its beginning are there, and
all ranks wait for the busiest port. Of a step that lasts T' transfers get 1 - X / T'.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.scenario import Cluster
from moesim.seeding import stream
from moesim.serving.batch import Batch, Formed, Job
from moesim.serving.costs import PARTS, StepCost, StepCosts
from moesim.serving.memory import ServingMemoryReport, layout_of
from moesim.serving.requests import Requests
from moesim.serving.schema import ServingScenario

NEARLY = 1e-9  # of a transfer: what is left by round-off


class Watcher:
    """Who is told what instances do: by itself nothing comes of it."""

    def formed(self, batches: Sequence[Batch]) -> None:
        """A step was formed of these batches."""

    def beside(self, batches: Sequence[Batch], cost: StepCost) -> StepCost:
        """The cost of that step beside whatever else uses its ports."""
        del batches
        return cost

    def ended(self, batches: Sequence[Batch]) -> None:
        """The step is over."""

    def done(self, batch: Batch, job: Job) -> None:
        """A batch is done with a request."""


class Port:
    """One direction of a NIC, or of a GPU's NVLink: transfers one after the other, beside exchanges of steps.

    `fullest`: the largest share of a step that exchange and transfers together kept it busy for.
    """

    def __init__(self, env: simpy.Environment, share: float) -> None:
        self._env, self.share = env, share
        self.queue = simpy.Resource(env)
        self.pending: list[Transfer] = []
        self.fullest = 0.0
        self._taken: dict[Batch, tuple[float, float, float]] = {}  # exchange, begin, passed until then
        self._of_step: dict[Batch, float] = {}  # share of its step
        self._passed = 0.0  # seconds of the whole port

    @property
    def rate(self) -> float:
        """How fast a transfer is now, of what it is alone."""
        left = 1.0 - max(self._of_step.values(), default=0.0)
        return min(1.0, left / self.share)

    def lengthened(self, exchange: float, total: float) -> float:
        """Seconds by which a step grows for the transfers that wait here."""
        half = min(self.share, 0.5)
        most = exchange * half / (1.0 - half)
        passes = total - exchange + most / self.share  # seconds of transfers alone, if they are always there
        waiting = sum(each.left_now for each in self.pending)
        return most * min(1.0, waiting / passes) if passes > 0.0 else most

    def take(self, owner: Batch, exchange: float, total: float) -> None:
        """A step begins whose exchange keeps the port busy for so many seconds of it."""
        self._taken[owner] = exchange, self._env.now, self._passed_now
        self._of_step[owner] = exchange / total
        self._wake()

    def release(self, owner: Batch) -> None:
        """It is over."""
        if owner not in self._taken:
            return
        exchange, begin, passed = self._taken.pop(owner)
        busy = exchange + self._passed_now - passed
        self.fullest = max(self.fullest, busy / (self._env.now - begin))
        del self._of_step[owner]
        self._wake()

    def note(self, seconds: float) -> None:
        """A transfer was alone for as long as it takes so many seconds."""
        self._passed += self.share * seconds

    @property
    def _passed_now(self) -> float:
        return self._passed + self.share * sum(each.passing for each in self.pending)

    def _wake(self) -> None:
        for each in self.pending:
            each.wake()


@dataclass(eq=False)
class Transfer:
    """Keys and values of one prompt; `left` seconds of it, alone, are still to pass, once it has been asked for."""

    env: simpy.Environment
    ports: tuple[Port, Port]
    left: float = 0.0
    taken: float = 0.0  # seconds that it had its ports for
    _rate: float = 0.0
    _since: float = 0.0
    _woken: simpy.Event | None = None

    @property
    def passing(self) -> float:
        """Seconds that have passed since its rate was last looked at."""
        return self._rate * (self.env.now - self._since)

    @property
    def left_now(self) -> float:
        """Seconds that are left at this moment."""
        return max(0.0, self.left - self.passing)

    def ask(self, seconds: float) -> None:
        """So many more are to pass."""
        self.left += seconds
        for port in self.ports:
            if self not in port.pending:
                port.pending.append(self)

    def run(self) -> Generator[Any, Any, None]:
        """Pass what was asked for."""
        source, target = self.ports
        whole = self.left
        with source.queue.request() as out:
            yield out
            with target.queue.request() as into:
                yield into
                begin = self.env.now
                while self.left > NEARLY * whole:
                    self._rate, self._since = min(port.rate for port in self.ports), self.env.now
                    self._woken = self.env.event()
                    enough = [self.env.timeout(self.left / self._rate)] if self._rate > 0.0 else []
                    yield simpy.AnyOf(self.env, [self._woken, *enough])
                    passed, self._rate = self.passing, 0.0
                    self.left -= passed
                    for port in self.ports:
                        port.note(passed)
                self.taken += self.env.now - begin
        self.left, self._woken = 0.0, None
        for port in self.ports:
            port.pending.remove(self)

    def wake(self) -> None:
        """The rate may be another one now."""
        if self._woken is not None and not self._woken.triggered:
            self._woken.succeed()


@dataclass
class Ports:
    """The ports that transfers leave and come in by, made when one is first used."""

    env: simpy.Environment
    cluster: Cluster
    share: float
    found: dict[tuple[str, str, int], Port] = field(default_factory=dict)

    def between(self, source: int, target: int) -> tuple[Port, Port]:
        """Those of a transfer between two ranks."""
        tier = self._tier(source, target)
        return self._of("out", tier, source), self._of("into", tier, target)

    def tiers(self, sources: Iterable[int], targets: Iterable[int]) -> set[str]:
        """Which kinds of ports transfers between any of these ranks can use."""
        out, into = ({self._places[rank][0] for rank in ranks} for ranks in (sources, targets))
        return {"nvlink" if a == b else "nic" for a in out for b in into}

    def used_by(self, way: str, rank: int, tiers: Iterable[str]) -> list[Port]:
        """Those of a rank, of each kind."""
        return [self._of(way, tier, rank) for tier in tiers]

    def _tier(self, source: int, target: int) -> str:
        return "nvlink" if self._places[source][0] == self._places[target][0] else "nic"

    @cached_property
    def _places(self) -> list[tuple[int, int, int]]:
        """Of every rank its node, its place there, and the GPUs of that node."""
        sizes = self.cluster.domain_sizes
        return [(node, place, size) for node, size in enumerate(sizes) for place in range(size)]

    def _of(self, way: str, tier: str, rank: int) -> Port:
        _, place, size = self._places[rank]
        if tier == "nic":  # shared where a node has fewer of them than GPUs
            rank = rank - place % (size // (self.cluster.fabric.nics_per_node or size))
        if (way, tier, rank) not in self.found:
            self.found[way, tier, rank] = Port(self.env, self.share)
        return self.found[way, tier, rank]


def exchanges_over_nics(scenario: ServingScenario) -> bool:
    """Whether dispatch and combine, or all-reduces of tensor ranks, leave a node."""
    mesh = scenario.parallelism
    return (mesh.stage_size if mesh.expert > 1 else mesh.tensor) > scenario.cluster.domain_sizes[0]


SLACK = 2.0  # times the requests of the emptiest batch, and
SLACK_REQUESTS = 4  # so many more, may a batch have that a request goes to for its prefix


def least_loaded(batches: Sequence[Batch], job: Job) -> int:
    """The batch with the fewest requests, the first of them."""
    del job
    return min(range(len(batches)), key=lambda each: (batches[each].load, each))


def by_prefix(batches: Sequence[Batch], job: Job) -> int:
    """The batch with the fewest requests of those that know the prefix, unless it has many more than the emptiest."""
    emptiest = least_loaded(batches, job)
    known = [number for number, batch in enumerate(batches) if batch.knows(job.prefix)]
    if not known:
        return emptiest
    chosen = min(known, key=lambda each: (batches[each].load, each))
    most = SLACK * batches[emptiest].load + SLACK_REQUESTS
    return chosen if batches[chosen].load <= most else emptiest


BALANCING: Mapping[str, Callable[[Sequence[Batch], Job], int]] = {"least_loaded": least_loaded, "by_prefix": by_prefix}


@dataclass
class Transfers:
    """Keys and values that went from instances for prompts to those that decode, and what their requests waited."""

    tokens: int = 0
    bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)  # of each on its link
    shown: list[float] = field(default_factory=list)  # from the first token until all had come
    fullest_port: float = 0.0  # largest share of a step that a port was busy for, with transfers and exchange


@dataclass
class Served:
    """What happened: seconds per request [N], and per step of a set of groups its end, length, load and pages."""

    first_N: NDArray[np.float64]
    done_N: NDArray[np.float64]
    batches: tuple[Batch, ...] = ()
    num_sets: int = 0  # of groups that step together
    earlier: "tuple[Served, ...]" = ()  # what instances for prompts did before
    transfers: Transfers | None = None  # between them and these
    step_end: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_generated: list[int] = field(default_factory=list)
    step_rows: list[int] = field(default_factory=list)  # of generated tokens, drafted ones with them
    step_waiting: list[int] = field(default_factory=list)
    step_pages: list[int] = field(default_factory=list)
    step_held: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)  # first group, pages of each
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def count(self, name: str) -> int:
        """A sum of `moesim.serving.batch.Counts` over all batches."""
        return sum(getattr(batch.counts, name) for batch in self.batches)


class Instance:
    """The batches of all data groups of one set of GPUs with all weights, and the processes that step them.

    All note in `served`, and tell the `watcher`.
    """

    def __init__(
        self,
        env: simpy.Environment,
        costs: StepCosts,
        memory: ServingMemoryReport,
        served: Served,
        watcher: Watcher | None = None,
    ) -> None:
        scenario = costs.scenario
        stages, data = scenario.parallelism.pipeline, scenario.parallelism.data
        engine = scenario.engine.model_copy(update={"running": -(-scenario.engine.running // stages)})
        first = len(served.batches)
        self.batches = [
            Batch(
                engine,
                layout=layout_of(scenario),
                pages=memory.pages,
                host_pages=memory.host_pages,
                rng=stream(scenario.seed, "accepted drafts", first + number),
            )
            for number in range(data * stages)
        ]
        served.batches += tuple(self.batches)
        groups = [self.batches[group * stages : (group + 1) * stages] for group in range(data)]
        sets = [groups] if costs.together else [[group] for group in groups]
        bells = [_Bell(env) for _ in sets]
        self._bell_of = [bells[0 if costs.together else number // stages] for number in range(len(self.batches))]
        self._choose = BALANCING[engine.balancing]
        for number, (bell, members) in enumerate(zip(bells, sets, strict=True)):
            group = first // stages + number * len(members)
            env.process(_steps(env, costs, members, bell, served, first_group=group, watcher=watcher or Watcher()))
        served.num_sets += len(sets)

    @property
    def load(self) -> int:
        """Requests that are here."""
        return sum(batch.load for batch in self.batches)

    def give(self, job: Job) -> Batch:
        """A request comes; the batch that has it."""
        batch = self.expect(job)
        self.take(batch, job)
        return batch

    def expect(self, job: Job) -> Batch:
        """The batch that a request on its way is meant for."""
        batch = self.batches[self._choose(self.batches, job)]
        batch.coming += 1
        return batch

    def take(self, batch: Batch, job: Job) -> None:
        """A request that was expected comes."""
        batch.coming -= 1
        batch.add(job)
        self.ring(batch)

    def ring(self, batch: Batch) -> None:
        """There is room again in one of the batches."""
        self._bell_of[self.batches.index(batch)].ring()


class _Bell:
    """Wakes a process that waits for work."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self.event: simpy.Event | None = None

    def wait(self) -> simpy.Event:
        self.event = self._env.event()
        return self.event

    def ring(self) -> None:
        if self.event is not None and not self.event.triggered:
            self.event.succeed()


def arrivals(env: simpy.Environment, requests: Requests, give: Callable[[Job], object]) -> Generator[Any, Any, None]:
    """Requests come in their time."""
    for number in range(len(requests)):
        delay = float(requests.arrival_N[number]) - env.now
        if delay > 0:
            yield env.timeout(delay)
        give(requests.job(number))


def _steps(
    env: simpy.Environment,
    costs: StepCosts,
    groups: Sequence[Sequence[Batch]],
    bell: _Bell,
    served: Served,
    *,
    first_group: int,
    watcher: Watcher,
) -> Generator[Any, Any, None]:
    """`groups`: the batches of each data group that steps with the others; from number `first_group` on."""
    batches = [batch for group in groups for batch in group]
    while True:
        if all(batch.is_idle for batch in batches):
            yield bell.wait()
            continue
        step = [[batch.form() for batch in group] for group in groups]
        turns = [in_turn for in_turn in zip(*step, strict=True) if any(each.tokens for each in in_turn)]
        if not turns:  # pages are taken by prompts that are on their way to another instance
            yield bell.wait()
            continue
        watcher.formed(batches)
        cost = max((costs.step(in_turn) for in_turn in turns), key=lambda each: each.total)
        cost = watcher.beside(batches, cost)
        assert cost.total > 0
        yield env.timeout(cost.total)
        watcher.ended(batches)
        waiting = sum(batch.num_waiting for batch in batches)
        held_D = np.array([sum(batch.held_pages for batch in group) for group in groups])
        for batch, each in zip(batches, (each for group in step for each in group), strict=True):
            first, ended = batch.finish(each)
            for job in first:
                if np.isnan(served.first_N[job.request]):
                    served.first_N[job.request] = env.now
            for job in ended:
                served.done_N[job.request] = env.now
                watcher.done(batch, job)
        served.step_pages.append(int(held_D.sum()))
        idle_D = [all(batch.is_idle for batch in group) for group in groups]
        served.step_held.append((first_group, np.where(idle_D, 0, held_D)))
        _note(served, env.now, cost, [each for group in step for each in group], waiting)


def _note(served: Served, now: float, cost: StepCost, formed: Sequence[Formed], waiting: int) -> None:
    for part in PARTS:
        served.parts[part] += getattr(cost, part)
    served.step_end.append(now)
    served.step_seconds.append(cost.total)
    served.step_tokens.append(sum(each.tokens for each in formed))
    served.step_generated.append(sum(each.generated for each in formed))
    served.step_rows.append(sum(each.generated * each.rows for each in formed))
    served.step_waiting.append(waiting)
