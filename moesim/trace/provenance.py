"""What simulated routing rests on, and whether a recorded trace is what a scenario asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import LIBRARY_PREFIX, GroupedRouter, RouterShape, TraceRouting
from moesim.scenario.schema import Scenario
from moesim.scenario.short_forms import routing_of
from moesim.trace.library import is_library_name
from moesim.trace.record import RoutingTrace

Basis = tuple[str, str]  # what it is, and what to know of it
_NOT_KNOWN = "nothing is known of how it was made"


def rests_on(trace: RoutingTrace, scenario: Scenario) -> dict[str, Any]:
    """Of the trace that a scenario simulates: what it rests on, how that was made, and whether the model brought it.

    `sequences_rest_on` is what cut the tokens into sequences where a recording does not say how: a key or a flag.
    """
    routing = scenario.routing
    what, how = _basis(trace)
    if isinstance(routing, TraceRouting):
        name = routing.file if is_library_name(routing.file) else Path(routing.file).name
        what = what if is_imported(trace) else name
    cut = trace.provenance.get("sequences")
    return {
        "rests_on": what,
        "rests_on_how": how,
        "model_default": _is_default(scenario),
        "sequences_rest_on": cut if is_imported(trace) and isinstance(cut, str) else None,
    }


def is_imported(trace: RoutingTrace) -> bool:
    """Whether it was made of what another program recorded."""
    return isinstance(trace.provenance.get("form"), str)


def _is_default(scenario: Scenario) -> bool:
    """Whether the routing is the one that the model has where a scenario names none."""
    default = routing_of(scenario.model.routing)
    return all(getattr(scenario.routing, key, None) == value for key, value in default.items()) and (
        scenario.routing.router is None
    )


def _basis(trace: RoutingTrace) -> Basis:
    made = trace.provenance
    if is_imported(trace):
        return _imported(trace)
    if isinstance(made.get("request"), Mapping):
        return _trained(trace)
    said = made.get("rests_on"), made.get("rests_on_how")  # of what is drawn, by those who draw it
    return (said[0], said[1]) if isinstance(said[0], str) and isinstance(said[1], str) else ("a trace", _NOT_KNOWN)


def _imported(trace: RoutingTrace) -> Basis:
    counts = ROUTERS[trace.router.kind].drawn
    what = f"{'counts' if counts else 'tokens'} of {trace.provenance.get('path')} ({trace.provenance['form']})"
    if counts:
        return what, "measured counts of experts, of which tokens are drawn: which experts go together is not known"
    return what, "recorded by another program, token by token"


def _trained(trace: RoutingTrace) -> Basis:
    """A router that moesim trained: kind, text and loss, as far as the trace knows them."""
    request: Any = trace.provenance["request"]
    corpus, steps = request.get("corpus"), request.get("steps")
    size = trace.provenance.get("corpus_train_bytes")
    text = f"{corpus} ({size / 1e6:.1f} MB)" if isinstance(size, int) else f"{corpus}"
    loss = trace.curves.validation_loss
    at = f", held-out loss {loss[-1]:.4f} nats per byte" if len(loss) else ""
    return "trained for this run", f"a small model's {trace.router.kind} router, {steps} steps on {text}{at}"


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
