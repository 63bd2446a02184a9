"""A recorded step on ranks that share its matrices and tokens: which widths each has a share of, where they exchange
tokens (arXiv 1909.08053, 2205.05198).

Heads, the widths of dense networks and shared experts, and the vocabulary are shared out among tensor ranks. A GEMM
whose columns are shared out sees the tokens of all of them, as does what lies between the first and the last operation
on such a width, but for operations on compressed queries, keys and values. Everything else runs on a rank's own tokens.
GEMMs that share an input share its gathering. Backward each exchange has its opposite, and inputs are gathered once
more for the gradients of weights (`moesim.program.gemms`).
"""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from moesim.recorded.pricing import GEMMS
from moesim.recorded.sizes import MatchedOp, StepSizes
from moesim.recorded.widths import (
    DENSE_WIDTH,
    EXPERT_WIDTH,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    KV_RANK,
    Q_RANK,
    ROPE_DIM,
    SHARED_WIDTH,
    VALUE_DIM,
    VOCABULARY,
)

# What is shared out together: one part of the model each.
PARTS = ({HEADS, KV_HEADS}, {DENSE_WIDTH}, {SHARED_WIDTH}, {VOCABULARY})
SHARED_OUT = set().union(*PARTS)
RANKS = {Q_RANK, KV_RANK}
WHOLE = {HIDDEN, HEAD_DIM, VALUE_DIM, ROPE_DIM, EXPERTS} | RANKS  # every tensor rank has all of it
KNOWN = WHOLE | SHARED_OUT | {EXPERT_WIDTH}
OF_LETTER = {"V": VOCABULARY, "F": EXPERT_WIDTH, "J": EXPERT_WIDTH, "E": EXPERTS}
ROUTED = {"R", "K", "E", "F", "J"}  # symbols of what follows the routing
NAME = re.compile(r"[^*/+\d][^*/+]*")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One among tensor ranks of tokens with `width` numbers each: gathered, or summed and scattered.

    late: for the gradients of weights. sums: of a number of each token in fp32 instead, such as maxima of logits.
    """

    gathers: bool
    width: int
    late: bool = False
    sums: bool = False


@dataclass(kw_only=True)
class Shared:
    """Of one operation: whether it sees the tokens of all tensor ranks, and what is exchanged before and behind it."""

    whole: bool = False
    before: list[Exchange] = field(default_factory=list)
    behind: list[Exchange] = field(default_factory=list)


def names_in(symbol: str) -> set[str]:
    """The sizes of the model in a dimension."""
    if len(symbol) == 1:
        return {OF_LETTER[symbol]} if symbol in OF_LETTER else set()
    return set(NAME.findall(symbol))


def names_of(op: MatchedOp) -> set[str]:
    """The same of all its tensors."""
    return {name for shape in (*op.reads, *op.writes) for symbol in shape for name in names_in(symbol)}


def divided(sizes: StepSizes, *, tensor: int, expert_tensor: int) -> StepSizes:
    """A rank's share of the widths."""
    widths = {name: -(-size // tensor) if name in SHARED_OUT else size for name, size in sizes.widths.items()}
    return replace(
        sizes,
        widths=widths,
        vocabulary=-(-sizes.vocabulary // tensor),
        expert_width=sizes.expert_width // expert_tensor,
    )


def kept_whole(ops: Sequence[MatchedOp], sizes: StepSizes) -> list[str]:
    """What of a step nothing says how to share out: names of widths, and of operations in layers with a dimension that
    matches nothing.
    """
    odd = {name for name in sizes.widths if name not in KNOWN}
    return sorted(odd | {each.op.name for each in ops if each.op.layer and not each.known})


def shared_out(forward: Sequence[MatchedOp], ops: Sequence[MatchedOp], sizes: StepSizes) -> list[Shared]:
    """For each of `ops`, a pass of a layer or of what lies outside of them, whose forward pass `forward` is.

    sizes: those of the model, of no share.
    """
    found = [Shared() for _ in ops]
    is_forward = not ops or ops[0].op.phase == "forward"
    names = list(map(names_of, ops))
    for part in PARTS:
        mine = [place for place, each in enumerate(names) if each & part]
        if not mine:
            continue
        for place in range(mine[0], mine[-1] + 1):
            found[place].whole = bool(names[place] & part) or _beside(ops[place], names[place], sizes, part)
        entered, left = _ends(forward, part)
        if is_forward:
            _exchanged(ops, found, mine, part, entered, left, sizes)
        else:
            found[mine[0]].before += [Exchange(gathers=True, width=_width(text, sizes)) for text in left]
            for text in entered:
                place = max((at for at in mine if _has(ops[at], text)), default=mine[-1])
                width = _width(text, sizes)
                again = Exchange(gathers=True, width=width, late=True)
                found[place].behind += [again, Exchange(gathers=False, width=width)]
    return found


def _beside(op: MatchedOp, names: AbstractSet[str], sizes: StepSizes, part: AbstractSet[str]) -> bool:
    """Whether an operation within a part, on none of its widths, sees the tokens of all ranks as well."""
    if names & RANKS or any(symbol in ROUTED for shape in (*op.reads, *op.writes) for symbol in shape):
        return False
    latent = HEADS in part and KV_RANK in sizes.widths
    return not (latent and HIDDEN in names)


def _ends(forward: Sequence[MatchedOp], part: AbstractSet[str]) -> tuple[list[str], list[str]]:
    """Inputs of the GEMMs whose columns are shared out, each once; results of those whose rows are, and of lookups
    in a table of which each rank has a share.
    """
    entered: dict[str, None] = {}
    left = []
    for each in forward:
        if each.op.name == "embedding" and names_in(each.reads[0][0]) & part:
            left.append(each.reads[0][-1])
        elif each.op.name in GEMMS and len(each.reads[-1]) == 2:
            depth, columns = each.reads[-1]
            inside, outside = names_in(depth) & part, names_in(columns) & part
            if outside and not inside:
                entered.setdefault(depth)
            elif inside and not outside:
                left.append(columns)
    return list(entered), left


def _exchanged(
    ops: Sequence[MatchedOp],
    found: list[Shared],
    mine: Sequence[int],
    part: AbstractSet[str],
    entered: Sequence[str],
    left: Sequence[str],
    sizes: StepSizes,
) -> None:
    for text in entered:
        place = next(at for at in mine if ops[at].op.name in GEMMS and ops[at].reads[-1][:1] == (text,))
        found[place].before.append(Exchange(gathers=True, width=_width(text, sizes)))
    rows = [at for at in mine if ops[at].op.name == "embedding" or shares_depth(ops[at], part)]
    for place, text in zip(rows, left, strict=True):
        found[place].behind.append(Exchange(gathers=False, width=_width(text, sizes)))
    if VOCABULARY in part and entered:  # each token's largest logit, the sum of their powers, and the target's
        found[mine[-1]].behind += [Exchange(gathers=False, width=1, sums=True)] * 3


def shares_depth(op: MatchedOp, part: AbstractSet[str]) -> bool:
    """Whether an operation is a GEMM of which each rank has a share of the depth, in one of these widths."""
    if op.op.name not in GEMMS or len(op.reads[-1]) != 2:
        return False
    depth, columns = op.reads[-1]
    return bool(names_in(depth) & part) and not names_in(columns) & part


def _has(op: MatchedOp, text: str) -> bool:
    return op.op.name in GEMMS and any(text in shape for shape in (*op.reads, *op.writes))


def _width(text: str, sizes: StepSizes) -> int:
    """Numbers of a token; compressed keys and values travel with the part of keys that turns."""
    return round(sizes.of(text)) + (sizes.widths.get(ROPE_DIM, 0) if names_in(text) == {KV_RANK} else 0)
