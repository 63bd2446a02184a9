"""A recorded step on ranks that share its matrices and tokens: which widths each has a share of, where they
exchange tokens (arXiv 1909.08053, 2205.05198); and transformers' own plans of tensor and expert parallelism.

Heads, the widths of dense networks and shared experts, and the vocabulary are shared out among tensor ranks. A product
whose columns are shared out sees the tokens of all of them, as does what lies between the first and the last operation
on such a width, but for operations on compressed queries, keys and values. Everything else runs on a rank's own tokens.
Products that share an input share its gathering. Backward each exchange has its opposite, and inputs are gathered once
more for the gradients of weights (`moesim.program.gemms`).

By transformers' plans (`tp_plan`, `enable_expert_parallel`) every rank has the same tokens. By the tensor plan a rank
has a share of the heads, of dense, shared and experts' widths and of the head's columns, whose logits are gathered;
every product with a share of its depth is summed, each for itself, as DTensor does it: three sums for the input's
gradients of queries, keys and values. By the expert plan a rank has a share of the experts alone; its rows of others
are moved as all others are, but no product computes them. Behind the experts the ranks' results are summed, and
backward their gradients of tokens and of gates. No sum overlaps anything (transformers 5.17,
transformers/distributed/tensor_parallel.py).
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from moesim.errors import UserError
from moesim.recorded.layers import EXPERTS_GEMM
from moesim.recorded.pricing import DTYPES, OPTIMIZER, PRODUCTS
from moesim.recorded.scaling import scaled_op, updating
from moesim.recorded.sizes import MatchedOp, StepSizes, matched, sizes_of
from moesim.recorded.step_file import GRADIENT_WIDTHS, GRADIENTS, RecordedOp
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
    """Inputs of the products whose columns are shared out, each once; results of those whose rows are, and of lookups
    in a table of which each rank has a share.
    """
    entered: dict[str, None] = {}
    left = []
    for each in forward:
        if each.op.name == "embedding" and names_in(each.reads[0][0]) & part:
            left.append(each.reads[0][-1])
        elif each.op.name in PRODUCTS and len(each.reads[-1]) == 2:
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
        place = next(at for at in mine if ops[at].op.name in PRODUCTS and ops[at].reads[-1][:1] == (text,))
        found[place].before.append(Exchange(gathers=True, width=_width(text, sizes)))
    rows = [at for at in mine if ops[at].op.name == "embedding" or shares_depth(ops[at], part)]
    for place, text in zip(rows, left, strict=True):
        found[place].behind.append(Exchange(gathers=False, width=_width(text, sizes)))
    if VOCABULARY in part and entered:  # each token's largest logit, the sum of their powers, and the target's
        found[mine[-1]].behind += [Exchange(gathers=False, width=1, sums=True)] * 3


def shares_depth(op: MatchedOp, part: AbstractSet[str]) -> bool:
    """Whether an operation is a product of which each rank has a share of the depth, in one of these widths."""
    if op.op.name not in PRODUCTS or len(op.reads[-1]) != 2:
        return False
    depth, columns = op.reads[-1]
    return bool(names_in(depth) & part) and not names_in(columns) & part


def _has(op: MatchedOp, text: str) -> bool:
    return op.op.name in PRODUCTS and any(text in shape for shape in (*op.reads, *op.writes))


def _width(text: str, sizes: StepSizes) -> int:
    """Numbers of a token; compressed keys and values travel with the part of keys that turns."""
    return round(sizes.of(text)) + (sizes.widths.get(ROPE_DIM, 0) if names_in(text) == {KV_RANK} else 0)


Sent = defaultdict[int, list[tuple[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The operations of one rank, and what is sent behind each by its place: (collective, bytes of the larger buffer).

    copied: bytes that a copy behind the sent moves, by the same places. wrapped: places of products whose tensors are
    DTensors, which cost the host more.
    """

    ops: tuple[RecordedOp, ...]
    sent: Mapping[int, Sequence[tuple[str, float]]]
    copied: Mapping[int, float]
    wrapped: frozenset[int] = frozenset()


