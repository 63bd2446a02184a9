"""The checks of pipeline schedules, stages, recomputation and overlap across sections."""

from typing import Protocol

from moesim.errors import UserError
from moesim.scenario.check_software import require_software
from moesim.scenario.model import Mla
from moesim.scenario.schema import Scenario
from moesim.scenario.software import FUSED
from moesim.schedules import PLAIN, SCHEDULES, SPLIT


class Report(Protocol):
    """Makes the error of a dotted key."""

    def user(self, key: str, message: str) -> UserError:
        """A mistake of the user at `key`."""


def check_pipeline(scenario: Scenario, report: Report) -> None:
    """Raises UserError when the schedule, the ranks and the micro-batches do not fit each other."""
    mesh, schedule = scenario.parallelism, scenario.parallelism.schedule
    facts = schedule.facts
    if facts.virtual and schedule.virtual < 2:
        message = f"{facts.name} needs at least 2 stages per rank; set it to 2 or more, or use kind: {PLAIN.name}"
        raise report.user("parallelism.schedule.virtual", message)
    if not facts.virtual and schedule.virtual != 1:
        others = " or ".join(other.name for other in SCHEDULES.values() if other.virtual)
        message = f"{facts.name} has no virtual stages; use kind: {others}, or drop this key"
        raise report.user("parallelism.schedule.virtual", message)
    p, m = mesh.pipeline, scenario.num_micro_batches
    unit = mesh.data * scenario.workload.micro_batch
    if facts.even and p % 2:
        message = f"{facts.name} needs an even number of ranks, got {p}; use {p + 1}, or another schedule"
        raise report.user("parallelism.pipeline", message)
    if mesh.batch_share != "even":
        return  # `check_mixed` looks at the numbers of every pool
    if facts.whole_rounds and m % p:
        sizes = " or ".join(str(count * unit) for count in (m // p * p, m // p * p + p) if count)
        what = f"{facts.name} needs micro-batches in rounds of pipeline = {p}, got {m}"
        raise report.user("workload.global_batch", f"{what}; use {sizes}")
    least = facts.least_rounds * p
    if (facts.even and m % 2) or m < least:
        fits = max(least, m + m % 2 if facts.even else m) * unit
        kind = "an even number of micro-batches" if facts.even else "micro-batches"
        at_least = f", at least {facts.least_rounds} * pipeline = {least}" if least else ""
        raise report.user("workload.global_batch", f"{facts.name} needs {kind}{at_least}, got {m}; use {fits}")


def check_stages(scenario: Scenario, report: Report) -> None:
    """Raises UserError when the layers do not go into the stages."""
    mesh, layers = scenario.parallelism, scenario.model.layers
    if mesh.stages is None:
        if mesh.num_stages > layers:
            message = f"{mesh.num_stages} stages for {layers} layers; use fewer, or say where they go with stages"
            raise report.user("parallelism.pipeline", message)
        return
    if len(mesh.stages) != mesh.num_stages:
        virtual = " * schedule.virtual" if mesh.schedule.virtual > 1 else ""
        what = f"{len(mesh.stages)} numbers of layers for pipeline{virtual} = {mesh.num_stages} stages"
        raise report.user("parallelism.stages", f"{what}; give one per stage")
    if sum(mesh.stages) != layers:
        what = f"{sum(mesh.stages)} layers in all stages together, but model.layers = {layers}"
        raise report.user("parallelism.stages", f"{what}; make them add up")


def check_recomputation(scenario: Scenario, report: Report) -> None:
    """Raises UserError for parts to recompute that the model does not have."""
    recompute, attention = scenario.workload.recompute, scenario.model.attention
    part = "mla_up_projection"
    if isinstance(recompute, tuple) and part in recompute and not isinstance(attention, Mla):
        what = f"{part} is a part of latent attention, but model.attention is {attention.kind}"
        raise report.user(f"workload.recompute.{recompute.index(part)}", f"{what}; drop it")


def require_supported_step(scenario: Scenario, report: Report) -> None:
    """Raises UserError for ways of running a step that the simulation core does not have yet, naming the key."""
    mesh, software = scenario.parallelism, scenario.implementation.software
    facts = mesh.schedule.facts
    shared = f"{facts.name} puts each stage on {facts.copies} pipeline ranks; use 0 or 1, or {SPLIT.name}"
    for part in ("dense", "expert"):
        if (stage := getattr(mesh.zero, part)) < 2:
            continue
        for refused, why in (
            (not software.shards_gradients, f"{software.name} keeps whole gradients; use 0 or 1, or {FUSED.name}"),
            (facts.copies > 1, shared),
        ):
            if refused:
                raise report.user(f"parallelism.zero.{part}", f"{stage} shards layer by layer, but {why}")
    if isinstance(scenario.model.attention, Mla) and scenario.model.attention.indexer is not None:
        what = "sparse attention with an indexer (DSA) is counted by `moesim model`, but no step with it is modelled"
        raise report.user("model.attention.indexer", f"{what}; drop it to take full attention instead")
    require_software(scenario, report)
