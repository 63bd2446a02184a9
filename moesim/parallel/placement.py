"""Where experts sit: slots of the ranks of one expert-parallel group; and a permutation of experts per model layer.

Thin layers that many model layers reuse then differ in who is hot. A permutation keeps experts of one rank, one node
and one router group together: rows, rank copies and node copies of a layer are then re-indexings of the thin layer's,
drops commute with it, and the group limit holds.

Legend: D ranks of the group, P slots per rank, E experts, J nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.placement import Placement

EMPTY_SLOT = -1


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The experts of one layer on the ranks of one group.

    slot_experts_DP: int64, the expert in slot p of rank d, -1 for an empty slot; every expert sits in one slot.
    """

    slot_experts_DP: NDArray[np.int64]

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return int(self.slot_experts_DP.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots per rank, the largest of the ranks."""
        return int(self.slot_experts_DP.shape[1])

    @cached_property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int((self.slot_experts_DP != EMPTY_SLOT).sum())

    @cached_property
    def rank_of_expert_E(self) -> NDArray[np.int64]:
        """Rank (within the group) that holds each expert."""
        rank_of_expert_E = np.full(self.num_experts, -1, dtype=np.int64)
        rank_d, slot_p = np.nonzero(self.slot_experts_DP != EMPTY_SLOT)
        rank_of_expert_E[self.slot_experts_DP[rank_d, slot_p]] = rank_d
        assert (rank_of_expert_E >= 0).all(), "every expert has a slot"
        return rank_of_expert_E


def place_lists(slots: Sequence[Sequence[int]]) -> ExpertPlacement:
    """`slots[d]` lists the experts of rank d, each once; shorter ranks get empty slots."""
    placed = ExpertPlacement(slot_table(slots))
    assert sorted(expert for experts in slots for expert in experts) == list(range(placed.num_experts))
    return placed


def slot_table(slots: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Lists of experts as an array [D, P], with -1 behind those of shorter ranks."""
    slot_experts_DP = np.full((len(slots), max(map(len, slots))), EMPTY_SLOT, dtype=np.int64)
    for rank, experts in enumerate(slots):
        slot_experts_DP[rank, : len(experts)] = experts
    return slot_experts_DP


def place_experts(placement: Placement, *, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """The slots that the scenario's `placement` section describes, for one group of `num_ranks` ranks.

    For placements in which every expert has one slot, the same in all layers; others are maps (`ExpertMap`).
    """
    slots = placement.fixed_slots(num_experts=num_experts, num_ranks=num_ranks)
    assert slots is not None, "layers differ"
    return place_lists(slots)


Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Relabelling:
    """Which thin expert, and which thin rank, a model layer's experts and ranks are.

    `expert_from_E[e]` is the thin expert that becomes expert e of the model layer; `rank_from_D` likewise for ranks.
    """

    expert_from_E: Labels
    rank_from_D: Labels

    def node_from_J(self, placement: ExpertPlacement, node_of_rank_D: Labels) -> Labels:
        """The node whose experts become those of node m; nodes move as a whole."""
        node_of_expert_E = node_of_rank_D[placement.rank_of_expert_E]
        node_from_J = np.arange(int(node_of_rank_D.max()) + 1)
        node_from_J[node_of_expert_E] = node_of_expert_E[self.expert_from_E]
        return node_from_J


def identity_relabelling(placement: ExpertPlacement) -> Relabelling:
    """Every expert keeps its place."""
    return Relabelling(expert_from_E=np.arange(placement.num_experts), rank_from_D=np.arange(placement.num_ranks))


def draw_relabellings(
    placement: ExpertPlacement,
    *,
    num_groups: int,
    nodes_of_ranks: Sequence[Labels],
    generators: Iterable[np.random.Generator],
) -> list[Relabelling]:
    """One random permutation per generator, each of which keeps ranks, router groups and nodes together.

    `nodes_of_ranks`: the node of each rank, once per different way in which the plan's expert groups lie on nodes.
    Where the partitions nest, blocks of equal build change places at every level; where they cross, only the blocks
    of their common refinement are shuffled inside.
    """
    rank_E = placement.rank_of_expert_E
    group_E = np.arange(placement.num_experts) // (placement.num_experts // num_groups)
    levels, fixed_top = _levels(rank_E, [group_E, *(node_D[rank_E] for node_D in nodes_of_ranks)])
    tree = _build_tree(np.arange(placement.num_experts), levels, fixed=fixed_top)
    return [_relabel(tree, placement, rng) for rng in generators]


def _relabel(tree: "_Block", placement: ExpertPlacement, rng: np.random.Generator) -> Relabelling:
    expert_from_E = np.empty(placement.num_experts, dtype=np.int64)
    expert_from_E[tree.order(None)] = tree.order(rng)
    rank_from_D = np.arange(placement.num_ranks)
    rank_from_D[placement.rank_of_expert_E] = placement.rank_of_expert_E[expert_from_E]
    return Relabelling(expert_from_E=expert_from_E, rank_from_D=rank_from_D)


def _levels(rank_E: Labels, others: list[Labels]) -> tuple[list[Labels], bool]:
    """Partitions from coarse to fine, each within the one before, and whether the coarsest blocks must stay."""
    coarse = sorted((labels for labels in others if _refines(rank_E, labels)), key=_num_blocks)
    fine = [labels for labels in others if not _refines(rank_E, labels)]
    if not all(_refines(labels, rank_E) for labels in fine):
        return [_meet([rank_E, *others])], True
    fine.sort(key=_num_blocks)
    if all(_refines(inner, outer) for outer, inner in pairwise(coarse)):
        return [*coarse, rank_E, *fine], False
    return [_meet(coarse), rank_E, *fine], True


def _num_blocks(labels: Labels) -> int:
    return len(np.unique(labels))


def _refines(fine: Labels, coarse: Labels) -> bool:
    """Whether every block of `fine` lies in one block of `coarse`."""
    return _num_blocks(_meet([fine, coarse])) == _num_blocks(fine)


def _meet(partitions: list[Labels]) -> Labels:
    """The common refinement."""
    return np.unique(np.stack(partitions), axis=1, return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, eq=False)
class _Block:
    """Experts that stay together: a leaf with its `experts`, or runs of child blocks that may change places."""

    build: tuple[Any, ...]  # equal for blocks of the same inner structure
    runs: list[list["_Block"]]
    experts: Labels

    def order(self, rng: np.random.Generator | None) -> list[int]:
        """The experts in an order in which blocks of equal build line up; `rng` shuffles what may change places."""
        if not self.runs:
            return [int(expert) for expert in (self.experts if rng is None else rng.permutation(self.experts))]
        ordered: list[int] = []
        for run in self.runs:
            turns = range(len(run)) if rng is None or len(run) == 1 else rng.permutation(len(run))
            for turn in turns:
                ordered += run[turn].order(rng)
        return ordered


def _build_tree(experts: Labels, levels: Sequence[Labels], *, fixed: bool = False) -> _Block:
    if not levels:
        return _Block((len(experts),), [], experts)
    labels = levels[0][experts]
    children = [_build_tree(experts[labels == label], levels[1:]) for label in np.unique(labels)]
    if fixed:
        runs = [[child] for child in children]
    else:
        children.sort(key=lambda child: child.build)
        runs = [list(run) for _, run in groupby(children, key=lambda child: child.build)]
    return _Block(tuple(child.build for child in children), runs, experts)
