"""From tables to rows of a profile: shapes, and the seconds that the tables' microbenchmarks found (short runs).

GEMMs are those of TensorRT-LLM's torch flow, whose bf16 rows are torch's own library calls; its FP8 rows include the
quantisation of the activations, which is measured apart in the same package and taken off. Attention is the fastest of
the frameworks' context-phase kernels. MLA rows are the core attention of 192-wide keys and 128-wide values.

Legend: N rows of a table.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.tables.package import Package, Table
from moesim.seeding import stream

Row = dict[str, Any]
_GEMM_FRAMEWORK = "trtllm"
_LEAST_ROWS, _LEAST_SIDE, _WIDEST = 64, 256, 65536  # of the outputs; of the two other sides
_HEAD_DIMS = (64, 128, 256)
_LEAST_SEQUENCE = 256
_CAST_FLOPS, _CAST_ROWS = (2e11, 1e13), 200  # of GEMMs that tell their cast: where the tensor cores are the limit
_CAST_ERROR = 0.25  # of a cast that was taken off: frameworks differ by so much
_QUANTISE_BYTES = {"computescale_perf": 2.0, "scale_matrix_perf": 3.0}  # per number: read, and written where it is
_MEMORY_BYTES, _MEMORY_LIMITS = 5e8, 0.7  # beyond every L2; of the bandwidth, from which on only the memory limits
MLA_KEYS, MLA_VALUES = 192, 128
_COLLECTIVES = {
    "all_reduce": "all_reduce", "alltoall": "all_to_all", "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}  # fmt: skip


def thinned(rows: list[Row], count: int, *, name: str) -> list[Row]:
    """At most `count` rows, drawn evenly and always the same ones."""
    if len(rows) <= count:
        return rows
    chosen = stream(0, "thinned", name).choice(len(rows), count, replace=False)
    return [rows[index] for index in sorted(chosen.tolist())]


def nvfp4_rows(package: Package, folder: str) -> list[Row]:
    """Forward GEMMs of nvfp4 without the cast of their activations, the fastest framework per shape; empty where none.

    Rows hold that cast: see `cast_seconds`. A GEMM keeps at least half of its row.
    """
    best: dict[tuple[int, ...], Row] = {}
    for table in package.tables(folder, "gemm", "gemm_perf"):
        m, n, k = (table[side] for side in "mnk")
        wide = (np.minimum(n, k) >= _LEAST_SIDE) & (np.maximum(n, k) <= _WIDEST)
        each = cast_seconds(table, "nvfp4")
        for i in np.flatnonzero((table["gemm_dtype"] == "nvfp4") & (m >= _LEAST_ROWS) & (m % 16 == 0) & wide):
            shape, whole = (int(m[i]), int(k[i]), int(n[i])), float(table["latency"][i]) * 1e-3
            seconds = max(whole - each * shape[0] * shape[1], 0.5 * whole)
            if seconds > 1e-6 and (shape not in best or seconds < best[shape]["p50"]):
                sizes = dict(zip("mkn", shape, strict=True))
                best[shape] = {
                    "family": "gemm_fp8", **sizes, "dtype": "nvfp4", "direction": "forward",
                    "p50": _rounded(seconds), "source": table.source,
                }  # fmt: skip
    return list(best.values())


def cast_seconds(table: Table, dtype: str) -> float:
    """Seconds per number of the activations by which a table's GEMMs of a format that it casts to are longer.

    Large GEMMs are seconds of a launch, of FLOPs, of activations [m, k], of outputs [m, n] and of weights [n, k],
    each by one constant, by least squares on relative errors: 3 to 7 % are left of the rows of Blackwell. Bytes of the
    activations then pass at 3.4 to 4.6 TB/s for nvfp4, whatever the framework and the kind, as a cast's do, where those
    of operands in the L2 would cost nothing beside the FLOPs. 0 where there are too few rows.
    """
    m, n, k = (table[side].astype(float) for side in "mnk")
    chosen = (table["gemm_dtype"] == dtype) & (m >= 512) & (np.minimum(n, k) >= 512)
    chosen &= (2.0 * m * n * k >= _CAST_FLOPS[0]) & (2.0 * m * n * k < _CAST_FLOPS[1])
    if chosen.sum() < _CAST_ROWS:
        return 0.0
    m, n, k, seconds = m[chosen], n[chosen], k[chosen], table["latency"][chosen] * 1e-3
    design = np.stack([np.ones_like(m), m * n * k, m * k, m * n, n * k], axis=1)
    scale = design.max(axis=0)
    found, *_ = np.linalg.lstsq(design / scale / seconds[:, None], np.ones_like(m), rcond=None)
    return float(max(found[2] / scale[2], 0.0))


def cast_share(package: Package, folder: str, *, least_flops: float) -> float:
    """Log of large nvfp4 rows over rows less `_CAST_ERROR` of the cast that was taken off, 90th percentile."""
    shares = []
    for table in package.tables(folder, "gemm", "gemm_perf"):
        m, n, k = (table[side].astype(float) for side in "mnk")
        large = (table["gemm_dtype"] == "nvfp4") & (2.0 * m * n * k >= least_flops)
        whole, cast = table["latency"][large] * 1e-3, cast_seconds(table, "nvfp4") * m[large] * k[large]
        shares.append(_CAST_ERROR * cast / np.maximum(whole - cast, 0.5 * whole))
    return float(np.percentile(np.log1p(np.concatenate(shares)), 90))


def block_over_fp8(package: Package, folder: str, *, least_flops: float) -> float:
    """|log| of rows with block scales, the fastest framework's, over per-tensor ones of the same large shape: p90.

    Both without the casts of the activations.
    """
    rows = gemm_rows(package, folder, "fp8")
    plain: dict[tuple[int, ...], float] = {(row["m"], row["k"], row["n"]): row["p50"] for row in rows}
    fastest: dict[tuple[int, ...], float] = {}
    for table in package.tables(folder, "gemm", "gemm_perf"):
        each = cast_seconds(table, "fp8_block")
        for i in np.flatnonzero(table["gemm_dtype"] == "fp8_block"):
            shape = int(table["m"][i]), int(table["k"][i]), int(table["n"][i])
            if shape in plain and 2.0 * math.prod(shape) >= least_flops:
                whole = float(table["latency"][i]) * 1e-3
                seconds = max(whole - each * shape[0] * shape[1], 0.5 * whole)
                fastest[shape] = min(seconds, fastest.get(shape, math.inf))
    return float(np.percentile([abs(np.log(seconds / plain[shape])) for shape, seconds in fastest.items()], 90))


def gemm_rows(package: Package, folder: str, dtype: str) -> list[Row]:
    """Forward GEMMs of `dtype` (bf16 or fp8); empty where the tables have none."""
    table = package.table(folder, "gemm", "gemm_perf", framework=_GEMM_FRAMEWORK)
    if table is None:
        return []
    named = {"bf16": "bfloat16", "fp8": "fp8"}[dtype]
    m, n, k = (table[side] for side in "mnk")
    wide = (np.minimum(n, k) >= _LEAST_SIDE) & (np.maximum(n, k) <= _WIDEST)
    chosen_N = np.flatnonzero((table["gemm_dtype"] == named) & (m >= _LEAST_ROWS) & (m % 16 == 0) & wide)
    seconds_N = table["latency"][chosen_N] * 1e-3
    if dtype == "fp8":
        seconds_N = seconds_N - _quantisation(package, folder, m[chosen_N], k[chosen_N])
    family = "gemm" if dtype == "bf16" else "gemm_fp8"
    return [
        {"family": family, "m": int(m[i]), "k": int(k[i]), "n": int(n[i]), "dtype": dtype, "direction": "forward",
         "p50": _rounded(seconds), "source": table.source}
        for i, seconds in zip(chosen_N, seconds_N, strict=True)
        if seconds > 1e-6
    ]  # fmt: skip


def _quantisation(package: Package, folder: str, m_N: NDArray[Any], k_N: NDArray[Any]) -> NDArray[np.float64]:
    """Seconds of finding the scales of the activations [m, k] and of applying them; nan where not measured."""
    seconds_N = np.zeros(len(m_N))
    for name in ("computescale_perf", "scale_matrix_perf"):
        table = package.table(folder, "quantize", name, framework=_GEMM_FRAMEWORK)
        known = (
            {} if table is None else dict(zip(zip(table["m"], table["k"], strict=True), table["latency"], strict=True))
        )
        seconds_N += [known.get(shape, np.nan) * 1e-3 for shape in zip(m_N, k_N, strict=True)]
    return seconds_N


def memory_share(package: Package, folder: str, base: str, *, bandwidths: tuple[float, float]) -> float | None:
    """The share of its bandwidth that a kind's large casts reach over the share that they reach on the base: median.

    bandwidths: of the kind and the base. Of casts that only the memory limits on the base; None without tables.
    """
    found = []
    for name, bytes_each in _QUANTISE_BYTES.items():
        theirs = _quantise_rates(package, base, name, bytes_each)
        for shape, rate in _quantise_rates(package, folder, name, bytes_each).items():
            if theirs.get(shape, 0.0) >= _MEMORY_LIMITS * bandwidths[1]:
                found.append(rate / bandwidths[0] / (theirs[shape] / bandwidths[1]))
    return float(np.median(found)) if found else None


def _quantise_rates(package: Package, folder: str, name: str, bytes_each: float) -> dict[tuple[Any, ...], float]:
    """Bytes/s of every framework's large casts, by framework and shape."""
    rates = {}
    for table in package.tables(folder, "quantize", name):
        numbers_N = table["m"].astype(float) * table["k"]
        for i in np.flatnonzero((numbers_N * bytes_each >= _MEMORY_BYTES) & (table["latency"] > 0.0)):
            shape = table.framework, int(table["m"][i]), int(table["k"][i])
            rates[shape] = bytes_each * float(numbers_N[i]) / (float(table["latency"][i]) * 1e-3)
    return rates


