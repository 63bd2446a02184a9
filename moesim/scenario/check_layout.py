"""Checks across sections of the layout: pipelines and their stages, what is computed again, what is shared out.

What is shared out must divide; the remedy names the divisors near what was asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

from moesim.errors import ConflictError, InfeasibleError
from moesim.scenario.document import Path, dotted
from moesim.scenario.model import LocalGlobal, Mla
from moesim.scenario.schema import PART_NEEDS, Scenario
from moesim.schedules import PLAIN, SCHEDULES


@dataclass(frozen=True)
class Report:
    """Makes the error of a dotted key; `where` says its place."""

    where: Callable[[Path], str] = dotted

    def place(self, key: str) -> str:
        """Where the key stands."""
        return self.where(tuple(int(part) if part.isdigit() else part for part in key.split(".")))

    def user(self, key: str, message: str) -> ConflictError:
        """A mistake of the user at `key` (exit code 1)."""
        return ConflictError(f"{self.place(key)}: {message}")

    def infeasible(self, key: str, message: str) -> InfeasibleError:
        """What is well-formed and cannot run, by `key` (exit code 2)."""
        return InfeasibleError(f"{self.place(key)}: {message}")


# Beyond that nobody reads the remedy, and a slip of the keyboard must not take for ever.
DIVISOR_SEARCH = 10**6


def check_pipeline(scenario: Scenario, report: Report) -> None:
    """Raises UserError when the schedule, the ranks and the micro-batches do not fit each other."""
    mesh, schedule = scenario.parallelism, scenario.parallelism.schedule
    facts = schedule.facts
    if facts.virtual and schedule.virtual < 2 and not facts.single:
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
    recompute, model = scenario.workload.recompute, scenario.model
    for place, part in enumerate(recompute if isinstance(recompute, tuple) else ()):
        key = f"workload.recompute.{place}"
        if part == "mla_up_projection" and not isinstance(model.attention, Mla):
            what = f"{part} is a part of latent attention, but model.attention is {model.attention.kind}"
            raise report.user(key, f"{what}; drop it")
        if part in PART_NEEDS and not getattr(model, PART_NEEDS[part]):
            raise report.user(key, f"the model has no {part}: model.{PART_NEEDS[part]} is 0; drop it")


def nearest_divisors(number: int, target: int, *, multiple_of: int = 1) -> list[int]:
    """The divisors of `number` just below and just above `target` that are multiples of `multiple_of`.

    Where none lies within a million of `target`, the smallest (`multiple_of` itself) or largest one stands in.
    """

    def first(candidates: range, instead: int) -> list[int]:
        near = candidates[:DIVISOR_SEARCH]
        tried = [instead] if candidates[DIVISOR_SEARCH:] else []
        fitting = (d for d in chain(near, tried) if number % d == 0 and d % multiple_of == 0)
        return list(islice(fitting, 1))

    below = first(range(min(target - 1, number), 0, -1), multiple_of)
    return below + first(range(target + 1, number + 1), number)


def either(values: Iterable[int]) -> str:
    """The numbers as a choice: `2 or 4`."""
    return " or ".join(str(value) for value in values)


def check_sharing(scenario: Scenario, report: Report) -> None:
    """Raises UserError when ranks cannot share the sequences and matrices of a layer evenly, or cannot be folded."""
    model, mesh = scenario.model, scenario.parallelism
    shared = [("tensor", mesh.tensor, "model.heads", model.heads)]
    if not isinstance(model.attention, Mla):
        shared.append(("tensor", mesh.tensor, "model.kv_heads", model.kv_heads))
    if model.dense_layers:
        shared.append(("tensor", mesh.tensor, "model.dense_intermediate", model.dense_intermediate))
    if model.shared_experts:
        name = f"model.shared_experts * {'shared' if model.shared_intermediate else 'expert'}_intermediate"
        shared.append(("tensor", mesh.tensor, name, model.shared_width))
    shared.append(("expert_tensor", mesh.expert_tensor, "model.expert_intermediate", model.expert_intermediate))
    for key, size, name, value in shared:
        if value % size:
            fits = either(nearest_divisors(value, size))
            raise report.user(f"parallelism.{key}", f"{size} does not divide {name} = {value}; use {fits}")
    _check_sequence(scenario, report)
    _check_folding(scenario, report)


def _check_sequence(scenario: Scenario, report: Report) -> None:
    """Tensor ranks share the tokens of two chunks of each of 2 * context."""
    mesh, length = scenario.parallelism, scenario.workload.sequence_length
    chunks = 2 * mesh.context if mesh.context > 1 else 1
    for key, name, parts in (
        ("context", f"{mesh.context}", mesh.context),
        ("context", f"2 * context = {chunks}", chunks),
        ("tensor", f"{mesh.tensor} ranks * {chunks} chunks = {mesh.tensor * chunks}", mesh.tensor * chunks),
    ):
        if length % parts:
            unit = parts // getattr(mesh, key)
            fits = either(near // unit for near in nearest_divisors(length, parts, multiple_of=unit))
            what = f"{name} does not divide workload.sequence_length = {length}"
            raise report.user(f"parallelism.{key}", f"{what}; use {fits}")
    attention = scenario.model.attention
    if mesh.context > 1 and isinstance(attention, LocalGlobal) and attention.window < length:
        message = "a ring of whole sequences has no windows; use 1, or another model.attention than local_global"
        raise report.user("parallelism.context", message)
    if mesh.context > 1 and scenario.model.local is not None and scenario.model.local.window < length:
        raise report.user("parallelism.context", "a ring of whole sequences has no windows; use 1, or drop model.local")


def _check_folding(scenario: Scenario, report: Report) -> None:
    mesh = scenario.parallelism
    attention, experts = mesh.context * mesh.tensor, mesh.expert * mesh.expert_tensor
    small, large = sorted((attention, experts))
    if large % small:
        what = f"expert * expert_tensor = {experts} and context * tensor = {attention} ranks do not fit into each other"
        raise report.user("parallelism.expert", f"{what}; make one of them a multiple of the other")
