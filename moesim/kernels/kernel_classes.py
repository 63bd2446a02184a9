"""Kernel classes: kernels with one physical formula and one residual field, such as all bf16 forward GEMMs.

A class predicts log seconds = physics(theta, sizes) + residual(features), at the clock that such kernels ran at while
they were measured; a row measured at another clock c counts as seconds * (c / expected clock) ** alpha.

Legend: P measured kernels, Q queried kernels, C size columns, F features.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import fp8, physics
from moesim.kernels.families import (
    DTYPE_BYTES,
    MEMORY_KINDS,
    FloatArray,
    Gemm,
    GroupedGemm,
    gemm_sides,
    is_narrow,
    kernel_of,
)
from moesim.kernels.gaussian import ResidualField, Shape
from moesim.kernels.physics import Columns, Parameters, arithmetic_of
from moesim.kernels.power import LEAST_EXPONENT, PowerCap

Row = dict[str, Any]
TENSOR_DTYPES = {dtype: dtype for dtype in ("bf16", "fp8", "fp8_block", "nvfp4")} | {"fp16": "bf16"}


@dataclass(frozen=True)
class Kind:
    """How one kind of class works: size columns of profile rows, physics, features for the residual, work for the
    clock, and what draws power: FLOPs and bytes.

    Columns hold a value per row, or the floats of a single kernel.
    """

    sizes: Callable[[list[Row]], Columns]
    log_seconds: Callable[[Parameters, Columns], Any]
    features: Callable[[Columns], tuple[Any, ...]]
    work: Callable[[Columns], Any]
    drawn: Callable[[Columns], tuple[Any, Any]]
    start: FloatArray
    noise: float
    amplitude: float = 0.1
    shape: Shape = "matern"
    least_exponent: float = LEAST_EXPONENT  # of sustained clocks
    far: float = 1.0  # length scales from the nearest measured kernel beyond which a prediction is an extrapolation


@dataclass(frozen=True)
class Fit:
    """What is fitted per class: theta, the expected log clock as a polynomial of log work, the clock's exponent.

    weights: those of the residual field; rows: the checksum of the rows that they belong to. Both None before the field
    was solved.
    """

    theta: FloatArray
    clock: FloatArray
    alpha: float
    weights: FloatArray | None = None
    rows: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain numbers for the profile."""
        content: dict[str, Any] = {"theta": self.theta.tolist(), "clock": self.clock.tolist(), "alpha": self.alpha}
        if self.weights is not None:
            content |= {"rows": self.rows, "weights": [float(f"{weight:.8g}") for weight in self.weights]}
        return content

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Fit":
        """The inverse of `as_json`."""
        weights = content.get("weights")
        return Fit(
            np.asarray(content["theta"], float),
            np.asarray(content["clock"], float),
            float(content["alpha"]),
            None if weights is None else np.asarray(weights, float),
            content.get("rows"),
        )


def _column(rows: list[Row], name: str) -> FloatArray:
    return np.array([row[name] for row in rows], float)


def _gemm_sizes(rows: list[Row]) -> Columns:
    sizes = [gemm_sides(row["m"], row["k"], row["n"], row["direction"]) for row in rows]
    return (*np.array(sizes, float).T, np.full(len(rows), DTYPE_BYTES[rows[0]["dtype"]]))


def _gemm_features(columns: Columns) -> tuple[Any, ...]:
    ops = arithmetic_of(columns)
    return tuple(ops.log(ops.maximum(column, 1.0)) / 2.5 for column in columns[:3])


