"""Smooth interpolation of what the physics leaves over: Gaussian-process regression.

Far from every measured point the prediction returns to the mean residual, that is to the physical formula alone.

Legend: P measured points, Q queried points, F features.
"""

import math
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.families import FloatArray

Shape = Literal["matern", "rational"]
_MARGIN = 0.15  # length scales beyond the measured range that still count as inside
_NEAR = 0.02  # length scales: perhaps the same point
# Multiplications of a block of queried points: its kernel values stay in the processor's cache, and its product is too
# small for the BLAS to wake threads, which then spin for longer than the product takes.
_BLOCK_PRODUCTS = 200_000
# A kernel is a function of SLOPE * squared distance + OFFSET. Matern-3/2 is (1 + s) exp(-s) with s = sqrt(3 d2), the
# rational quadratic one is 1 / (1 + 2 d2): half as dear, and as good where its heavier tail does no harm.
_SLOPES: dict[Shape, tuple[float, float]] = {"matern": (3.0, 1e-4), "rational": (2.0, 1.0)}


def _kernel_in_place(arguments: Any, shape: Shape) -> Any:
    """Kernel values from SLOPE * squared distance + OFFSET; overwrites the arguments."""
    if shape == "rational":
        return np.divide(1.0, arguments, out=arguments)
    np.sqrt(arguments, out=arguments)
    decay = np.exp(arguments)
    arguments += 1.0
    return np.divide(arguments, decay, out=arguments)


