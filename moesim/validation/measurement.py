"""A rank of a real run: it builds the model, trains some steps and measures them.

Stamps follow the order of a device's
work; marks are those of an instrumented pass through the MoE layers.
Legend: B sequences, S tokens per sequence, T = B S tokens, K selections, L MoE layers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesim.kernels.benchmarks.device import Sampler
from moesim.scenario import Scenario
from moesim.seeding import stream
from moesim.validation.cases import Ids
from moesim.validation.programs import build_trainer

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


PARTS = ("forward", "backward", "reduction", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: about `seconds` of steps (at least `least`, at most `most`) behind about half as much of
    warm-up (at least `warm` steps), then `instrumented` steps; `single` keeps the seconds of every step and of every
    part of every layer on each rank.
    """

    seconds: float = 2.0
    least: int = 7
    most: int = 25
    warm: int = 4
    instrumented: int = 4
    single: bool = False


class Runner:
    """The trainer of one case on one rank with its batches and forced routing."""

    def __init__(self, scenario: Scenario, ids: list[list[Ids]], *, rank: int, device: torch.device) -> None:
        world = scenario.parallelism.world_size
        self.device, self.clock, self.world = device, Clock(device), world
        self.trainer = build_trainer(scenario, rank=rank, device=device)
        self.ids_BL = [[torch.from_numpy(layer.astype(np.int64)).to(device) for layer in layers] for layers in ids]
        rng = stream(scenario.seed, "tokens", rank // scenario.parallelism.tensor)  # tensor ranks have the same
        workload = scenario.workload
        shape_BS = (len(ids), workload.micro_batch, workload.sequence_length + 1)
        tokens = torch.from_numpy(rng.integers(0, scenario.model.vocab, size=shape_BS)).to(device)
        self.batches = [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in tokens]

    def together(self) -> None:
        """All ranks here, all devices idle."""
        self.clock.wait()
        if self.world > 1:
            dist.barrier()
            self.clock.wait()

    def step(self) -> dict[str, float]:
        """One step from idle devices to idle devices; seconds of its parts, and of the host to issue it."""
        self.together()
        issued = time.perf_counter()
        stamps = [("start", self.clock.stamp())]
        for (tokens_BS, targets_BS), ids_L in zip(self.batches, self.ids_BL, strict=True):
            self.trainer.force_routing(ids_L)
            loss = self.trainer.forward(tokens_BS, targets_BS)
            stamps.append(("forward", self.clock.stamp()))
            self.trainer.backward(loss)
            stamps.append(("backward", self.clock.stamp()))
        self.trainer.reduce()
        stamps.append(("reduction", self.clock.stamp()))
        self.trainer.optimize()
        stamps.append(("optimizer", self.clock.stamp()))
        issued = time.perf_counter() - issued
        self.clock.wait()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (part, end) in pairwise(stamps):
            seconds[part] += self.clock.seconds(begin, end)
        return {**seconds, "step": self.clock.seconds(stamps[0][1], stamps[-1][1]), "host": issued}

    def instrumented_step(self) -> tuple[dict[str, float], list[tuple[str, float]]]:
        """One step with marks in the MoE layers: seconds per part over all layers and micro-batches, and of every part
        one after the other."""
        seconds: dict[str, float] = {}
        marks = []
        self.together()
        for (tokens_BS, targets_BS), ids_L in zip(self.batches, self.ids_BL, strict=True):
            marks.append(Marks(self.clock))
            self.trainer.set_mark(marks[-1])
            self.trainer.force_routing(ids_L)
            self.trainer.backward(self.trainer.forward(tokens_BS, targets_BS))
        self.trainer.reduce()
        self.trainer.optimize()
        self.trainer.set_mark()
        self.clock.wait()
        single = [part for mark in marks for part in mark.parts()]
        for key, value in single:
            seconds[key] = seconds.get(key, 0.0) + value
        return seconds, single

    def memory(self) -> dict[str, int]:
        """Bytes of one step: held between steps, the allocator's peak in each part, and what it reserves; {} on CPU."""
        if self.device.type != "cuda":
            return {}
        self.together()
        found = {"held": torch.cuda.memory_allocated()}

        def note(part: str) -> None:
            self.clock.wait()
            found[part] = max(found.get(part, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

        torch.cuda.reset_peak_memory_stats()
        for (tokens_BS, targets_BS), ids_L in zip(self.batches, self.ids_BL, strict=True):
            self.trainer.force_routing(ids_L)
            loss = self.trainer.forward(tokens_BS, targets_BS)
            found["kept"] = max(found.get("kept", 0), torch.cuda.memory_allocated())
            note("forward")
            self.trainer.backward(loss)
            note("backward")
        self.trainer.reduce()
        note("reduction")
        self.trainer.optimize()
        note("optimizer")
        return found | {"reserved": torch.cuda.max_memory_reserved()}

    def slowest(self, seconds: float) -> float:
        """The largest of the ranks' values, so that all of them decide alike."""
        value = torch.tensor(seconds, dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def rows(self) -> list[list[list[int]]]:
        """Rows that this rank sent to each expert, as the software counted them: [micro_batch][layer][expert]."""
        counted = []
        for (tokens_BS, targets_BS), ids_L in zip(self.batches, self.ids_BL, strict=True):
            self.trainer.force_routing(ids_L)
            with torch.no_grad():
                self.trainer.forward(tokens_BS, targets_BS)
            counts: list[Tensor | None] = [layer.last_count_E for layer in self.trainer.model.moe_layers]
            counted.append([count.tolist() for count in counts if count is not None])
        return counted


def measure_rank(
    scenario: Scenario, ids: list[list[Ids]], *, rank: int, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """Measure one case on this rank: medians over steps of the parts, and of the parts of the MoE layers.

    `state` is the mean SM clock (MHz) and power (W) during the steps, where NVML tells.
    """
    runner = Runner(scenario, ids, rank=rank, device=device)
    first = [runner.step()["step"] for _ in range(effort.warm)][-1]
    count = int(np.clip(effort.seconds / runner.slowest(first), effort.least, effort.most))
    for _ in range(count // 2):
        runner.step()
    with Sampler(device.index if device.type == "cuda" else None) as sampler:
        begin = time.monotonic()
        steps = [runner.step() for _ in range(count)]
        state = sampler.since(begin)
    rows = runner.rows()
    runner.instrumented_step()  # the first one pays for what is new in it
    layers, singles = zip(*(runner.instrumented_step() for _ in range(effort.instrumented)), strict=True)
    result = {
        "parts": _medians(steps),
        "spread": _spread([step["step"] for step in steps]),
        "layer_parts": _medians(layers),
        "rows": rows,
        "state": state,
        "memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }
    result["memory"] = runner.memory()
    if effort.single:
        result["steps"] = [[_short(step[part]) for part in (*PARTS, "step", "host")] for step in steps]
        result["marks"] = [([n for n, _ in single], [_short(s) for _, s in single]) for single in singles]
    return result


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}


def _spread(seconds: list[float]) -> float:
    """Half the range between the 10th and 90th percentile, as a share of the median."""
    low, middle, high = np.percentile(seconds, [10, 50, 90])
    return float((high - low) / 2 / middle)
