"""Experts with any number of copies: which slots hold which expert in one layer, to which copy a row goes, which share
of its rows each copy gets, and the sum of their gradients.

Where experts have copies, a slot takes the place of an expert in all counting: rows go to slots, slots sit on ranks.
Slots are numbered rank by rank, empty ones left out.
Legend: E experts, Z slots, D ranks, P slots of a rank, J nodes of the group, C copies of an expert at most (of one: the
ranks that have it), B blocks of tokens, T tokens of a block, K selections of a token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.placement import EMPTY_SLOT, ExpertPlacement
from moesim.parallel.traffic import sum_columns
from moesim.scenario import Scenario

Array = NDArray[Any]
Ints = NDArray[np.int64]
Split = Literal["even", "nearest", "weighted"]

TURNS = 60  # of an expert whose copies get rows by weight: shares are whole numbers of these


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """One layer: slot_experts_DP, int64, is the expert in slot p of rank d, -1 where there is none.

    weight_X: what share of its expert's rows each slot gets under a weighted split; None: all alike.
    """

    slot_experts_DP: Ints
    num_experts: int
    weight_Z: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        assert (self.copies_E >= 1).all(), "every expert has a slot"

    @cached_property
    def expert_Z(self) -> Ints:
        """The expert of every slot."""
        return np.asarray(self.slot_experts_DP[self.slot_experts_DP != EMPTY_SLOT])

    @cached_property
    def copies_E(self) -> Ints:
        """Slots that hold each expert."""
        return np.bincount(self.expert_Z, minlength=self.num_experts)

    @cached_property
    def placement(self) -> ExpertPlacement:
        """The slots on their ranks, each with its own number in the place of an expert's."""
        taken_DP = self.slot_experts_DP != EMPTY_SLOT
        slot_DP = np.full(taken_DP.shape, EMPTY_SLOT, dtype=np.int64)
        slot_DP[taken_DP] = np.arange(taken_DP.sum())
        return ExpertPlacement(slot_DP)

    @cached_property
    def holds_DE(self) -> NDArray[np.bool_]:
        """Whether a rank holds an expert, in one slot or more."""
        holds_DE = np.zeros((len(self.slot_experts_DP), self.num_experts), dtype=bool)
        holds_DE[self.placement.rank_of_expert_E, self.expert_Z] = True
        return holds_DE

    def ranks_of(self, expert: int) -> tuple[int, ...]:
        """The ranks of all copies of an expert, one entry per copy."""
        return tuple(self.placement.rank_of_expert_E[self.expert_Z == expert].tolist())

    def reordered(self, slot_from_Z: Ints) -> "ExpertMap":
        """The map in which slot x holds what slot `slot_from_X[x]` holds here."""
        slot_experts_DP = self.slot_experts_DP.copy()
        slot_experts_DP[slot_experts_DP != EMPTY_SLOT] = self.expert_Z[slot_from_Z]
        return replace(
            self,
            slot_experts_DP=slot_experts_DP,
            weight_Z=None if self.weight_Z is None else self.weight_Z[slot_from_Z],
        )

    @cached_property
    def share_Z(self) -> NDArray[np.float64]:
        """The share of its expert's rows that goes to each slot, under an even or a weighted split."""
        weight_Z = np.ones(len(self.expert_Z)) if self.weight_Z is None else self.weight_Z
        whole_E = np.bincount(self.expert_Z, weights=weight_Z, minlength=self.num_experts)
        return np.asarray(weight_Z / whole_E[self.expert_Z])

    def rows_of_experts(self, rows_BZ: Array) -> Array:
        """Rows of slots summed to rows of experts, [..., E]."""
        return sum_columns(rows_BZ, self.expert_Z, self.num_experts)

    def choice(self, split: Split, node_of_rank_D: Ints) -> "SlotChoice":
        """How rows find their slot in a group whose ranks lie on these nodes."""
        slot_EC = np.full((self.num_experts, int(self.copies_E.max())), -1, dtype=np.int64)
        order_Z = np.argsort(self.expert_Z, kind="stable")
        first_E = np.cumsum(self.copies_E) - self.copies_E
        slot_EC[self.expert_Z[order_Z], np.arange(len(order_Z)) - first_E[self.expert_Z[order_Z]]] = order_Z
        num_nodes = int(node_of_rank_D.max()) + 1
        if split == "weighted":
            turns = [self._turns_of(slots[slots >= 0]) for slots in slot_EC]
            longest = max(map(len, turns))
            slot_ET = np.stack([np.pad(slots, (0, longest - len(slots)), constant_values=-1) for slots in turns])
            return SlotChoice(slot_ET[None], np.array([[len(slots) for slots in turns]]))
        if split == "even" or num_nodes == 1:
            return SlotChoice(slot_EC[None], self.copies_E[None])
        node_EC = np.where(slot_EC < 0, -1, node_of_rank_D[self.placement.rank_of_expert_E[slot_EC]])
        near_JEC = node_EC == np.arange(num_nodes)[:, None, None]
        near_JEC |= ~near_JEC.any(axis=2, keepdims=True) & (slot_EC >= 0)
        first_JEC = np.argsort(~near_JEC, axis=2, kind="stable")
        slot_JEC = np.take_along_axis(np.broadcast_to(slot_EC, near_JEC.shape), first_JEC, axis=2)
        return SlotChoice(slot_JEC, near_JEC.sum(axis=2))

    def _turns_of(self, slot_C: Ints) -> Ints:
        """The slots of an expert in the order of turns, each as often as its share says and spread over all of them."""
        if len(slot_C) == 1:
            return slot_C
        exact_C = TURNS * self.share_Z[slot_C]
        count_C = np.floor(exact_C).astype(np.int64)
        count_C[np.argsort(count_C - exact_C, kind="stable")[: TURNS - int(count_C.sum())]] += 1
        place_T = np.concatenate([(np.arange(count) + 0.5) / count for count in count_C.tolist() if count])
        return np.asarray(np.repeat(slot_C, count_C)[np.argsort(place_T, kind="stable")])


