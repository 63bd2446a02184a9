"""Single kernels as loops for numba: the formulas of `physics`, `cells` and `gaussian` for one kernel at a time.

A numpy call costs about a microsecond whatever its size, a Python operation a tenth, and one kernel takes hundreds:
here it takes five microseconds in all. Everything is in double precision; tests hold both forms together.

Legend: P measured kernels, F features, G = F + 1 (the features, then the weights), T candidate tiles, E experts,
C constants of a cell (`Cell.constants_C`: ten parameters, mean residual, exponent of sustained clocks, exponent within
the cell, three coefficients of the expected clock), L power limit (`limit_of`: log clock, threshold, slope, worth of a
byte, and which exponent counts: 0 none, 1 that of sustained clocks, 2 that within the cell).
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_FURTHEST = 40.0  # exp(-40) is nothing beside one


@numba.njit(cache=True, fastmath=True)
def _field(
    point_F: FloatArray, data_GP: FloatArray, ranges_2F: FloatArray, rational: bool, scratch_P: FloatArray
) -> tuple[float, float]:
    features, count = len(point_F), data_GP.shape[1]
    inside = True
    for p in range(count):
        scratch_P[p] = 0.0
    for f in range(features):
        x = point_F[f]
        inside = inside and ranges_2F[0, f] <= x <= ranges_2F[1, f]
        for p in range(count):
            offset = data_GP[f, p] - x
            scratch_P[p] += offset * offset
    nearest = scratch_P[0]
    for p in range(count):
        nearest = min(nearest, scratch_P[p])
    total = 0.0
    if rational:
        for p in range(count):
            total += data_GP[features, p] / (1.0 + 2.0 * scratch_P[p])
    else:
        for p in range(count):
            s = min(math.sqrt(3.0 * scratch_P[p]), _FURTHEST)
            # exp(-s) as the 1024th power of a short series, which compilers turn into vector instructions.
            r = s * (-1.0 / 1024.0)
            e = 1.0 + r * (1.0 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720))))))
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            e *= e
            total += data_GP[features, p] * (1.0 + s) * e
    return total, nearest if inside else math.inf


@numba.njit("UniTuple(f8, 2)(f8[::1], f8[:, ::1], f8[:, ::1], b1)", cache=True)
def field(point_F: FloatArray, data_GP: FloatArray, ranges_2F: FloatArray, rational: bool) -> tuple[float, float]:
    """(weighted sum of the kernel, squared distance to the nearest measured point or inf outside their range)."""
    return _field(point_F, data_GP, ranges_2F, rational, np.empty(data_GP.shape[1]))


@numba.njit("void(f8[:, ::1], f8[:, ::1], f8[:, ::1], b1, f8[::1], f8[::1])", cache=True)
def field_of_many(
    points_QF: FloatArray,
    data_GP: FloatArray,
    ranges_2F: FloatArray,
    rational: bool,
    sums_Q: FloatArray,
    nearest_Q: FloatArray,
) -> None:
    """`field` of many points, into `sums_Q` and `nearest_Q`."""
    scratch_P = np.empty(data_GP.shape[1])
    for q in range(len(points_QF)):
        sums_Q[q], nearest_Q[q] = _field(points_QF[q], data_GP, ranges_2F, rational, scratch_P)


@numba.njit(cache=True, fastmath=True)
def _at_limit(
    logs: float, work: float, flops: float, moved: float, constants_C: FloatArray, limit_L: FloatArray
) -> float:
    """Seconds at the clock that the power limit leaves; `Cell._sustained` of one kernel."""
    if limit_L[4] == 0.0:
        return math.exp(logs)
    log_work = math.log(work + 1.0)
    expected = constants_C[13] + log_work * (constants_C[14] + log_work * constants_C[15])
    load = (flops + limit_L[3] * moved) / math.exp(logs)
    clock = limit_L[0] - limit_L[2] * max(load - limit_L[1], 0.0)
    return math.exp(logs - constants_C[11 if limit_L[4] == 1.0 else 12] * (clock - expected))


@numba.njit(cache=True, fastmath=True)
def _gemm_log_seconds(
    m: float, n: float, k: float, size: float, constants_C: FloatArray, tiles_3T: FloatArray
) -> float:
    """`physics.gemm_log_seconds`; `tiles_3T`: rows, columns and splits of the candidate tiles."""
    launch, rate, feed, prologue, epilogue = (
        constants_C[0], constants_C[1], constants_C[2], constants_C[3], constants_C[4],
    )  # fmt: skip
    memory, peak, split_launch, split_byte, l2 = (
        constants_C[5], constants_C[6], constants_C[7], constants_C[8], constants_C[9],
    )  # fmt: skip
    fixed = ((size * k * (m + n) + 2.0 * m * n) / memory) ** 4 + (2.0 * m * n * k / peak) ** 4
    count = tiles_3T.shape[1]
    seconds_T = np.empty(count)
    best = math.inf
    for t in range(count):
        tile_m, tile_n, split = tiles_3T[0, t], tiles_3T[1, t], tiles_3T[2, t]
        outputs, is_split = tile_m * tile_n, 1.0 if split > 1.0 else 0.0
        steps = math.ceil(k / (split * 64.0))
        work, operands = 128.0 * outputs / rate, 64.0 * (tile_m + tile_n) * size / feed
        work, operands = work * work, operands * operands
        tile = steps * math.sqrt(math.sqrt(work * work + operands * operands)) + prologue + epilogue * outputs
        if is_split > 0.0 and steps < 4.0:
            tile = 1e3
        tiles_m, tiles_n = math.ceil(m / tile_m), math.ceil(n / tile_n)
        compute = math.ceil(tiles_m * tiles_n * split / 132.0) * tile
        shared = (tiles_n * m + tiles_m * n) * (k * (size / l2))
        compute, shared = compute * compute, shared * shared
        busy = math.sqrt(math.sqrt(compute * compute + shared * shared + fixed))
        seconds = busy + is_split * (4.0 * split_byte) * split * (m * n) + launch + is_split * split_launch
        seconds_T[t] = seconds
        best = min(best, seconds)
    closeness = 0.0
    for t in range(count):
        r = best / seconds_T[t]
        r *= r  # 2
        r4 = r * r
        r8 = r4 * r4
        r20 = r8 * r8 * r4
        closeness += r20 * r20 * r20
    return math.log(best) - math.log(closeness) / 60.0


@numba.njit("UniTuple(f8, 2)(f8, f8, f8, f8, f8[:, ::1], f8[::1], f8[:, ::1], f8[:, ::1], f8[::1])", cache=True)
def gemm(
    m: float,
    n: float,
    k: float,
    size: float,
    tiles_3T: FloatArray,
    constants_C: FloatArray,
    data_GP: FloatArray,
    ranges_2F: FloatArray,
    limit_L: FloatArray,
) -> tuple[float, float]:
    """(seconds, squared distance to the nearest measured product) of one product M x N x K."""
    point_F = np.array([math.log(max(m, 1.0)) / 2.5, math.log(max(n, 1.0)) / 2.5, math.log(max(k, 1.0)) / 2.5])
    residual, square = _field(point_F, data_GP, ranges_2F, False, np.empty(data_GP.shape[1]))
    logs = _gemm_log_seconds(m, n, k, size, constants_C, tiles_3T) + residual + constants_C[10]
    flops, moved = m * n * k * size, size * k * (m + n) + 2.0 * m * n
    return _at_limit(logs, 2.0 * m * n * k, flops, moved, constants_C, limit_L), square


@numba.njit(cache=True)
def _fourth(value: float) -> float:
    square = value * value
    return square * square


@numba.njit(cache=True)
def _grouped(
    totals_7: tuple[float, float, float, float, float, float, float],
    sizes_3: tuple[float, float, float],
    direction: int,
    small: bool,
    constants_C: FloatArray,
) -> tuple[float, float]:
    """(log seconds, bytes): `physics.grouped_sizes` and the formula of its direction."""
    rows, active, _, most, fill_64, fill_128, fill_256 = totals_7
    experts, k, n = sizes_3
    tile_m, tile_n, tile_k = (64.0, 128.0, 128.0) if small else (128.0, 256.0, 64.0)
    launch, rate, prologue, memory = constants_C[0], constants_C[1], constants_C[2], constants_C[3]
    peak, per_expert, l2, whole, write_cost = (
        constants_C[4], constants_C[5], constants_C[6], constants_C[7], constants_C[8],
    )  # fmt: skip
    step, share = 2.0 * tile_m * tile_n / rate, whole / (1.0 + whole)
    if direction == 2:
        per_tile = math.ceil(k / (2.0 * tile_m)) * 2.0 * math.ceil(n / tile_n)
        longest = math.ceil(most / tile_k) * tile_k
        tiles, work = max(per_tile * experts, 1.0), per_tile * (fill_128 if small else fill_64) * tile_k
        l2_bytes = rows * 2.0 * (k * math.ceil(n / tile_n) + n * math.ceil(k / (2.0 * tile_m)))
        read, written = rows * 2.0 * (k + n), 2.0 * experts * k * n
        waves = math.ceil(tiles / 132.0)
        even = max(work / 132.0, longest) * (1.0 - share) + work * (share / tiles * waves)
        compute = even * step + waves * prologue
    else:
        width, depth = (n, k) if direction == 0 else (k, n)
        pairs, tiles_n = fill_128 if small else fill_256, math.ceil(width / tile_n)
        tiles, longest = max(pairs * 2.0 * tiles_n, 1.0), math.ceil(depth / tile_k) * tile_k
        l2_bytes = rows * 2.0 * depth * tiles_n + pairs * 2.0 * depth * width
        read, written = rows * 2.0 * depth + active * 2.0 * k * n, rows * 2.0 * width
        waves = math.ceil(tiles / 132.0)
        compute = (waves * share + max(tiles / 132.0, 1.0) * (1.0 - share)) * (longest * step + prologue)
    parts = _fourth(compute) + _fourth((read + written * write_cost) / memory)
    parts += _fourth(rows * 2.0 * k * n / peak) + _fourth(l2_bytes / l2)
    return math.log(launch + per_expert * experts + math.sqrt(math.sqrt(parts))), read + written


@numba.njit("UniTuple(f8, 7)(f8[::1])", cache=True)
def row_totals(rows_E: FloatArray) -> tuple[float, float, float, float, float, float, float]:
    """Of the rows of experts: sum, experts with any, sum of squares, most; how many 64s, 128s and 256s they fill."""
    rows = active = squares = most = fill_64 = fill_128 = fill_256 = 0.0
    for e in range(len(rows_E)):
        value = rows_E[e]
        rows += value
        active += 1.0 if value > 0.0 else 0.0
        squares += value * value
        most = max(most, value)
        fill_64 += math.ceil(value / 64.0)
        fill_128 += math.ceil(value / 128.0)
        fill_256 += math.ceil(value / 256.0)
    return rows, active, squares, most, fill_64, fill_128, fill_256


@numba.njit(
    "UniTuple(f8, 2)(UniTuple(f8, 7), UniTuple(f8, 3), i8, b1, f8[::1], f8[:, ::1], f8[:, ::1], f8[::1])", cache=True
)
def grouped(
    totals_7: tuple[float, float, float, float, float, float, float],
    sizes_3: tuple[float, float, float],
    direction: int,
    small: bool,
    constants_C: FloatArray,
    data_GP: FloatArray,
    ranges_2F: FloatArray,
    limit_L: FloatArray,
) -> tuple[float, float]:
    """(seconds, squared distance) of one grouped product; `sizes_3`: experts, k, n; forward is 0, dgrad 1, wgrad 2."""
    rows, active, squares = totals_7[:3]
    experts, k, n = sizes_3
    mean_square = squares / max(rows, 1.0)
    point_F = np.array([rows + 1.0, experts, k, n, 0.0, max(active, 1.0) / experts])
    point_F[4] = (mean_square + 1.0) * experts / (rows + experts)
    for f in range(6):
        point_F[f] = math.log(point_F[f]) / 4.0
    residual, square = _field(point_F, data_GP, ranges_2F, True, np.empty(data_GP.shape[1]))
    logs, moved = _grouped(totals_7, sizes_3, direction, small, constants_C)
    flops = 2.0 * rows * k * n
    return _at_limit(logs + residual + constants_C[10], flops, flops, moved, constants_C, limit_L), square


@numba.njit("UniTuple(f8, 2)(f8[::1], f8[::1], f8[:, ::1], f8[:, ::1], f8[::1])", cache=True)
def attention(
    columns_9: FloatArray, constants_C: FloatArray, data_GP: FloatArray, ranges_2F: FloatArray, limit_L: FloatArray
) -> tuple[float, float]:
    """(seconds, squared distance) of one attention, of its columns `physics.ATTENTION_COLUMNS`."""
    flops, moved, tiles, longest = columns_9[0], columns_9[1], columns_9[2], columns_9[3]
    heads, sequence, group, head_dim, causal = (
        columns_9[4], columns_9[5], columns_9[6], columns_9[7], columns_9[8],
    )  # fmt: skip
    launch, rate, memory, prologue, whole = (
        constants_C[0], constants_C[1], constants_C[2], constants_C[3], constants_C[4],
    )  # fmt: skip
    share = whole / (1.0 + whole)
    even = max(flops / (rate * 132.0), longest / rate)
    waves = flops / max(tiles, 1.0) * math.ceil(tiles / 132.0) / rate
    compute = even * (1.0 - share) + share * waves + prologue * tiles / 132.0
    logs = math.log(launch + math.sqrt(math.sqrt(_fourth(compute) + _fourth(moved / memory))))
    ragged = 0.4 if sequence % 128.0 != 0.0 else 0.0
    logs_3 = math.log(heads) / 2.5, math.log(sequence) / 2.5, math.log(group) / 5.0
    point_F = np.array([logs_3[0], logs_3[1], logs_3[2], head_dim / 80.0, (1.0 - causal) * 0.6, ragged])
    residual, square = _field(point_F, data_GP, ranges_2F, False, np.empty(data_GP.shape[1]))
    return _at_limit(logs + residual + constants_C[10], flops, flops, moved, constants_C, limit_L), square
