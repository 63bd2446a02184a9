"""Megatron-LM's strings of pipeline stages, such as `Et*3|(tt|)*29|mL`: read, and written.

E is the embedding, t a layer, m a layer of multi-token prediction, L the loss; | ends a stage, x*N repeats one letter
and (...)*N a part. Stages are listed along the model, so that rank r of P holds stages r, r + P, and so on.
"""

import re
from collections.abc import Sequence

from moesim.scenario.base import MOST_LAYERS

_WORDS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
_REPEATED = re.compile(r"\(([^()]*)\)\*([0-9]{1,4})|([EtmL|])\*([0-9]{1,4})|\(([^()]*)\)(?!\*)")
_MOST = 4 * MOST_LAYERS  # letters


def stages_of(text: str) -> tuple[str, ...]:
    """The letters of every stage, first stage first. Raises ValueError for a string that is none.

    >>> stages_of("Et*2|(tt|)*2,mL")
    ('Ett', 'tt', 'tt', 'mL')
    """
    for word, letter in _WORDS.items():
        text = re.sub(rf"\b{word}\b", letter, text, flags=re.IGNORECASE)
    text = re.sub(r"[,\s]", "", text)
    while (found := _REPEATED.search(text)) is not None:
        inside = found[1] or found[3] or found[5] or ""
        times = int(found[2] or found[4] or 1)
        if len(inside) * times > _MOST:
            raise ValueError(f"more than {_MOST:,} letters")
        text = text[: found.start()] + inside * times + text[found.end() :]
        if len(text) > _MOST:
            raise ValueError(f"more than {_MOST:,} letters")
    if wrong := sorted(set(text) - set("EtmL|")):
        raise ValueError(f"{''.join(wrong)!r} is none of E, t, m, L, |, *N and ( )")
    if not re.fullmatch(r"E[t|]*[m|]*L", text):
        raise ValueError("must begin with E, hold layers t before m, and end with L")
    return tuple(text.split("|"))


def text_of(lengths: Sequence[int], *, prediction_layers: int) -> str:
    """Stages of so many layers as a string, with embedding, prediction layers and loss at the ends.

    >>> text_of([3, 2, 0], prediction_layers=1)
    'Et*3|tt|mL'
    """
    stages = ["t" * length if length < 3 else f"t*{length}" for length in lengths]
    stages[0] = "E" + stages[0]
    stages[-1] += ("m" if prediction_layers == 1 else f"m*{prediction_layers}" if prediction_layers else "") + "L"
    return "|".join(stages)