def attention_rows(package: Package, folder: str) -> list[Row]:
    """Causal attention of whole prompts in bf16, the fastest framework per shape; MLA's core beside it."""
    best: dict[tuple[int, ...], Row] = {}
    for table in package.tables(folder, "attention", "context_attention_perf"):
        for shape, seconds in _attention_shapes(table):
            _keep_faster(best, shape, seconds, table)
    mla = package.table(folder, "mla", "context_mla_perf", framework="trtllm")
    if mla is not None:
        for shape, seconds in _mla_shapes(mla):
            _keep_faster(best, shape, seconds, mla)
    return list(best.values())


def _attention_shapes(table: Table) -> Iterator[tuple[tuple[int, ...], float]]:
    plain_N = (table["attn_dtype"] == "bfloat16") & (table["kv_cache_dtype"] == "bfloat16") & (table["step"] == 0)
    plain_N &= np.isin(table["head_dim"], _HEAD_DIMS) & (table["isl"] >= _LEAST_SEQUENCE)
    if "window_size" in table.columns:
        plain_N &= table["window_size"] == 0
    names = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "head_dim")
    shapes = zip(*(table[name][plain_N].tolist() for name in names), strict=True)
    yield from zip(shapes, table["latency"][plain_N] * 1e-3, strict=True)


