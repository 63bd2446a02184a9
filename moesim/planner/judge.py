"""One combination judged: discarded with a reason, or a candidate with what the screen expects of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from moesim.planner.funnel import Funnel
from moesim.planner.outcome import Miss, Outcome, missed, outcome_of
from moesim.planner.screen import Screen
from moesim.planner.space import Discarded, Layout, Space
from moesim.units import format_bytes

SLACK = 1.1  # the screen may be off: what misses a limit by less than this factor is left to the simulation


class Candidate(NamedTuple):
    """A layout that fits into memory. `miss`: the limit that it misses by more than SLACK, by the screen."""

    layout: Layout
    screened: Outcome
    peak_bytes: float
    miss: Miss | None


class Violation(NamedTuple):
    """How far a combination is from a candidate, 0 where it keeps a constraint: for searches that need a direction."""

    structure: float
    memory: float
    goal: float


class Loss(NamedTuple):
    """Where a combination falls out of the funnel, why, and by which factor it misses a limit."""

    stage: str
    reason: str
    detail: str
    factor: float | None = None


class Verdict(NamedTuple):
    """What becomes of one combination; `loss` is None where it may meet the goal."""

    candidate: Candidate | None
    violation: Violation
    loss: Loss | None


def verdict_on(space: Space, screen: Screen, layout: Layout) -> Verdict:
    """The verdict on one combination; the same whatever else was judged before."""
    plan = space.plan
    try:
        scenario = space.scenario(layout)
    except Discarded as why:
        return Verdict(None, Violation(1.0, 1.0, 1.0), Loss(why.stage, why.reason, why.detail))
    peak, capacity = screen.memory(scenario)
    usable = capacity * (1 - plan.constraints.free_memory)
    if peak > usable:
        gpu = scenario.cluster.pools[0].gpu_name
        detail = f"the smallest layout needs {format_bytes(peak)} of the {format_bytes(usable)} of a {gpu}"
        loss = Loss("memory", gpu, f"{detail} ({scenario.name})", peak / usable)
        return Verdict(None, Violation(0.0, peak / usable - 1, 1.0), loss)
    outcome = outcome_of(scenario, screen.step_seconds(scenario), screen=True)
    miss = missed(plan, outcome)
    if miss is None or miss.factor <= SLACK:
        return Verdict(Candidate(layout, outcome, peak, None), Violation(0.0, 0.0, 0.0), None)
    loss = Loss(miss.stage, miss.stage, f"{miss.text} ({scenario.name})", miss.factor)
    return Verdict(Candidate(layout, outcome, peak, miss), Violation(0.0, 0.0, miss.factor - 1), loss)


@dataclass(frozen=True)
class Judge:
    """Judges combinations of one space and counts what becomes of them.

    `fitting`: all that fit into memory, in the order of judging, also those that miss the goal.
    """

    space: Space
    screen: Screen
    funnel: Funnel = field(default_factory=Funnel)
    fitting: list[Candidate] = field(default_factory=list)
    _seen: dict[Layout, Verdict] = field(init=False, default_factory=dict, repr=False)

    @property
    def candidates(self) -> list[Candidate]:
        """Those that may meet the goal."""
        return [candidate for candidate in self.fitting if candidate.miss is None]

    def knows(self, layout: Layout) -> bool:
        """Whether the combination was judged before."""
        return layout in self._seen

    def judge(self, layout: Layout) -> Verdict:
        """The verdict on a combination; each combination is counted once."""
        if layout not in self._seen:
            self.settle(layout, verdict_on(self.space, self.screen, layout))
        return self._seen[layout]

    def settle(self, layout: Layout, verdict: Verdict) -> None:
        """Count a combination with a verdict found elsewhere."""
        assert layout not in self._seen
        self._seen[layout] = verdict
        if verdict.candidate is not None:
            self.fitting.append(verdict.candidate)
        if verdict.loss is None:
            self.funnel.keep()
        else:
            self.funnel.discard(*verdict.loss)
