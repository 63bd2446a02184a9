"""A recorded step, whose equal operations stand once, in the order in which its operations ran.

Layers of a kind follow each other, dense ones before those with experts, backward the other way round; within a layer,
and outside of the layers, operations stand in the order of the first of their kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.recorded.layers import DENSE, MOE
from moesim.recorded.step_file import RecordedOp

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
