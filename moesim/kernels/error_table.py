"""The rows of `errors.json`, made from the shipped profiles: which study of `error_study` answers for which basis."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np

from moesim.kernels import error_study
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.error_study import Misses
from moesim.kernels.errors import NETWORK, KnownError, known_error_of, transfers_of
from moesim.kernels.estimate import KernelModel
from moesim.kernels.families import MIDDLE, FloatArray
from moesim.kernels.loading import FP8_OF, load_profile, rates_of
from moesim.kernels.scaled import ScaledModel
from moesim.kernels.tabulated import TabulatedModel

MEASURED = ("h100", "h200")  # kinds with rows of this project
TABULATED = ("a100", "b200", "b300", "gb200", "gb300", "l40s", "rtx-pro-6000")
STANDS_FOR = {"h100": "h200", "h200": "h100", **dict.fromkeys(TABULATED, "h200")}  # each kind is predicted from
LEFT_OUT = "every row predicted from the others of its class"
VISITS = "visits of one row against their median"
BEYOND = "rows large in some dimension, by a fit to those large in none"
KIND_OUT = "every row of a kind predicted from another kind by the ratios of data sheets: {kinds}"
REACHED = "the same with the share of the peak that dense GEMMs reach: {kinds}"
RATIO = "gradient over forward of another kind (H100, H200); apart: error of the forward kernel"
DATA_SHEET = "every row predicted from its own GPU's data sheet: {kinds}"
PUBLISHED = (
    "DeepGEMM's rows of H100 that are kept out of the fits, and those published of H800, none of which is in one"
)
PUBLISHED_ELSEWHERE = f"{PUBLISHED}; apart: grouped GEMMs of one kind predicted from another"
OTHER_GRADIENTS = "forward rows of {name} predicted from {other}; apart: gradient over forward of one from the other"
OTHER_GROUPED = "DeepGEMM's rows of {other} kept out of the fits; apart: bf16 GEMMs of experts of {name} from {other}"
OTHER_CASTS = "rows of {name} from {other}, as if every kind followed the power {middle} of the bandwidth"
# Transfers by the rows that were measured of them (`moesim.network.parameters.Evidence`): how many shaped no constant,
# p50 and p90 of their errors from 1 MiB on, and which test prints them.
NETWORK_ROWS = {
    "": (
        96, 0.158, 0.34,
        "no row of it: as far as calls of 32 MiB and more inside a node are from links and constants without their "
        "tables (tests/network/test_transfer_errors.py)",
    ),
    "measured, own rows": (
        80, 0.037, 0.13, "calls of two H100s, kept out and of another day (tests/network/test_transfer_errors.py)"
    ),
    "NCCL's tables": (
        240, 0.048, 0.14, "every other size of nccl-tests on 4 and 8 GPUs (tests/network/test_transfer_errors.py)"
    ),
    "tables of dispatch kernels": (
        2561, 0.049, 0.13, "every other row of DeepEP's and TensorRT-LLM's (tests/network/test_transfer_errors.py)"
    ),
}  # fmt: skip
_TABLE_FAMILIES = {"gemm": "gemm/bf16", "gemm fp8": "gemm/fp8", "attention": "attention"}
BLACKWELL = ("b200", "b300", "gb200", "gb300", "rtx-pro-6000")
MXFP8 = (
    "rows of per-tensor fp8; apart: those rows, and how far rows with block scales, without their casts, are from them"
)
OTHER_KINDS = "rows of tables, each kind's from the others of it; apart: another kind by data sheets"
FEWER_BITS = "grouped GEMMs with a scale a row of H100, each from the others; apart: grouped GEMMs by data sheets"


def all_errors() -> Iterator[KnownError]:
    """Every row of the table."""
    yield from profile_errors(MEASURED, "measured")
    for name in (*MEASURED, *TABULATED):
        yield from profile_errors((name,), name)
    yield from _gradients()
    yield from kinds_left_out("tables", MEASURED, _reached, REACHED, families=("grouped_gemm", "memory_bound"))
    yield from kinds_left_out("scaled", (*MEASURED, *TABULATED), kind_misses, KIND_OUT)
    yield from kinds_left_out("any", (*MEASURED, *TABULATED), _roofline, DATA_SHEET)
    yield from _published()
    yield from _of_relatives()
    yield from _fewer_bits()
    for evidence, (count, p50, p90, how) in NETWORK_ROWS.items():
        errors = {"median": 0.0, "p50": p50, "p90": p90, "apart": 0.0}
        yield KnownError(basis="any", source=NETWORK, family=transfers_of(evidence), count=count, how=how, **errors)


def profile_errors(names: tuple[str, ...], basis: str) -> Iterator[KnownError]:
    """What the profiles tell of themselves: one row left out, repeated visits, and the largest left out."""
    yield from _own_errors(names, basis, left_out_misses, LEFT_OUT)
    yield from _own_errors(names, basis, _beyond, BEYOND)


def left_out_errors(name: str) -> list[KnownError]:
    """One row left out of one profile, and repeated visits: what takes no new fit."""
    return list(_own_errors((name,), name, left_out_misses, LEFT_OUT))


def _own_errors(
    names: tuple[str, ...], basis: str, study: Callable[[str], list[Misses]], how_of: str
) -> Iterator[KnownError]:
    for (source, family), logs in _by_source([study(name) for name in names]).items():
        if (how_of == BEYOND) != (source == "extrapolated"):
            continue
        how = VISITS if source == "measured" else how_of
        apart = max(_apart(name, family) for name in names)
        yield known_error_of(logs, basis=basis, source=source, family=family, how=how, apart=apart)


def kinds_left_out(
    basis: str,
    names: tuple[str, ...],
    study: Callable[[str], list[Misses]],
    how: str,
    *,
    families: tuple[str, ...] = (),
) -> Iterator[KnownError]:
    """Rows of several kinds, each predicted without its own; of `families`, or of all."""
    for (source, family), logs in _by_source([study(name) for name in names]).items():
        if families and not family.startswith(families):
            continue
        kinds = ", ".join(name for name in names if any((m.source, m.family) == (source, family) for m in study(name)))
        yield known_error_of(logs, basis=basis, source=source, family=family, how=how.format(kinds=kinds))


def _published() -> Iterator[KnownError]:
    """Of block-scaled FP8 GEMMs: on the chip that they were published of, and grouped ones on others."""
    out = _block_scaled_out()
    for misses in out:
        yield known_error_of([misses.logs_P], basis="any", source="scaled", family=misses.family, how=PUBLISHED)
    family = "grouped_gemm fp8"
    logs = [misses.logs_P for misses in out if misses.family == family]
    for basis, study in (("tables", _reached), ("scaled", kind_misses)):
        grouped = kinds_left_out(basis, MEASURED, study, "", families=("grouped_gemm",))
        apart = max(row.p90 for row in grouped)
        yield known_error_of(logs, basis=basis, source="scaled", family=family, how=PUBLISHED_ELSEWHERE, apart=apart)


def _of_relatives() -> Iterator[KnownError]:
    """Errors of the FP8 kernels that a measured GPU takes from another GPU of its chip, by rows of both."""
    for name, other in FP8_OF.items():
        pair = _by_source([_from_relative(name)])
        middle = _by_source([_from_relative(name, memory_follows=MIDDLE)])
        gradients = [misses.logs_P for misses in _ratios(name) if misses.family == "gemm"]
        experts = [misses.logs_P for misses in _block_scaled_out() if misses.family == "grouped_gemm fp8"]
        for family, logs, how, apart in (
            ("gemm fp8", pair["scaled", "gemm fp8"], OTHER_GRADIENTS, _p90(gradients)),
            ("grouped_gemm fp8", experts, OTHER_GROUPED, _p90(pair["scaled", "grouped_gemm"])),
            ("memory_bound", middle["scaled", "memory_bound"], OTHER_CASTS, 0.0),
        ):
            said = how.format(name=name, other=other, middle=MIDDLE)
            yield known_error_of(logs, basis=name, source="scaled", family=family, how=said, apart=apart)


def _p90(logs: list[FloatArray]) -> float:
    return round(float(np.quantile(np.abs(np.concatenate(logs)), 0.9)), 4)


def _block_scaled_out() -> list[Misses]:
    h800 = load_profile("h800")
    assert isinstance(h800, ScaledModel)
    return error_study.block_scaled_out(_own("h100"), h800.at_benchmark_clock())


def _gradients() -> Iterator[KnownError]:
    """Of tables, which have forward kernels alone."""
    ratios = {family: logs for (_, family), logs in _by_source([_ratios(name) for name in MEASURED]).items()}
    for name in TABULATED:
        for own in left_out_errors(name):
            if own.source == "interpolated":
                logs = ratios["attention" if own.family == "attention" else "gemm"]
                apart = round(own.half_width, 4)
                yield known_error_of(logs, basis=name, source="scaled", family=own.family, how=RATIO, apart=apart)


def _fewer_bits() -> Iterator[KnownError]:
    """Of mxfp8, and of nvfp4 and grouped GEMMs where only tables of other kinds tell of such formats."""
    made: list[KnownError] = []
    for name in BLACKWELL:
        model = _model(name)
        assert isinstance(model, TabulatedModel) and model.profile.tables is not None
        logs = _interpolated(name, "gemm fp8")
        block = float(model.profile.tables["families"]["gemm/nvfp4"]["block_over_fp8_p90"])
        apart = round(math.hypot(_apart(name, "gemm fp8"), block), 4)
        made.append(known_error_of(logs, basis=name, source="scaled", family="gemm mxfp8", how=MXFP8, apart=apart))
    yield from made
    kinds = list(kinds_left_out("scaled", (*MEASURED, *TABULATED), kind_misses, ""))
    dense = max(row.p90 for row in kinds if row.family == "gemm fp8")
    grouped = round(max(row.p90 for row in kinds if row.family == "grouped_gemm"), 4)
    for family in ("gemm mxfp8", "gemm fp4"):
        logs = [log for name in BLACKWELL for log in _interpolated(name, family.replace("mxfp8", "fp8"))]
        apart = round(math.hypot(max(row.apart for row in made), dense), 4)
        yield known_error_of(logs, basis="scaled", source="scaled", family=family, how=OTHER_KINDS, apart=apart)
    for basis in ("tables", "scaled"):
        for family in ("grouped_gemm mxfp8", "grouped_gemm fp4"):
            logs = _interpolated("h100", "grouped_gemm fp8")
            yield known_error_of(logs, basis=basis, source="scaled", family=family, how=FEWER_BITS, apart=grouped)


def _interpolated(name: str, family: str) -> list[FloatArray]:
    return [m.logs_P for m in left_out_misses(name) if (m.source, m.family) == ("interpolated", family)]


def _by_source(found: Iterable[list[Misses]]) -> dict[tuple[str, str], list[FloatArray]]:
    together: dict[tuple[str, str], list[FloatArray]] = {}
    for misses in (misses for part in found for misses in part):
        together.setdefault((misses.source, misses.family), []).append(misses.logs_P)
    return dict(sorted(together.items()))


def _apart(name: str, family: str) -> float:
    """How far rows of tables are from own ones: p90 of what is left on H100 and H200."""
    model = _model(name)
    if not isinstance(model, TabulatedModel):
        return 0.0
    assert model.profile.tables is not None
    families = model.profile.tables["families"]
    if family == "gemm fp4":  # a quarter of the cast that was taken off
        return float(families["gemm/nvfp4"]["cast_p90"])
    return float(families[_TABLE_FAMILIES[family]]["compared_on_h100_and_h200"]["p90_left"])


@cache
def _model(name: str) -> KernelModel:
    return load_profile(name)


def _own(name: str) -> CalibratedModel:
    """The classes of a profile."""
    model = _model(name)
    if isinstance(model, TabulatedModel):
        return model.tables
    assert isinstance(model, CalibratedModel)
    return model


@cache
def left_out_misses(name: str) -> list[Misses]:
    """Of one profile."""
    return error_study.left_out(_own(name))


@cache
def _beyond(name: str) -> list[Misses]:
    return error_study.beyond(_own(name))


@cache
def kind_misses(name: str) -> list[Misses]:
    """Every row of a kind predicted from the kind that stands for it."""
    base = STANDS_FOR[name]
    own, measured, target = _own(name), rates_of(base), rates_of(name)
    return error_study.kind_out(own.profile.rows, base=_own(base), measured=measured, target=target)


def _from_relative(name: str, *, memory_follows: float | None = None) -> list[Misses]:
    """Rows of a GPU predicted from the GPU that its FP8 kernels are taken from, in the same way."""
    other = FP8_OF[name]
    measured, target, rows = rates_of(other), rates_of(name), _own(name).profile.rows
    return error_study.kind_out(rows, base=_own(other), measured=measured, target=target, memory_follows=memory_follows)


@cache
def _reached(name: str) -> list[Misses]:
    base, rows = STANDS_FOR[name], _own(name).profile.rows
    measured, target = rates_of(base), rates_of(name)
    share = error_study.reached_shares(rows, base=_own(base), measured=measured, target=target)
    return error_study.reached_out(rows, base=_own(base), measured=measured, target=target, shares={"bf16": share})


@cache
def _ratios(name: str) -> list[Misses]:
    return error_study.gradients_by_ratio(_own(name).profile.rows, own=_own(name), other=_own(STANDS_FOR[name]))


@cache
def _roofline(name: str) -> list[Misses]:
    return error_study.roofline_out(_own(name).profile.rows, gpu=rates_of(name))
