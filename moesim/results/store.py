"""A run's folder. All files are written beside and then moved into place together; result.json comes last.

OUT/scenario.yaml   the resolved scenario; `moesim run` accepts it
OUT/result.json     the numbers
OUT/arrays.npz      the arrays behind the figures (see RunRecord)
OUT/spans.npz       spans of expert group 0 in sample 0
OUT/trace.npz       the routing trace that was simulated
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.files import refused
from moesim.processes import STOP_SIGNALS, signals_wait
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


def write_run(
    record: RunRecord,
    out_dir: Path,
    *,
    force: bool = False,
    also: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write all files of the run or none; those of an earlier run are replaced, or go.

    `also`: further names out of RUN_FILES, each with what writes that file to a path. Raises UserError (see check_free)
    and MachineError, a full disk for example; an earlier run then stays as it was.
    """
    check_free(out_dir, force=force)
    with _staged(out_dir) as stage:
        (stage / RESULT_FILE).write_bytes((json_text(record.result, indent=1) + "\n").encode())
        (stage / "scenario.yaml").write_bytes(dump_scenario(record.scenario).encode())
        _save_arrays(stage / "arrays.npz", dict(record.arrays))
        _save_arrays(stage / "spans.npz", span_arrays(record.spans))
        if record.trace is not None:
            save_trace(record.trace, stage / "trace.npz")
        for name, write in (also or {}).items():
            write(stage / name)


@contextmanager
def _staged(out_dir: Path) -> Iterator[Path]:
    """A folder to write the files of a run to; when the block ends they move into `out_dir`, result.json last."""
    stage = out_dir / f".run.{os.getpid()}.partial"
    made = not out_dir.exists()
    try:
        try:
            stage.mkdir(parents=True, exist_ok=True)
            yield stage
            with signals_wait(*STOP_SIGNALS):
                for name in (RESULT_FILE, *RUN_FILES):
                    (out_dir / name).unlink(missing_ok=True)
                for name in (*RUN_FILES, RESULT_FILE):
                    if (stage / name).exists():
                        (stage / name).rename(out_dir / name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if made and not any(out_dir.glob("*")):
                shutil.rmtree(out_dir, ignore_errors=True)
    except OSError as error:
        raise refused(out_dir, error) from error


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
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(
                f"{name} of {path.name} has numbers that are not finite, which are no result and are not written: a "
                "quantity of the input lies outside all that is physical; look for an extreme number there"
            )
    content = io.BytesIO()  # on a full disk a half-written archive would complain once more when it is closed
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    path.write_bytes(content.getbuffer())
