"""Bytes of tensors that are alive while a step is recorded: storages of the meta device, made and freed as on a GPU.

A recording keeps what autograd keeps and drops what the program drops, so that the most that is alive at once is the
most that a GPU's allocator hands out, beside what single kernels need inside.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

BLOCK = 512  # bytes that torch's allocator rounds up to
# What torch's CUDA kernels make for themselves: the product of softmax and its gradient, before its sums.
INSIDE: Mapping[str, Callable[[Tensor], int]] = {
    "_softmax_backward_data": lambda result: result.numel() * result.element_size(),
}


@dataclass(frozen=True, kw_only=True)
class LivePeak:
    """Bytes of one step on one GPU, without the workspaces of libraries and what the allocator keeps beyond tensors.

    held: weights, buffers and what else was there before the step. most: alive at once, by phase. made: gradients and
    what else is left behind the backward pass.
    """

    held: int
    most: Mapping[str, int]
    made: int


class LiveBytes:
    """Counts storages from the first tensor that uses them until the last one is gone."""

    def __init__(self, model: nn.Module) -> None:
        self._now = 0
        self._most: dict[str, int] = {}
        self._known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._count(tensor)
        self._held = self._now

    def seen(self, inputs: Iterable[Tensor]) -> None:
        """What an operation reads: tensors that nothing recorded has made were there before."""
        for tensor in inputs:
            self._held += self._count(tensor)

    def made(self, name: str, results: Iterable[Tensor], *, phase: str) -> None:
        """What an operation hands out."""
        inside = 0
        for tensor in results:
            self._count(tensor)
            inside += INSIDE[name](tensor) if name in INSIDE else 0
        self._most[phase] = max(self._most.get(phase, 0), self._now + inside)

    def peak(self) -> LivePeak:
        """What was counted, behind the backward pass."""
        return LivePeak(held=self._held, most=dict(self._most), made=self._now - self._held)

    def _count(self, tensor: Tensor) -> int:
        storage: Any = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return 0
        size = -(-int(storage.nbytes()) // BLOCK) * BLOCK
        self._now += size
        self._known.add(place)
        weakref.finalize(storage, self._gone, place, size)
        return size

    def _gone(self, place: int, size: int) -> None:
        self._now -= size
        self._known.discard(place)
