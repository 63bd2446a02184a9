"""The processes of real runs: one case after the other, and what each gave is kept in a file of its own."""

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.processes import same_imports, without_main
from moesim.scenario import Compute, dump_scenario
from moesim.strict_json import json_text, parse_json
from moesim.validation.cases import Case, forced_ids
from moesim.validation.measurement import Effort, measure_rank

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
