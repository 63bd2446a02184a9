"""Serving on a clock: a process lets requests arrive, and one for each set of groups that step together serves them."""

from collections.abc import Generator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.serving.batch import Batch, Job
from moesim.serving.costs import StepCost, StepCosts
from moesim.serving.requests import Requests

PARTS = tuple(part.name for part in fields(StepCost))


@dataclass
class Served:
    """What happened: seconds per request [N], and per step of a set of groups its end, length, load and pages."""

    first_N: NDArray[np.float64]
    done_N: NDArray[np.float64]
    step_end: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_generated: list[int] = field(default_factory=list)
    step_waiting: list[int] = field(default_factory=list)
    step_pages: list[int] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    preempted: int = 0


def run_clock(costs: StepCosts, requests: Requests, *, pages: int) -> Served:
    """Serve all requests to their end."""
    scenario = costs.scenario
    env = simpy.Environment()
    batches = [Batch(scenario.engine, pages=pages) for _ in range(scenario.parallelism.data)]
    sets = [list(range(len(batches)))] if costs.together else [[number] for number in range(len(batches))]
    served = Served(np.full(len(requests), np.nan), np.full(len(requests), np.nan))
    bells = [_Bell(env) for _ in sets]
    set_of = {group: number for number, groups in enumerate(sets) for group in groups}
    env.process(_arrivals(env, requests, batches, bells, set_of))
    for bell, groups in zip(bells, sets, strict=True):
        env.process(_steps(env, costs, [batches[group] for group in groups], bell, served))
    env.run()
    served.preempted = sum(batch.preempted for batch in batches)
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
    env: simpy.Environment, requests: Requests, batches: list[Batch], bells: list[_Bell], set_of: dict[int, int]
) -> Generator[Any, Any, None]:
    for number in range(len(requests)):
        delay = float(requests.arrival_N[number]) - env.now
        if delay > 0:
            yield env.timeout(delay)
        group = min(range(len(batches)), key=lambda each: (batches[each].load, each))
        batches[group].waiting.append(Job(number, int(requests.input_N[number]), int(requests.output_N[number])))
        bells[set_of[group]].ring()


def _steps(
    env: simpy.Environment, costs: StepCosts, batches: list[Batch], bell: _Bell, served: Served
) -> Generator[Any, Any, None]:
    while True:
        if all(batch.is_idle for batch in batches):
            yield bell.wait()
            continue
        formed = [batch.form() for batch in batches]
        tokens_D = np.array([each.tokens for each in formed])
        generated_D = np.array([each.generated for each in formed])
        context_D = np.array([each.context for each in formed])
        chunks = [(d, tokens, before) for d, each in enumerate(formed) for _, tokens, before in each.chunks]
        cost = costs.step(tokens_D, generated_D, context_D, chunks)
        seconds = cost.total
        assert tokens_D.sum() > 0 and seconds > 0
        yield env.timeout(seconds)
        for part in PARTS:
            served.parts[part] += getattr(cost, part)
        for batch, each in zip(batches, formed, strict=True):
            first, done = batch.finish(each)
            for job in first:
                if np.isnan(served.first_N[job.request]):
                    served.first_N[job.request] = env.now
            for job in done:
                served.done_N[job.request] = env.now
        served.step_end.append(env.now)
        served.step_seconds.append(seconds)
        served.step_tokens.append(int(tokens_D.sum()))
        served.step_generated.append(int(generated_D.sum()))
        served.step_waiting.append(sum(len(batch.waiting) for batch in batches))
        served.step_pages.append(sum(batch.used_pages for batch in batches))
