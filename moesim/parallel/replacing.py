"""Placing anew while a router trains: how long a placement stays good, and what has to move for the next one.

Legend: E experts, L thin layers of the trace, D ranks of an expert group, Z slots of all ranks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.placement import EMPTY_SLOT
from moesim.trace.record import RoutingTrace

FloatArray = NDArray[np.float64]


def recorded_loads(trace: RoutingTrace) -> dict[int, FloatArray]:
    """Rows of every expert in each layer of the trace [L, E], before dropping, by recorded training step."""
    loads = {each.step: each.counts_LSE.sum(axis=1, dtype=np.float64) for each in trace.earlier}
    experts = trace.router.num_experts
    return loads | {step.step: step.load_LE(num_experts=experts).astype(np.float64) for step in trace.steps}


def recorded_ages(trace: RoutingTrace) -> list[int]:
    """How many training steps before the simulated router each step was recorded, ascending from 0."""
    steps = {each.step for each in trace.earlier} | {each.step for each in trace.steps}
    return sorted(trace.final.step - step for step in steps)


def check_interval(trace: RoutingTrace, every: int) -> None:
    """Raises UserError where the trace does not reach back for so long."""
    oldest = recorded_ages(trace)[-1]
    if oldest == 0:
        raise UserError(
            "placement.every: the trace has one recorded step, and with it no drift; use routing: {kind: train}, a "
            "router of the library (moesim trace library:), or a recording of several steps"
        )
    if every > oldest:
        first, last = trace.final.step - oldest, trace.final.step
        what = f"{every:,} steps, but rows are recorded from training step {first:,} to {last:,}"
        raise UserError(f"placement.every: {what}; use at most {oldest:,}")


def loads_ago(trace: RoutingTrace, load_LE: NDArray[Any], *, steps_ago: float) -> FloatArray:
    """The rows `load_LE` of a part of the final router's tokens, as they were so many training steps before.

    They differ by as much as the rows of all recorded tokens do, times the part's share of these: the part keeps what
    is its own in its text. Between two recorded steps rows go from one to the other evenly.
    """
    recorded = recorded_loads(trace)
    steps = sorted(recorded)
    then = trace.final.step - steps_ago
    after = min(max(int(np.searchsorted(steps, then)), 1), len(steps) - 1)
    first, second = steps[after - 1], steps[after]
    weight = (then - first) / (second - first)
    then_LE = (1 - weight) * recorded[first] + weight * recorded[second]
    now_LE = recorded[trace.final.step]
    share = load_LE.sum() / max(now_LE.sum(), 1.0)
    return np.asarray(np.maximum(load_LE + share * (then_LE - now_LE), 0.0))


def rank_loads(held: ExpertMap, load_E: FloatArray) -> FloatArray:
    """Rows of every rank where each expert's split over its copies evenly, or by their weights, [D]."""
    each_Z = load_E[held.expert_Z] * held.share_Z
    loads_D = np.bincount(held.placement.rank_of_expert_E, weights=each_Z, minlength=held.placement.num_ranks)
    return np.asarray(loads_D, dtype=np.float64)


def renumbered(before: ExpertMap, after: ExpertMap, node_of_rank_D: NDArray[np.int64]) -> ExpertMap:
    """`after` with the ranks of each node in the order that leaves experts where they are, as far as pairs tell.

    Ranks of a node are alike, so which of them gets which slots is free: the pair of an old and a new one with most
    experts in common is joined first, ties to the smaller old, then new one.
    """
    common_DD = before.holds_DE.astype(np.int64) @ after.holds_DE.T.astype(np.int64)
    taken_from = np.empty(len(common_DD), dtype=np.int64)
    for node in np.unique(node_of_rank_D):
        members = np.flatnonzero(node_of_rank_D == node)
        old, new = np.meshgrid(members, members, indexing="ij")
        columns = (-common_DD[old, new]).ravel().tolist(), old.ravel().tolist(), new.ravel().tolist()
        pairs = sorted(zip(*columns, strict=True))
        joined: dict[int, int] = {}
        for _, mine, theirs in pairs:
            if mine not in joined and theirs not in joined.values():
                joined[mine] = theirs
        taken_from[list(joined)] = list(joined.values())
    slot_DP = after.placement.slot_experts_DP[taken_from]
    weight_Z = None if after.weight_Z is None else after.weight_Z[slot_DP[slot_DP != EMPTY_SLOT]]
    return ExpertMap(after.slot_experts_DP[taken_from], after.num_experts, weight_Z)


def moves_DD(before: ExpertMap, after: ExpertMap, node_of_rank_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Experts that each rank sends each other one so that all hold what `after` says, [source, target].

    A rank that has an expert already keeps it. Others get it from a rank that had it: one of their own node where
    there is one, and of these the one that has least to send so far.
    """
    num_ranks = len(before.slot_experts_DP)
    moves = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for rank, expert in np.argwhere(after.holds_DE & ~before.holds_DE).tolist():
        had = np.flatnonzero(before.holds_DE[:, expert])
        near = had[node_of_rank_D[had] == node_of_rank_D[rank]]
        able = near if len(near) else had
        source = able[moves[able].sum(axis=1).argmin()]
        moves[source, rank] += 1
    return moves
