"""What a misspelt word may mean."""

import difflib
import re
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'run'?` for a near miss, else nothing."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known word that is most like `word`, of those with at least `likeness` (1: the same); None without one."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return near[0] if near else None


def same_product(word: str, known: Iterable[str]) -> str | None:
    """The name of `known` that `word` writes in another way, or None; never another product.

    Products of a family differ by a digit or a letter, so that spelling says nothing: an h20 is no h200 and a
    deepseek-v3.2 no deepseek-v3. Numbers must be the same in the same order, one or two letters between them too;
    only words of three letters and more may be misspelt.

    >>> same_product("Mixtral_8x7B", ["mixtral-8x7b"]), same_product("h20", ["h200"])
    ('mixtral-8x7b', None)
    """
    parts = _parts(word)
    for name in known:
        others = _parts(name)
        if len(parts) == len(others) and all(map(_same_part, parts, others)):
            return name
    return None


def _parts(name: str) -> list[str]:
    """Runs of digits and runs of letters, separators left out."""
    return re.findall(r"[0-9]+|[a-z]+", re.sub(r"[^a-z0-9]", "", name.lower()))


def _same_part(part: str, other: str) -> bool:
    is_word = min(len(part), len(other)) > 2 and not part.isdigit()
    return part == other or (is_word and bool(difflib.get_close_matches(part, [other], n=1, cutoff=0.85)))
