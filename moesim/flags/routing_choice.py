"""Which routing a launch is simulated with: flags state the router and its balance, not how it routes."""

from typing import Any, Literal

from moesim.flags.arguments import Arguments
from moesim.flags.read_training import routing_fields
from moesim.scenario.routing import LIBRARY_PREFIX
from moesim.trace.library import LibraryEntry, library_entries

Choice = Literal["library", "train", "uniform"]
_POINT = "published"  # of a layout in the library: the balance that was published for it


def routing_section(args: Arguments, model: dict[str, Any], choice: Choice | None) -> dict[str, Any]:
    """The `routing` section, in a mapping of its own; empty for a dense model.

    Without a `choice` it is a router of the library, where one ships that routes and is laid out as the flags say, else
    one that is trained with the balance of the flags. Raises UserError where the library has none and is asked for.
    """
    stated = routing_fields(args)
    if not stated or stated["routing"]["kind"] == "uniform":
        return stated
    router = stated["routing"]["router"]
    if choice == "uniform":
        return {"routing": {"kind": "uniform", "router": router}}
    entry = None if choice == "train" else _shipped(model, router["kind"])
    if entry is None:
        if choice == "library":
            what = f"the library has no router {router['kind']} of {model['experts']} experts, {model['top_k']} a token"
            raise args.refuse("--num-experts", f"{what}; use --routing train")
        args.take("routing: a small model is trained with the router and the balance of the flags (--routing uniform)")
        return stated
    name = f"{LIBRARY_PREFIX}{entry.layout}/{_POINT}"
    steps = _request(entry)["steps"]
    args.take(f"routing: {name}, {steps} steps with a balance of its own (--routing train: with that of the flags)")
    return {"routing": {"kind": "trace", "file": name, "router": router}}


def _shipped(model: dict[str, Any], kind: str) -> LibraryEntry | None:
    """The published router of the library with the experts, groups and kind of the flags."""
    wanted = {
        "kind": kind,
        "num_experts": model["experts"],
        "top_k": model["top_k"],
        "num_groups": model.get("router_groups", 1),
        "group_limit": model.get("router_group_limit", 1),
    }
    for entry in library_entries():
        router = _request(entry).get("router")
        published = entry.axis == _POINT and entry.seed == 0
        if published and isinstance(router, dict) and wanted.items() <= router.items():
            return entry
    return None


def _request(entry: LibraryEntry) -> dict[str, Any]:
    """What the entry was trained as."""
    request = entry.provenance["request"]
    return request if isinstance(request, dict) else {}
