"""What became of every combination: counts by stage and reason, and which constraint took the last ones."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# In the order in which a combination meets them.
STAGES = {
    "offer": "more GPUs than offered",
    "sizes": "sizes that do not divide",
    "places": "groups that leave their node",
    "same": "the same as another",
    "refused": "refused by the scenario's checks",
    "unsupported": "not simulated yet",
    "memory": "more memory than a GPU has",
    "speed": "slower than asked for",
    "deadline": "later than the deadline",
    "budget": "dearer than the budget",
}


@dataclass
class Rejections:
    """Counts of combinations; `nearest` holds, for each limit, the discarded one that came closest: (factor, text)."""

    looked_at: int = 0
    kept: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    nearest: dict[str, tuple[float, str]] = field(default_factory=dict)

    def keep(self) -> None:
        """One combination is a candidate."""
        self.looked_at += 1
        self.kept += 1

    def discard(self, stage: str, reason: str, detail: str, factor: float | None = None) -> None:
        """One is not; `factor` by which it misses a limit."""
        assert stage in STAGES
        self.looked_at += 1
        self.reasons[stage, reason] += 1
        self.examples.setdefault((stage, reason), detail)
        if factor is not None and factor < self.nearest.get(stage, (float("inf"), ""))[0]:
            self.nearest[stage] = factor, detail

    def count(self, stage: str) -> int:
        """Combinations discarded at a stage."""
        return sum(count for (where, _), count in self.reasons.items() if where == stage)

    @property
    def binding(self) -> str | None:
        """The stage that took the last combinations; None while some are left."""
        if self.kept:
            return None
        return next((stage for stage in reversed(STAGES) if self.count(stage)), None)

    def why_empty(self) -> str:
        """One line on the constraint that took the last combinations."""
        stage = self.binding
        assert stage is not None, "some are left, or none was looked at"
        if stage in self.nearest:
            return f"{stage}: {self.nearest[stage][1]}"
        (_, reason), _ = max(
            ((key, count) for key, count in self.reasons.items() if key[0] == stage), key=lambda pair: pair[1]
        )
        return f"{STAGES[stage]}: {self.examples[stage, reason]}"

    def as_json(self) -> dict[str, Any]:
        """looked_at = kept + the sum of all discarded."""
        discarded = [
            {"stage": stage, "reason": reason, "count": count, "example": self.examples[stage, reason]}
            for (stage, reason), count in sorted(
                self.reasons.items(), key=lambda pair: (list(STAGES).index(pair[0][0]), -pair[1], pair[0][1])
            )
        ]
        return {"looked_at": self.looked_at, "kept": self.kept, "discarded": discarded}
