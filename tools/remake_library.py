"""Remake the library of trained routing: `python tools/remake_library.py --out DIR [--only PATTERN] [--device cuda]`.

Points are trained several at a time: a process trains a bunch side by side on one device (CUDA graphs on streams of
their own), and a few processes hide each other's starts, evaluations and compression. A finished entry is a file; a
rerun into the same folder makes only what is missing. Ctrl-C keeps what is finished.

The shipped data: 9 minutes on one H200, torch 2.11, `--workers 5 --lanes 5`, the text being `stdlib` of CPython 3.11.7;
15 entries with other balance losses and the 16 of 8x2, 64x8, 128x8 and 384x8 on H100s (each names its device). Made
again on another H200 with one worker and three lanes, entries came out equal to the byte; an H100 gives other bits.
Studies need few tokens of most entries; `--tokens` records more.
"""

import argparse
import fnmatch
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
from library_points import SEQUENCE_LENGTH, LibraryPoint, library_points
from rich.console import Console

from moesim.display import Display, opened_display
from moesim.errors import UserError
from moesim.processes import same_imports, signals_interrupt
from moesim.routing.request import TrainingRequest
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import NoCapacity
from moesim.trace import RoutingTrace, StepCounts
from moesim.trace.library import (
    COARSE_RATIO,
    FINE_RATIO,
    INDEX,
    TextOrder,
    file_of,
    read_facts,
    read_order,
    sort_text,
    write_index,
    write_order,
)

if TYPE_CHECKING:
    from static_training import StaticTrainer

EVALUATED_SEQUENCES = 64  # 262,144 held-out tokens at every evaluation
EVALUATED_TOGETHER = 32_768  # tokens of one forward pass
EVALUATED_AT = (0, 1 / 30, 1 / 15, 2 / 15, 4 / 15, 7 / 15, 11 / 15, 1)  # of all steps: drift is early
LAST_PART = 0.1  # of the steps: what training loss, imbalance and drops are averaged over
ON_CUDA, ON_CPU = (3, 6), (1, 1)  # processes, points side by side in each
INTERRUPTED_EXIT_CODE = 130


