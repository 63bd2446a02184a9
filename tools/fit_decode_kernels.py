"""Fits the kernels of decoding (`moesim/serving/decode_kernels.py`) and prints the errors of rows kept out.

    python tools/fit_decode_kernels.py [--write]

Rows: tests/data/decode_kernels_h100.json.gz, measured by tools/measure_decode.py, and the tables of the package
aiconfigurator-core (pip install 'moesim[tables]'): of each shape the fastest framework's kernel. Left out are rows of
tables whose keys and values the L2 holds, as a step finds them in memory, and batches of under 64 keys. Needs scipy.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from moesim.files import write_atomically
from moesim.kernels import Gemm, GroupedGemm, load_profile
from moesim.kernels.tables.package import COMPARED, LICENCE, PACKAGE, TABLE_GPUS, Package
from moesim.scenario import gpu_spec
from moesim.serving.decode_kernels import (
    FILE,
    attention_seconds,
    batched_seconds,
    fused_experts_seconds,
    grouped_shape,
    latent_shape,
    small_seconds,
)
from moesim.strict_json import json_text, parse_json, unpacked

MEASURED = Path(__file__).parents[1] / "tests" / "data" / "decode_kernels_h100.json.gz"
L2_BYTES = {"h100": 50e6, "h200": 50e6, "a100": 40e6, "l40s": 96e6, "rtx-pro-6000": 128e6}  # others: 126 MB
FEW = 128  # rows of GEMMs that the memory bounds
START = np.log([5e-6, 300.0, 1e-10, 1e-8, 2.5e12, 3e14])
LATENT, ROPE = 512, 64
WORST = 0.25  # a family that is further off is not taken
FORMATS = {"bf16": ("bfloat16", 2.0), "fp8": ("fp8_block", 1.0), "int4": ("int4_wo", 0.5)}  # of weights of experts
BY_ROWS = ("topk", "sort", "searchsorted", "scatter", "divide", "gather")  # steps, not a law, over rows
OTHER_KERNELS = {("softmax", 2048), ("softmax", 7168)}  # wide rows take another kernel; routers have few experts
# Several kernels of transformers in one, from profiles of Qwen3's layers with 4, 32 and 64 rows
# (tools/measure_engine.py).
OF_TRANSFORMERS = {
    "norm_in_eight": {"kernels": 8, "parameters": [14.5e-6, 0.0, 0.0, 1.6e-11]},
    "rotary_in_five": {"kernels": 5, "parameters": [11.9e-6, 0.0, 0.0, 1.0e-11]},
}
Row = tuple[float, float, int, int, int, float]  # requests, keys, heads, kv heads, head dim, seconds


def errors_of(predicted: Any, measured: Any, kept_out: Any) -> dict[str, float]:
    """Median and 90th percentile of |log| of the rows that were kept out, and their signed median."""
    off = np.log(np.asarray(predicted) / np.asarray(measured))[np.asarray(kept_out)]
    return {
        "rows": len(off),
        "median": _digits(np.median(np.abs(off))),
        "p90": _digits(np.quantile(np.abs(off), 0.9)),
        "signed": _digits(np.median(off)),
    }


def _digits(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def fit_attention(rows: list[Row], *, gpu: str, size: float, is_latent: bool, kept_out: Any) -> dict[str, Any]:
    """Parameters of `attention_seconds`, none above what the GPU can do, and the errors of the rows kept out."""
    peaks, narrow = gpu_spec(gpu).peak_flops, "fp8" if size < 2.0 else "bf16"
    memory, peak = gpu_spec(gpu).memory_bandwidth, peaks.get(narrow, peaks["bf16"])
    requests, keys, heads, kv, dim, seconds = (np.array(column, float) for column in zip(*rows, strict=True))
    shape = latent_shape(heads, LATENT, ROPE, size=size) if is_latent else grouped_shape(heads, kv, dim, size=size)
    used = ~np.asarray(kept_out)

    def off(logs: Any) -> Any:
        return (np.log(attention_seconds(np.exp(logs), shape, requests, keys)) - np.log(seconds))[used]

    starts = [START, START + np.log([1, 1, 300, 1, 0.5, 0.3])]
    bounds = (np.log([5e-7, 1, 1e-13, 1e-12, 1e11, 5e12]), np.log([5e-5, 1e5, 1e-6, 1e-6, memory, peak]))
    fits = [
        least_squares(off, np.clip(start, bounds[0], bounds[1] - 1e-3), loss="soft_l1", f_scale=0.1, bounds=bounds)
        for start in starts
    ]
    best = np.exp(min(fits, key=lambda fit: fit.cost).x)
    errors = errors_of(attention_seconds(best, shape, requests, keys), seconds, kept_out)
    return {"parameters": [_digits(value) for value in best], "kept_out": errors}


def table_rows(package: Package, folder: str, *, kv: str, is_latent: bool, l2: float) -> tuple[list[Row], set[str]]:
    """Rows of a GPU's tables, of each shape the fastest, and the tables that they come from."""
    best: dict[tuple[int, ...], float] = {}
    used = set()
    names = ("mla", "generation_mla_perf") if is_latent else ("attention", "generation_attention_perf")
    for table in package.tables(folder, *names):
        chosen = table["kv_cache_dtype"] == kv
        chosen &= (table["num_heads"] >= 8) if is_latent else np.isin(table["head_dim"], (64, 128, 256))
        if "window_size" in table.columns:
            chosen &= table["window_size"] == 0
        for i in np.flatnonzero(chosen):
            requests, keys = int(table["batch_size"][i]), int(table["isl"][i] + table["step"][i])
            heads = int(table["num_heads"][i])
            kv_heads, dim = (0, 0) if is_latent else (int(table["num_key_value_heads"][i]), int(table["head_dim"][i]))
            held = (
                requests * keys * (LATENT + ROPE if is_latent else 2 * kv_heads * dim) * (2 if kv == "bfloat16" else 1)
            )
            if keys < 64 or requests > 512 or heads < 2 or l2 * 0.1 < held < 1.2 * l2:
                continue
            used.add(table.source)
            shape = (requests, keys, heads, kv_heads, dim)
            best[shape] = min(best.get(shape, math.inf), float(table["latency"][i]) * 1e-3)
    return [(*shape, seconds) for shape, seconds in best.items()], used  # type: ignore[misc]


