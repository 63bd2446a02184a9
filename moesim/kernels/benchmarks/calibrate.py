"""`moesim calibrate`: run every family on the machine at hand, within a time budget, and write the profile.

Every shape is visited several times, apart in time; under torchrun the ranks share the shapes of the single-device
families, another rank at each visit, and then measure collectives together.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moesim.errors import UserError
from moesim.kernels.benchmarks.buffers import Pool
from moesim.kernels.benchmarks.collectives import (
    Overlap,
    block_shapes,
    collective_shapes,
    contention_shapes,
    fixed_counts,
    measure_overlap,
    prepare_collective,
)
from moesim.kernels.benchmarks.deep_gemm import prepare_deep_gemm
from moesim.kernels.benchmarks.device import Sampler, environment
from moesim.kernels.benchmarks.fp8 import is_fp8_row, long_gemms, prepare_fp8
from moesim.kernels.benchmarks.host import host_calls
from moesim.kernels.benchmarks.kernels import (
    Prepared,
    prepare_attention,
    prepare_gemm,
    prepare_grouped_gemm,
    prepare_other_layout,
)
from moesim.kernels.benchmarks.later_shapes import LAYOUT
from moesim.kernels.benchmarks.memory_kernels import prepare_memory_bound
from moesim.kernels.benchmarks.session import Row, Session
from moesim.kernels.benchmarks.shapes import CPU_LIMITS, GPU_LIMITS, Limits, family_shapes, kernel_flops
from moesim.kernels.benchmarks.timing import CpuTimer, CudaTimer, kernel_names, measure_sustained, summarise
from moesim.kernels.fp8 import DEEP_GEMM
from moesim.kernels.profile import Profile

Preparer = Callable[[dict[str, Any], Pool, float], Prepared]
_PREPARE: dict[str, Preparer] = {
    "gemm": prepare_gemm,
    "gemm_fp8": prepare_gemm,
    "grouped_gemm": prepare_grouped_gemm,
    "attention": prepare_attention,
    "memory_bound": prepare_memory_bound,
    DEEP_GEMM: prepare_deep_gemm,
}
_OF_EDGES: dict[str, Preparer] = {LAYOUT: prepare_other_layout}


def prepare(row: Row, pool: Pool, beyond: float) -> Prepared:
    """The call of a row of any single-device family."""
    return (prepare_fp8 if is_fp8_row(row) else (_PREPARE | _OF_EDGES)[row["family"]])(row, pool, beyond)


SINGLE = (*_PREPARE, "fp8", "edges", "between")  # families of one device; rows of the last three say which kernels
# Shares of the whole budget. The single-device families come first: they need no other rank.
BUDGET_SHARES = {
    "host": 0.03,
    "gemm": 0.28,
    "grouped_gemm": 0.26,
    "attention": 0.13,
    "memory_bound": 0.10,
    "gemm_fp8": 0.06,
    "fp8": 0.06,
    "edges": 0.06,
    "between": 0.10,
    DEEP_GEMM: 0.06,
    "sustained": 0.10,
    "collective": 0.10,
    "contention": 0.10,
}
NUM_VISITS = 3  # of every shape, apart in time and on different ranks: the clock under a power limit never stands still
_PROFILED_TOGETHER = 24
_LONG_FP8 = 40  # FP8 GEMMs that run without pause


@dataclass(kw_only=True)
class Bench:
    """Everything that a family's loop needs."""

    device: str
    session: Session
    timer: Any
    pool: Pool
    sampler: Sampler
    limits: Limits
    ranks: int
    visits: int
    beyond: float  # bytes between two uses of one operand
    progress: Callable[[str, float], None]


def _check_device(device: str) -> None:
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: use cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; run on a machine with one, or use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"torchrun started more processes than GPUs: local rank {local}, {count} GPUs; use --nproc-per-node {count}"
        )


