"""The routing that a scenario asks for, without importing torch: trained (and kept), or read from a file.

All that determines a trained router's trace is a request, and traces are kept by its content hash: an equal scenario
never trains twice. torch loads only to train. Progress is one report per step; `show_training` shows it on a display.

`routing.file` names a trace of the library, of moesim, or what another program recorded, which is read as
`moesim trace import` reads it. Model and workload of the scenario say what the source does not, and the trace made of
it is kept in the cache under the hash of all that it depends on.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import moesim
from moesim.display import Display
from moesim.errors import MachineError, UserError
from moesim.files import turn
from moesim.routing.corpus import load_corpus
from moesim.scenario import Scenario, Section
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import (
    LIBRARY_PREFIX,
    Balance,
    Capacity,
    DeviceCapacity,
    NoCapacity,
    RouterShape,
    Routing,
    Thin,
    TraceRouting,
    TrainRouting,
)
from moesim.strict_json import json_text
from moesim.trace import RoutingTrace, load_trace, save_trace
from moesim.trace.library import is_library_name, load_library
from moesim.trace.store import is_trace_file

RECIPE = 2  # raise when a change of the code changes the traces that equal requests give
LEAST_RECORDED_TOKENS = 65_536
CHEAP_RECORDED_TOKENS = 262_144  # a few seconds of forward passes
FIRST_RECORDED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """One thin model to train and the held-out text on which its routing is recorded.

    `sequence_length` and `micro_batch` are the simulated workload's: `recorded_sequences` sequences of that length are
    recorded at the last step, and fewer at step 0. Expert choice alone competes over a micro-batch. Raises UserError
    when the parts do not fit each other.
    """

    router: RouterShape
    steps: int
    sequence_length: int
    recorded_sequences: int
    micro_batch: int = 1
    shared_experts: int = 0
    balance: Balance = field(default_factory=Balance)
    capacity: Capacity = field(default_factory=NoCapacity)
    thin: Thin = field(default_factory=Thin)
    corpus: str = "stdlib"
    seed: int = 0

    @classmethod
    def from_scenario(cls, scenario: Scenario) -> "TrainingRequest":
        """The request of a scenario whose routing is trained.

        Recorded are at least 65,536 tokens, one EP group's micro-batch and `routing.tokens`; and, up to 262,144 tokens,
        as many sequences as the global batch has, because samples drawn from fewer understate their own spread.
        What plays no part in training or recording is 1, so that layouts that differ in nothing else share a router.
        """
        routing = scenario.routing
        assert isinstance(routing, TrainRouting)
        workload = scenario.workload
        group_tokens = scenario.parallelism.expert * workload.micro_batch * workload.sequence_length
        batch_tokens = workload.global_batch * workload.sequence_length
        wanted = max(LEAST_RECORDED_TOKENS, group_tokens, routing.tokens or 0, min(batch_tokens, CHEAP_RECORDED_TOKENS))
        router = scenario.router_shape()
        if not _knows_devices(routing.balance, scenario.capacity):
            router = replace(router, num_devices=1)
        return cls(
            router=router,
            steps=routing.steps,
            sequence_length=workload.sequence_length,
            recorded_sequences=-(-wanted // workload.sequence_length),
            micro_batch=workload.micro_batch if ROUTERS[router.kind].by_experts else 1,
            shared_experts=scenario.model.shared_experts,
            balance=routing.balance,
            capacity=scenario.capacity,
            thin=routing.thin,
            corpus=routing.corpus,
            seed=scenario.seed,
        )

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise UserError(complaint)

    @property
    def first_sequences(self) -> int:
        """Sequences recorded at step 0: about 16,384 tokens, at least one sequence."""
        return min(self.recorded_sequences, max(1, FIRST_RECORDED_TOKENS // self.sequence_length))

    @property
    def batch_sequences(self) -> int:
        """Training sequences of one micro-batch of the thin model."""
        return self.thin.tokens_per_step // (self.thin.micro_batches * self.thin.context)

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        sections = {key: value.model_dump(mode="json") for key, value in values.items() if isinstance(value, Section)}
        return values | sections | {"router": asdict(self.router)}

    def provenance(self) -> dict[str, Any]:
        """What makes the trace: all fields, the corpus by hash, and the versions of all that computes."""
        corpus = load_corpus(self.corpus)
        return {
            "request": self.to_json(),
            "recipe": RECIPE,
            "corpus_hash": corpus.content_hash,
            "corpus_files": corpus.num_files,
            "corpus_train_bytes": len(corpus.train),
            "corpus_held_out_bytes": len(corpus.held_out),
            "versions": {
                "moesim": moesim.__version__,
                "torch": version("torch"),
                "python": platform.python_version(),
            },
        }

    def content_hash(self) -> str:
        """SHA-256 (hex) of `provenance`: equal hashes give equal traces on one machine. Raises UserError (corpus)."""
        return _hash(self.provenance())

    def training_hash(self) -> str:
        """Likewise of what determines the trained model, whatever is recorded of it at the end."""
        provenance = self.provenance()
        fields = {key: value for key, value in provenance["request"].items() if key != "recorded_sequences"}
        provenance["request"] = {**fields, "first_sequences": self.first_sequences}
        return _hash(provenance)

    def _complaints(self) -> Iterator[str]:
        thin, router, balance = self.thin, self.router, self.balance
        if thin.hidden % thin.heads or thin.hidden // thin.heads % 2:
            yield (
                f"routing.thin.hidden = {thin.hidden} is not an even multiple of heads = {thin.heads}; "
                "use e.g. hidden 128 with heads 4"
            )
        for name in ("hidden", "expert_intermediate"):
            width = getattr(thin, name)
            if width % 8:
                yield f"routing.thin.{name} = {width} is no multiple of 8 (grouped GEMMs); use {width // 8 * 8 + 8}"
        if thin.tokens_per_step % (thin.micro_batches * thin.context):
            yield (
                f"routing.thin.tokens_per_step = {thin.tokens_per_step} is not a multiple of micro_batches * context = "
                f"{thin.micro_batches * thin.context}; use {thin.micro_batches * thin.context * 8}"
            )
        facts = ROUTERS[router.kind]
        fixed_k = facts.fixed_k
        if fixed_k is not None and router.top_k != fixed_k:
            yield (
                f"routing.router.kind {router.kind} selects {fixed_k} expert(s) per token, but model.top_k = "
                f"{router.top_k}; set it to {fixed_k}"
            )
        if not facts.biased and balance.loss_free is not None:
            others = " or ".join(other.name for other in ROUTERS.values() if other.biased)
            yield (
                f"routing.balance.loss_free needs the bias of router {others}, not {router.kind}; "
                "remove it or change the router"
            )
        yield from self._balance_complaints()

    def _balance_complaints(self) -> Iterator[str]:
        router, balance = self.router, self.balance
        coefficients = ("expert", "device", "communication", "variance", "sequence")
        used = [name for name in coefficients if getattr(balance, name)]
        if used and ROUTERS[router.kind].affinity == "none":
            yield f"routing.balance.{used[0]} has no effect on router {router.kind}, which has no affinities; remove it"
        if _knows_devices(balance, self.capacity) and router.num_experts % router.num_devices:
            yield (
                f"{router.num_experts} experts do not divide among {router.num_devices} devices: device capacity and "
                "the device and communication losses need that; change parallelism.expert"
            )


def _knows_devices(balance: Balance, capacity: Capacity) -> bool:
    """Whether training looks at which experts lie on one device."""
    return bool(balance.device or balance.communication) or isinstance(capacity, DeviceCapacity)


def _hash(provenance: dict[str, Any]) -> str:
    text = json_text(provenance, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class StepReport(NamedTuple):
    """One finished training step: `step` counts from 1, `imbalance` is max / mean expert load over its tokens."""

    step: int
    num_steps: int
    train_loss: float
    imbalance: float


class SearchReport(NamedTuple):
    """One placement of experts that was simulated: `tried` counts from 1."""

    tried: int
    total: int
    step_time_s: float


ProgressCallback = Callable[[StepReport | SearchReport], None]


def show_training(display: Display) -> ProgressCallback:
    """What shows every report on the display."""

    def show(report: StepReport | SearchReport) -> None:
        if isinstance(report, SearchReport):
            note = f"step {1e3 * report.step_time_s:.4g} ms"
            display.show("placing the experts", completed=report.tried, total=report.total, note=note)
            return
        note = f"loss {report.train_loss:.3f}, imbalance {report.imbalance:.2f}"
        display.show("training the router", completed=report.step, total=report.num_steps, note=note)

    return show


def cache_directory() -> Path:
    """`$MOESIM_CACHE`, or `~/.cache/moesim`."""
    named = os.environ.get("MOESIM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "moesim"


def trace_path(request: TrainingRequest, cache_dir: Path | None = None) -> Path:
    """Where the trace of `request` is kept."""
    return (cache_dir or cache_directory()) / "traces" / f"{request.content_hash()[:32]}.npz"


def checkpoint_path(request: TrainingRequest, cache_dir: Path | None = None) -> Path:
    """Where the model of `request` is kept, as far as it is trained: whoever records more of it needs no training."""
    return checkpoint_file(checkpoint_directory(cache_dir), request.training_hash())


def checkpoint_directory(cache_dir: Path | None = None) -> Path:
    """Where checkpoints of training lie."""
    return (cache_dir or cache_directory()) / "checkpoints"


def checkpoint_file(folder: Path, training_hash: str) -> Path:
    """The checkpoint of the training of that hash in `folder`."""
    return folder / f"{training_hash[:32]}.checkpoint"


def cached_trace(
    request: TrainingRequest, cache_dir: Path | None = None, *, progress: ProgressCallback | None = None
) -> RoutingTrace:
    """The trace of `request`: from the cache, or trained now (or resumed) and put there.

    Where another process trains it already this one waits, and says so if `progress` is asked for. A damaged cache file
    is reported on stderr and made again, never used. Raises UserError as `train_router` does, and MachineError when the
    cache cannot be written.
    """
    path, content_hash = trace_path(request, cache_dir), request.content_hash()

    def say() -> None:
        if progress is not None:
            print("another process trains this router; waiting for it", file=sys.stderr, flush=True)

    if (trace := _kept(path, content_hash=content_hash)) is not None:
        return trace
    with turn(checkpoint_path(request, cache_dir), on_wait=say):
        return _kept(path, content_hash=content_hash) or _trained(request, cache_dir, progress=progress)


def _kept(path: Path, *, content_hash: str | None = None) -> RoutingTrace | None:
    """The trace in the cache, of that hash where one is given; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        trace = load_trace(path)
        if content_hash is None or trace.provenance.get("content_hash") == content_hash:
            return trace
        reason = "it is the trace of another scenario"
    except UserError as error:
        reason = str(error)
    print(f"cached trace not used: {reason}; making it again", file=sys.stderr)
    path.unlink(missing_ok=True)
    return None


