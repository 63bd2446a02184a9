"""What simulated routing rests on: a router trained on which text at which loss, counts of whom, or no router at all.

Read from the trace's provenance, so that a trace in a file says the same as the scenario that made it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.scenario import Scenario, TraceRouting
from moesim.scenario.forms import routing_of
from moesim.scenario.routers import ROUTERS
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
