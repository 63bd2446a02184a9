"""What if: the same step simulated again, same seeds, with one thing changed. Nothing here is an estimate.

Each answer is that of a run of the changed scenario; only `balanced_routing` has none that could be written down.

balanced_routing   the same kept rows and copies per token in total, spread evenly over experts and ranks, wherever rows
                   end in a kernel's tiles (every run has simulated it)
double_bandwidth   all links carry twice as much; latencies and software costs stay
no_overlap         shared experts, paired micro-batches and gradient reductions wait for communication
no_group_limit     the router may send a token to any group: the same synthetic routing drawn without the limit, or
                   a router trained without it, which takes a training
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.results import RunRecord
from moesim.results.metrics import cost
from moesim.routing.request import ProgressCallback
from moesim.run import mean_step_seconds, obtain_trace
from moesim.scenario import GroupedRouter, Overlap, Scenario, TraceRouting, TrainRouting
from moesim.scenario.routing import NO_GROUPS

LABELS = {
    "balanced_routing": "perfectly balanced routing",
    "double_bandwidth": "twice the network",
    "no_overlap": "no overlap",
    "no_group_limit": "router without group limit",
}


class _NotSimulated(Exception):
    """Why a what-if has no answer for this scenario."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    record: RunRecord
    train: bool
    progress: ProgressCallback | None
    cache_dir: Path | None

    @property
    def scenario(self) -> Scenario:
        """That of the run, with its stages: the pipeline is not split anew for each change."""
        return self.record.scenario.with_stages_listed()

    def balanced_routing(self) -> float:
        if not self.scenario.model.experts:
            raise _NotSimulated("a dense model routes nothing")
        return float(self.record.result["balanced_step_time_s"])

    def double_bandwidth(self) -> float:
        return mean_step_seconds(self.scenario.with_bandwidth(2.0), self.record.trace)

    def no_overlap(self) -> float:
        software = self.scenario.implementation.software
        if not software.overlaps:
            raise _NotSimulated(f"{software.name} overlaps nothing")
        nothing = Overlap(shared_experts=False, micro_batches=False, gradient_reduction=False)
        return mean_step_seconds(self.scenario.model_copy(update={"overlap": nothing}), self.record.trace)

    def no_group_limit(self) -> float:
        free = _without_limit(self.scenario, train=self.train)
        trace = obtain_trace(free, progress=self.progress, cache_dir=self.cache_dir)
        return mean_step_seconds(free, trace)


def _without_limit(scenario: Scenario, *, train: bool) -> Scenario:
    """The scenario whose router chooses among all groups. Raises _NotSimulated where there is no such limit."""
    routing = scenario.routing
    if not scenario.model.experts:
        raise _NotSimulated("a dense model routes nothing")
    if isinstance(routing, TraceRouting):
        raise _NotSimulated("the trace holds what its router chose; record one without the limit")
    if scenario.router_shape().num_groups == 1:
        raise _NotSimulated("the router has no group limit")
    if not isinstance(routing, TrainRouting):
        return scenario.model_copy(update={"routing": routing.model_copy(update={"router": NO_GROUPS})})
    if not train:
        raise _NotSimulated("needs the training of another router; ask for it with --what-if=all")
    assert isinstance(routing.router, GroupedRouter), "only such a router is trained with a limit"
    groups = scenario.router_shape().num_groups
    free = GroupedRouter(kind=routing.router.kind, groups=groups, group_limit=groups)
    return scenario.model_copy(update={"routing": routing.model_copy(update={"router": free})})


def what_if(
    record: RunRecord, *, train: bool = False, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RunRecord:
    """`record` with `what_if` in its result: a list of what each change would give, in the order of LABELS.

    Entries hold name, label, step_time_s, difference_s (to the record's step), usd_per_million_tokens and note; a
    change that does not apply or does not fit has None for numbers and the reason as its note. `train` allows
    training another router (`progress` is told of its steps).
    """
    question = _Question(record=record, train=train, progress=progress, cache_dir=cache_dir)
    asked: Sequence[tuple[str, Callable[[], float]]] = [(name, getattr(question, name)) for name in LABELS]
    entries = [_entry(record, name, ask) for name, ask in asked]
    return replace(record, result=record.result | {"what_if": entries})


def _entry(record: RunRecord, name: str, ask: Callable[[], float]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "label": LABELS[name]}
    try:
        step_s = ask()
    except (_NotSimulated, UserError) as reason:
        return {**entry, "step_time_s": None, "difference_s": None, "usd_per_million_tokens": None, "note": str(reason)}
    return {
        **entry,
        "step_time_s": step_s,
        "difference_s": step_s - record.result["step_time_s"],
        "usd_per_million_tokens": cost(record.scenario, step_s)["usd_per_million_tokens"],
        "note": "",
    }
