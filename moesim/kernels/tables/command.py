"""`moesim calibrate --from-tables`: the profile of a GPU from the tables of aiconfigurator-core."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import UserError
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.clock_laws import KIND_POWER, clock_law
from moesim.kernels.estimate import Estimate
from moesim.kernels.families import kernel_of, peak_format
from moesim.kernels.fitting import fit_profile
from moesim.kernels.profile import Profile
from moesim.kernels.roofline import GpuRates, Roofline
from moesim.kernels.tables.comparison import Comparison, compare, compared_collectives, table_rows, unseen
from moesim.kernels.tables.package import COMPARED, LICENCE, PACKAGE, TABLE_GPUS, Package
from moesim.kernels.tables.rows import (
    Row,
    block_over_fp8,
    cast_share,
    collective_rows,
    decode_rows,
    memory_share,
    nvfp4_rows,
    thinned,
)
from moesim.kernels.tabulated import MEMORY

# Rows that ship, thinned evenly; all others test what was fitted.
KEPT = {"gemm/bf16": 700, "gemm/fp8": 500, "attention": 350, "mla": 60, "nvfp4": 400, "decode": 80, "collective": 120}
_CORRECTED = ("gemm/bf16", "gemm/fp8")  # the same libraries as behind own rows
_HELD_OUT = 2000
_LARGE = 1e11  # FLOPs from which the tensor cores are the limit
SCALED = {
    "gradients of GEMMs and attention": "forward kernel of the tables times what the gradient takes over it on {base}",
    "grouped GEMMs": "{base} by the ratio of peaks, each times the share that dense GEMMs reach (peak_shares)",
    "memory-bound kernels": "{base} by the ratio of bandwidths, times the share that large casts reach, and of SMs",
    "host, contention": "as measured beside {base}",
}


def from_tables(
    name: str, *, folder: Path | None, models: Callable[[str], Any], rates: Callable[[str], GpuRates]
) -> Profile:
    """The fitted profile of the GPU `name`. Raises UserError for a GPU without tables or a package that is not there.

    models: shipped kernel models by name; rates: the catalogue's GPUs.
    """
    if name not in TABLE_GPUS:
        raise UserError(f"no tables of {name!r}; there are tables of: {', '.join(TABLE_GPUS)}")
    package, gpu = Package.found(folder), TABLE_GPUS[name]
    own = {other: models(other) for other in COMPARED}
    comparisons = compare(package, own)
    kept, families = [], {}
    for family, comparison in comparisons.items():
        rows = table_rows(package, gpu.folder, family)
        if not rows:
            continue
        if family in _CORRECTED:
            rows = [row | {"p50": float(f"{comparison.own(row['p50']):.4g}")} for row in rows]
        chosen = thinned(rows, KEPT[family], name=f"{name} {family}")
        families[family] = _facts(rows, chosen, comparison, corrected=family in _CORRECTED)
        kept += chosen
    fours = nvfp4_rows(package, gpu.folder)
    if fours:
        chosen = thinned(fours, KEPT["nvfp4"], name=f"{name} nvfp4")
        kept += chosen
    profile = Profile(name=name, sessions=[], rows=kept)
    fit_profile(profile)
    model = CalibratedModel(profile, fallback=Roofline(rates(name)), expected_families=())
    if fours:
        share = cast_share(package, gpu.folder, least_flops=_LARGE)
        held_out = _held_out(model, fours, kept, "gemm/nvfp4", own_of=float)
        facts = {"rows_of_table": len(fours), "kept": len(chosen), "as_in_table": False}
        block = block_over_fp8(package, gpu.folder, least_flops=_LARGE)
        spreads = {"cast_p90": round(share, 3), "block_over_fp8_p90": round(block, 3)}
        families["gemm/nvfp4"] = facts | spreads | {"held_out": held_out}
    for family in comparisons:
        if family not in families:
            continue
        rows = table_rows(package, gpu.folder, family)
        families[family]["held_out"] = _held_out(
            model, rows, kept, family, own_of=comparisons[family].own if family in _CORRECTED else float
        )
    base = own[gpu.base]
    shares = {
        dtype: _peak_share(rows, base, rates(name), rates(gpu.base), dtype)
        for dtype, family in (("bf16", "gemm"), ("fp8", "gemm_fp8"))
        if (rows := [row for row in profile.family(family) if row["dtype"] == dtype])
    }
    if fours:
        shares["fp4"] = round(shares["fp8"] * _over_fp8(profile.family("gemm_fp8"), rates(name)), 4)
    memory = memory_share(
        package, gpu.folder, COMPARED[gpu.base].folder,
        bandwidths=(rates(name).memory_bandwidth, rates(gpu.base).memory_bandwidth),
    )  # fmt: skip
    if memory is not None:
        shares[MEMORY] = round(memory, 4)
    law = clock_law(name, short=_short_rate(profile.family("gemm")))
    for extra, found in (
        ("decode", decode_rows(package, gpu.folder)),
        ("collective", collective_rows(package, gpu.folder)),
    ):
        chosen = thinned(found, KEPT[extra], name=f"{name} {extra}")
        families[extra] = {"rows_of_table": len(found), "kept": len(chosen), "as_in_table": True}
        kept += chosen
    families["collective"] |= compared_collectives(package, own)
    profile.fits["sustained"] = law.cap.as_json()
    profile.sessions = _number_sources(kept, package, name)
    profile.rows = kept
    profile.tables = {
        "package": f"{PACKAGE} {package.version}", "licence": LICENCE, "base": gpu.base,
        "command": f"moesim calibrate --from-tables --gpu {name} --out {name}.json.gz",
        "peak_shares": shares, "clock": law.as_json(),
        "power_watts": KIND_POWER[name].watts, "power_source": KIND_POWER[name].watts_source,
        "families": families, "scaled": {key: text.format(base=gpu.base) for key, text in SCALED.items()},
    }  # fmt: skip
    return profile


def _facts(rows: list[Row], chosen: list[Row], comparison: Comparison, *, corrected: bool) -> dict[str, Any]:
    return {
        "rows_of_table": len(rows),
        "kept": len(chosen),
        "as_in_table": not corrected,  # else with the difference below taken off
        "compared_on_h100_and_h200": comparison.as_json(),
    }


def _held_out(
    model: CalibratedModel, rows: list[Row], kept: list[Row], family: str, *, own_of: Callable[[float], float]
) -> dict[str, float]:
    """Errors |table / predicted - 1| of rows that were not kept: how well the fit stands for the table."""
    others = thinned(unseen(rows, kept), _HELD_OUT, name=f"{model.name} {family} held out")
    if not others:
        return {"rows": 0}
    seconds = [own_of(row["p50"]) for row in others]
    found = np.array([float(_at_benchmark_clock(model, row).seconds) for row in others])
    median, p90 = np.percentile(np.abs(np.array(seconds) / found - 1.0), [50, 90])
    return {"rows": len(others), "median": round(float(median), 4), "p90": round(float(p90), 4)}


def _at_benchmark_clock(model: CalibratedModel, row: Row) -> Estimate:
    return model.at_benchmark_clock().seconds(kernel_of(row))


def _peak_share(rows: list[Row], base: CalibratedModel, target: GpuRates, measured: GpuRates, dtype: str) -> float:
    """The share of its peak that large GEMMs reach, over the share that they reach on the measured GPU."""
    free = base.at_benchmark_clock()
    kernels = [(kernel_of(row), row["p50"]) for row in rows]
    large = [(kernel, seconds) for kernel, seconds in kernels if float(kernel.flops) >= _LARGE]
    ratios = [float(free.seconds(kernel).seconds) / seconds for kernel, seconds in large]
    return round(float(np.median(ratios)) * measured.peak_flops[dtype] / target.peak_flops[dtype], 4)


def _over_fp8(rows: list[Row], gpu: GpuRates) -> float:
    """Share of the fp4 peak that large nvfp4 GEMMs reach, over the share of the fp8 peak that those of fp8 do."""
    found: dict[str, list[float]] = {"nvfp4": [], "fp8": []}
    for row in rows:
        if (flops := float(kernel_of(row).flops)) >= _LARGE:
            found[row["dtype"]].append(flops / row["p50"])
    shares = {dtype: float(np.median(rates)) / gpu.peak_flops[peak_format(dtype)] for dtype, rates in found.items()}
    return shares["nvfp4"] / shares["fp8"]


def _short_rate(rows: list[Row]) -> float:
    """FLOP/s that large bf16 GEMMs reach in the tables, in the median."""
    rates = [2.0 * row["m"] * row["k"] * row["n"] / row["p50"] for row in rows]
    large = [rate for rate, row in zip(rates, rows, strict=True) if 2.0 * row["m"] * row["k"] * row["n"] >= 5 * _LARGE]
    return float(np.median(large))


def _number_sources(rows: list[Row], package: Package, name: str) -> list[dict[str, Any]]:
    """The sources of the rows as sessions; every row then names its own by number."""
    sources = sorted({row["source"] for row in rows})
    for index, row in enumerate(rows):
        rows[index] = {key: value for key, value in row.items() if key != "source"}
        rows[index]["session"] = sources.index(row["source"])
    shared = {
        "device": f"{name.replace('-', ' ')} of the tables",
        "package": f"{PACKAGE} {package.version}",
        "licence": LICENCE,
    }
    return [{**shared, "table": source} for source in sources]
