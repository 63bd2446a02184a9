"""Widths of a model as texts: sums of products of its named sizes, as `2*expert_width` or `heads*head_dim/2`.

A recording says each dimension of a tensor that is a width as such a text (`moesim.importing.dimensions`), so that it
has a value at other sizes of the model, too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import lru_cache

Powers = tuple[tuple[str, int], ...]  # of the names of a term, sorted
Width = tuple[tuple[Powers, Fraction], ...]  # its terms with their factors, sorted

SEQUENCES, LENGTH = "sequences", "length"  # of one micro-batch, and of each of them
HIDDEN, VOCABULARY, EXPERTS, EXPERT_WIDTH = "hidden", "vocabulary", "experts", "expert_width"
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = "heads", "kv_heads", "head_dim", "value_head_dim"
DENSE_WIDTH, SHARED_WIDTH = "dense_width", "shared_width"
Q_RANK, KV_RANK, ROPE_DIM = "q_lora_rank", "kv_lora_rank", "rope_head_dim"
# Sizes of a scenario's model, and of its latent attention, by their keys.
OF_MODEL = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dense_intermediate": DENSE_WIDTH}
OF_LATENT = {"kv_lora_rank": KV_RANK, "q_lora_rank": Q_RANK, "rope_head_dim": ROPE_DIM, "value_head_dim": VALUE_DIM}
_FACTOR = re.compile(r"([*/]?)([^*/+]+)")


def number(value: int | Fraction) -> Width:
    """A width that is the same for all models."""
    return (((), Fraction(value)),)


def named(name: str) -> Width:
    """A size of the model."""
    return ((((name, 1),), Fraction(1)),)


def total(widths: Iterable[Width]) -> Width:
    """Their sum."""
    found: dict[Powers, Fraction] = {}
    for width in widths:
        for powers, factor in width:
            found[powers] = found.get(powers, Fraction(0)) + factor
    return tuple(sorted((powers, factor) for powers, factor in found.items() if factor))


def times(first: Width, second: Width) -> Width:
    """Their product."""
    return total(((_joined(powers, more), factor * other),) for powers, factor in first for more, other in second)


def over(width: Width, term: Width) -> Width:
    """The width divided by a width of one term."""
    ((powers, factor),) = term
    return times(width, ((tuple((name, -power) for name, power in powers), 1 / factor),))


def _joined(first: Powers, second: Powers) -> Powers:
    found = dict(first)
    for name, power in second:
        found[name] = found.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in found.items() if power))


def text_of(width: Width) -> str:
    """As a file has it."""
    return "+".join(_term(powers, factor) for powers, factor in width)


def _term(powers: Powers, factor: Fraction) -> str:
    above = [name for name, power in powers for _ in range(power)]
    below = [name for name, power in powers for _ in range(-power)]
    if factor.numerator != 1 or not above:
        above.insert(0, str(factor.numerator))
    if factor.denominator != 1:
        below.append(str(factor.denominator))
    return "/".join(["*".join(above), *below])


@lru_cache(maxsize=4096)
def parsed(text: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The terms of a text, each as pairs of a sign of calculation and a name or number. ValueError for no width."""
    terms = tuple(tuple(_FACTOR.findall(term)) for term in text.split("+"))
    if any(not term or "".join(map("".join, term)) != part for term, part in zip(terms, text.split("+"), strict=True)):
        raise ValueError(f"{text!r} is no width of a model")
    return terms


def value_of(text: str, sizes: Mapping[str, float]) -> float:
    """What it is at these sizes. Raises KeyError for a name that is none of them."""
    return sum(
        math.prod(
            (1.0 / each if sign == "/" else each)
            for sign, name in term
            for each in [float(name) if name.isdigit() else float(sizes[name])]
        )
        for term in parsed(text)
    )
