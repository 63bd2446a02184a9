"""What one step costs, by part."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step by part."""

    projections: float
    attention: float
    experts: float
    exchange: float
    head: float
    draft: float
    swap: float
    host: float

    @property
    def total(self) -> float:
        """All of it: nothing runs beside anything else."""
        return float(sum(getattr(self, part) for part in PARTS))


PARTS = tuple(part.name for part in fields(StepCost))
