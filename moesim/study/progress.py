"""How far a pool is: what the display shows after every change."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counts of points and of routers to train first; `running` counts both."""

    points: int
    done: int = 0
    failed: int = 0
    infeasible: int = 0
    routers: int = 0
    trained: int = 0
    running: int = 0

    @property
    def finished(self) -> int:
        """Points with a record."""
        return self.done + self.failed + self.infeasible


Watch = Callable[[Progress], None]
