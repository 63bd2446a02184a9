"""The routing of a plan's layouts, obtained once for all that would get the same."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from moesim.routing.progress import ProgressCallback
from moesim.routing.request import TrainingRequest
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.routing import StatedRouting, TraceRouting, TrainRouting
from moesim.trace import RoutingTrace
from moesim.trace.basis import check_agreement

TOKENS = 262_144  # recorded or drawn: as many as for a whole step, though a layout may be screened on a part of one


@dataclass(frozen=True)
class Traces:
    """`of` gives the routing of a scenario; `progress` is told of training steps, `cache_dir` holds trained traces."""

    cache_dir: Path | None
    progress: ProgressCallback | None = None
    _known: dict[Hashable, RoutingTrace | None] = field(init=False, default_factory=dict, repr=False)

    def of(self, scenario: Scenario) -> RoutingTrace | None:
        """The trace of the scenario's router; None for a dense model. Raises UserError where a file does not fit.

        It depends on the scenario alone, not on those that were asked for before: the global batch, which differs
        between a layout and the part of it that is screened, counts as at least TOKENS.
        """
        if scenario.model.experts == 0:
            return None
        whole = _with_whole_batch(scenario)
        key = _key(whole)
        if key not in self._known:
            self._known[key] = self._obtained(whole)
        return self._known[key]

    def _obtained(self, scenario: Scenario) -> RoutingTrace | None:
        read = next(iter(self._known.values()), None)
        if read is None or not isinstance(scenario.routing, TraceRouting):
            return obtain_trace(scenario, progress=self.progress, cache_dir=self.cache_dir)
        check_agreement(read, scenario.routing, wanted=scenario.router_shape())  # one plan, one file
        return read


def _with_whole_batch(scenario: Scenario) -> Scenario:
    workload = scenario.workload
    sequences = -(-TOKENS // workload.sequence_length)
    return scenario.model_copy(update={"workload": workload.model_copy(update={"global_batch": sequences})})


def _key(scenario: Scenario) -> Hashable:
    """Equal for scenarios that get the same trace."""
    if isinstance(scenario.routing, TrainRouting):
        return TrainingRequest.from_scenario(scenario).content_hash()
    if isinstance(scenario.routing, TraceRouting):
        return scenario.router_shape()
    window = scenario.parallelism.expert * scenario.tokens_per_micro_batch
    drawn = scenario.router_shape(), max(TOKENS, window)
    if not isinstance(scenario.routing, StatedRouting):
        return drawn
    return *drawn, scenario.placement, scenario.parallelism.context, scenario.parallelism.tensor
