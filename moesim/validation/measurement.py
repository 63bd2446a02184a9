"""Real runs: a process builds the model, trains some steps and measures them; and what starts the processes of a run.

One case runs after the other, and what each gave is kept in a file of its own. Stamps follow the order of a device's
work; marks are those of an instrumented pass through the MoE layers.
Legend: B sequences, S tokens per sequence, T = B S tokens, K selections, L MoE layers.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.kernels.benchmarks.device import Sampler
from moesim.processes import same_imports, without_main
from moesim.scenario import Compute, Scenario, dump_scenario
from moesim.seeding import stream
from moesim.strict_json import json_text, parse_json
from moesim.validation.cases import Case, Ids, forced_ids
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


Log = Callable[[str], None]
TIMEOUT = timedelta(seconds=120)  # of one collective: a rank that fell out must not hold the others for ever
OUT_OF_MEMORY = 3  # exit code of a process whose device is full


def check_device(device: str, gpus: int) -> None:
    """Raise UserError when the device is not there, or fewer of them than asked for."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device; use --device cpu")
    found = torch.cuda.device_count()
    if found < gpus:
        raise UserError(f"--gpus {gpus}, but this machine has {found} CUDA device(s); use --gpus {found}")


def device_name(device: str) -> str:
    """What the runs ran on."""
    return torch.cuda.get_device_name(0) if device == "cuda" else "cpu"


def measure_cases(
    cases: Sequence[Case], *, device: str, folder: Path, effort: Effort, log: Log
) -> dict[str, dict[str, Any]]:
    """Measure every case that `folder` does not hold yet; what they gave by name, skipped ones with their reason.

    One set of processes runs all cases of one world size. An interrupt loses at most the case that was running. Raises
    UserError for a missing device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_device(device, max(case.gpus for case in cases))
    for gpus in sorted({case.gpus for case in cases}):
        while pending := [case for case in cases if case.gpus == gpus and not _kept(folder, case)]:
            _run(pending, device, folder, effort)
    found = {case.name: parse_json(_path(folder, case).read_text(encoding="utf-8")) for case in cases}
    for name, result in found.items():
        if "skipped" in result:
            log(f"{name}: skipped, {result['skipped']}")
    return found


def _path(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.json"


def run_as(case: Case) -> str:
    """The scenario that is run: without what only the prediction looks at."""
    return dump_scenario(case.scenario.model_copy(update={"compute": Compute()}))


def _kept(folder: Path, case: Case) -> bool:
    """Whether the folder holds a measurement of this very scenario."""
    path = _path(folder, case)
    return path.exists() and parse_json(path.read_text(encoding="utf-8")).get("scenario") == run_as(case)


def _keep(folder: Path, case: Case, result: dict[str, Any]) -> None:
    """Write a measurement so that its file is whole or not there."""
    path = _path(folder, case)
    write_atomically(path, (json_text({"scenario": run_as(case), **result}, indent=1) + "\n").encode())


def _run(cases: list[Case], device: str, folder: Path, effort: Effort) -> None:
    """Measure `cases` in order until one does not fit the device: that one is then marked as skipped."""
    with tempfile.TemporaryDirectory() as scratch, same_imports(), without_main():
        context: Any = start_processes(  # type: ignore[no-untyped-call]
            _process,
            (cases, device, scratch, str(folder), effort),
            nprocs=cases[0].gpus,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            if error.exit_code != OUT_OF_MEMORY:
                raise
            too_large = next(case for case in cases if not _kept(folder, case))
            _keep(folder, too_large, {"skipped": "out of memory on the device"})


def _process(rank: int, cases: list[Case], device: str, scratch: str, folder: str, effort: Effort) -> None:
    world = cases[0].gpus
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world) if device == "cpu" else 1)
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{scratch}/store",
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=place if device == "cuda" else None,
        )
    for case in cases:
        try:
            sample = case.sample()
            micro_batches = case.scenario.num_micro_batches
            ids = [[] for _ in range(micro_batches)] if sample is None else forced_ids(sample, rank=rank)
            result = measure_rank(case.scenario, ids, rank=rank, device=place, effort=effort)
        except torch.OutOfMemoryError:
            os._exit(OUT_OF_MEMORY)  # at once: a clean end would wait for collectives that never come
        ranks = _gathered(result, world)
        if rank == 0:
            _keep(Path(folder), case, _merge(ranks))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if world > 1:
        dist.destroy_process_group()


def _gathered(result: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """The results of all ranks."""
    if world == 1:
        return [result]
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, result)
    return ranks


def _merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The step of the slowest rank, and the parts averaged over ranks, as the simulation gives them."""
    measured = {
        "step": max(rank["parts"]["step"] for rank in ranks),
        "parts": _mean([rank["parts"] for rank in ranks]),
        "layer_parts": _mean([rank["layer_parts"] for rank in ranks]),
        "rows": [rank["rows"] for rank in ranks],
        "spread": max(rank["spread"] for rank in ranks),
        "state": [rank["state"] for rank in ranks],
        "memory_bytes": max(rank["memory_bytes"] for rank in ranks),
        "memory": [rank["memory"] for rank in ranks],
    }
    if "steps" in ranks[0]:
        measured["steps"] = [rank["steps"] for rank in ranks]
        measured["marks"] = {"names": ranks[0]["marks"][0][0], "seconds": [[m for _, m in r["marks"]] for r in ranks]}
    return measured


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