class ResidualField:
    """Residuals values_P at points_PF (already divided by their length scales), with measuring noise `noise`.

    Fitting is in double precision; queries run in single precision, whose 1e-6 is nothing beside the noise.
    `weights_P` are those that an earlier fit to the same points gave; solving for them takes far longer than a query.
    """

    def __init__(
        self,
        points_PF: FloatArray,
        values_P: FloatArray,
        *,
        noise: float,
        amplitude: float = 0.1,
        shape: Shape = "matern",
        weights_P: FloatArray | None = None,
    ) -> None:
        assert points_PF.ndim == 2 and len(points_PF) == len(values_P)
        self._noise, self._amplitude, self._shape = noise, amplitude, shape
        self._values_P = values_P
        self.mean = float(np.mean(values_P))
        center_F = points_PF.mean(0)
        self._centers: list[float] = center_F.tolist()
        self._centered_PF = centered_PF = points_PF - center_F
        self.weights_P: FloatArray = self._solved() if weights_P is None else weights_P
        self._scaled_weights_P = (amplitude * self.weights_P).astype(np.float32)
        self._ranges: list[tuple[float, float]] = [
            (low - _MARGIN, high + _MARGIN) for low, high in zip(centered_PF.min(0), centered_PF.max(0), strict=True)
        ]
        self._slope, self._offset = _SLOPES[shape]
        # [x, |x|^2, 1] times this is the kernel's argument at x for every measured point.
        squares_P = self._slope * np.square(centered_PF).sum(1) + self._offset
        rows = (-2.0 * self._slope * centered_PF.T, np.full((1, len(values_P)), self._slope), squares_P[None])
        self._arguments_GP = np.ascontiguousarray(np.concatenate(rows).astype(np.float32))

    def _solved(self) -> FloatArray:
        return np.asarray(np.linalg.solve(self._covariance_PP, self._values_P - self.mean), float)

    @cached_property
    def _covariance_PP(self) -> FloatArray:
        squares_P = np.square(self._centered_PF).sum(1)
        squares_PP = squares_P[:, None] + squares_P - 2.0 * (self._centered_PF @ self._centered_PF.T)
        slope, offset = _SLOPES[self._shape]
        covariance_PP = self._amplitude * _kernel_in_place(slope * np.maximum(squares_PP, 0.0) + offset, self._shape)
        covariance_PP[np.diag_indices(len(self._values_P))] += self._noise
        return np.asarray(covariance_PP)

    def predict_one(self, point_F: tuple[float, ...]) -> tuple[float, float]:
        """(residual, distance to the nearest measured point), as `predict` for one point."""
        offsets = [value - center for value, center in zip(point_F, self._centers, strict=True)]
        query_G = np.array([*offsets, sum(offset * offset for offset in offsets), 1.0], np.float32)
        arguments_P = query_G @ self._arguments_GP
        distance = self._distance(float(arguments_P.min()))
        residual = float(_kernel_in_place(arguments_P, self._shape) @ self._scaled_weights_P) + self.mean
        inside = all(low <= offset <= high for offset, (low, high) in zip(offsets, self._ranges, strict=True))
        return residual, distance if inside else math.inf

    def predict(self, features: tuple[float | FloatArray, ...], count: int) -> tuple[Any, float, Any]:
        """(residual_Q, distance of the farthest point, which points perhaps are measured ones) of `count` points.

        features: a column per feature, a float where all points share it. The distance is that to the nearest measured
        point in length scales, infinite when a point lies outside the range of those.
        """
        queries_QG = np.empty((count, len(features) + 2), np.float32)
        inside = True
        for number, (feature, center, (low, high)) in enumerate(
            zip(features, self._centers, self._ranges, strict=True)
        ):
            offset = feature - center
            queries_QG[:, number] = offset
            least, most = (offset.min(), offset.max()) if isinstance(offset, np.ndarray) else (offset, offset)
            inside = inside and low <= least and most <= high
        offsets_QF = queries_QG[:, :-2]
        queries_QG[:, -2] = np.einsum("qf,qf->q", offsets_QF, offsets_QF)
        queries_QG[:, -1] = 1.0
        residual_Q, nearest_Q = np.empty((2, count), np.float32)
        size = max(1, _BLOCK_PRODUCTS // self._arguments_GP.size)
        buffer = np.empty((min(count, size), len(self._values_P)), np.float32)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            arguments_BP = np.matmul(queries_QG[begin:end], self._arguments_GP, out=buffer[: end - begin])
            np.minimum.reduce(arguments_BP, axis=1, out=nearest_Q[begin:end])
            kernel_BP = _kernel_in_place(arguments_BP, self._shape)
            np.einsum("bp,p->b", kernel_BP, self._scaled_weights_P, out=residual_Q[begin:end])
        distance = self._distance(float(nearest_Q.max())) if inside else math.inf
        near = np.empty(0, int)
        if self._distance(float(nearest_Q.min())) < _NEAR:
            near = np.flatnonzero(nearest_Q < self._slope * _NEAR**2 + self._offset)
        return residual_Q + self.mean, distance, near

    def _distance(self, argument: float) -> float:
        return math.sqrt(max((argument - self._offset) / self._slope, 0.0))

    def alone_P(self, far: float) -> NDArray[np.bool_]:
        """Which points lie farther than `far` from all others, or outside the range of those."""
        points_PF = self._centered_PF
        squares_P = np.square(points_PF).sum(1)
        squares_PP = squares_P[:, None] + squares_P - 2.0 * (points_PF @ points_PF.T)
        np.fill_diagonal(squares_PP, np.inf)
        lonely_P = squares_PP.min(axis=1) > far**2
        second_low_F, second_high_F = np.sort(points_PF, axis=0)[[1, -2]]  # the range of the others, at its ends
        outside_PF = (points_PF < second_low_F - _MARGIN) | (points_PF > second_high_F + _MARGIN)
        return np.asarray(lonely_P | outside_PF.any(axis=1))

    @cached_property
    def leave_one_out_P(self) -> FloatArray:
        """values_P minus what is predicted for each point from all others (closed form, Rasmussen & Williams 5.12)."""
        inverse_PP = np.linalg.inv(self._covariance_PP)
        return np.asarray(inverse_PP @ (self._values_P - self.mean) / np.diag(inverse_PP))
