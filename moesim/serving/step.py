"""What one step costs, by part."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step by part; `hidden`: those of the exchange that compute hides, in no part."""

    projections: float
    attention: float
    experts: float
    exchange: float
    head: float
    draft: float
    swap: float
    host: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing runs beside anything else."""
        return float(sum(getattr(self, part) for part in PARTS))

    def longer(self, seconds: float) -> "StepCost":
        """The same step with an exchange that takes so much longer."""
        return replace(self, exchange=self.exchange + seconds)


PARTS = tuple(part.name for part in fields(StepCost) if part.name != "hidden")
