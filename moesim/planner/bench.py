"""Many combinations judged at once by processes of this machine: the verdicts of one process, in the same order.

Combinations that share pieces go to one process together, so that each piece is made about once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.planner.judge import Judge, Verdict, verdict_on
from moesim.planner.plan import Plan
from moesim.planner.screen import Screen
from moesim.planner.space import Discarded, Layout, Space
from moesim.planner.traces import Traces
from moesim.scenario import TrainRouting
from moesim.study.workers import Lost, Workers, opened_workers

Progress = Callable[[int, int], None]  # done, of how many

SMALL = 300  # combinations that one process has judged before others have started
TRIES = 2  # of a group whose process is killed


@dataclass(frozen=True)
class Bench:
    """Judges for one judge: `place` holds the processes, None where this process does it alone."""

    judge: Judge
    place: Workers | None = None
    cache_dir: Path | None = None

    def judge_all(self, layouts: Sequence[Layout], *, progress: Progress | None = None) -> None:
        """Judge the combinations; the judge counts them in their order, however many processes there are.

        Raises UserError when a process is killed twice over the same combinations.
        """
        new = [layout for layout in dict.fromkeys(layouts) if not self.judge.knows(layout)]
        verdicts = self._verdicts(self.place, new, progress) if self.place is not None and new else {}
        for number, layout in enumerate(layouts, start=1):
            if layout in verdicts:
                self.judge.settle(layout, verdicts.pop(layout))
            self.judge.judge(layout)
            if progress is not None and self.place is None:
                progress(number, len(layouts))

    def _verdicts(self, place: Workers, layouts: Sequence[Layout], progress: Progress | None) -> dict[Layout, Verdict]:
        space = self.judge.space
        waiting = [(group, 1) for group in grouped(space, layouts)]
        waiting.reverse()  # taken from the end
        running: dict[Future[Any], tuple[list[Layout], int]] = {}
        verdicts: dict[Layout, Verdict] = {}
        while waiting or running:
            while waiting and place.has_room:
                group, tries = waiting.pop()
                future = place.submit(judge_group, space.plan, space.model is space.plan.model, group, self.cache_dir)
                running[future] = group, tries
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group, tries = running.pop(future)
                found = place.collect(future)
                if not isinstance(found, Lost):
                    verdicts.update(zip(group, found, strict=True))
                elif tries < TRIES:
                    waiting.append((group, tries + 1))
                else:
                    raise UserError(f"{space.plan.name}: the process screening layouts was killed; was memory short?")
            if progress is not None:
                progress(len(verdicts), len(layouts))
        return verdicts


@contextmanager
def opened_bench(judge: Judge, *, workers: int | None, cache_dir: Path | None, expected: int) -> Iterator[Bench]:
    """A bench of `workers` processes (one per core by default), of this one alone for few `expected` combinations.

    Where routers are trained this process trains them first, so that no two processes train the same.
    """
    count = workers or len(os.sched_getaffinity(0))
    if count == 1 or expected <= SMALL:
        yield Bench(judge)
        return
    if isinstance(judge.space.plan.routing, TrainRouting):
        _train(judge)
    with opened_workers(count=count, cluster=None) as place:
        yield Bench(judge, place, cache_dir)


def _train(judge: Judge) -> None:
    for layout in judge.space.layouts():
        try:
            scenario = judge.space.scenario(layout)
        except Discarded:
            continue
        judge.screen.trace_of(scenario)


def grouped(space: Space, layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Combinations whose pieces and memory are much alike together; the largest group first."""
    groups: dict[tuple[object, ...], list[Layout]] = {}
    for layout in layouts:
        key = layout.tensor, layout.context, layout.expert, layout.expert_tensor, layout.micro_batch
        groups.setdefault(key, []).append(layout)
    return sorted(groups.values(), key=len, reverse=True)


def judge_group(plan: Plan, own_model: bool, layouts: Sequence[Layout], cache_dir: Path | None) -> list[Verdict]:
    """The verdicts on some combinations of the plan, or of its baseline: what a process of a bench does."""
    space, screen = _screened(plan, own_model, cache_dir)
    return [verdict_on(space, screen, layout) for layout in layouts]


@lru_cache(maxsize=1)
def _screened(plan: Plan, own_model: bool, cache_dir: Path | None) -> tuple[Space, Screen]:
    """What a process keeps from one group to the next."""
    return Space.of(plan) if own_model else Space.of_baseline(plan), Screen(Traces(cache_dir).of)