@dataclass(frozen=True, eq=False)
class SlotChoice:
    """slot_MEC: the slots to which rows from node m for expert e go; the first count_ME of them count.

    M is 1 where the node of a row's source makes no difference.
    """

    slot_JEC: Ints
    count_JE: Ints

    @property
    def by_node(self) -> bool:
        """Whether rows of different nodes go to different copies."""
        return len(self.slot_JEC) > 1

    def slots(self, expert_ids_BTK: Array, *, node_B: Ints | None = None) -> Array:
        """The slot of every row, of the ids' type; -1 stays. `node_B`: the node on which each block's tokens are.

        The rows of a block for one expert go to its copies in turn, beginning with another copy in every block.
        """
        experts = self.slot_JEC.shape[1]
        ids_BR = expert_ids_BTK.reshape(len(expert_ids_BTK), -1).astype(np.int64)
        key_BR = ids_BR if node_B is None or not self.by_node else ids_BR + experts * node_B[:, None]
        count = np.append(self.count_JE.reshape(-1), 1)
        slot_C = np.vstack([self.slot_JEC.reshape(-1, self.slot_JEC.shape[2]), np.full(self.slot_JEC.shape[2], -1)])
        key_BR = np.where(ids_BR < 0, len(count) - 1, key_BR)  # the last row: no expert, no slot
        slot_BR = slot_C[key_BR, 0]
        block_Q, row_Q = np.nonzero(count[key_BR] > 1)
        key_Q = key_BR[block_Q, row_Q]
        turn_Q = _turns(block_Q * len(count) + key_Q) + block_Q
        slot_BR[block_Q, row_Q] = slot_C[key_Q, turn_Q % count[key_Q]]
        return np.asarray(slot_BR.astype(expert_ids_BTK.dtype).reshape(expert_ids_BTK.shape))


def _turns(key_Q: Ints) -> Ints:
    """How many earlier entries are equal to each one."""
    if not len(key_Q):
        return key_Q
    order_Q = np.argsort(key_Q, kind="stable")
    sorted_Q = key_Q[order_Q]
    starts_Q = np.append(True, sorted_Q[1:] != sorted_Q[:-1])
    place_Q = np.arange(len(key_Q))
    turn_Q = np.empty_like(key_Q)
    turn_Q[order_Q] = place_Q - np.maximum.accumulate(np.where(starts_Q, place_Q, 0))
    return turn_Q


