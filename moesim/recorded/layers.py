"""For which layer of the model each operation of a recorded step works, of which kind it is, and in which order it ran.

Layers are told by the numbers in modules' paths: those with grouped GEMMs are MoE layers, the others of the same stack
dense ones. Equal operations stand once in a recorded step. As they ran, layers of a kind follow each other, dense ones
before those with experts, backward the other way round; within a layer, and outside of the layers, operations stand in
the order of the first of their kind.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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


HEAD, EMBEDDING = "head", "embedding"  # what lies outside of the layers: behind them, and before them


@dataclass(frozen=True, kw_only=True)
class Block:
    """What runs in one pass of one layer, or outside of them: the place of each operation in the step, how often it
    runs there. layer: its number, -1 outside of the layers.
    """

    phase: str
    layer: int
    runs: tuple[tuple[int, float], ...]


def in_order(ops: Sequence[RecordedOp]) -> list[Block]:
    """The blocks of a step, one behind the other. A step that does not know its layers is one block a phase."""
    layers = [kind for kind in (DENSE, MOE) for _ in range(next((op.layers for op in ops if op.layer == kind), 0))]
    found = []
    for phase in ("forward", "backward"):
        mine = [place for place, op in enumerate(ops) if op.phase == phase]
        first = next((at for at, place in enumerate(mine) if ops[place].layer), len(mine))
        outside = [(mine[:first], -1), ([place for place in mine[first:] if not ops[place].layer], -1)]
        passes = [([place for place in mine if ops[place].layer == kind], number) for number, kind in enumerate(layers)]
        ordered = passes if phase == "forward" else passes[::-1]
        for places, number in [outside[0], *ordered, outside[1]]:
            runs = tuple((place, ops[place].count / (ops[place].layers if number >= 0 else 1)) for place in places)
            found.append(Block(phase=phase, layer=number, runs=runs))
    last = [(place, op.count) for place, op in enumerate(ops) if op.phase == "optimizer"]
    return [*found, Block(phase="optimizer", layer=-1, runs=tuple(last))]