@contextmanager
def _process_group(device: str) -> Iterator[tuple[int, int]]:
    """(rank, ranks); with several processes their group is open inside."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    if device == "cuda":
        # Multicast on NVSwitch is left off: it is not needed for point-to-point traffic and can disturb shared hosts.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        index = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(index)
        dist.init_process_group("nccl", device_id=torch.device("cuda", index))
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _attempt(bench: Bench, row: Row, measure: Callable[[], Row]) -> None:
    """Measure one row; what this machine cannot run is skipped and named."""
    begin = time.monotonic()
    try:
        measured = measure()
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        bench.session.skip(
            row, "out of memory" if out_of_memory else f"{type(error).__name__}: {error}".splitlines()[0]
        )
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        return
    bench.session.add(row | bench.sampler.since(max(begin, bench.timer.started)) | measured)


def _run_family(bench: Bench, family: str, seconds: float) -> None:
    """One family of single-device kernels: this rank's share of the shapes, in the visit that is under way."""
    rows = [{"family": family} | shape for shape in family_shapes(family, bench.limits)]
    mine = [row for i, row in enumerate(rows) if (i + bench.session.visit) % bench.ranks == bench.session.rank]

    def measure(row: Row) -> Row:
        call, facts = prepare(row, bench.pool, bench.beyond)
        timing: Row = bench.timer.time(call).as_row()
        return timing | facts

    begin = time.monotonic()
    for number, row in enumerate(bench.session.within(mine, seconds)):
        _attempt(bench, row, lambda row=row: measure(row))  # type: ignore[misc]
        if bench.device == "cuda" and number % 16 == 15:
            torch.cuda.empty_cache()
        bench.progress(family, (bench.session.visit + (time.monotonic() - begin) / seconds) / bench.visits)
    bench.progress(family, (bench.session.visit + 1) / bench.visits)


def _run_host(bench: Bench, seconds: float) -> None:
    """Host costs, on rank 0 while the others wait: they share the processor's caches and memory."""
    if bench.session.rank == 0:
        calls = host_calls(bench.device)
        rows = [{"family": "host", "part": part, "kind": kind} for part, kind in calls]
        for row in bench.session.within(rows, seconds):
            timed = calls[row["part"], row["kind"]]
            _attempt(bench, row, lambda timed=timed: summarise(timed(), 400).as_row())  # type: ignore[misc]
        floor = {"family": "host", "part": "device", "kind": "kernel_floor"}
        if bench.session.wants(floor):
            tiny = torch.ones(1, device=bench.device)
            _attempt(bench, floor, lambda: bench.timer.time(lambda i: tiny.add_(0.0)).as_row())
    bench.progress("host", 1.0)


def _run_sustained(bench: Bench, seconds: float) -> None:
    """Kernels that run on and on: the clock under the power limit. The ranks share the shapes."""
    fp8 = list(long_gemms(family_shapes("fp8", bench.limits)))[:_LONG_FP8]
    rows: list[Row] = [{"family": "sustained", "of": shape} for shape in fp8]
    rows += [{"family": "sustained"} | shape for shape in family_shapes("sustained", bench.limits)]
    mine = [row for i, row in enumerate(rows) if i % bench.ranks == bench.session.rank]

    def measure(row: Row) -> Row:
        of = row["of"]
        call, _ = prepare(of, bench.pool, bench.beyond)
        return measure_sustained(
            call,
            flops=kernel_flops(of),
            probe=lambda call: bench.timer.probe(call)[0],
            sampler=bench.sampler,
        )

    for row in bench.session.within(mine, seconds):
        _attempt(bench, row, lambda row=row: measure(row))  # type: ignore[misc]
        torch.cuda.empty_cache()
    bench.progress("sustained", 1.0)


def _largest_over_ranks(value: float, device: str) -> float:
    value_1 = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(value_1, op=dist.ReduceOp.MAX)
    return float(value_1.item())


def _agreed(bench: Bench, rows: list[Row], seconds: float) -> Iterator[Row]:
    """As `Session.within`, with one decision for all ranks: all measure a row or none does."""
    begin = time.monotonic()
    for row in rows:
        wanted = bench.session.wants(row) and time.monotonic() - begin < seconds
        if _largest_over_ranks(float(wanted), bench.device) > 0.0:
            yield row


