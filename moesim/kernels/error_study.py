"""How wrong each source of a kernel's time is, measured on the rows of the shipped profiles.

Five questions, each answered by the log of measured over predicted seconds of rows that the prediction does not know:

- one row left out: predicted from all others of its class, at its own clock (`left_out`);
- the largest left out: classes fitted to the rows that are large in no dimension predict those that are (`beyond`);
- a GPU kind left out: every row of a kind predicted from the kind that stands for it, by `ScaledModel` (`kind_out`);
- what a GPU of tables lacks: its dense GEMMs, and a measured GPU's other kernels, scaled with the shares that dense
  GEMMs reach (`reached_out`);
- the roofline on every row (`roofline_out`).

Legend: P measured kernels.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.estimate import KernelModel
from moesim.kernels.families import FAMILIES, FAMILY_OF, Attention, FloatArray, Gemm, error_family, kernel_of
from moesim.kernels.fitting import MIN_ROWS, class_rows, fit_class
from moesim.kernels.fp8 import DEEP_GEMM, published_errors
from moesim.kernels.kernel_classes import KernelClass, Row, deep_gemm_class, kind_of
from moesim.kernels.roofline import GpuRates, Roofline
from moesim.kernels.scaled import ScaledModel
from moesim.kernels.tabulated import reached_rates

LEAST_SECONDS = 100e-6  # a step's time does not rest on shorter kernels, whose errors are larger
_LARGE_FLOPS = 1e11  # from which the tensor cores are the limit
_INSIDE = 0.85  # quantile of every feature up to which rows are fitted


@dataclass(frozen=True)
class Misses:
    """Logs of measured over predicted seconds of kernels of one family, all predicted from one source."""

    source: str
    family: str
    logs_P: FloatArray


def left_out(model: CalibratedModel) -> list[Misses]:
    """Every row predicted from all others of its class; `extrapolated` where no other is near, and how much repeated
    visits of one row differ (`measured`)."""
    found: list[Misses] = []
    for name in sorted(class_rows(model.profile)):
        kernel_class = model.kernel_class(name)
        assert kernel_class is not None
        families_P = np.array([error_family(kernel_of(row)) for row in kernel_class.rows])
        errors_P, far_P = kernel_class.leave_one_out(at_row_clock=True), kernel_class.alone_P
        long_P = np.exp(kernel_class.log_seconds_P) >= LEAST_SECONDS
        for family in np.unique(families_P).tolist():
            own_P = families_P == family
            for source, chosen_P in (("interpolated", ~far_P), ("extrapolated", far_P)):
                found.append(Misses(source, family, errors_P[chosen_P & long_P & own_P]))
            own = [row for row, is_own in zip(kernel_class.rows, own_P, strict=True) if is_own]
            found.append(Misses("measured", family, _visits(own)))
    return pooled(found)


def _visits(rows: Iterable[Row]) -> FloatArray:
    logs = [np.log(row["visits"]) for row in rows if len(row.get("visits", ())) > 1 and row["p50"] >= LEAST_SECONDS]
    return np.concatenate([visits - np.median(visits) for visits in logs]) if logs else np.empty(0)


def beyond(model: CalibratedModel) -> list[Misses]:
    """Rows among the largest of their class in some dimension, predicted by a fit to those that are among them in none:
    what that fit calls `extrapolated`."""
    found = []
    for name, rows in sorted(class_rows(model.profile).items()):
        kind = kind_of(name)
        features_PF = np.stack(np.broadcast_arrays(*kind.features(kind.sizes(rows))), axis=1)
        inside_P = (features_PF <= np.quantile(features_PF, _INSIDE, axis=0)).all(axis=1)
        inside = [row for row, is_inside in zip(rows, inside_P, strict=True) if is_inside]
        outside = [row for row, is_inside in zip(rows, inside_P, strict=True) if not is_inside]
        if len(inside) < MIN_ROWS:
            continue
        kernel_class = KernelClass(kind, inside, fit_class(kind, inside))
        far: dict[str, list[float]] = {}
        for row in outside:
            if row["p50"] >= LEAST_SECONDS and (log := _extrapolated(kernel_class, row)) is not None:
                far.setdefault(error_family(kernel_of(row)), []).append(log)
        found += [Misses("extrapolated", family, np.array(logs)) for family, logs in far.items()]
    return pooled(found)


def _extrapolated(kernel_class: KernelClass, row: Row) -> float | None:
    """Log of measured over predicted seconds; None where the rows of the class are near."""
    columns = tuple(float(np.ravel(column)[0]) for column in kernel_class.kind.sizes([row]))
    seconds, source = kernel_class.predict_one(columns, clock_mhz=row.get("clock_mhz"))
    return float(np.log(row["p50"] / seconds)) if source == "extrapolated" else None


def kind_out(
    rows: Iterable[Row],
    *,
    base: CalibratedModel,
    measured: GpuRates,
    target: GpuRates,
    memory_follows: float | None = 1.0,
) -> list[Misses]:
    """Rows of the GPU `target`, predicted from the profile of the GPU `measured` by the ratios of their data sheets.

    Both at the clocks that their benchmarks, which were short, ran at. memory_follows: the power of the bandwidth that
    kernels short of it follow; 1, since how much they do by kind (None) was found on the same rows.
    """
    free = base.without_relative().at_benchmark_clock()
    known = [row for row in rows if row["family"] in FAMILIES and free.has(kernel_of(row))]
    return predicted(known, ScaledModel(free, measured=measured, target=target, memory_follows=memory_follows))


def reached_out(
    rows: Iterable[Row], *, base: CalibratedModel, measured: GpuRates, target: GpuRates, shares: Mapping[str, float]
) -> list[Misses]:
    """As `kind_out`, with the share of its peak that large dense GEMMs of the target reach known: what `TabulatedModel`
    does for kernels that its tables lack."""
    return kind_out(rows, base=base, measured=measured, target=reached_rates(target, shares))


def reached_shares(rows: Iterable[Row], *, base: CalibratedModel, measured: GpuRates, target: GpuRates) -> float:
    """The share of the bf16 peak that large GEMMs reach, over the share that they reach on the measured GPU."""
    free = base.at_benchmark_clock()
    kernels = [(kernel_of(row), row["p50"]) for row in rows if row["family"] == "gemm"]
    large = [(kernel, seconds) for kernel, seconds in kernels if float(kernel.flops) >= _LARGE_FLOPS]
    ratio = float(np.median([float(np.asarray(free.seconds(kernel).seconds)) / seconds for kernel, seconds in large]))
    return ratio * measured.peak_flops["bf16"] / target.peak_flops["bf16"]


def gradients_by_ratio(rows: Iterable[Row], *, own: CalibratedModel, other: CalibratedModel) -> list[Misses]:
    """Gradients of GEMMs and attention as their own forward kernel times what they take over it on the other GPU."""
    own_free, other_free = own.at_benchmark_clock(), other.without_relative().at_benchmark_clock()
    found: dict[str, list[float]] = {}
    for row in _long(rows):
        kernel = kernel_of(row)
        if not isinstance(kernel, Gemm | Attention) or kernel.direction == "forward":
            continue
        forward = replace(kernel, direction="forward")
        if not other_free.has(kernel):
            continue
        ratio = np.asarray(other_free.seconds(kernel).seconds) / other_free.seconds(forward).seconds
        seconds = float(own_free.seconds(forward).seconds * ratio)
        found.setdefault(error_family(kernel), []).append(float(np.log(row["p50"] / seconds)))
    return [Misses("scaled", family, np.array(logs)) for family, logs in sorted(found.items())]


def roofline_out(rows: Iterable[Row], *, gpu: GpuRates) -> list[Misses]:
    """Rows predicted from the data sheet of their own GPU alone."""
    return predicted(rows, Roofline(gpu))


def block_scaled_out(own: CalibratedModel, published: KernelModel) -> list[Misses]:
    """DeepGEMM's block-scaled GEMMs: rows that are kept out of the fits of `own`, and dense ones that were published
    of the GPU of the model `published`, which has the same chip."""
    found: dict[str, list[FloatArray]] = {"gemm fp8": [published_errors(published, least_seconds=LEAST_SECONDS)]}
    for row in _long(row | {"family": FAMILY_OF[type(kernel_of(row))]} for row in own.profile.family(DEEP_GEMM)):
        kernel_class = own.kernel_class(deep_gemm_class(row["direction"]))
        if row.get("held_out") and kernel_class is not None:
            errors = kernel_class.errors_of([row], at_row_clock=True)
            found.setdefault(error_family(kernel_of(row)), []).append(errors)
    return [Misses("scaled", family, np.concatenate(logs)) for family, logs in sorted(found.items())]


def predicted(rows: Iterable[Row], model: KernelModel) -> list[Misses]:
    """Rows of kernels that take long enough to matter, by family and by the source that `model` returned."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in _long(rows):
        kernel = kernel_of(row)
        seconds, source = model.seconds(kernel)
        key = source, error_family(kernel)
        found.setdefault(key, []).append(float(np.log(row["p50"] / float(np.asarray(seconds)))))
    return [Misses(source, family, np.array(logs)) for (source, family), logs in sorted(found.items())]


def _long(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows of kernels that take long enough to matter."""
    return (row for row in rows if row["family"] in FAMILIES and row["p50"] >= LEAST_SECONDS)


def pooled(found: Iterable[Misses]) -> list[Misses]:
    """Those of one source and family together; what has no row is left out."""
    together: dict[tuple[str, str], list[FloatArray]] = {}
    for misses in found:
        together.setdefault((misses.source, misses.family), []).append(misses.logs_P)
    return list(_filled(together))


def _filled(together: Mapping[tuple[str, str], list[FloatArray]]) -> Iterator[Misses]:
    for (source, family), parts in sorted(together.items()):
        logs_P = np.concatenate(parts)
        if len(logs_P):
            yield Misses(source, family, logs_P)