def _trained(request: TrainingRequest, cache_dir: Path | None, *, progress: ProgressCallback | None) -> RoutingTrace:
    from moesim.routing.training import train_router

    trace = train_router(request, progress=progress, checkpoint_dir=checkpoint_directory(cache_dir))
    path = trace_path(request, cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, path)
    except MachineError as error:
        kept = checkpoint_path(request, cache_dir)
        raise MachineError(f"{error} with MOESIM_CACHE; the trained router is kept in {kept}") from error
    return trace


IMPORT_RECIPE = 1  # raise when a change of the code changes the traces that equal sources give


def recorded_trace(scenario: Scenario, *, tokens: int, cache_dir: Path | None = None) -> RoutingTrace:
    """The trace of a scenario whose routing is recorded; `tokens` are drawn where a source holds counts alone.

    Raises UserError, one line, for what is no routing, for a form that is not known, and for what does not fit the
    model.
    """
    routing = scenario.routing
    assert isinstance(routing, TraceRouting)
    if is_library_name(routing.file):
        return load_library(routing.file)
    path = Path(routing.file)
    if is_trace_file(path):
        return load_trace(path)
    if is_trace_file(path / "trace.npz"):
        raise UserError(f"routing.file: {path} is the folder of a run; name its trace, {path / 'trace.npz'}")
    return _imported(scenario, path, tokens=tokens, cache_dir=cache_dir)


