"""Cells: the kernels that share one physical formula and one residual field, such as all bf16 forward products.

A cell predicts log seconds = physics(theta, sizes) + residual(features), at the clock that such kernels ran at while
they were measured; a row measured at another clock c counts as seconds * (c / expected clock) ** alpha.

Legend: P measured kernels, Q queried kernels, C size columns, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.compute import physics
from moesim.compute.estimate import DTYPE_BYTES, FloatArray
from moesim.compute.gaussian import ResidualField

Row = dict[str, Any]
_NEAR = 0.02  # length scales: perhaps the same kernel


@dataclass(frozen=True)
class Kind:
    """How one kind of cell works: sizes of a profile row, physics, features for the residual, FLOPs for the clock."""

    sizes: Callable[[Row], FloatArray]
    log_seconds: Callable[[FloatArray, FloatArray], FloatArray]
    features: Callable[[FloatArray], FloatArray]
    work: Callable[[FloatArray], FloatArray]
    start: FloatArray
    noise: float
    amplitude: float = 0.1
    far: float = 1.0  # length scales from the nearest measured kernel beyond which a prediction is an extrapolation


@dataclass(frozen=True)
class Fit:
    """What is fitted per cell: theta, the expected log clock as a polynomial of log work, the clock's exponent."""

    theta: FloatArray
    clock: FloatArray
    alpha: float

    def as_json(self) -> dict[str, Any]:
        """Plain numbers for the profile."""
        return {"theta": self.theta.tolist(), "clock": self.clock.tolist(), "alpha": self.alpha}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Fit":
        """The inverse of `as_json`."""
        return Fit(np.asarray(content["theta"], float), np.asarray(content["clock"], float), float(content["alpha"]))


