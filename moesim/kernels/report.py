"""How well a calibrated model predicts kernels it has not seen: leave-one-out errors per class and family.

Legend: P measured kernels.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.error_study import Misses
from moesim.kernels.errors import KnownError
from moesim.kernels.estimate import BesideSend, Contention, wait_of
from moesim.kernels.families import FloatArray
from moesim.kernels.kernel_classes import KernelClass, Row, class_of
from moesim.kernels.measured import DISPATCH, OVERLAP_BYTES, SEND, sends_of

if TYPE_CHECKING:
    from rich.table import Table

# Median and 90th percentile that each family should reach: |measured / predicted - 1|.
TARGETS = {"gemm": (0.03, 0.10), "grouped_gemm": (0.04, 0.12), "attention": (0.04, 0.12)}


_CAPTION = """error = |measured / predicted - 1|, each kernel predicted from all others,
at the clock it was measured at, and without knowing that clock;
visits: median range of repeated measurements of one kernel"""


@dataclass(frozen=True)
class ErrorRow:
    """Errors |measured / predicted - 1| of a class or a family, every kernel predicted from all others.

    `median` and `p90` know the clock at which each kernel was measured; `median_unclocked` and `p90_unclocked` do not,
    and so include how the clock moves under the power limit. `spread` is the median range of repeated visits.
    """

    name: str
    count: int
    median: float
    p90: float
    median_unclocked: float
    p90_unclocked: float
    spread: float
    target: tuple[float, float] | None


def _row(name: str, clocked_P: FloatArray, unclocked_P: FloatArray, spreads: list[float]) -> ErrorRow:
    median, p90 = np.percentile(np.abs(np.expm1(clocked_P)), [50, 90])
    median_unclocked, p90_unclocked = np.percentile(np.abs(np.expm1(unclocked_P)), [50, 90])
    spread = float(np.median(spreads)) if spreads else float("nan")
    numbers = (float(median), float(p90), float(median_unclocked), float(p90_unclocked), spread)
    return ErrorRow(name, len(clocked_P), *numbers, target=TARGETS.get(name))


def _spreads(rows: Iterable[dict[str, list[float]]]) -> list[float]:
    visits = [row["visits"] for row in rows if len(row.get("visits", [])) > 1]
    return [(max(seconds) - min(seconds)) / median(seconds) for seconds in visits]


def leave_one_out_rows(model: CalibratedModel, *, by_class: bool = False) -> list[ErrorRow]:
    """Errors per family, or per class."""
    known = _known(model, {name for row in model.profile.rows if (name := class_of(row)) is not None})
    rows = {name: kernel_class.rows for name, kernel_class in known.items()}

    def errors(name: str, *, at_clock: bool) -> FloatArray:
        return known[name].leave_one_out(at_row_clock=at_clock)

    return _error_rows(rows, errors, by_class=by_class)


def held_out_rows(model: CalibratedModel, *, by_class: bool = False) -> list[ErrorRow]:
    """Errors of the rows that are kept out of every fit, per family or per class."""
    held: dict[str, list[Row]] = {}
    for row in model.profile.rows:
        if row.get("held_out") and (name := class_of(row)) is not None:
            held.setdefault(name, []).append(row)
    known = _known(model, held)

    def errors(name: str, *, at_clock: bool) -> FloatArray:
        return known[name].errors_of(held[name], at_row_clock=at_clock)

    return _error_rows({name: held[name] for name in known}, errors, by_class=by_class)


def _known(model: CalibratedModel, names: Iterable[str]) -> dict[str, KernelClass]:
    """The classes of these names that the model has."""
    found = ((name, model.kernel_class(name)) for name in sorted(names))
    return {name: kernel_class for name, kernel_class in found if kernel_class is not None}


def _error_rows(rows: Mapping[str, list[Row]], errors: Callable[..., FloatArray], *, by_class: bool) -> list[ErrorRow]:
    """Of rows by class, whose `errors` are known by the name of their class."""
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(name if by_class else _family(name), []).append(name)
    found = []
    for group, members in groups.items():
        clocked_P, unclocked_P = (
            np.concatenate([errors(name, at_clock=at_clock) for name in members]) for at_clock in (True, False)
        )
        spreads = _spreads(row for name in members for row in rows[name])
        found.append(_row(group, clocked_P, unclocked_P, spreads))
    return found


def _family(class_name: str) -> str:
    family, rest = class_name.split("/", 1)
    if family.startswith("memory"):
        return family
    return f"{family} fp8" if rest.startswith("fp8") else f"{family} fp4" if rest.startswith("nvfp4") else family


def numbers_table(first: str, *headers: str, title: str, caption: str | None) -> "Table":
    """A table for the terminal without rows: of names, and of numbers under the headers."""
    from rich.table import Table  # here: whoever predicts a kernel or a transfer does without

    table = Table(title=title, caption=caption)
    table.add_column(first, no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


_KIND_CAPTION = """error = |measured / predicted - 1|, rows of 100 us and more,
predicted without any row of this GPU;
bias: median of measured / predicted - 1"""


def kind_table(found: list[Misses], *, title: str) -> "Table":
    """Errors of one GPU kind's rows predicted from another kind, by family and by the source of the prediction."""
    table = numbers_table("kernels", "source", "count", "median / p90", "bias", title=title, caption=_KIND_CAPTION)
    for misses in sorted(found, key=lambda misses: (misses.family, misses.source)):
        median, p90 = np.percentile(np.abs(np.expm1(misses.logs_P)), [50, 90])
        bias = f"{float(np.expm1(np.median(misses.logs_P))):+.1%}"
        table.add_row(misses.family, misses.source, str(len(misses.logs_P)), f"{median:.1%} / {p90:.1%}", bias)
    return table