def _grouped_row_sizes(rows: list[Row]) -> Columns:
    """Rows of one class, in any number of experts: those of one number are computed together."""
    direction, fp8 = rows[0]["direction"], is_narrow(rows[0]["dtype"])
    tiles = tiles_of(rows[0])
    sizes_PC = np.empty((len(rows), len(physics.GROUPED_COLUMNS)))
    experts_P = np.array([len(row["rows_per_expert"]) for row in rows])
    for experts in np.unique(experts_P):
        chosen_P = experts_P == experts
        part = [rows[index] for index in np.flatnonzero(chosen_P)]
        totals = physics.RowTotals.of(np.array([row["rows_per_expert"] for row in part], float))
        sizes = physics.grouped_sizes(
            totals, _column(part, "k"), _column(part, "n"), direction=direction, tiles=tiles, fp8=fp8
        )
        sizes_PC[chosen_P] = np.stack(np.broadcast_arrays(*sizes), axis=1)
    return tuple(sizes_PC.T)


def _grouped_features(columns: Columns) -> tuple[Any, ...]:
    rows, experts, active, k, n = columns[:5]
    ops = arithmetic_of((rows, experts))
    few, one, some = arithmetic_of((experts,)), arithmetic_of((k,)), arithmetic_of((active,))
    unevenness = (columns[13] + 1.0) * experts / (rows + experts)
    return (
        ops.log(rows + 1.0) / 4.0,
        few.log(experts) / 4.0,
        one.log(k) / 4.0,
        one.log(n) / 4.0,
        ops.log(unevenness) / 4.0,
        some.log(some.maximum(active, 1.0) / experts) / 4.0,
    )


def _grouped_work(columns: Columns) -> Any:
    return 2.0 * columns[0] * columns[3] * columns[4]


def _grouped_drawn(columns: Columns) -> tuple[Any, Any]:
    return _grouped_work(columns), columns[10] + columns[11]


def _block_row_sizes(rows: list[Row]) -> Columns:
    kernels = map(kernel_of, rows)
    sizes = [fp8.block_sizes(kernel) for kernel in kernels if isinstance(kernel, Gemm | GroupedGemm)]
    return tuple(np.asarray(sizes, float).T)


def _block_drawn(columns: Columns) -> tuple[Any, Any]:
    return fp8.block_work(columns), columns[7] + columns[8]


def _attention_row_sizes(rows: list[Row]) -> Columns:
    names = ("batch", "sequence", "heads", "kv_heads", "head_dim", "value_dim", "causal")
    return physics.attention_sizes(**{name: _column(rows, name) for name in names}, direction=rows[0]["direction"])


def _attention_features(columns: Columns) -> tuple[Any, ...]:
    heads, sequence, group, head_dim, causal = columns[4:9]
    return (
        arithmetic_of((heads,)).log(heads) / 2.5,
        arithmetic_of((sequence,)).log(sequence) / 2.5,
        arithmetic_of((group,)).log(group) / 5.0,
        head_dim / 80.0,
        (1.0 - causal) * 0.6,
        (sequence % 128 != 0) * 0.4,
    )


def _memory_features(columns: Columns) -> tuple[Any, ...]:
    ops = arithmetic_of(columns)
    return tuple(ops.log(ops.maximum(column, 1.0)) / 2.0 for column in columns)


