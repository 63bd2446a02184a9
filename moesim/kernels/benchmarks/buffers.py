"""Operands for benchmarks: normal random data, taken at ever new places so that no call finds its inputs in the L2."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_ALIGNMENT = 256  # bytes
_MAX_SETS = 96


class Pool:
    """One large buffer of normal bf16 numbers; `take` hands out views of it in turn, wrapping around at the end."""

    def __init__(self, *, device: str, num_bytes: int) -> None:
        self.device = device
        self.capacity = count = num_bytes // 2  # numbers
        self._values = torch.empty(count, dtype=torch.bfloat16, device=device)
        chunk = 1 << 28
        for begin in range(0, count, chunk):
            self._values[begin : begin + chunk].normal_()
        self._bytes = self._values.view(torch.uint8)
        self._next = 0

    def take(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A contiguous tensor of `shape`: bf16 values are normal; other dtypes are converted copies."""
        if dtype != torch.bfloat16:
            return self.take(*shape).to(dtype)
        size = 2 * math.prod(shape)
        if self._next + size > self._bytes.numel():
            self._next = 0
        view = self._bytes[self._next : self._next + size].view(torch.bfloat16)
        self._next += (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        if view.numel() < math.prod(shape):
            return torch.randn(*shape, dtype=dtype, device=self.device)
        return view.view(*shape)


class Rotation:
    """`make()` prepared as many times as it takes to move `beyond` bytes between two uses of one operand set."""

    def __init__(self, make: Callable[[], T], *, bytes_per_call: float, beyond: float) -> None:
        sets = min(_MAX_SETS, max(2, math.ceil(beyond / max(bytes_per_call, 1.0)) + 1))
        if bytes_per_call > beyond:
            sets = 2
        self.items: list[Any] = [make() for _ in range(sets)]

    def __len__(self) -> int:
        return len(self.items)

    def __call__(self, index: int) -> Any:
        return self.items[index % len(self.items)]


def keep_outputs(call: Callable[[int], Any], *, sets: int) -> Callable[[int], None]:
    """The call with its last `sets` outputs kept alive, so that outputs do not land on one warm address."""
    kept: list[Any] = [None] * sets

    def run(index: int) -> None:
        kept[index % sets] = call(index)

    return run
