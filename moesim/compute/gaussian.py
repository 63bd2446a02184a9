"""Smooth interpolation of what the physics leaves over: Gaussian-process regression with a Matern-3/2 kernel.

Far from every measured point the prediction returns to zero, that is to the physical formula alone.

Legend: P measured points, Q queried points, F features.
"""

import numpy as np

from moesim.compute.estimate import FloatArray

_MARGIN = 0.15  # length scales beyond the measured range that still count as inside


class ResidualField:
    """Residuals values_P at points_PF (already divided by their length scales), with measuring noise `noise`.

    Fitting is in double precision; queries run in single precision, whose 1e-6 is nothing beside the noise.
    """

    def __init__(self, points_PF: FloatArray, values_P: FloatArray, *, noise: float, amplitude: float = 0.1) -> None:
        assert points_PF.ndim == 2 and len(points_PF) == len(values_P)
        self._center_F = points_PF.mean(0)
        self._mean = float(np.mean(values_P))
        centered_PF = points_PF - self._center_F
        squares_P = np.square(centered_PF).sum(1)
        squares_PP = squares_P[:, None] + squares_P - 2.0 * (centered_PF @ centered_PF.T)
        scaled_PP = np.sqrt(3.0 * np.maximum(squares_PP, 0.0))
        self._covariance_PP = amplitude * (1.0 + scaled_PP) * np.exp(-scaled_PP)
        self._covariance_PP[np.diag_indices(len(values_P))] += noise
        self._weights_P = np.linalg.solve(self._covariance_PP, values_P - self._mean)
        self._low_F, self._high_F = centered_PF.min(0) - _MARGIN, centered_PF.max(0) + _MARGIN
        self._minus_twice_FP = np.ascontiguousarray((-2.0 * centered_PF.T).astype(np.float32))
        self._squares_P = squares_P.astype(np.float32)
        self._scaled_weights_P = (amplitude * self._weights_P).astype(np.float32)

    def predict(self, points_QF: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(residual_Q, distance_Q to the nearest measured point in length scales, infinite outside their range)."""
        centered_QF = points_QF - self._center_F
        single_QF = centered_QF.astype(np.float32)
        squares_QP = single_QF @ self._minus_twice_FP
        squares_QP += self._squares_P
        squares_QP += np.square(single_QF).sum(1)[:, None]
        np.maximum(squares_QP, 0.0, out=squares_QP)
        distance_Q = np.sqrt(squares_QP.min(1)).astype(float)
        squares_QP *= 3.0
        np.sqrt(squares_QP, out=squares_QP)
        shape_QP = np.exp(-squares_QP)
        squares_QP += 1.0
        shape_QP *= squares_QP
        residual_Q = (shape_QP @ self._scaled_weights_P).astype(float) + self._mean
        outside_Q = ((centered_QF < self._low_F) | (centered_QF > self._high_F)).any(1)
        distance_Q[outside_Q] = np.inf
        return residual_Q, distance_Q

    def leave_one_out(self) -> FloatArray:
        """values_P minus what is predicted for each point from all others (closed form, Rasmussen & Williams 5.12)."""
        inverse_PP = np.linalg.inv(self._covariance_PP)
        return np.asarray(self._weights_P / np.diag(inverse_PP))