def engines(package: Package) -> dict[str, Any]:
    """Attention of serving engines by GPU, from the tables."""
    found: dict[str, Any] = {}
    for gpu, entry in (COMPARED | TABLE_GPUS).items():
        found[gpu] = {}
        for kind, is_latent in (("grouped", False), ("latent", True)):
            for dtype, kv, size in (("bf16", "bfloat16", 2.0), ("fp8", "fp8", 1.0)):
                rows, used = table_rows(package, entry.folder, kv=kv, is_latent=is_latent, l2=L2_BYTES.get(gpu, 126e6))
                if len(rows) < 100:
                    continue
                rows = rows[:: max(1, len(rows) // 3000)]
                kept_out = np.arange(len(rows)) % 3 == 2
                fitted = fit_attention(rows, gpu=gpu, size=size, is_latent=is_latent, kept_out=kept_out)
                found[gpu][f"{kind}/{dtype}"] = fitted | {"source": ", ".join(sorted(used))}
                print(f"{gpu:14} {kind}/{dtype:5} {fitted['kept_out']}", flush=True)
    return found


def all_reduces(package: Package) -> dict[str, Any]:
    """[bytes, seconds] of the fastest all-reduce of an engine by GPU and number of ranks."""
    found: dict[str, Any] = {}
    for gpu, entry in (COMPARED | TABLE_GPUS).items():
        best: dict[int, dict[int, float]] = {}
        for table in package.tables(entry.folder, "comm", "custom_allreduce_perf"):
            eager = np.char.endswith(table["kernel_source"].astype(str), "eager")
            for i in np.flatnonzero(~eager):
                ranks, size = int(table["num_gpus"][i]), int(2 * table["message_size"][i])  # elements of 2 bytes
                seconds = best.setdefault(ranks, {})
                seconds[size] = min(seconds.get(size, math.inf), float(table["latency"][i]) * 1e-3)
        if best:
            found[gpu] = {
                str(ranks): [[size, _digits(seconds[size])] for size in sorted(seconds)]
                for ranks, seconds in sorted(best.items())
            }
    return found


def fused_experts(package: Package) -> dict[str, Any]:
    """Routed experts of serving engines by GPU and format of weights; rows of balanced tokens on one rank."""
    found: dict[str, Any] = {}
    for gpu, entry in (COMPARED | TABLE_GPUS).items():
        found[gpu] = {}
        for kind, (dtype, size) in FORMATS.items():
            rows, used = _expert_rows(package, entry.folder, dtype)
            if len(rows) < 100:
                continue
            columns = np.array(rows)
            fitted = _fit_experts(columns, gpu=gpu, size=size, kept_out=np.arange(len(rows)) % 3 == 2)
            found[gpu][kind] = fitted | {"source": ", ".join(sorted(used))}
            print(f"{gpu:14} experts {kind:5} {fitted['kept_out']}", flush=True)
    return found


def check_spread_experts(package: Package, fitted: dict[str, Any]) -> None:
    """Prints the errors for decoding experts of SGLang that are spread over ranks: tables that shaped nothing."""
    for gpu, entry in COMPARED.items():
        table = package.table(entry.folder, "moe", "wideep_generation_moe_perf", framework="sglang")
        if table is None:
            continue
        predicted, seconds = [], []
        for i in np.flatnonzero(table["distribution"] == "uniform"):
            names = ("num_tokens", "topk", "num_experts", "moe_ep_size", "hidden_size", "inter_size")
            tokens, top, experts, ranks, hidden, width = (int(table[name][i]) for name in names)
            held = experts // ranks
            rows = np.full((1, held), tokens * top // ranks // held)
            rows[0, : tokens * top // ranks % held] += 1
            if 0 < rows.sum() <= 64 * held:
                own = fitted[gpu]["fp8"]
                sizes = {"hidden": hidden, "width": width, "matrices": 3, "size": 1.0}
                predicted.append(float(fused_experts_seconds(own["parameters"], own["block"], rows, **sizes)[0]))
                seconds.append(float(table["latency"][i]) * 1e-3)
        print(f"{gpu} spread experts, {table.source}", errors_of(predicted, seconds, np.ones(len(seconds), bool)))


def _expert_rows(package: Package, folder: str, dtype: str) -> tuple[list[tuple[float, ...]], set[str]]:
    """(tokens, hidden, width, experts of a token, experts, seconds), of each shape the fastest."""
    best: dict[tuple[int, ...], float] = {}
    used = set()
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    for table in package.tables(folder, "moe", "moe_perf"):
        chosen = (table["moe_dtype"] == dtype) & (table["distribution"] == "balanced") & (table["moe_ep_size"] == 1)
        chosen &= ~np.char.endswith(table["kernel_source"].astype(str), "nongated")
        for i in np.flatnonzero(chosen):
            tokens, hidden, width, top, experts, shared = (int(table[name][i]) for name in names)
            shape = (tokens, hidden, width // shared, top, experts)
            if shape[2] < 128 or top > 16:
                continue
            used.add(table.source)
            best[shape] = min(best.get(shape, math.inf), float(table["latency"][i]) * 1e-3)
    return [(*shape, seconds) for shape, seconds in best.items()], used


def _fit_experts(rows: Any, *, gpu: str, size: float, kept_out: Any) -> dict[str, Any]:
    tokens, hidden, width, top, experts, seconds = rows.T
    active = np.minimum(experts, tokens * top)
    weights = 3 * hidden * width

    def of(parameters: Any, block: int) -> Any:
        floor, expert, row_bandwidth, bandwidth, rate = parameters
        padded = active * np.ceil(tokens * top / active / block) * block
        busy = np.cbrt((active * weights * size / bandwidth) ** 3 + (2.0 * padded * weights / rate) ** 3)
        return floor + expert * active + busy + tokens * top * (4.0 * hidden + 8.0 * width) / row_bandwidth

    start = np.log([2e-5, 3e-8, 2e12, min(2.5e12, 0.9 * gpu_spec(gpu).memory_bandwidth), 4e14])
    bounds = (np.log([1e-6, 1e-12, 1e11, 1e11, 1e13]), np.log([1e-4, 1e-5, 3e13, gpu_spec(gpu).memory_bandwidth, 1e16]))
    tried = []
    for block in (16, 32, 64, 128):

        def off(logs: Any, block: int = block) -> Any:
            return (np.log(of(np.exp(logs), block)) - np.log(seconds))[~kept_out]

        fit = least_squares(off, start, loss="soft_l1", f_scale=0.1, bounds=bounds)
        tried.append((fit.cost, block, np.exp(fit.x)))
    _, block, best = min(tried, key=lambda each: each[0])
    errors = errors_of(of(best, block), seconds, kept_out)
    return {"parameters": [_digits(value) for value in best], "block": block, "kept_out": errors}


def batched(package: Package) -> dict[str, Any]:
    """GEMMs for each head, of latents of 512: queries of 128 into them, outputs of 128 out of them."""
    found: dict[str, Any] = {}
    for gpu, entry in (COMPARED | TABLE_GPUS).items():
        found[gpu] = {}
        for kind, dtype, size in (("bf16", "bfloat16", 2.0), ("fp8", "fp8", 1.0)):
            best: dict[tuple[int, int], float] = {}
            for table in package.tables(entry.folder, "mla_bmm", "mla_bmm_perf"):
                for i in np.flatnonzero((table["bmm_dtype"] == dtype) & (table["num_heads"] >= 4)):
                    shape = int(table["num_heads"][i]), int(table["num_tokens"][i])
                    best[shape] = min(best.get(shape, math.inf), float(table["latency"][i]) * 1e-3)
            if len(best) < 50:
                continue
            heads, tokens = np.array(list(best), float).T
            seconds, kept_out = np.array(list(best.values())), np.arange(len(best)) % 3 == 2

            def of(parameters: Any, heads: Any = heads, tokens: Any = tokens, size: float = size) -> Any:
                return batched_seconds(parameters, heads, tokens, 128, LATENT, size=size)

            def off(logs: Any, of: Any = of, seconds: Any = seconds, kept_out: Any = kept_out) -> Any:
                return (np.log(of(np.exp(logs))) - np.log(seconds))[~kept_out]

            fitted = np.exp(least_squares(off, np.log([4e-6, 3e12, 4e14]), loss="soft_l1", f_scale=0.1).x)
            errors = errors_of(of(fitted), seconds, kept_out)
            print(f"{gpu:14} batched {kind:5} {errors}", flush=True)
            if errors["median"] < WORST:
                found[gpu][kind] = {"parameters": [_digits(value) for value in fitted], "kept_out": errors}
    return found


def torch_attention(measured: dict[str, Any]) -> dict[str, Any]:
    """Attention of torch as measured."""
    names = ("batch", "keys", "heads", "kv_heads", "head_dim", "seconds")
    rows: list[Row] = [tuple(row[name] for name in names) for row in measured["attention"]]  # type: ignore[misc]
    kept_out = np.array([row["kept_out"] for row in measured["attention"]])
    fitted = fit_attention(rows, gpu="h100", size=2.0, is_latent=False, kept_out=kept_out)
    print("torch attention", fitted["kept_out"])
    return {"h100": {"grouped/bf16": fitted | {"source": "measured on one H100"}}}


def small_kernels(measured: dict[str, Any]) -> dict[str, Any]:
    """Parameters of every small kernel; several launches that belong together count as one kind."""
    kinds: dict[str, Any] = {}
    off = []
    for kind in dict.fromkeys(row["kind"] for row in measured["small"]):
        rows = [row for row in measured["small"] if row["kind"] == kind and (kind, row["width"]) not in OTHER_KERNELS]
        count, width, seconds = (np.array([row[key] for row in rows], float) for key in ("rows", "width", "seconds"))
        kept_out = np.array([row["kept_out"] for row in rows])
        fitted: dict[str, Any]
        if kind in BY_ROWS:
            used = [(n, np.log(seconds[(count == n) & ~kept_out]).mean()) for n in np.unique(count)]
            fitted = {"points": [[int(n), _digits(math.exp(log))] for n, log in used if not math.isnan(log)]}
        else:
            terms = np.stack([np.ones_like(count), width, count, count * width], axis=1) / seconds[:, None]
            parameters, _ = nnls(terms[~kept_out], np.ones((~kept_out).sum()))
            fitted = {"parameters": [_digits(value) for value in parameters]}
        predicted = np.array([small_seconds(fitted, n, w) for n, w in zip(count, width, strict=True)])
        off += np.log(predicted / seconds)[kept_out].tolist()
        kinds[kind] = {"kernels": rows[0]["kernels"]} | fitted | {"kept_out": errors_of(predicted, seconds, kept_out)}
        print(f"small {kind:14} {kinds[kind]['kept_out']}")
    print(f"all small: median {np.median(np.abs(off)):.1%}, p90 {np.quantile(np.abs(off), 0.9):.1%}")
    return kinds


def gaps(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds by which a GEMM in a row of kernels is shorter than one launched alone: median over few rows."""
    h100 = load_profile("h100")
    alone = {
        "gemm": [(row, Gemm(m=row["m"], k=row["k"], n=row["n"])) for row in measured["gemm"] if row["m"] <= FEW],
        "grouped": [
            (row, GroupedGemm(rows_per_expert=np.array([row["rows_per_expert"]]), k=row["k"], n=row["n"]))
            for row in measured["grouped"]
        ],
    }
    found: dict[str, float] = {}
    for family, rows in alone.items():
        predicted = np.array([float(np.ravel(h100.seconds(kernel).seconds)[0]) for _, kernel in rows])
        seconds = np.array([row["seconds"] for row, _ in rows])
        kept_out = np.array([row["kept_out"] for row, _ in rows])
        short = seconds < 60e-6
        found[family] = _digits(np.median((predicted - seconds)[short & ~kept_out]))
        print(family, "before", errors_of(predicted, seconds, kept_out))
        print(family, f"less {found[family] * 1e6:.2f} us", errors_of(predicted - found[family], seconds, kept_out))
    return found


def host(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds of the host: of a kernel of an eager layer, of a replay, of reading the tokens."""
    bound = [row for row in measured["steps"] if row["eager_seconds"] > 1.5 * row["seconds"]]  # by the host
    kernels, seconds = (np.array([row[key] for row in bound], float) for key in ("kernels", "eager_seconds"))
    kept_out = np.array([row["kept_out"] for row in bound])
    launch = float(np.median((seconds / kernels)[~kept_out]))
    print("eager launch", launch, errors_of(launch * kernels, seconds, kept_out))
    replay = [row["submit"] for row in measured["host"] if row["kind"] == "replay"]
    launches = next(row["seconds"] / row["kernels"] for row in measured["host"] if row["kind"] == "launches")
    readback = next(row["seconds"] for row in measured["host"] if row["kind"] == "readback")
    fixed = {"launch": _digits(launches), "eager_launch": _digits(launch)}
    return fixed | {"replay": _digits(float(np.median(replay))), "readback": _digits(readback)}


def main() -> None:
    """Fit, print, and with --write record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    measured, package = parse_json(unpacked(MEASURED.read_bytes())), Package.found(None)
    found: dict[str, Any] = {
        "sources": {
            "measured": f"{measured['device']}, torch {measured['torch']}, as CUDA graphs",
            "tables": f"{PACKAGE} {package.version}, {LICENCE}",
        },
        "small": {"kinds": small_kernels(measured) | OF_TRANSFORMERS},
        "gap": gaps(measured),
        "host": host(measured),
        "attention": {"torch": torch_attention(measured), "engines": engines(package)},
        "all_reduce": all_reduces(package),
        "experts": fused_experts(package),
        "batched": batched(package),
    }
    check_spread_experts(package, found["experts"])
    if arguments.write:
        by_entry = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda part: " ".join(part[0].split()), json_text(found, indent=1))
        write_atomically(FILE, by_entry.encode())


if __name__ == "__main__":
    main()
