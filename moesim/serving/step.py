"""What one step costs, by part."""

from dataclasses import dataclass, fields, replace


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

    def beside(self, seconds: float) -> "StepCost":
        """The same step while the ports of its exchange carry other transfers for so many seconds more.

        Those fall on the exchange with its share of the step; the bytes of both go through the same ports, and all
        ranks wait for the one that is busiest.
        """
        if seconds <= 0.0 or self.exchange <= 0.0:
            return self
        longer = min(seconds, self.total) * self.exchange / self.total
        return replace(self, exchange=self.exchange + longer)


PARTS = tuple(part.name for part in fields(StepCost))
