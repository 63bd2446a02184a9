"""Which rank holds which experts and copies of them in serving, and to which copy a row goes.

Legend: N tokens, K experts of a token, E experts, X slots of all ranks (rank r holds X/R of them from r*X/R on).
"""

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.eplb import balance_experts

IntArray = NDArray[np.int64]


class ExpertSlots:
    """The slots of one layer. `load_E`: rows by which they are placed, None: neighbours, without copies.

    Copies are placed by DeepSeek's global policy, and rows of an expert go to its copies in turn.
    """

    def __init__(self, load_E: NDArray[np.float64] | None, *, experts: int, slots: int, ranks: int) -> None:
        expert_X = np.arange(experts)
        if load_E is not None:
            expert_X = balance_experts(load_E[None], num_slots=slots, num_groups=1, num_nodes=1, num_ranks=ranks)[0]
        self.num_slots = len(expert_X)
        self.is_plain = load_E is None
        self.slot_X: IntArray = np.argsort(expert_X, kind="stable")  # slots of expert 0, of expert 1 ...
        self.copies_E: IntArray = np.bincount(expert_X, minlength=experts)
        self.first_E: IntArray = np.cumsum(self.copies_E) - self.copies_E

    def of(self, ids_NK: IntArray) -> IntArray:
        """[N, K] the slots that rows go to; -1 (dropped) stays."""
        if self.is_plain:
            return ids_NK
        flat = ids_NK.reshape(-1)
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        turn = np.arange(len(flat)) - np.searchsorted(ordered, ordered, side="left")
        slots = self.slot_X[self.first_E[ordered] + turn % self.copies_E[ordered]]
        found = np.empty_like(flat)
        found[order] = np.where(ordered >= 0, slots, -1)
        return found.reshape(ids_NK.shape)