def _settings() -> Row:
    """What the library of collectives was told in the environment and a row must say: the SMs it may use."""
    limit = os.environ.get("NCCL_MAX_CTAS")
    return {"max_ctas": int(limit)} if limit else {}


def _without_switch(shape: Row) -> Row:
    """Whether NVSwitch was kept from summing, of the calls in which it could."""
    off = os.environ.get("NCCL_NVLS_ENABLE") == "0" and shape["kind"] == "all_reduce" and shape["ranks"] > 2
    return {"nvls": 0} if off else {}


def _run_collectives(bench: Bench, seconds: float) -> None:
    largest = 1 << 30 if bench.device == "cuda" else 1 << 17
    shapes = list(collective_shapes(bench.ranks, largest=largest))
    if bench.device == "cuda" and not _settings():
        shapes += block_shapes(bench.ranks)
    rows = [{"family": "collective"} | shape | _settings() | _without_switch(shape) for shape in shapes]
    for row in _agreed(bench, rows, seconds):

        def measure(row: Row = row) -> Row:
            call = prepare_collective(row, bench.device, own_limit=not _settings())
            timing = bench.timer.time_fixed(call, **fixed_counts(row["bytes"])).as_row()
            slowest = {name: _largest_over_ranks(timing[name], bench.device) for name in ("p20", "p50", "p80")}
            return {**timing, **slowest}

        _attempt(bench, row, measure)
    bench.progress("collective", 1.0)


def _run_contention(bench: Bench, seconds: float) -> None:
    rows = [row | _settings() for row in contention_shapes(bench.ranks)]
    for row in _agreed(bench, rows, seconds):

        def measure(row: Row = row) -> Row:
            contender = row["compute"]
            compute, _ = prepare(contender, bench.pool, bench.beyond)
            overlap = Overlap(compute, prepare_collective(row, bench.device, own_limit=False), sleep=bench.timer.sleep)
            measured: Row = {}
            measured |= measure_overlap(
                overlap, largest_over_ranks=lambda value: _largest_over_ranks(value, bench.device)
            )
            return measured

        _attempt(bench, row, measure)
    bench.progress("contention", 1.0)


def _run_kernel_names(bench: Bench) -> None:
    """Which kernels the library takes for each dense GEMM: rows of their own, one profiled call per shape."""
    rows: list[Row] = [{"family": "gemm"} | shape for shape in family_shapes("gemm", bench.limits)]
    mine = [row for i, row in enumerate(rows) if i % bench.ranks == bench.session.rank and not bench.session.wants(row)]
    named: list[Row] = [{"family": "kernel_name", "of": row} for row in mine]
    named = [row for row in named if bench.session.wants(row)]
    try:
        for begin in range(0, len(named), _PROFILED_TOGETHER):
            part = named[begin : begin + _PROFILED_TOGETHER]
            found = kernel_names([prepare_gemm(row["of"], bench.pool, 0.0)[0] for row in part])
            for row, names in zip(part, found, strict=True):
                bench.session.add(row | {"kernel": names})
    except RuntimeError as error:
        bench.session.report(f"kernel names were not recorded: {error}")


def _pool(device: str) -> Pool:
    """Raises UserError where the device has no room for operands."""
    size = 12 << 30 if device == "cuda" else 1 << 23
    try:
        return Pool(device=device, num_bytes=size)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device {device}: no room for {size >> 30} GiB of operands; stop what else uses the device's memory"
        ) from None


def _heat(bench: Bench, seconds: float) -> None:
    """Large GEMMs until the chip has its working temperature: cold clocks are faster than a step ever sees."""
    a, b = bench.pool.take(8192, 8192), bench.pool.take(8192, 8192)
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()


