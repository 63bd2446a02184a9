"""Kernel models that the cells of a screen share: at loads on a grid, so that what they remember is of use again."""

from dataclasses import dataclass, field
from typing import Any

from moesim.kernels import KernelModel

LOAD_GRID = 5e12  # FLOP/s, half a per cent of an H100's peak: the clock follows load by less than that


@dataclass(frozen=True, eq=False)
class SharedClocks:
    """`kernels` whose `at_load` gives the same model again for the same load, loads being rounded to LOAD_GRID.

    Everything else is that of `kernels`.
    """

    kernels: KernelModel
    _known: dict[float, KernelModel] = field(init=False, default_factory=dict, repr=False)

    def at_load(self, flops_per_second: float) -> Any:
        """The kernels in a step of about this mean load; itself where there is no power limit."""
        load = round(flops_per_second / LOAD_GRID) * LOAD_GRID
        if load not in self._known:
            self._known[load] = self.kernels.at_load(load)
        found = self._known[load]
        return self if found is self.kernels else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)