def canonical(m: Any, k: Any, n: Any, direction: str) -> tuple[Any, Any, Any]:
    """(M, N, K) of the forward product m x k x n, or of its dgrad or wgrad."""
    return {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[direction]


def _gemm_sizes(row: Row) -> FloatArray:
    sizes = canonical(row["m"], row["k"], row["n"], row["direction"])
    return np.array([[*sizes, DTYPE_BYTES[row["dtype"]]]], float)


def _gemm_features(sizes_QC: FloatArray) -> FloatArray:
    return np.log(np.maximum(sizes_QC[:, :3], 1.0)) / 2.5


def _grouped_row_sizes(row: Row) -> FloatArray:
    return physics.grouped_sizes(row["rows_per_expert"], row["k"], row["n"], direction=row["direction"])


def _grouped_features(sizes_QC: FloatArray) -> FloatArray:
    rows, experts, active, k, n = sizes_QC[:, :5].T
    unevenness = (sizes_QC[:, 13] + 1.0) * experts / (rows + experts)
    logs = np.log([rows + 1.0, experts, k, n, unevenness, np.maximum(active, 1.0) / experts])
    return np.ascontiguousarray(logs.T) / 4.0


def _attention_row_sizes(row: Row) -> FloatArray:
    names = ("heads", "kv_heads", "head_dim", "value_dim", "causal", "direction")
    sizes = {name: row[name] for name in names}
    return physics.attention_sizes(
        batch=np.array([row["batch"]], float), sequence=np.array([row["sequence"]], float), **sizes
    )


def _attention_features(sizes_QC: FloatArray) -> FloatArray:
    heads, sequence, group, head_dim, causal = sizes_QC[:, 4:9].T
    ragged = (sequence % 128 != 0).astype(float)
    columns = (np.log(heads), np.log(sequence), np.log(group) / 2, head_dim / 32, (1.0 - causal) * 1.5, ragged)
    return np.stack(columns, axis=1) / 2.5


def _memory_features(sizes_QC: FloatArray) -> FloatArray:
    return np.log(np.maximum(sizes_QC, 1.0)) / 2.0


KINDS: dict[str, Kind] = {
    "gemm": Kind(
        _gemm_sizes, physics.gemm_log_seconds, _gemm_features, lambda s: 2.0 * s[:, 0] * s[:, 1] * s[:, 2],
        physics.GEMM_START, noise=1e-2,
    ),
    "grouped_gemm": Kind(
        _grouped_row_sizes, physics.grouped_log_seconds, _grouped_features, lambda s: 2.0 * s[:, 0] * s[:, 3] * s[:, 4],
        physics.GROUPED_START, noise=8e-3,
    ),
    "grouped_wgrad": Kind(
        _grouped_row_sizes, physics.grouped_wgrad_log_seconds, _grouped_features,
        lambda s: 2.0 * s[:, 0] * s[:, 3] * s[:, 4], physics.GROUPED_START, noise=8e-3,
    ),
    "attention": Kind(
        _attention_row_sizes, physics.attention_log_seconds, _attention_features, lambda s: s[:, 0],
        physics.ATTENTION_START, noise=2e-3,
    ),
    "memory_bound": Kind(
        lambda row: np.array([[row["bytes"], row["width"]]], float), physics.memory_log_seconds, _memory_features,
        lambda s: s[:, 0], physics.MEMORY_START, noise=3e-3, amplitude=0.3, far=2.0,
    ),
}  # fmt: skip


def kind_of(cell: str) -> Kind:
    """The kind of a cell named as `cell_of` names it."""
    family = cell.split("/")[0]
    return KINDS["grouped_wgrad" if family == "grouped_gemm" and "/wgrad" in cell else family]


def cell_of(row: Row) -> str | None:
    """The cell that a profile row belongs to, e.g. "gemm/bf16/forward"; None for rows of no kernel."""
    family = row["family"]
    if family in ("gemm", "gemm_fp8"):
        return f"gemm/{row['dtype']}/{row['direction']}"
    if family == "grouped_gemm":
        rows_E, direction = row["rows_per_expert"], row["direction"]
        mean_rows = sum(rows_E) / len(rows_E)
        small = physics.takes_small_tiles(mean_rows, row["k"], row["n"], direction=direction)
        return grouped_cell(direction, small=small)
    if family == "attention":
        return f"attention/{row['direction']}"
    return f"memory_bound/{row['kind']}" if family == "memory_bound" else None


def grouped_cell(direction: str, *, small: bool) -> str:
    """Grouped products with small tiles (few rows per expert) and large ones are different kernels."""
    return f"grouped_gemm/{direction}/{'small' if small else 'large'}"


class Cell:
    """One fitted cell over its measured rows."""

    def __init__(self, kind: Kind, rows: list[Row], fit: Fit) -> None:
        self.kind, self.fit, self.rows = kind, fit, rows
        self.sizes_PC = np.concatenate([kind.sizes(row) for row in rows])
        self.log_seconds_P = np.log([row["p50"] for row in rows])
        self.shift_P = fit.alpha * self.clock_excess(self.sizes_PC, clocks_of(rows))
        self._features_PF = kind.features(self.sizes_PC)
        residual_P = self.log_seconds_P + self.shift_P - kind.log_seconds(fit.theta, self.sizes_PC)
        self._field = ResidualField(self._features_PF, residual_P, noise=kind.noise, amplitude=kind.amplitude)

    def expected_clock(self, sizes_QC: FloatArray) -> FloatArray:
        """Log MHz that kernels of this work ran at."""
        return np.asarray(np.polynomial.polynomial.polyval(np.log(self.kind.work(sizes_QC) + 1.0), self.fit.clock))

    def clock_excess(self, sizes_QC: FloatArray, clocks: FloatArray) -> FloatArray:
        """Log of clock over expected clock; 0 where no clock is known (nan)."""
        return np.asarray(np.nan_to_num(np.log(clocks) - self.expected_clock(sizes_QC)))

    def predict(self, sizes_QC: FloatArray, *, clock_mhz: float | None = None) -> tuple[FloatArray, str]:
        """(seconds_Q, the weakest source among them), at the expected clock or a given one."""
        features_QF = self.kind.features(sizes_QC)
        residual_Q, distance_Q = self._field.predict(features_QF)
        logs_Q = self.kind.log_seconds(self.fit.theta, sizes_QC) + residual_Q
        exact = 0
        for query in np.flatnonzero(distance_Q < _NEAR):
            nearest = int(np.square(self._features_PF - features_QF[query]).sum(1).argmin())
            if np.allclose(self.sizes_PC[nearest], sizes_QC[query], rtol=1e-9):
                logs_Q[query] = self.log_seconds_P[nearest] + self.shift_P[nearest]
                exact += 1
        if clock_mhz is not None:
            logs_Q = logs_Q - self.fit.alpha * self.clock_excess(sizes_QC, np.full(len(sizes_QC), clock_mhz))
        if exact == len(logs_Q):
            return np.exp(logs_Q), "measured"
        return np.exp(logs_Q), "interpolated" if distance_Q.max() <= self.kind.far else "extrapolated"

    def leave_one_out(self, *, at_row_clock: bool) -> FloatArray:
        """Log of measured over predicted seconds, each row predicted from all others.

        at_row_clock: predict for the clock that the row was measured at, else for the clock expected of such kernels.
        """
        errors_P = self._field.leave_one_out()
        return errors_P if at_row_clock else errors_P - self.shift_P


def clocks_of(rows: list[Row]) -> FloatArray:
    """MHz per row, nan where none was read."""
    return np.array([float(row.get("clock_mhz", np.nan)) for row in rows])