class Stopped(Exception):
    """The user interrupted; the worker gives up its bunch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and write the index; 0 when all is there, 1 when a point failed, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    try:
        with signals_interrupt():
            return _make(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/remake_library.py", description="Remake the library of routing."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the entries go; kept and resumed")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names, e.g. '64x6/*/seed0'")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--corpus", default="stdlib", help="text: stdlib, a file or a folder")
    parser.add_argument("--workers", type=int, help="processes; 3 on CUDA, 1 on a CPU")
    parser.add_argument("--lanes", type=int, help="points side by side in a process; 6 on CUDA, 1 on a CPU")
    parser.add_argument("--tokens", type=_recorded_tokens, help="record so many in every entry: 4096, 8192 ... 262144")
    parser.add_argument("--steps", type=int, help="fewer training steps, for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="a tiny model on short sequences, for a rehearsal")
    parser.add_argument("--list", action="store_true", help="print the names and train nothing")
    return parser


def _recorded_tokens(text: str) -> int:
    """Recorded sequences are some of the evaluated ones, evenly spread."""
    tokens = int(text)
    if tokens < SEQUENCE_LENGTH or EVALUATED_SEQUENCES * SEQUENCE_LENGTH % tokens or tokens % SEQUENCE_LENGTH:
        raise argparse.ArgumentTypeError(f"{tokens} is not {SEQUENCE_LENGTH} times 1, 2, 4 ... {EVALUATED_SEQUENCES}")
    return tokens


def _make(args: argparse.Namespace) -> int:
    points = _chosen(args)
    if args.list:
        print("\n".join(point.name for point in points))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    keep_order(points[0].request, args.out)
    missing = [point for point in points if not _is_made(point, args.out)]
    workers, lanes = ON_CPU if args.device == "cpu" or not _has_cuda() else ON_CUDA
    bunches = list(_bunches(missing, lanes=args.lanes or lanes))
    console = Console(stderr=True)
    console.print(f"{len(points) - len(missing)} entries are made, {len(missing)} are missing")
    failures, stopped = _train_all(bunches, out=args.out, workers=args.workers or workers, console=console)
    total = write_index(args.out)
    console.print(f"{total} entries in {args.out}, listed in {INDEX}")
    for failure in failures:
        print(failure, file=sys.stderr)
    if stopped:
        print(f"interrupted; finished entries are kept in {args.out}; run the same command again", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return 1 if failures else 0


def _chosen(args: argparse.Namespace) -> list[LibraryPoint]:
    changes = {"steps": args.steps} if args.steps else {}
    points = library_points(corpus=args.corpus, device=args.device, tokens=args.tokens, **changes)
    if args.quick:
        points = tuple(_shrunk(point) for point in points)
    if args.only:
        points = tuple(each for each in points if any(fnmatch.fnmatch(each.name, only) for only in args.only))
        if not points:
            raise UserError(f"--only {' '.join(args.only)}: no such entry; --list prints all names")
    return list(points)


def _shrunk(point: LibraryPoint) -> LibraryPoint:
    """The point with everything small but its router: seconds on a CPU."""
    request = point.request
    small = {"layers": 2, "hidden": 32, "heads": 2, "context": 64, "tokens_per_step": 512, "expert_intermediate": 16}
    tiny = replace(
        request,
        steps=min(request.steps, 6),
        sequence_length=64,
        recorded_sequences=2,
        thin=request.thin.model_copy(update=small),
    )
    return replace(point, request=tiny)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_made(point: LibraryPoint, out: Path) -> bool:
    path = out / file_of(point.name)
    try:
        made: bool = read_facts(path)[0]["provenance"]["content_hash"] == point.request.content_hash()
    except (UserError, KeyError, ValueError):
        return False
    return made


def _bunches(points: Sequence[LibraryPoint], *, lanes: int) -> Iterator[list[LibraryPoint]]:
    """Points that train together. Expert choice waits for the host in every layer, so each is alone, and first."""
    alone = [point for point in points if ROUTERS[point.request.router.kind].by_experts]
    yield from ([point] for point in alone)
    # costly ones first, like beside like, so that the lanes of a bunch end together and the last bunch is short
    others = sorted((point for point in points if point not in alone), key=_cost, reverse=True)
    for start in range(0, len(others), lanes):
        yield others[start : start + lanes]


def _cost(point: LibraryPoint) -> int:
    router = point.request.router
    return router.num_experts * point.request.thin.expert_intermediate + 64 * 64 * router.top_k


def _train_all(
    bunches: Sequence[list[LibraryPoint]], *, out: Path, workers: int, console: Console
) -> tuple[list[str], bool]:
    """Train every bunch; the failures, and whether the user stopped it."""
    spawn = multiprocessing.get_context("spawn")
    stop, steps_done = spawn.Event(), spawn.Queue()
    failures: list[str] = []
    stopped = False
    total = sum(point.request.steps for bunch in bunches for point in bunch)
    with opened_display(console=console) as display:
        watcher = Thread(target=_watch, args=(steps_done, display, total), daemon=True)
        watcher.start()
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(stop, steps_done))
        with same_imports(), pool:
            futures = [pool.submit(train_bunch, bunch, out) for bunch in bunches]
            try:
                for future in as_completed(futures):
                    failures += future.result()
            except KeyboardInterrupt:
                stopped = True
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        steps_done.put(None)
        watcher.join()
    return failures, stopped


def _watch(steps_done: "Queue[int | None]", display: Display | None, total: int) -> None:
    done = 0
    while True:
        try:
            steps = steps_done.get(timeout=1)
        except Empty:
            continue
        if steps is None:
            return
        done += steps
        if display is not None:
            display.show("training steps", completed=done, total=total)


_STOP: Event | None = None
_STEPS_DONE: "Queue[int | None] | None" = None


def _start_worker(stop: Event, steps_done: "Queue[int | None]") -> None:
    """Ctrl-C reaches every process of the terminal; only the parent acts on it."""
    global _STOP, _STEPS_DONE
    _STOP, _STEPS_DONE = stop, steps_done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    import torch

    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel per allocation, for memory never read


def _tell(steps: int) -> None:
    if _STEPS_DONE is not None:
        _STEPS_DONE.put(steps)
    if _STOP is not None and _STOP.is_set():
        raise Stopped


def train_bunch(points: Sequence[LibraryPoint], out: Path) -> list[str]:
    """Train the points side by side and write their entries; a line for each that diverged."""
    from static_training import StaticTrainer, train_together

    from moesim.routing.corpus import load_corpus
    from moesim.routing.held_out import held_out_sequences
    from moesim.routing.training import device_of

    first = points[0].request
    corpus = load_corpus(first.corpus)
    text = held_out_sequences(corpus.held_out, num_sequences=EVALUATED_SEQUENCES, length=first.sequence_length)
    trainers = [StaticTrainer(point.request, corpus, device=device_of(point.request)) for point in points]
    failures = []
    for share in EVALUATED_AT:
        train_together(trainers, until=round(share * first.steps), progress=_tell)
        for trainer in list(trainers):
            loss = trainer.evaluate(text, tokens_per_forward=EVALUATED_TOGETHER).loss
            if not np.isfinite(loss):
                point = points[[each.request for each in points].index(trainer.request)]
                failures.append(f"{point.name}: training diverged before step {trainer.done} (loss {loss})")
                trainers.remove(trainer)
    for trainer in trainers:
        point = points[[each.request for each in points].index(trainer.request)]
        _write(point, trainer, corpus.held_out, out)
    return failures


def keep_order(request: TrainingRequest, out: Path) -> TextOrder:
    """The order of the evaluated held-out text, written into the folder of the entries that use it."""
    from moesim.routing.corpus import load_corpus
    from moesim.routing.held_out import held_out_sequences

    held_out = load_corpus(request.corpus).held_out
    text = held_out_sequences(held_out, num_sequences=EVALUATED_SEQUENCES, length=request.sequence_length)
    order = sort_text(text[:, :-1], context=request.thin.context)
    write_order(out, order)
    return order


def recorded_layers(request: TrainingRequest) -> list[int]:
    """The two layers of the trained model whose routing is kept: the one in the middle and the last."""
    return [request.thin.layers // 2 - 1, request.thin.layers - 1]


def _write(point: LibraryPoint, trainer: "StaticTrainer", held_out: bytes, out: Path) -> None:
    """Record the trained router and write the entry."""
    from moesim.trace.library import write_entry

    request, trace = point.request, _record(trainer, held_out)
    part = max(1, round(LAST_PART * request.steps))
    facts = {
        "name": point.name,
        "aliases": [f"{point.layout}/{alias}" for alias in point.aliases],
        "layout": point.layout if point.layout != "granularity" else point.point,
        "axis": point.axis,
        "value": point.value,
        "seed": request.seed,
        "tokens": trace.final.num_tokens,
        "train_loss": float(trace.curves.train_loss[-part:].mean()),
        "held_out_loss": float(trace.curves.validation_loss[-1]),
        "imbalance": float(trace.curves.imbalance[-part:].mean()),
        "dropped_share": float(trainer.dropped_share_P()[-part:].mean()),
    }
    # logits lie closer together than the odds of probabilities: coarse steps would make the K gates of a token equal
    coarse = isinstance(request.capacity, NoCapacity) and ROUTERS[request.router.kind].affinity != "logits"
    ratio = COARSE_RATIO if coarse else FINE_RATIO
    write_entry(out / file_of(point.name), trace, facts=facts, ratio=ratio, order=read_order(out))


def _record(trainer: "StaticTrainer", held_out: bytes) -> RoutingTrace:
    """The trained router's routing of held-out text in the kept layers, with the counts of earlier steps."""
    from static_training import flash_attention

    from moesim.routing.held_out import record
    from moesim.routing.training import device_name

    request, layers = trainer.request, recorded_layers(trainer.request)
    with flash_attention(trainer.device):
        last = record(
            trainer.model, request, held_out, step=request.steps, num_sequences=request.recorded_sequences
        ).step
    kept = {name: getattr(last, name)[layers] for name in ("expert_ids_LSTK", "affinities_LSTK", "gates_LSTK")}
    every = EVALUATED_SEQUENCES // request.recorded_sequences  # the recorded sequences are these of the evaluated ones
    return RoutingTrace(
        router=request.router,
        steps=(replace(last, **kept),),
        earlier=tuple(
            StepCounts(step=each.step, counts_LSE=each.counts_LSE[layers, ::every]) for each in trainer.evaluations[:-1]
        ),
        curves=trainer.curves(),
        provenance={
            **request.provenance(),
            "content_hash": request.content_hash(),
            "device": device_name(trainer.device),
            "recorded_layers": layers,
            "evaluated_tokens": EVALUATED_SEQUENCES * request.sequence_length,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