def _memory_kind(log_seconds: Callable[[Parameters, Columns], Any], start: FloatArray) -> Kind:
    return Kind(
        lambda rows: (_column(rows, "bytes"), _column(rows, "width")), log_seconds, _memory_features,
        lambda s: s[0], lambda s: (0.0, s[0]), start, noise=3e-3, amplitude=0.3, far=2.0, least_exponent=1.0,
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "gemm": Kind(
        _gemm_sizes, physics.gemm_log_seconds, _gemm_features, lambda s: 2.0 * s[0] * s[1] * s[2],
        lambda s: (2.0 * s[0] * s[1] * s[2], s[3] * s[2] * (s[0] + s[1]) + 2.0 * s[0] * s[1]),
        physics.GEMM_START, noise=1e-2,
    ),
    "gemm_block": Kind(
        _block_row_sizes, fp8.block_log_seconds, fp8.block_features, fp8.block_work, _block_drawn,
        fp8.BLOCK_START, noise=1e-2,
    ),
    "grouped_gemm": Kind(
        _grouped_row_sizes, physics.grouped_log_seconds, _grouped_features, _grouped_work, _grouped_drawn,
        physics.GROUPED_START, noise=8e-3, shape="rational",
    ),
    "grouped_wgrad": Kind(
        _grouped_row_sizes, physics.grouped_wgrad_log_seconds, _grouped_features, _grouped_work, _grouped_drawn,
        physics.GROUPED_START, noise=8e-3, shape="rational",
    ),
    "grouped_gemm_fp8": Kind(
        _grouped_row_sizes, physics.grouped_fp8_log_seconds, _grouped_features, _grouped_work, _grouped_drawn,
        physics.GROUPED_FP8_START, noise=8e-3, shape="rational",
    ),
    "grouped_wgrad_fp8": Kind(
        _grouped_row_sizes, physics.grouped_wgrad_fp8_log_seconds, _grouped_features, _grouped_work, _grouped_drawn,
        physics.GROUPED_WGRAD_FP8_START, noise=8e-3, shape="rational",
    ),
    "deep_gemm": Kind(
        _block_row_sizes, fp8.deep_gemm_log_seconds, fp8.block_features, fp8.block_work, _block_drawn,
        fp8.DEEP_GEMM_START, noise=8e-3, shape="rational",
    ),
    "deep_gemm_wgrad": Kind(
        _block_row_sizes, fp8.block_wgrad_log_seconds, fp8.block_features, fp8.block_work, _block_drawn,
        fp8.BLOCK_WGRAD_START, noise=8e-3, shape="rational",
    ),
    "attention": Kind(
        _attention_row_sizes, physics.attention_log_seconds, _attention_features, lambda s: s[0], lambda s: s[:2],
        physics.ATTENTION_START, noise=2e-3,
    ),
    "memory_bound": _memory_kind(physics.memory_log_seconds, physics.MEMORY_START),
    "memory_copy": _memory_kind(physics.memory_copy_log_seconds, physics.COPY_START),
    "memory_table": _memory_kind(physics.memory_table_log_seconds, physics.TABLE_START),
}  # fmt: skip


def kind_of(kernel_class: str) -> Kind:
    """The kind of a class named as `class_of` names it."""
    family, rest = kernel_class.split("/", 1)
    if family == "memory_bound":
        return KINDS[MEMORY_KINDS[rest].formula]
    if kernel_class in BLOCK_CLASSES:
        return KINDS["gemm_block"]
    if family == fp8.DEEP_GEMM and "/wgrad" in kernel_class:
        family += "_wgrad"
    if family == "grouped_gemm":
        family = ("grouped_wgrad" if "/wgrad" in kernel_class else family) + ("_fp8" if "/fp8/" in kernel_class else "")
    return KINDS[family]


def stored_fit(kind: Kind, content: dict[str, Any] | None) -> Fit | None:
    """What a profile stored for a class of this kind; None where it has nothing, or that of an earlier formula."""
    return None if content is None or len(content["theta"]) != len(kind.start) else Fit.from_json(content)


def class_of(row: Row) -> str | None:
    """The class that a profile row belongs to, e.g. "gemm/bf16/forward"; None for rows of no kernel."""
    family = row["family"]
    if family in ("gemm", "gemm_fp8"):
        return gemm_class(row["dtype"], row["direction"])
    if family == "grouped_gemm":
        return grouped_class(row["direction"], dtype=row["dtype"], tiles=tiles_of(row))
    if family == fp8.DEEP_GEMM:
        return deep_gemm_class(row["direction"])
    if family == "attention":
        return f"attention/{row['direction']}"
    return f"memory_bound/{row['kind']}" if family == "memory_bound" else None


def tiles_of(row: Row) -> int:
    """The tiles of a measured grouped GEMM, as an index of GROUPED_TILES."""
    rows_E, fp8 = row["rows_per_expert"], is_narrow(row["dtype"])
    mean_rows = sum(rows_E) / len(rows_E)
    return int(physics.grouped_tiles(mean_rows, row["k"], row["n"], direction=row["direction"], fp8=fp8))


