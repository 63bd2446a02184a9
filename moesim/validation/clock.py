"""Stamps in the order of a device's work, and the marks of an instrumented pass through the MoE layers."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["forward", "backward"]
Stamp = Any  # a CUDA event, or seconds


class Clock:
    """Stamps: CUDA events on the current stream, or the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def stamp(self) -> Stamp:
        """The place in the device's work that has been reached by what is issued so far."""
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, begin: Stamp, end: Stamp) -> float:
        """Seconds between two stamps, after the device has passed both."""
        return float(begin.elapsed_time(end)) / 1e3 if self.cuda else float(end - begin)

    def wait(self) -> None:
        """Until the device has done all that was issued."""
        if self.cuda:
            torch.cuda.synchronize()


@dataclass
class Marks:
    """A mark for `ExpertParallelMoE.mark`: stamps when a part ends in the forward and begins in the backward pass."""

    clock: Clock
    stamps: dict[Phase, list[tuple[str, Stamp]]] = field(default_factory=lambda: {"forward": [], "backward": []})

    def __call__(self, tensor: Tensor, part: str) -> Tensor:
        marked: Tensor = _Stamped.apply(tensor, part, self)  # type: ignore[no-untyped-call]
        return marked

    def add(self, phase: Phase, part: str) -> None:
        """Stamp now."""
        self.stamps[phase].append((part, self.clock.stamp()))

    def part_seconds(self) -> dict[str, float]:
        """Seconds per part over all layers, forward and backward: keys `forward.router`, `backward.experts`, ..."""
        seconds: dict[str, float] = {}
        for key, value in self.parts():
            seconds[key] = seconds.get(key, 0.0) + value
        return seconds

    def parts(self) -> list[tuple[str, float]]:
        """The same, one part of one layer after the other."""
        found = []
        for phase, stamps in self.stamps.items():
            for (first, begin), (second, end) in pairwise(stamps):
                part = second if phase == "forward" else first
                if part == "start" or (phase == "backward" and second == "shared"):
                    continue  # what lies between two layers
                found.append((f"{phase}.{part}", self.clock.seconds(begin, end)))
        return found


class _Stamped(torch.autograd.Function):
    """The identity, which stamps when either pass goes through it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, part: str, marks: Marks) -> Tensor:
        ctx.part, ctx.marks = part, marks
        marks.add("forward", part)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.marks.add("backward", ctx.part)
        return gradients[0], None, None
