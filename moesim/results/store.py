"""RunRecord, everything that one simulation hands to the store, the reports and the planner; and a run's folder.

All files are written beside and then moved into place together; result.json comes last.

OUT/scenario.yaml   the resolved scenario; `moesim run` accepts it
OUT/result.json     the numbers
OUT/arrays.npz      the arrays behind the figures (see RunRecord)
OUT/spans.npz       spans of expert group 0 in sample 0
OUT/trace.npz       the routing trace that was simulated

Legend: L model layers with a router, E experts, R ranks of expert group 0, W ranks of the world, S plain routing
samples, C categories of the attribution, P pipeline ranks, V chunks of a pipeline rank, B drawn micro-batches.
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.files import refused
from moesim.processes import STOP_SIGNALS, signals_wait
from moesim.results.spans import SpanTable
from moesim.scenario import Scenario, dump_scenario
from moesim.strict_json import json_text
from moesim.trace import RoutingTrace, save_trace

RESULT_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """The outcome of `moesim.run.simulate`.

    `result` is what result.json holds. `arrays`:
      step_time_S              seconds of every plain sample
      attribution_CW           mean seconds per category and rank (categories in the order of results.CATEGORIES)
      attribution_balanced_C   the same, mean over ranks, of the counterfactual with equal loads
      compute_time_W           mean seconds that a rank computes
      held_bytes_P             bytes of states and what is reserved on each pipeline rank
      kept_bytes_PVBW          bytes that a micro-batch keeps on each rank of a stage until its backward ends, sample 0
      expert_load_LE           rows of an expert / mean rows, over the whole step and all samples
      rank_load_LR             rows of a rank / mean rows, likewise
      placement_LDP            the expert in every slot of every rank, -1 for none; not for contiguous experts
      rank_load_contiguous_LR  rows of a rank in one step of all samples, had it neighbouring experts; likewise
      traffic_RR               dispatched bytes from rank to rank in one step, both passes, group 0
    `pipeline_spans` holds expert group 0 of every pipeline rank in sample 0. `trace` is None for a dense model.
    """

    scenario: Scenario
    result: dict[str, Any]
    arrays: dict[str, NDArray[np.float64]]
    pipeline_spans: tuple[SpanTable, ...]
    trace: RoutingTrace | None

    @property
    def spans(self) -> SpanTable:
        """Those of the first pipeline rank."""
        return self.pipeline_spans[0]


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
