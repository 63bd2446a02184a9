"""Serving on a clock: a process lets requests arrive, and one for each set of groups that step together serves them.

A data group of several stages works on as many batches in turn, a stage behind each other: a round lasts as long as the
slowest of them takes through all stages.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.seeding import stream
from moesim.serving.balancing import BALANCING
from moesim.serving.batch import Batch, Formed
from moesim.serving.costs import PARTS, StepCost, StepCosts
from moesim.serving.memory import ServingMemoryReport, layout_of
from moesim.serving.requests import Requests


@dataclass
class Served:
    """What happened: seconds per request [N], and per step of a set of groups its end, length, load and pages."""

    first_N: NDArray[np.float64]
    done_N: NDArray[np.float64]
    batches: Sequence[Batch] = ()
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


def run_clock(costs: StepCosts, requests: Requests, *, memory: ServingMemoryReport) -> Served:
    """Serve all requests to their end."""
    scenario = costs.scenario
    env = simpy.Environment()
    mesh, layout = scenario.parallelism, layout_of(scenario)
    stages = mesh.pipeline
    engine = scenario.engine.model_copy(update={"running": -(-scenario.engine.running // stages)})
    batches = [
        Batch(
            engine,
            layout=layout,
            pages=memory.pages,
            host_pages=memory.host_pages,
            rng=stream(scenario.seed, "accepted drafts", number),
        )
        for number in range(mesh.data * stages)
    ]
    groups = [batches[group * stages : (group + 1) * stages] for group in range(mesh.data)]
    sets = [groups] if costs.together else [[group] for group in groups]
    served = Served(np.full(len(requests), np.nan), np.full(len(requests), np.nan), batches)
    bells = [_Bell(env) for _ in sets]
    bell_of = [bells[0 if costs.together else number // stages] for number in range(len(batches))]
    env.process(_arrivals(env, requests, batches, bell_of, scenario.engine.balancing))
    for first, (bell, members) in enumerate(zip(bells, sets, strict=True)):
        env.process(_steps(env, costs, members, bell, served, first))
    env.run()
    assert not np.isnan(served.done_N).any(), "a request was never answered"
    return served


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


def _arrivals(
    env: simpy.Environment, requests: Requests, batches: Sequence[Batch], bell_of: Sequence[_Bell], balancing: str
) -> Generator[Any, Any, None]:
    choose = BALANCING[balancing]
    for number in range(len(requests)):
        delay = float(requests.arrival_N[number]) - env.now
        if delay > 0:
            yield env.timeout(delay)
        job = requests.job(number)
        chosen = choose(batches, job)
        batches[chosen].add(job)
        bell_of[chosen].ring()


def _steps(
    env: simpy.Environment,
    costs: StepCosts,
    groups: Sequence[Sequence[Batch]],
    bell: _Bell,
    served: Served,
    first_group: int,
) -> Generator[Any, Any, None]:
    """`groups`: the batches of each data group that steps with the others, from number `first_group` on."""
    batches = [batch for group in groups for batch in group]
    while True:
        if all(batch.is_idle for batch in batches):
            yield bell.wait()
            continue
        formed = [[batch.form() for batch in group] for group in groups]
        turns = [in_turn for in_turn in zip(*formed, strict=True) if any(each.tokens for each in in_turn)]
        cost = max((costs.step(in_turn) for in_turn in turns), key=lambda each: each.total)
        assert cost.total > 0
        yield env.timeout(cost.total)
        waiting = sum(batch.num_waiting for batch in batches)
        held_D = np.array([sum(batch.held_pages for batch in group) for group in groups])
        for batch, each in zip(batches, (each for group in formed for each in group), strict=True):
            first, done = batch.finish(each)
            for job in first:
                if np.isnan(served.first_N[job.request]):
                    served.first_N[job.request] = env.now
            for job in done:
                served.done_N[job.request] = env.now
        served.step_pages.append(int(held_D.sum()))
        served.step_held.append((first_group, held_D))
        _note(served, env.now, cost, [each for group in formed for each in group], waiting)


def _note(served: Served, now: float, cost: StepCost, formed: Sequence[Formed], waiting: int) -> None:
    for part in PARTS:
        served.parts[part] += getattr(cost, part)
    served.step_end.append(now)
    served.step_seconds.append(cost.total)
    served.step_tokens.append(sum(each.tokens for each in formed))
    served.step_generated.append(sum(each.generated for each in formed))
    served.step_rows.append(sum(each.generated * each.rows for each in formed))
    served.step_waiting.append(waiting)
