"""Serving on a clock: a process lets requests arrive, and one for each set of groups that step together serves them.

A data group of several stages works on as many batches in turn, a stage behind each other: a round lasts as long as the
slowest of them takes through all stages. `BALANCING`: which batch a request that arrives is given to.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.seeding import stream
from moesim.serving.batch import Batch, Formed, Job
from moesim.serving.costs import PARTS, StepCost, StepCosts
from moesim.serving.memory import ServingMemoryReport, layout_of
from moesim.serving.requests import Requests


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