def _run_all(bench: Bench, families: tuple[str, ...], budget: float) -> None:
    """Host and collectives once, single-device families once per visit; `budget` seconds are shared as listed."""
    together = {"collective": _run_collectives, "contention": _run_contention}
    scale = budget / sum(BUDGET_SHARES[family] for family in families)
    if "host" in families:
        _run_host(bench, BUDGET_SHARES["host"] * scale)
    for visit in range(bench.visits):
        bench.session.visit = visit
        for family in families:
            if family not in SINGLE:
                continue
            if bench.ranks > 1:
                dist.barrier()
            if bench.device == "cuda":
                _heat(bench, 1.0)
            _run_family(bench, family, BUDGET_SHARES[family] * scale / bench.visits)
    bench.session.visit = 0
    if "sustained" in families and bench.device == "cuda":
        _run_sustained(bench, BUDGET_SHARES["sustained"] * scale)
    for family, run in together.items():
        if family in families and bench.ranks > 1 and (family == "collective" or bench.device == "cuda"):
            dist.barrier()
            run(bench, BUDGET_SHARES[family] * scale)
    if bench.device == "cuda" and "gemm" in families:
        _run_kernel_names(bench)


@contextmanager
def _bars(console: Console, families: tuple[str, ...], *, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar per family: how much of its time is used."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shown) as progress:
        tasks = {family: progress.add_task(family, total=1.0, start=False) for family in families}

        def update(family: str, share: float) -> None:
            progress.start_task(tasks[family])
            progress.update(tasks[family], completed=min(share, 1.0))

        yield update


def _chosen(families: tuple[str, ...]) -> tuple[str, ...]:
    """The families in measuring order. Raises UserError for one that does not exist."""
    unknown = [family for family in families if family not in BUDGET_SHARES]
    if unknown:
        raise UserError(f"unknown family {unknown[0]!r}; use some of: {', '.join(BUDGET_SHARES)}")
    return tuple(family for family in BUDGET_SHARES if family in families)


def _measure(
    session: Session, device: str, *, ranks: int, visits: int, families: tuple[str, ...], budget: float, shown: bool
) -> Row:
    """Fill the open session with rows; returns the facts about the machine."""
    gpu = device == "cuda"
    facts = environment(device, ranks)
    sampled = int(os.environ.get("LOCAL_RANK", "0")) if gpu else None
    with Sampler(sampled) as sampler, _bars(Console(stderr=True), families, shown=shown) as progress:
        bench = Bench(
            device=device,
            session=session,
            timer=CudaTimer() if gpu else CpuTimer(),
            pool=_pool(device),
            sampler=sampler,
            limits=GPU_LIMITS if gpu else CPU_LIMITS,
            ranks=ranks,
            visits=visits,
            beyond=2.5 * facts["l2_bytes"] if gpu else 0.0,
            progress=progress,
        )
        _run_all(bench, families, budget)
    if ranks > 1:
        dist.barrier()
    return facts


def _say(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def run_calibration(
    *,
    device: str,
    out: Path,
    name: str | None = None,
    budget: float = 420.0,
    families: tuple[str, ...] = tuple(BUDGET_SHARES),
    visits: int = NUM_VISITS,
    quiet: bool = False,
) -> Profile | None:
    """Measure `families` for about `budget` seconds and write (or extend) the profile `out`.

    Returns the profile on rank 0, None on the others. Raises UserError for a missing device or an unknown family. An
    interrupt keeps what was measured in `OUT.partial`; the same call again goes on from there.
    """
    _check_device(device)
    families = _chosen(families)
    with _process_group(device) as (rank, ranks):
        session = Session(out=out, rank=rank, report=_say)
        session.open()
        shown = rank == 0 and not quiet
        try:
            facts = _measure(session, device, ranks=ranks, visits=visits, families=families, budget=budget, shown=shown)
        except KeyboardInterrupt:
            session.report(
                f"interrupted: {session.num_rows} rows kept in {session.partial}; the same call goes on from there"
            )
            raise
        finally:
            session.close()
        return session.merge(name=name or out.name.split(".")[0], environment=facts) if rank == 0 else None