FloatArray = NDArray[np.float64]
MapOfLayer = Callable[[int], ExpertMap | None]

MOST_ROUNDS = 200
NEAR = 1e-6  # of the mean load: a round that changes no rank by more is the last


def balanced_weights(held: ExpertMap, load_E: NDArray[np.generic], *, speed_D: FloatArray) -> FloatArray:
    """Weights of all slots [Z] that load ranks as evenly as these allow; an expert's have a sum of 1, and one without
    rows splits evenly.

    The loads whose squares over speed have the least sum are also those whose busiest rank has least to do: what ranks
    can be given with fixed slots is the base of a polymatroid (Fujishige, Math. Oper. Res. 5(2), 1980). They are found
    expert by expert, each time filling the ranks of its copies up to one level, until nothing changes.
    """
    rank_Z, expert_Z = held.placement.rank_of_expert_E, held.expert_Z
    weight_Z = held.share_Z.copy()
    rows_E = np.asarray(load_E, dtype=np.float64)
    load_D: FloatArray = np.zeros(len(speed_D))
    np.add.at(load_D, rank_Z, weight_Z * rows_E[expert_Z])
    copied = [np.flatnonzero(expert_Z == expert) for expert in np.flatnonzero((held.copies_E > 1) & (rows_E > 0))]
    near = NEAR * load_D.mean()
    for _ in range(MOST_ROUNDS):
        before_D = load_D.copy()
        for slots in copied:
            rows = rows_E[expert_Z[slots[0]]]
            ranks, index = np.unique(rank_Z[slots], return_inverse=True)
            np.subtract.at(load_D, rank_Z[slots], weight_Z[slots] * rows)
            given_C = _fill(load_D[ranks], speed_D[ranks], rows)
            np.add.at(load_D, ranks, given_C)
            weight_Z[slots] = (given_C / rows / np.bincount(index))[index]  # copies on one rank share its part
        if np.abs(load_D - before_D).max() <= near:
            break
    return weight_Z


def _fill(load_C: FloatArray, speed_C: FloatArray, rows: float) -> FloatArray:
    """Rows for every rank so that all that get some are done at the same time, no later than the others."""
    order_C = np.argsort(load_C / speed_C, kind="stable")
    load, speed = np.cumsum(load_C[order_C]), np.cumsum(speed_C[order_C])
    level_C = (rows + load) / speed  # with the first one, two, three ... ranks
    fits = np.append(level_C[:-1] <= (load_C / speed_C)[order_C][1:], True)
    level = level_C[np.argmax(fits)]
    return np.asarray(np.maximum(speed_C * level - load_C, 0.0))


def copy_gradient_bytes_DD(maps: Iterable[ExpertMap | None], *, expert_bytes: float, num_ranks: int) -> FloatArray:
    """Bytes from rank to rank in each of the two halves, of all layers together, zero on the diagonal.

    Ranks that hold copies of an expert all-reduce its gradient among themselves as NCCL does: every rank sends each
    other one its part (reduce-scatter), then the sum of its own part to each of them (all-gather). Copies on one rank
    are summed there; data-parallel ranks with the same slots have reduced theirs before. With C ranks that hold an
    expert every ordered pair of them moves `expert_bytes` / C in each half.
    """
    bytes_DD = np.zeros((num_ranks, num_ranks))
    for held in maps:
        if held is None:
            continue
        holders_E = held.holds_DE.sum(axis=0)
        share_E = np.where(holders_E > 1, expert_bytes / holders_E, 0.0)
        holds_DE = held.holds_DE.astype(np.float64)
        bytes_DD += (holds_DE * share_E) @ holds_DE.T
    np.fill_diagonal(bytes_DD, 0.0)
    return bytes_DD


def layers_of_stages(scenario: Scenario, stages: Sequence[int]) -> list[int]:
    """The layers with a router of some stages, numbered among those; prediction layers lie on the last stage."""
    model = scenario.model
    layers = [layer for stage in stages for layer in scenario.stage_layers[stage] if not model.is_dense(layer)]
    if scenario.parallelism.num_stages - 1 in stages:
        layers += range(model.layers, model.layers + model.mtp_layers)
    return [model.moe_number(layer) for layer in layers]
