"""Which candidates are simulated, and how far the screen was off."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.planner.evaluation import Candidate, Evaluator
from moesim.planner.outcome import Outcome
from moesim.planner.plan import Objective, Plan
from moesim.planner.space import Layout
from moesim.seeding import stream

FIRST_SHARE = 0.75  # of the layouts to simulate; the rest waits for what the screen's error turns out to be


def by_objective(candidates: Iterable[Candidate], names: Sequence[Objective]) -> list[Candidate]:
    """The best by the screen first."""
    return sorted(candidates, key=lambda candidate: (*candidate.screened.objectives(names), candidate.layout[:2]))


def first_choice(candidates: Sequence[Candidate], plan: Plan, count: int) -> list[Candidate]:
    """The best with each kind of GPU, then the best of all in turn with the best of each number of GPUs of a kind.

    A price or a deadline may move, and then another kind or number is what was wanted.
    """
    ordered = by_objective(candidates, plan.objectives)
    best_of_kind = {candidate.layout.gpu: candidate for candidate in reversed(ordered)}
    kinds = by_objective(best_of_kind.values(), plan.objectives)
    best_of_size: dict[tuple[int, int], Candidate] = {}
    for candidate in ordered:
        best_of_size.setdefault((candidate.layout.gpu, candidate.layout.gpus), candidate)
    sizes = list(best_of_size.values())
    in_turn = [candidate for pair in zip(ordered, sizes, strict=False) for candidate in pair]
    chosen = dict.fromkeys([*kinds, *in_turn, *ordered])
    return list(chosen)[: max(1, round(FIRST_SHARE * count))]


def challengers(
    candidates: Sequence[Candidate], simulated: Mapping[Layout, Outcome], plan: Plan, *, best: Outcome | None
) -> list[Candidate]:
    """Candidates not simulated that could still beat the `best`, were the screen as wrong as it has been at worst.

    All others, best first, while nothing simulated meets the goal.
    """
    name = plan.objectives[0]
    others = by_objective((c for c in candidates if c.layout not in simulated), plan.objectives)
    if best is None:
        return others
    known = {candidate.layout: candidate.screened for candidate in candidates if candidate.layout in simulated}
    ratios = [simulated[layout].step_s / screened.step_s for layout, screened in known.items()]
    least = min(ratios, default=1.0)

    def hoped(candidate: Candidate) -> float:
        value = candidate.screened.objective(name)
        return value / least if name == "mfu" else value * least

    return [candidate for candidate in others if hoped(candidate) < best.objective(name)]


def random_sample(evaluator: Evaluator, plan: Plan) -> list[Candidate]:
    """Layouts drawn from all that fit into memory, whether or not they meet the goal: for a measure of the screen."""
    fitting = sorted(evaluator.fitting, key=lambda candidate: str(candidate.layout))
    rng = stream(plan.seed, "check-of-the-screen")
    chosen = rng.permutation(len(fitting))[: plan.search.check]
    return [fitting[index] for index in sorted(chosen.tolist())]


@dataclass(frozen=True, kw_only=True)
class ScreenError:
    """Step times of the screen against those of the simulation, over `layouts` drawn at random.

    `bias`: median of screen / simulation - 1. `rank_correlation`: Spearman's, of the first objective; None for fewer
    than three layouts.
    """

    layouts: int
    median: float
    worst: float
    bias: float
    rank_correlation: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def screen_error(
    pairs: Sequence[tuple[Outcome, Outcome]], *, objective: Callable[[Outcome], float]
) -> ScreenError | None:
    """The error over (screened, simulated) pairs; None without any."""
    if not pairs:
        return None
    relative = np.array([screened.step_s / simulated.step_s - 1 for screened, simulated in pairs])
    ranks = None
    if len(pairs) >= 3:
        ranks = rank_correlation([objective(one) for one, _ in pairs], [objective(two) for _, two in pairs])
    return ScreenError(
        layouts=len(pairs),
        median=float(np.median(np.abs(relative))),
        worst=float(np.abs(relative).max()),
        bias=float(np.median(relative)),
        rank_correlation=ranks,
    )


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side does not vary."""
    one, two = _ranks(np.asarray(first)), _ranks(np.asarray(second))
    one, two = one - one.mean(), two - two.mean()
    size = float(np.sqrt((one**2).sum() * (two**2).sum()))
    return float((one * two).sum() / size) if size else 0.0


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group], dtype=np.float64)
