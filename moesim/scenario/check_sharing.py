"""The checks of tensor, context and expert-tensor parallelism: what is shared out must divide."""

from moesim.scenario.check_numbers import either, nearest_divisors
from moesim.scenario.check_pipeline import Report
from moesim.scenario.model import LocalGlobal, Mla
from moesim.scenario.schema import Scenario


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
