"""Whether a recorded trace is what a scenario asks for: its experts always, its router where one is named."""

from moesim.errors import UserError
from moesim.scenario.routing import LIBRARY_PREFIX, GroupedRouter, RouterShape, TraceRouting
from moesim.scenario.schema import Scenario
from moesim.trace.basis import is_imported
from moesim.trace.record import RoutingTrace


def check_agreement(trace: RoutingTrace, routing: TraceRouting, *, wanted: RouterShape) -> None:
    """Compare a trace with the scenario that replays it; `wanted` is the scenario's router with aliases resolved.

    The trace fixes router, groups and limit: a scenario that names others in `routing.router` is refused, not obeyed.
    Raises UserError, one line, that names the key and both sides.
    """
    router, asked = trace.router, routing.router
    where = f"routing.file: {routing.file}"
    if (router.num_experts, router.top_k) != (wanted.num_experts, wanted.top_k):
        raise UserError(
            f"{where} routes each token to {router.top_k} of {router.num_experts} experts, but the model has "
            f"model.top_k = {wanted.top_k} of model.experts = {wanted.num_experts}; use a trace of the model's own "
            f"layout (`moesim trace {LIBRARY_PREFIX}` lists those at hand)"
        )
    if asked is None:
        return
    if asked.kind != router.kind:
        raise UserError(
            f"{where} was made by router {router.kind}, not routing.router.kind = {asked.kind}; "
            "use another trace, or leave routing.router out"
        )
    grouped = isinstance(asked, GroupedRouter) and (asked.device_limit or asked.group_limit)
    if grouped and (router.num_groups, router.group_limit) != (wanted.num_groups, wanted.group_limit):
        raise UserError(
            f"{where} was made with a limit of {router.group_limit} of {router.num_groups} groups, but routing.router "
            f"asks for {wanted.group_limit} of {wanted.num_groups}; a recorded limit cannot be changed: use another "
            "trace, or leave routing.router out"
        )


def limit_difference(trace: RoutingTrace | None, scenario: Scenario) -> list[str]:
    """A warning where a replayed trace has another group limit than the model's own router and nobody asked for it."""
    routing, model = scenario.routing, scenario.model
    if trace is None or not isinstance(routing, TraceRouting) or routing.router is not None or model.router_groups == 1:
        return []
    router = trace.router
    if (router.num_groups, router.group_limit) == (model.router_groups, model.router_group_limit):
        return []
    has = f"at most {router.group_limit} of {router.num_groups} groups" if router.num_groups > 1 else "no group limit"
    return [
        f"the trace's router has {has} per token, the model's own at most {model.router_group_limit} of "
        f"{model.router_groups}: bytes and waiting are those of the trace"
    ]


def import_notes(trace: RoutingTrace | None, scenario: Scenario) -> list[str]:
    """What was left out, mapped or assumed when the trace was made of what another program recorded."""
    if trace is None or not is_imported(trace):
        return []
    recorded = trace.provenance.get("notes")
    notes = [str(note) for note in recorded] if isinstance(recorded, list) else []
    routed = scenario.model.moe_layers + scenario.model.mtp_layers
    if trace.num_layers > routed:
        notes.append(f"the model has {routed} MoE layers, for which the first of its {trace.num_layers} stand")
    elif trace.num_layers < routed:
        notes.append(f"{trace.num_layers} recorded layer(s) stand in turn for the {routed} MoE layers of the model")
    return [f"routing of {trace.provenance.get('path')}: {note}" for note in notes]
