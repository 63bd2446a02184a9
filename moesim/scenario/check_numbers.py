"""Numbers that would fit, for the remedies of the checks."""

from collections.abc import Iterable
from itertools import chain, islice

DIVISOR_SEARCH = 10**6  # beyond that nobody reads the remedy, and a slip of the keyboard must not take for ever


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
