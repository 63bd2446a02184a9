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


@dataclass(frozen=True)
class Judge:
    """Judges combinations of one space and counts what becomes of them.

    `fitting`: all that fit into memory, in the order of judging, also those that miss the goal.
    """

    space: Space
    screen: Screen
    funnel: Funnel = field(default_factory=Funnel)
    fitting: list[Candidate] = field(default_factory=list)
    _seen: dict[Layout, tuple[Candidate | None, Violation]] = field(default_factory=dict, repr=False)

    @property
    def candidates(self) -> list[Candidate]:
        """Those that may meet the goal."""
        return [candidate for candidate in self.fitting if candidate.miss is None]

    def judge(self, layout: Layout) -> tuple[Candidate | None, Violation]:
        """The candidate that a combination is, or None; each combination is counted once."""
        if layout not in self._seen:
            self._seen[layout] = self._judged(layout)
        return self._seen[layout]

    def _judged(self, layout: Layout) -> tuple[Candidate | None, Violation]:
        plan = self.space.plan
        try:
            scenario = self.space.scenario(layout)
        except Discarded as why:
            self.funnel.discard(why.stage, why.reason, why.detail)
            return None, Violation(1.0, 1.0, 1.0)
        peak, capacity = self.screen.memory(scenario)
        usable = capacity * (1 - plan.constraints.free_memory)
        if peak > usable:
            gpu = scenario.cluster.pools[0].gpu
            detail = f"the smallest layout needs {format_bytes(peak)} of the {format_bytes(usable)} of a {gpu}"
            self.funnel.discard("memory", gpu, f"{detail} ({scenario.name})", peak / usable)
            return None, Violation(0.0, peak / usable - 1, 1.0)
        outcome = outcome_of(scenario, self.screen.step_seconds(scenario))
        miss = missed(plan, outcome)
        if miss is not None and miss.factor <= SLACK:
            miss = None
        candidate = Candidate(layout, outcome, peak, miss)
        self.fitting.append(candidate)
        if miss is None:
            self.funnel.keep()
            return candidate, Violation(0.0, 0.0, 0.0)
        self.funnel.discard(miss.stage, miss.stage, f"{miss.text} ({scenario.name})", miss.factor)
        return candidate, Violation(0.0, 0.0, miss.factor - 1)
