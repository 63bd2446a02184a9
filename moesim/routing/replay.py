"""The routing that `routing.file` names: of the library, a trace of moesim, or what another program recorded.

What others recorded is read as `moesim trace import` reads it. Model and workload of the scenario say what the source
does not, and the trace made of it is kept in the cache under the hash of all that it depends on.
"""

import hashlib
import os
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import moesim
from moesim.errors import MachineError, UserError
from moesim.routing.cache import cache_directory
from moesim.scenario import Scenario
from moesim.scenario.routing import LIBRARY_PREFIX, Routing, TraceRouting
from moesim.strict_json import json_text
from moesim.trace import RoutingTrace, load_trace, save_trace
from moesim.trace.library import is_library_name, load_library
from moesim.trace.store import is_trace_file

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
    from moesim.routing.importing import Asked, Words, form_of, import_routing

    asked = Asked(
        experts=scenario.model.experts,
        top_k=scenario.model.top_k,
        sequence_length=scenario.workload.sequence_length,
        tokens=tokens,
        seed=scenario.seed,
        fill=True,
        yields=True,
        words=Words(
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


def _kept(path: Path) -> RoutingTrace | None:
    """The imported trace in the cache; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        return load_trace(path)
    except UserError as error:
        print(f"cached trace not used: {error}; importing it again", file=sys.stderr)
    path.unlink(missing_ok=True)
    return None


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