def gemm_class(dtype: str, direction: str) -> str:
    """fp16 runs at the rate of bf16."""
    return f"gemm/{TENSOR_DTYPES.get(dtype, '')}/{direction}"


BLOCK_CLASSES = tuple(gemm_class(fp8.BLOCK_SCALED, direction) for direction in ("forward", "dgrad"))
"""Dense GEMMs of the vendor's library with one operand's scales of 128 x 128: each block of the depth is a step."""


def deep_gemm_class(direction: str) -> str:
    """Input gradients run on the kernels of forward GEMMs, dense ones on those of experts."""
    return f"{fp8.DEEP_GEMM}/{'wgrad' if direction == 'wgrad' else 'forward'}"


def grouped_class(direction: str, *, dtype: str, tiles: int) -> str:
    """Grouped GEMMs with other tiles are other kernels: small ones (few rows per expert), large ones, long sides."""
    return f"grouped_gemm/{'fp8/' if is_narrow(dtype) else ''}{direction}/{physics.GROUPED_TILES[tiles]}"


def _checksum(rows: list[Row], sizes_PC: FloatArray) -> int:
    """What tells whether stored weights belong to these rows."""
    measured_P2 = np.stack([_column(rows, "p50"), clocks_of(rows)], axis=1)
    return zlib.crc32(measured_P2.tobytes(), zlib.crc32(np.ascontiguousarray(sizes_PC).tobytes()))