def error_table(rows: list[ErrorRow], *, title: str, caption: str | None = _CAPTION) -> "Table":
    """The rows as a table for the terminal."""
    aimed = any(row.target for row in rows)
    headers = ("count", "median / p90", "without clock", "visits", *(["target"] if aimed else []))
    table = numbers_table("kernels", *headers, title=title, caption=caption)
    for row in rows:
        known, unknown = f"{row.median:.1%} / {row.p90:.1%}", f"{row.median_unclocked:.1%} / {row.p90_unclocked:.1%}"
        target = f"{row.target[0]:.0%} / {row.target[1]:.0%}" if row.target else ""
        spread = "" if math.isnan(row.spread) else f"{row.spread:.1%}"  # tables have no visits
        table.add_row(row.name, str(row.count), known, unknown, spread, *([target] if aimed else []))
    return table


_HELD_CAPTION = """range = the factor that nine of ten predictions stay within, less 1;
the 90 % range of a result holds it of each family by its share of the step"""


def held_table(found: list[KnownError], *, title: str, clock: tuple[float, str] | None) -> "Table":
    """The errors behind the range of a result by source and family; `clock`: log error at full load, and its source."""
    from rich.table import Table  # here: whoever predicts a kernel does without

    table = Table(title=title, caption=_HELD_CAPTION)
    for header in ("source", "kernels"):
        table.add_column(header, no_wrap=True)
    for header in ("median", "range"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("found by")
    for row in found:
        median, widened = math.expm1(row.p50), math.expm1(row.half_width)
        table.add_row(row.source, row.family, f"{median:.1%}", f"{widened:.0%}", row.how)
    if clock is not None:
        error, how = clock
        table.add_row("clock", "all that compute", "", f"{math.expm1(error):.0%}", f"at full load; {how}")
    return table


_BESIDE_CAPTION = """error = |measured / predicted - 1| of transfers of 32 MiB and more and of the kernels beside them,
rows that no factor was fitted to; alone: if nothing slowed the transfers"""


def beside_rows(model: CalibratedModel) -> list[tuple[str, int, float, float, float]]:
    """Kept-out rows of kernels beside transfers, by kind: count, median errors of transfers, of kernels, and of
    transfers as if they were alone."""
    kept = [row for row in model.profile.family("contention") if row.get("held_out") and row["bytes"] >= OVERLAP_BYTES]
    found, sends = [], sends_of(model.profile)
    for kind in sorted({str(row.get("kind", DISPATCH)) for row in kept}):
        rows = [row for row in kept if row.get("kind", DISPATCH) == kind]
        errors_N3 = np.array([_beside_errors(model.contention, sends, kind, row) for row in rows])
        transfer, kernel, alone = np.median(errors_N3, axis=0).tolist()
        found.append((kind, len(rows), transfer, kernel, alone))
    return found


def _beside_errors(
    contention: Contention, sends: Mapping[str, BesideSend], kind: str, row: dict[str, Any]
) -> tuple[float, float, float]:
    family, alone = row["compute"]["family"], float(row["transfer_alone"])
    if kind == SEND:
        send = sends.get(family, BesideSend(1.0, 0.0, 0.0))
        transfer, slower = alone + float(send.later(alone, kernel=row["compute_alone"])), send.compute
    else:
        facts = contention.of(family) if kind == DISPATCH else contention.beside_collective(family)
        wait = facts.wait if kind == DISPATCH else float(wait_of(facts.wait, alone=alone))
        transfer = wait + facts.transfer * alone
        free = wait / transfer
        slower = 1.0 / ((1.0 - free) / facts.compute + free)
    measured = float(row["transfer_beside"])
    kernel = float(row["compute_beside"]) / (slower * float(row["compute_alone"]))
    return abs(measured / transfer - 1.0), abs(kernel - 1.0), abs(measured / alone - 1.0)


def beside_table(rows: list[tuple[str, int, float, float, float]], *, title: str) -> "Table":
    """The same for the terminal."""
    headers = ("kept out", "transfers", "kernels", "alone")
    table = numbers_table("transfers", *headers, title=title, caption=_BESIDE_CAPTION)
    for kind, count, *errors in rows:
        table.add_row(kind, str(count), *(f"{error:.1%}" for error in errors))
    return table