def _mla_shapes(table: Table) -> Iterator[tuple[tuple[int, ...], float]]:
    plain_N = (table["mla_dtype"] == "bfloat16") & (table["kv_cache_dtype"] == "bfloat16")
    plain_N &= (table["isl"] >= _LEAST_SEQUENCE) & (table["num_heads"] >= 8)
    names = ("batch_size", "isl", "num_heads", "num_heads")
    shapes = zip(*(table[name][plain_N].tolist() for name in names), strict=True)
    yield from zip(((*shape, MLA_KEYS, MLA_VALUES) for shape in shapes), table["latency"][plain_N] * 1e-3, strict=True)


def _keep_faster(best: dict[tuple[int, ...], Row], shape: tuple[int, ...], seconds: float, table: Table) -> None:
    if shape not in best or seconds < best[shape]["p50"]:
        names = ("batch", "sequence", "heads", "kv_heads", "head_dim", "value_dim")
        sizes = dict(zip(names, map(int, shape), strict=True))
        best[shape] = {
            "family": "attention", **sizes, "causal": True, "direction": "forward", "p50": _rounded(seconds),
            "source": table.source,
        }  # fmt: skip


def decode_rows(package: Package, folder: str) -> list[Row]:
    """Attention of one new token per sequence; `sequence` counts keys. No training step asks for them."""
    found = []
    for table in package.tables(folder, "attention", "generation_attention_perf")[:1]:
        plain_N = (table["attn_dtype"] == "bfloat16") & (table["kv_cache_dtype"] == "bfloat16")
        plain_N &= table["head_dim"] == 128
        if "window_size" in table.columns:
            plain_N &= table["window_size"] == 0
        for i in np.flatnonzero(plain_N):
            found.append({
                "family": "attention_decode", "batch": int(table["batch_size"][i]),
                "sequence": int(table["isl"][i] + table["step"][i]), "heads": int(table["num_heads"][i]),
                "kv_heads": int(table["num_key_value_heads"][i]), "head_dim": 128,
                "p50": _rounded(table["latency"][i] * 1e-3), "source": table.source,
            })  # fmt: skip
    return found


def collective_rows(package: Package, folder: str) -> list[Row]:
    """NCCL inside a node; the tables count elements of 2 bytes, rows count the bytes of one rank's whole buffer."""
    found: dict[tuple[Any, ...], Row] = {}
    for table in package.tables(folder, "comm", "nccl_perf"):
        chosen_N = np.flatnonzero((table["nccl_dtype"] == "half") & np.isin(table["op_name"], list(_COLLECTIVES)))
        for i in chosen_N:
            kind, size = _COLLECTIVES[table["op_name"][i]], int(2 * table["message_size"][i])
            ranks = int(table["num_gpus"][i])
            if size >= 8192:
                found[kind, size, ranks] = {
                    "family": "collective", "kind": kind, "bytes": size, "ranks": ranks,
                    "p50": _rounded(table["latency"][i] * 1e-3), "source": table.source,
                }  # fmt: skip
    return list(found.values())


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def shape_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row's kernel from others."""
    return tuple(value for key, value in row.items() if key not in ("p50", "source", "session", "table_p50"))
