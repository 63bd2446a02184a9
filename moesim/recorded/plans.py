"""transformers' own plans of tensor and expert parallelism over a recorded step: a rank's operations, and what is sent.

By these plans (`tp_plan`, `enable_expert_parallel`) every rank has the same tokens. By the tensor plan a rank has a
share of the heads, of dense, shared and experts' widths and of the head's columns, whose logits are gathered; every
GEMM with a share of its depth is summed, each for itself, as DTensor does it: three sums for the input's gradients
of queries, keys and values. By the expert plan a rank has a share of the experts alone; its rows of others are moved as
all others are, but no GEMM computes them. Behind the experts the ranks' results are summed, and backward their
gradients of tokens and of gates. No sum overlaps anything (transformers 5.17,
transformers/distributed/tensor_parallel.py).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moesim.errors import UserError
from moesim.recorded.layers import EXPERTS_GEMM
from moesim.recorded.pricing import DTYPES, GEMMS, OPTIMIZER
from moesim.recorded.scaling import scaled_op, updating
from moesim.recorded.sharing import SHARED_OUT, divided, kept_whole, names_of, shares_depth
from moesim.recorded.sizes import MatchedOp, StepSizes, matched, sizes_of
from moesim.recorded.step_file import GRADIENT_WIDTHS, GRADIENTS, RecordedOp
from moesim.recorded.widths import EXPERT_WIDTH, HEAD_DIM, VOCABULARY

Sent = defaultdict[int, list[tuple[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The operations of one rank, and what is sent behind each by its place: (collective, bytes of the larger buffer).

    copied: bytes that a copy behind the sent moves, by the same places. wrapped: places of GEMMs whose tensors are
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
    return each.op.name in GEMMS and VOCABULARY in names_of(each)


def _is_shared(each: MatchedOp) -> bool:
    """Whether it is a GEMM of a weight of which each rank has a share, or of that weight's gradient."""
    return each.op.name in GEMMS and len(each.reads[-1]) == 2 and bool(names_of(each) & SHARED_OUT)


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