def tensor_plan(ops: Sequence[RecordedOp], ranks: int) -> Planned:
    """A rank's share by `base_model_tp_plan`. Raises UserError where nothing says what a share is."""
    sizes, found = _matched(ops)
    if kept := kept_whole(found, sizes):
        raise UserError(f"the step has what cannot be shared out: {', '.join(kept)}; spread it by ddp or fsdp2")
    share = divided(sizes, tensor=ranks, expert_tensor=ranks)
    for key in (*(SHARED_OUT - {VOCABULARY}) & sizes.widths.keys(), EXPERT_WIDTH):
        whole = sizes.expert_width if key == EXPERT_WIDTH else sizes.widths[key]
        if whole % ranks:
            raise UserError(f"--ranks {ranks} does not divide the recorded step's {key}, {whole}; use another number")
    body = replace(share, vocabulary=sizes.vocabulary)
    sent: Sent = defaultdict(list)
    copied: dict[int, float] = {}
    own = []
    for place, each in enumerate(found):
        head = _of_head(each)
        scaled = scaled_op(each, sizes, share if head else body)
        assert scaled is not None
        own.append(scaled)
        if shares_depth(each, SHARED_OUT):
            sent[place] = [("all_reduce", float(scaled.writes[0][2]))]
        elif head and each.op.phase == "forward":
            logits = float(each.op.writes[0][2])
            sent[place], copied[place] = [("all_gather", logits)], 2.0 * logits
        norms = [texts for texts in each.op.facts.get(GRADIENT_WIDTHS, ()) if texts == [HEAD_DIM]]
        if norms:  # of every head, whose gradients each rank has of its own heads
            sent[place] += [("all_reduce", 2.0 * sizes.widths[HEAD_DIM])] * len(norms)
    wrapped = frozenset(place for place, each in enumerate(found) if _is_shared(each))
    return replace(_with_experts(own, found, sent, copied, gates=1), wrapped=wrapped)


def expert_plan(ops: Sequence[RecordedOp], ranks: int) -> Planned:
    """A rank's share by `base_model_ep_plan`. Raises UserError where the step has no experts that could be shared."""
    sizes, found = _matched(ops)
    if not sizes.experts:
        raise UserError(
            "the step has no experts in grouped GEMMs that ranks could share; spread it by ddp, fsdp2 or tp"
        )
    if sizes.experts % ranks:
        raise UserError(
            f"--ranks {ranks} does not divide the recorded step's experts, {sizes.experts}; use another number"
        )
    share = replace(sizes, experts=sizes.experts // ranks, given_rows=sizes.rows // ranks)
    own = [scaled_op(each, sizes, share if each.op.name == EXPERTS_GEMM else sizes) for each in found]
    # The sums of gates: the router's scores, and once more as the experts' inputs.
    return _with_experts([op for op in own if op is not None], found, defaultdict(list), {}, gates=2)


def _matched(ops: Sequence[RecordedOp]) -> tuple[StepSizes, list[MatchedOp]]:
    sizes = sizes_of(ops, where="the step")
    if not sizes.widths:
        raise UserError("the step does not follow widths (a trace, or an older file); record it with this version")
    return sizes, matched(ops, sizes)


def _of_head(each: MatchedOp) -> bool:
    return each.op.name in PRODUCTS and VOCABULARY in names_of(each)


def _is_shared(each: MatchedOp) -> bool:
    """Whether it is a product of a weight of which each rank has a share, or of that weight's gradient."""
    return each.op.name in PRODUCTS and len(each.reads[-1]) == 2 and bool(names_of(each) & SHARED_OUT)


def _with_experts(
    own: Sequence[RecordedOp], found: Sequence[MatchedOp], sent: Sent, copied: Mapping[int, float], *, gates: int
) -> Planned:
    """With the sums around the experts, of all tokens and backward `gates` times of gates, and an optimizer over what a
    rank has.
    """
    for phase in ("forward", "backward"):
        ends = [
            place
            for place, each in enumerate(found)
            if each.op.phase == phase
            and any("R" in shape or "K" in shape for shape in each.reads)
            and any(shape[:1] == ("T",) and len(shape) == 2 and len(shape[1]) > 1 for shape in each.writes)
        ]
        if ends:
            tokens = float(found[ends[-1]].op.writes[0][2])
            more = 0 if phase == "forward" else gates
            sent[ends[-1]] += [("all_reduce", tokens), *[("all_reduce", _gates(found))] * more]
    parameters = sum(
        op.count * math.prod(shape) for op in own for shape in op.facts.get(GRADIENTS, ()) if op.name != OPTIMIZER
    )
    updated = [updating(op, round(parameters)) if op.name == OPTIMIZER else op for op in own]
    return Planned(ops=tuple(updated), sent=sent, copied=copied)


def _gates(found: Sequence[MatchedOp]) -> float:
    """Bytes of the gates of all tokens, as the forward pass last has them."""
    gates = [
        float(size)
        for each in found
        for (_, dtype, size), symbols in zip(each.op.writes, each.writes, strict=True)
        if symbols == ("T", "K") and dtype in DTYPES and each.op.phase == "forward"
    ]
    return gates[-1] if gates else 0.0
