"""The routing of a plan's layouts, obtained once per router: they differ in nothing else that a trace depends on."""

from dataclasses import dataclass, field
from pathlib import Path

from moesim.moe.progress import ProgressCallback
from moesim.run import obtain_trace
from moesim.scenario import RouterShape, Scenario, TraceRouting
from moesim.trace import RoutingTrace
from moesim.trace.agreement import check_agreement


@dataclass(frozen=True)
class Traces:
    """`of` gives the routing of a scenario; `progress` is told of training steps, `cache_dir` holds trained traces."""

    cache_dir: Path | None
    progress: ProgressCallback | None = None
    _known: dict[RouterShape, RoutingTrace | None] = field(default_factory=dict, repr=False)

    def of(self, scenario: Scenario) -> RoutingTrace | None:
        """The trace of the scenario's router; None for a dense model. Raises UserError where a file does not fit."""
        if scenario.model.experts == 0:
            return None
        key = scenario.router_shape()
        if key not in self._known:
            self._known[key] = self._obtained(scenario)
        return self._known[key]

    def _obtained(self, scenario: Scenario) -> RoutingTrace | None:
        read = next(iter(self._known.values()), None)
        if read is None or not isinstance(scenario.routing, TraceRouting):
            return obtain_trace(scenario, progress=self.progress, cache_dir=self.cache_dir)
        check_agreement(read, scenario.routing, wanted=scenario.router_shape())  # one plan, one file
        return read
