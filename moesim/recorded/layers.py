"""Which layer of the model an operation works for, by the numbers in its module's path, and of which kind it is.

Layers with grouped GEMMs are MoE layers, the others of the same stack dense ones.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moesim.recorded.step_file import RecordedOp

DENSE, MOE = "dense", "moe"
EXPERTS_GEMM = "_grouped_mm"


def with_layers(ops: Sequence[RecordedOp]) -> list[RecordedOp]:
    """The operations with the kind of their layer and how many layers of it the step has; without, outside of all."""
    kinds = kinds_of_layers(ops)
    number_of = Counter(kinds.values())
    return [_placed(op, kinds.get(place_of(op.module) or ("", -1)), number_of) for op in ops]


def _placed(op: RecordedOp, kind: str | None, number_of: Mapping[str, int]) -> RecordedOp:
    return replace(op, layer="", layers=1) if kind is None else replace(op, layer=kind, layers=number_of[kind])


def kinds_of_layers(ops: Sequence[RecordedOp]) -> dict[tuple[str, int], str]:
    """(stack, number) of each layer of the largest stack -> its kind."""
    found: dict[str, dict[tuple[str, int], bool]] = defaultdict(dict)
    for op in ops:
        place = place_of(op.module)
        if place is not None:
            moe = op.name == EXPERTS_GEMM
            found[place[0]][place] = moe or found[place[0]].get(place, False)
    if not found:
        return {}
    largest = max(found.values(), key=len)
    return {place: MOE if moe else DENSE for place, moe in largest.items()}


def place_of(module: str) -> tuple[str, int] | None:
    """The path before the first number in a module's path, and that number."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:at]), int(part)
    return None


def module_in_layer(module: str) -> str:
    """The part of a layer that a module or weight belongs to: `mlp` of `model.layers.*.mlp.experts`; "" outside."""
    parts = module.split(".")
    at = next((place for place, part in enumerate(parts) if part == "*" or part.isdigit()), len(parts))
    return parts[at + 1] if at + 1 < len(parts) else ""
