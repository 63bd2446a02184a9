"""How far the tables can be compared: their rows of H100 and H200 beside this project's own measurements of both.

Tables repeat one kernel in a captured graph, so that operands stay in the L2 and the clock is free; own rows find the
L2 as a mixture of kernels leaves it. Small kernels are faster in the tables, large ones as fast. For GEMMs of the same
library that difference is taken off, as a function of the seconds.

Legend: N rows, B bins of seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.families import FloatArray
from moesim.kernels.kernel_classes import class_of
from moesim.kernels.tables.package import COMPARED, Package
from moesim.kernels.tables.rows import Row, attention_rows, collective_rows, gemm_rows, shape_of, thinned

_EDGES_B = np.log([1e-9, 1e-5, 2e-5, 5e-5, 2e-4, 1e-3, 1e3])
_CENTERS_B = np.log([7e-6, 1.4e-5, 3.2e-5, 1e-4, 4.5e-4, 3e-3])
_COMPARED_ROWS = 2500
_MIN_BIN = 25


@dataclass(frozen=True)
class Comparison:
    """bias_B: median log of table over own seconds in bins of the table's seconds, mean of both GPUs; `spread`: 90th
    percentile of what is left; `rows` compared on both GPUs together.
    """

    rows: int
    bias_B: tuple[float, ...]
    spread: float

    def own(self, seconds: float) -> float:
        """What own benchmarks would have found where the table has `seconds`."""
        return float(seconds * np.exp(-np.interp(np.log(seconds), _CENTERS_B, self.bias_B)))

    def as_json(self) -> dict[str, Any]:
        """Rounded, for the provenance."""
        seconds = [float(f"{np.exp(center):.3g}") for center in _CENTERS_B]
        bias = dict(zip(map(str, seconds), (round(bias, 3) for bias in self.bias_B), strict=True))
        return {"rows": self.rows, "log_table_over_own_by_seconds": bias, "p90_left": round(self.spread, 3)}


def compare(package: Package, models: Mapping[str, CalibratedModel]) -> dict[str, Comparison]:
    """Of gemm/bf16, gemm/fp8, attention and mla: every row that own classes can predict without extrapolating far."""
    found = {}
    for name in ("gemm/bf16", "gemm/fp8", "attention", "mla"):
        logs, errors = [], []
        for gpu, where in COMPARED.items():
            rows = thinned(table_rows(package, where.folder, name), _COMPARED_ROWS, name=f"{gpu} {name}")
            table_N = np.log([row["p50"] for row in rows])
            logs.append(table_N)
            errors.append(table_N - np.log(own_seconds(models[gpu], rows)))
        found[name] = _comparison(logs, errors)
    return found


def _comparison(logs: list[FloatArray], errors: list[FloatArray]) -> Comparison:
    bias_GB = np.full((len(logs), len(_CENTERS_B)), np.nan)
    for g, (table_N, error_N) in enumerate(zip(logs, errors, strict=True)):
        for b in range(len(_CENTERS_B)):
            inside_N = (table_N >= _EDGES_B[b]) & (table_N < _EDGES_B[b + 1])
            if inside_N.sum() >= _MIN_BIN:
                bias_GB[g, b] = np.median(error_N[inside_N])
    known_B = np.isfinite(bias_GB).all(axis=0)
    if not known_B.any():  # few rows: one difference for all
        bias_GB[:] = [[np.median(error_N)] for error_N in errors]
        known_B[:] = True
    bias_B = np.interp(_CENTERS_B, _CENTERS_B[known_B], bias_GB[:, known_B].mean(axis=0))
    left = [error_N - np.interp(table_N, _CENTERS_B, bias_B) for table_N, error_N in zip(logs, errors, strict=True)]
    spread = float(np.percentile(np.abs(np.concatenate(left)), 90))
    return Comparison(sum(map(len, logs)), tuple(float(bias) for bias in bias_B), spread)


def table_rows(package: Package, folder: str, name: str) -> list[Row]:
    """Rows of gemm/bf16, gemm/fp8, attention or mla as the table has them."""
    if name.startswith("gemm"):
        return gemm_rows(package, folder, name.split("/")[1])
    is_mla = name == "mla"
    return [row for row in attention_rows(package, folder) if ("mla" in row["source"]) == is_mla]


def own_seconds(model: CalibratedModel, rows: list[Row]) -> FloatArray:
    """What the classes of `model` predict for rows of one class, at the clock of its benchmarks."""
    kernel_class = model.kernel_class(str(class_of(rows[0])))
    assert kernel_class is not None
    return kernel_class.predict(kernel_class.kind.sizes(rows))[0]


def compared_collectives(package: Package, models: Mapping[str, CalibratedModel]) -> dict[str, Any]:
    """Log of the table's over own seconds of NCCL calls among two GPUs, sizes within a tenth of each other."""
    errors = []
    for gpu, where in COMPARED.items():
        table = [row for row in collective_rows(package, where.folder) if row["ranks"] == 2]
        for own in (row for row in models[gpu].collectives if "max_ctas" not in row):
            same = [row for row in table if row["kind"] == own["kind"] and abs(row["bytes"] / own["bytes"] - 1) < 0.1]
            errors += [float(np.log(row["p50"] / own["p50"])) for row in same]
    low, median, high = np.percentile(errors, [10, 50, 90]).round(3).tolist()
    return {"rows": len(errors), "log_table_over_own": {"p10": low, "median": median, "p90": high}}


def unseen(rows: list[Row], chosen: list[Row]) -> list[Row]:
    """Those of `rows` whose shape is not among the chosen."""
    known = {shape_of(row) for row in chosen}
    return [row for row in rows if shape_of(row) not in known]