def _imported(scenario: Scenario, path: Path, *, tokens: int, cache_dir: Path | None) -> RoutingTrace:
    from moesim.routing.importing import ImportRequest, MessageWords, form_of, import_routing

    asked = ImportRequest(
        experts=scenario.model.experts,
        top_k=scenario.model.top_k,
        sequence_length=scenario.workload.sequence_length,
        tokens=tokens,
        seed=scenario.seed,
        fill=True,
        yields=True,
        words=MessageWords(
            experts="model.experts",
            top_k="model.top_k",
            sequence_length="workload.sequence_length",
            remedy=f"record the model's own layout, or use one that ships (`moesim trace {LIBRARY_PREFIX}`)",
        ),
    )
    form = form_of(path).name
    made_of = [IMPORT_RECIPE, moesim.__version__, form, path.name, content_digest(path), asdict(asked)]
    digest = hashlib.sha256(json_text(made_of, sort_keys=True).encode()).hexdigest()
    kept = (cache_dir or cache_directory()) / "traces" / f"imported-{digest[:32]}.npz"
    if (known := _kept(kept)) is not None:
        return known
    trace = import_routing(form, path, asked=asked)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, kept)
    except (MachineError, OSError) as error:
        print(f"imported trace not kept, and read again next time: {error}", file=sys.stderr)
    return trace


def routing_digest(routing: Routing | None) -> str | None:
    """SHA-256 (hex) of what `routing.file` holds; None where there is none, or one that ships."""
    if not isinstance(routing, TraceRouting) or is_library_name(routing.file):
        return None
    path = Path(routing.file)
    return content_digest(path) if path.exists() else None


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, or of every file below a folder with its name."""
    files = [path] if path.is_file() else sorted(_files_below(path))
    try:
        seen = tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files)
        return _digest(str(path), seen)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}); check the path") from None


def _files_below(folder: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(folder) for name in names if (Path(root) / name).is_file()]


@lru_cache(maxsize=256)
def _digest(path: str, seen: tuple[tuple[str, int, int], ...]) -> str:
    """Of the files in `seen`, whose sizes and times say that they are the same as before."""
    digest = hashlib.sha256()
    for name, size, _ in seen:
        digest.update(f"{os.path.relpath(name, path)}\0{size}\0".encode())
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
