"""Fitting the few physical parameters of each class: robust least squares on log seconds, in plain numpy.

Legend: P measured kernels, C size columns, D parameters.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moesim.kernels.families import FloatArray
from moesim.kernels.kernel_classes import Fit, KernelClass, Kind, Row, class_of, clocks_of, kind_of, stored_fit
from moesim.kernels.power import PowerCap, SustainedRows, fit_power_cap
from moesim.kernels.profile import Profile
from moesim.strict_json import json_text

SUSTAINED = "sustained"  # family of rows, and name of the fit to them
_PRIOR = 0.05  # pull of every parameter towards its start: keeps what the data do not determine physical
_HUBER = 0.1  # log seconds beyond which an error counts linearly
MIN_ROWS = 8  # a class with fewer rows is left to the roofline
_MIN_CLOCK_ROWS = 20  # fewer cannot tell the clock's effect from chance
_MAX_FIT_ROWS = 700  # the physics has ten parameters; more rows cost time and change nothing


def _robust(residual_P: FloatArray) -> FloatArray:
    """Values whose squares are the Huber loss of the residuals."""
    size_P = np.abs(residual_P)
    loss_P = np.where(size_P <= _HUBER, size_P**2, 2.0 * _HUBER * size_P - _HUBER**2)
    return np.asarray(np.sign(residual_P) * np.sqrt(loss_P))


def least_squares(
    predict: Callable[[FloatArray], FloatArray], target_P: FloatArray, start_D: FloatArray, *, steps: int = 25
) -> FloatArray:
    """Levenberg-Marquardt with numerical derivatives: parameters near `start_D` for which predict(theta) ~ target."""

    def residual(theta_D: FloatArray) -> FloatArray:
        return np.concatenate([_robust(predict(theta_D) - target_P), _PRIOR * (theta_D - start_D)])

    theta_D, damping, count = start_D.copy(), 1e-2, len(start_D)
    now = residual(theta_D)
    for _ in range(steps):
        columns = [(residual(theta_D + 1e-2 * np.eye(count)[d]) - now) / 1e-2 for d in range(count)]
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        move_D = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), jacobian.T @ now)
        trial_D = theta_D + np.clip(move_D, -0.5, 0.5)
        trial = residual(trial_D)
        if trial @ trial < now @ now:
            gain = now @ now - trial @ trial
            theta_D, now, damping = trial_D, trial, damping / 3.0
            if gain < 1e-7 * (now @ now):
                break
        else:
            damping *= 6.0
            if damping > 1e6:
                break
    return theta_D


def _expected_clock(work_P: FloatArray, clocks_P: FloatArray) -> FloatArray:
    """Polynomial of second degree in log work for the log clock; flat where no clocks were read."""
    known_P = np.isfinite(clocks_P)
    if known_P.sum() < MIN_ROWS:
        return np.zeros(1)
    logs = np.log(work_P[known_P] + 1.0)
    degree = 2 if np.ptp(logs) > 1.0 else 0
    return np.asarray(np.polynomial.polynomial.polyfit(logs, np.log(clocks_P[known_P]), degree))


def _clock_exponent(kernel_class: KernelClass, excess_P: FloatArray) -> float:
    """How strongly seconds fall with the clock: the slope of what is left without it, between 0 and 1."""
    spread = float(np.square(excess_P).sum())
    if spread < 1e-6 or len(excess_P) < _MIN_CLOCK_ROWS:
        return 0.0
    errors_P = np.clip(kernel_class.leave_one_out(at_row_clock=True), -0.2, 0.2)
    return float(np.clip(-(errors_P * excess_P).sum() / spread, 0.0, 1.0))


def fit_class(kind: Kind, rows: list[Row]) -> Fit:
    """Physics without the clock, the clock's exponent from what is left, the physics again, then the residual field."""
    columns = tuple(np.broadcast_arrays(*kind.sizes(rows)))
    clock = _expected_clock(kind.work(columns), clocks_of(rows))
    chosen = slice(None, None, max(1, len(rows) // _MAX_FIT_ROWS))
    some = tuple(column[chosen] for column in columns)
    logs_P = np.log([row["p50"] for row in rows])

    def fitted(shift_P: FloatArray, start: FloatArray) -> FloatArray:
        target_P = (logs_P + shift_P)[chosen]
        return least_squares(lambda theta: kind.log_seconds(tuple(np.exp(theta).tolist()), some), target_P, start)

    theta = fitted(np.zeros(len(rows)), kind.start)
    unclocked = KernelClass(kind, rows, Fit(theta, clock, 0.0))
    excess_P = unclocked.clock_excess(unclocked.columns, clocks_of(rows))
    alpha = _clock_exponent(unclocked, excess_P)
    return KernelClass(kind, rows, Fit(fitted(alpha * excess_P, theta), clock, alpha)).fit


def class_rows(profile: Profile) -> dict[str, list[Row]]:
    """Rows per class, of classes with enough of them; those marked `held_out` are for reports alone."""
    kernel_classes: dict[str, list[Row]] = {}
    for row in profile.rows:
        name = None if row.get("held_out") else class_of(row)
        if name is not None and row.get("p50", 0.0) > 0.0:
            kernel_classes.setdefault(name, []).append(row)
    return {name: rows for name, rows in kernel_classes.items() if len(rows) >= MIN_ROWS}


def fit_sustained(rows: list[Row], class_named: Callable[[str], KernelClass | None]) -> PowerCap | None:
    """The power cap from rows of the family `sustained`, of kernels that have a class."""
    found = []
    for row in rows:
        name = class_of(row["of"])
        kernel_class = None if name is None else class_named(name)
        if kernel_class is None:
            continue
        columns = tuple(float(np.ravel(column)[0]) for column in kernel_class.kind.sizes([row["of"]]))
        seconds, _ = kernel_class.predict_one(columns)
        clock = kernel_class.expected_clock(columns)
        logs = np.log([row["p50"], seconds])
        found.append((*logs, *kernel_class.kind.drawn(columns), clock, kernel_class.sustained_exponent))
    return fit_power_cap(SustainedRows(*np.array(found, float).reshape(-1, 6).T))


def fit_profile(profile: Profile) -> None:
    """Fit every class, and the power cap, whose rows are not those that its stored fit belongs to: `profile.fits`.

    The share of an FP8 FLOP in the power is a fact that rows of another kind told; it stays.
    """
    earlier = profile.fits
    kernel_classes = {
        name: _fitted(kind_of(name), rows, earlier.get(name)) for name, rows in class_rows(profile).items()
    }
    profile.fits = {name: kernel_class.fit.as_json() for name, kernel_class in kernel_classes.items()}
    stored, long_runs = earlier.get(SUSTAINED, {}), profile.family(SUSTAINED)
    checksum = zlib.crc32(json_text(long_runs).encode())
    if stored.get("rows") == checksum:
        profile.fits[SUSTAINED] = stored
    elif (cap := fit_sustained(long_runs, kernel_classes.get)) is not None:
        share = {"fp8_share": stored["fp8_share"]} if "fp8_share" in stored else {}
        profile.fits[SUSTAINED] = cap.as_json() | share | {"rows": checksum}


def _fitted(kind: Kind, rows: list[Row], stored: dict[str, Any] | None) -> KernelClass:
    fit = stored_fit(kind, stored)
    if fit is not None:
        kept = KernelClass(kind, rows, fit)
        if kept.fit.rows == fit.rows:
            return kept
    return KernelClass(kind, rows, fit_class(kind, rows))
