"""A run's folder. Every file is written beside and moved into place; result.json comes last.

OUT/scenario.yaml   the resolved scenario; `moesim run` accepts it
OUT/result.json     the numbers
OUT/arrays.npz      the arrays behind the figures (see RunRecord)
OUT/spans.npz       spans of expert group 0 in sample 0
OUT/trace.npz       the routing trace that was simulated
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.results.record import RunRecord
from moesim.results.spans import SpanTable
from moesim.scenario import dump_scenario
from moesim.strict_json import json_text
from moesim.trace import save_trace

RESULT_FILE = "result.json"
RUN_FILES = ("scenario.yaml", "arrays.npz", "spans.npz", "trace.npz", "report.html", "timeline.json.gz")


def check_free(out_dir: Path, *, force: bool) -> None:
    """Refuse a folder that holds files of a run, unless `force`; others, such as a drawing of the fabric, may stay.

    Raises UserError; call it before the long work begins.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file; name a folder with --out")
    if force or not out_dir.is_dir():
        return
    if (out_dir / RESULT_FILE).exists():
        raise UserError(f"{out_dir} holds another run; choose another --out, or --force to replace it")
    kept = [name for name in RUN_FILES if (out_dir / name).exists()]
    if kept:
        raise UserError(f"{out_dir} holds {kept[0]}, which a run would replace; choose another --out, or --force")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file as a whole, so that a reader finds the former content or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_run(record: RunRecord, out_dir: Path, *, force: bool = False) -> None:
    """Write the run; a folder with a result.json is complete. Raises UserError (see check_free)."""
    check_free(out_dir, force=force)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / RESULT_FILE).unlink(missing_ok=True)
    write_atomically(out_dir / "scenario.yaml", dump_scenario(record.scenario).encode())
    _save_arrays(out_dir / "arrays.npz", dict(record.arrays))
    _save_arrays(out_dir / "spans.npz", span_arrays(record.spans))
    if record.trace is not None:
        save_trace(record.trace, out_dir / "trace.npz")
    write_atomically(out_dir / RESULT_FILE, (json_text(record.result, indent=1) + "\n").encode())


def span_arrays(table: SpanTable) -> dict[str, NDArray[Any]]:
    """The spans of sample 0 as plain arrays: label columns as text, times in seconds [N, R]."""
    labels = table.labels
    return {
        "label_names": np.array([label.name for label in labels]),
        "label_categories": np.array([label.category for label in labels]),
        "label_streams": np.array([int(label.stream) for label in labels]),
        "label_layers": np.array([label.layer for label in labels]),
        "ranks": table.ranks_R,
        "label": table.label_N,
        "micro_batch": table.micro_batch_N,
        "start_s": table.start_NSR[:, 0],
        "finish_s": table.finish_NSR[:, 0],
        "own_s": table.own_NSR[:, 0],
        "step_s": table.step_S[:1],
    }


def _save_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    partial = path.with_name("partial." + path.name)
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)