class KernelClass:
    """One fitted class over its measured rows."""

    def __init__(self, kind: Kind, rows: list[Row], fit: Fit) -> None:
        self.kind, self.rows = kind, rows
        self.columns = kind.sizes(rows)
        self.sizes_PC = np.stack(np.broadcast_arrays(*self.columns), axis=1)
        self.log_seconds_P = np.log(_column(rows, "p50"))
        self.parameters: Parameters = tuple(np.exp(fit.theta).tolist())
        self.fit = fit
        self.shift_P = fit.alpha * self.clock_excess(self.columns, clocks_of(rows))
        self._clocked_P = self.log_seconds_P + self.shift_P
        points_PF = np.stack(np.broadcast_arrays(*kind.features(self.columns)), axis=1)
        residual_P = self._clocked_P - kind.log_seconds(self.parameters, self.columns)
        checksum = _checksum(rows, self.sizes_PC)
        weights_P = fit.weights if fit.rows == checksum else None
        self._field = ResidualField(
            points_PF, residual_P, noise=kind.noise, amplitude=kind.amplitude, shape=kind.shape, weights_P=weights_P
        )
        self.fit = replace(fit, weights=self._field.weights_P, rows=checksum)
        self._measured = {tuple(sizes): index for index, sizes in enumerate(self.sizes_PC.tolist())}

    @property
    def sustained_exponent(self) -> float:
        """How strongly seconds fall with a sustained clock."""
        return max(self.fit.alpha, self.kind.least_exponent)

    def expected_clock(self, columns: Columns) -> Any:
        """Log MHz that kernels of this work ran at."""
        work = self.kind.work(columns)
        log_work = arithmetic_of((work,)).log(work + 1.0)
        clock = 0.0
        for coefficient in reversed(self.fit.clock.tolist()):
            clock = clock * log_work + coefficient
        return clock

    def clock_excess(self, columns: Columns, clocks: FloatArray) -> FloatArray:
        """Log of clock over expected clock; 0 where no clock is known (nan)."""
        return np.asarray(np.nan_to_num(np.log(clocks) - self.expected_clock(columns)))

    def _sustained(self, logs: Any, columns: Columns, cap: PowerCap) -> Any:
        """Log seconds of a kernel that runs on and on, at the clock that the power limit leaves it."""
        flops, moved = self.kind.drawn(columns)
        flops = flops * cap.share_of(self.rows[0].get("dtype", "bf16"))
        load = (flops + cap.traffic * moved) / (math.exp(logs) if isinstance(logs, float) else np.exp(logs))
        return logs - self.sustained_exponent * (cap.log_clock(load) - self.expected_clock(columns))

    def predict_one(
        self, columns: Columns, *, clock_mhz: float | None = None, cap: PowerCap | None = None
    ) -> tuple[float, str]:
        """(seconds, source) of one kernel whose columns are floats: at a clock, under a power cap, or as measured."""
        measured = self._measured.get(columns)
        if measured is not None:
            logs, source = float(self._clocked_P[measured]), "measured"
        else:
            residual, distance = self._field.predict_one(self.kind.features(columns))
            logs = self.kind.log_seconds(self.parameters, columns) + residual
            source = "interpolated" if distance <= self.kind.far else "extrapolated"
        if clock_mhz is not None:
            logs -= self.fit.alpha * (math.log(clock_mhz) - self.expected_clock(columns))
        elif cap is not None:
            logs = self._sustained(logs, columns, cap)
        return math.exp(logs), source

    def predict(
        self, columns: Columns, *, clock_mhz: float | None = None, cap: PowerCap | None = None
    ) -> tuple[FloatArray, str]:
        """(seconds_Q, the weakest source among them) for columns of which some are arrays [Q]; see predict_one."""
        count = len(next(column for column in columns if isinstance(column, np.ndarray)))
        residual_Q, distance, near = self._field.predict(self.kind.features(columns), count)
        logs_Q = self.kind.log_seconds(self.parameters, columns) + residual_Q
        exact = self._put_measured(logs_Q, columns, near) if len(near) else 0
        if clock_mhz is not None:
            logs_Q -= self.fit.alpha * (math.log(clock_mhz) - self.expected_clock(columns))
        elif cap is not None:
            logs_Q = self._sustained(logs_Q, columns, cap)
        if exact == count:
            return np.exp(logs_Q), "measured"
        return np.exp(logs_Q), "interpolated" if distance <= self.kind.far else "extrapolated"

    def _put_measured(self, logs_Q: FloatArray, columns: Columns, near: Any) -> int:
        """Replace predictions of shapes that were measured; `near` are the kernels that may be. Returns how many."""
        sizes_NC = np.empty((len(near), len(columns)))
        for number, column in enumerate(columns):
            sizes_NC[:, number] = column[near] if isinstance(column, np.ndarray) else column
        exact = 0
        for query, sizes in zip(near.tolist(), sizes_NC.tolist(), strict=True):
            measured = self._measured.get(tuple(sizes))
            if measured is not None:
                logs_Q[query] = self._clocked_P[measured]
                exact += 1
        return exact

    @property
    def alone_P(self) -> NDArray[np.bool_]:
        """Which measured kernels would be extrapolated from all others."""
        return self._field.alone_P(self.kind.far)

    def leave_one_out(self, *, at_row_clock: bool) -> FloatArray:
        """Log of measured over predicted seconds, each row predicted from all others.

        at_row_clock: predict for the clock that the row was measured at, else for the clock expected of such kernels.
        """
        errors_P = self._field.leave_one_out_P
        return errors_P if at_row_clock else errors_P - self.shift_P

    def errors_of(self, rows: list[Row], *, at_row_clock: bool) -> FloatArray:
        """Log of measured over predicted seconds of rows of this class that are not in it, as `leave_one_out`."""
        columns = self.kind.sizes(rows)
        errors_P = np.log(_column(rows, "p50")) - np.log(self.predict(columns)[0])
        return errors_P + self.fit.alpha * self.clock_excess(columns, clocks_of(rows)) if at_row_clock else errors_P


def clocks_of(rows: list[Row]) -> FloatArray:
    """MHz per row, nan where none was read."""
    return np.array([float(row.get("clock_mhz", np.nan)) for row in rows])
