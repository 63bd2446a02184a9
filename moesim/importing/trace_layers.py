"""Layers of a trace without a stack: the block of forward operations that repeats itself.

Legend: N outermost operations of the first forward pass.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST_BLOCK = 3000  # operations of a layer
LEAST_SHARE = 1 / 3  # of the operations, in layers; what repeats itself less is no stack of them


def repeated_blocks(signs: Sequence[Hashable]) -> list[int | None]:
    """Of each operation the number of its layer, [N]; None outside of the longest part that repeats one block.

    >>> repeated_blocks(["embed", "norm", "mm", "norm", "mm", "norm", "head"])
    [None, 0, 0, 1, 1, None, None]
    """
    numbers: dict[Hashable, int] = {}
    ids_N = np.array([numbers.setdefault(sign, len(numbers)) for sign in signs], dtype=np.int64)
    begin, period, length = _longest(ids_N)
    if length < LEAST_SHARE * len(signs):
        return [None] * len(signs)
    layers: list[int | None] = [None] * len(signs)
    for at in range(begin, begin + length - length % period if period else 0):
        layers[at] = (at - begin) // period
    return layers


def _longest(ids_N: NDArray[np.int64]) -> tuple[int, int, int]:
    """Where the part begins that repeats a block the longest, the block's length, and the part's; zeros for none."""
    best, matched = (0, 0, 0), 0
    for period in range(1, min(len(ids_N) // 2, LONGEST_BLOCK) + 1):
        same = np.concatenate([[False], ids_N[:-period] == ids_N[period:], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        runs = edges[1::2] - edges[::2]
        if len(runs) and runs.max() >= period and runs.max() > matched:
            longest = int(runs.argmax())
            matched = int(runs[longest])
            best = int(edges[2 * longest]), period, matched + period
    return best
