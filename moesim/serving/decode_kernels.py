"""Kernels that only serving has: attention of generated tokens, small kernels in a row, all-reduces of small messages.

Their formulas have few parameters, which `tools/fit_decode_kernels.py` fits to kernels measured on an H100
(`tools/measure_decode.py`) and to the tables of aiconfigurator-core, for each kind of GPU. A third of
the rows shaped nothing; what they are off by stands beside the parameters in `decode_kernels.json`.

Legend: D data groups, N kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.scenario import GpuSpec, gpu_spec
from moesim.strict_json import parse_json

FloatArray = NDArray[np.float64]
FILE = Path(__file__).parent / "decode_kernels.json"
HEAD_ROWS = 64  # query heads that one block computes


@cache
def facts() -> dict[str, Any]:
    """The fitted parameters with their sources and errors."""
    found: dict[str, Any] = parse_json(FILE.read_bytes())
    return found


@dataclass(frozen=True, kw_only=True)
class KeyShape:
    """What one key costs on a rank: bytes read, FLOPs of all query heads, and blocks for each request."""

    key_bytes: float
    key_flops: float
    query_bytes: float
    blocks: float


def grouped_shape(heads: Any, kv_heads: Any, head_dim: Any, *, size: float) -> KeyShape:
    """Of grouped queries: keys and values of `size` bytes an element."""
    return KeyShape(
        key_bytes=2 * kv_heads * head_dim * size,
        key_flops=4.0 * heads * head_dim,
        query_bytes=4.0 * heads * head_dim,
        blocks=kv_heads * np.ceil(heads / kv_heads / HEAD_ROWS),
    )


def latent_shape(heads: Any, latent: Any, rope: Any, *, size: float) -> KeyShape:
    """Of absorbed MLA: all heads read the same latents."""
    return KeyShape(
        key_bytes=(latent + rope) * size,
        key_flops=2.0 * heads * (2 * latent + rope),
        query_bytes=2.0 * heads * (2 * latent + rope),
        blocks=np.ceil(heads / HEAD_ROWS),
    )


def attention_seconds(parameters: Any, shape: KeyShape, requests: Any, keys: Any) -> Any:
    """One layer: `requests` tokens with `keys` keys each.

    parameters: floor (s), keys at which it has grown by half of what a split over keys adds to it, seconds of a key in
    turn, seconds of a block, bandwidth (bytes/s), rate (FLOP/s).
    """
    floor, half, in_turn, block, bandwidth, rate = parameters
    read = requests * (keys * shape.key_bytes + shape.query_bytes) / bandwidth
    computed = requests * keys * shape.key_flops / rate
    busy = np.cbrt(read**3 + computed**3)
    return floor * (1.0 + keys / (keys + half)) + in_turn * keys + busy + block * requests * shape.blocks


def fused_experts_seconds(
    parameters: Any, block: int, rows_RE: NDArray[Any], *, hidden: int, width: int, matrices: int, size: float
) -> FloatArray:
    """All routed experts of a rank in an engine's kernels [R]: sorting, both GEMMs, activation, weighted sum.

    parameters: floor (s), seconds of an expert that has rows, bandwidth of rows (bytes/s), bandwidth of weights of
    `size` bytes an element, rate (FLOP/s). Rows of an expert fill up blocks of `block`.
    """
    floor, expert, row_bandwidth, bandwidth, rate = parameters
    weights = matrices * hidden * width
    active_R = np.count_nonzero(rows_RE, axis=-1)
    padded_R = (np.ceil(rows_RE / block) * block).sum(axis=-1)
    busy_R = np.cbrt((active_R * weights * size / bandwidth) ** 3 + (2.0 * padded_R * weights / rate) ** 3)
    moved_R = rows_RE.sum(axis=-1) * (4.0 * hidden + 8.0 * width)
    return np.asarray(floor + expert * active_R + busy_R + moved_R / row_bandwidth)


def batched_seconds(parameters: Any, batch: Any, tokens: Any, k: Any, n: Any, *, size: float) -> Any:
    """A GEMM [tokens, k] x [k, n] for each of a batch; parameters: floor (s), bandwidth, rate.

    Where tables were measured again and again with the same weights, the bandwidth is that of the L2.
    """
    floor, bandwidth, rate = parameters
    read = batch * (k * n + tokens * (k + n)) * size / bandwidth
    return floor + np.cbrt(read**3 + (2.0 * batch * tokens * k * n / rate) ** 3)


def small_seconds(fitted: Mapping[str, Any], rows: float, width: float, *, slower: float = 1.0) -> float:
    """A small kernel in a row of others.

    fitted: points over rows, or floor, seconds of an element of a row, of a row and of an element, which takes `slower`
    times as long on another GPU.
    """
    if "points" in fitted:
        counts, seconds = zip(*fitted["points"], strict=True)
        return float(np.exp(np.interp(np.log(max(rows, 1.0)), np.log(counts), np.log(seconds))))
    floor, across, row, element = fitted["parameters"]
    return float(floor + across * width + row * rows + element * slower * (rows * width))


@dataclass(frozen=True)
class Fitted:
    """Parameters of one family on one GPU, what they rest on, and the entry that they come from."""

    parameters: tuple[float, ...]
    source: str
    entry: Mapping[str, Any]


def fitted_of(family: str, gpu: GpuSpec, *kinds: str, rates: Mapping[int, str]) -> Fitted:
    """Those of the first of `kinds` that a GPU has, else of the GPU that it is like, else of the H100.

    `family`: a path in `decode_kernels.json`, as in "attention/engines". Parameters of another GPU are scaled by the
    ratio of what `rates` says of their places: "memory" or "peak", and are never more than that: a step finds weights
    and keys in memory. Another kind or GPU makes the source "scaled".
    """
    table: Mapping[str, Any] = facts()
    for part in family.split("/"):
        table = table[part]
    for name in (gpu.name, gpu.scaled_from or "h100", "h100"):
        for kind in kinds:
            entry = table.get(name, {}).get(kind)
            if entry is None:
                continue
            base = gpu_spec(name)
            ratios = {
                "memory": gpu.memory_bandwidth / base.memory_bandwidth,
                "peak": gpu.peak_flops["bf16"] / base.peak_flops["bf16"],
            }
            own = (each * ratios.get(rates.get(place, ""), 1.0) for place, each in enumerate(entry["parameters"]))
            computed = "fp8" if "fp8" in kind and "fp8" in gpu.peak_flops else "bf16"
            most = {"memory": gpu.memory_bandwidth, "peak": gpu.peak_flops[computed]}
            own = (min(each, most.get(rates.get(place, ""), each)) for place, each in enumerate(own))
            is_own = name == gpu.name and kind == kinds[0]
            return Fitted(tuple(own), "interpolated" if is_own else "scaled", entry)
    raise AssertionError(f"no kernel of kind {kinds} in {family}")


def attention_of(gpu: GpuSpec, *, stack: str, kind: str) -> Fitted:
    """Attention of a stack of software (`engines`, `torch`), of kind `grouped/bf16`, `latent/fp8`, ...

    Keys in fp8 without rows have the parameters of bf16, and half its bytes. torch has no kernel of absorbed latents.
    """
    wide = kind.split("/")[0] + "/bf16"
    if wide not in facts()["attention"][stack]["h100"]:
        stack = "engines"
    return fitted_of(f"attention/{stack}", gpu, kind, wide, rates={4: "memory", 5: "peak"})


def small_on(gpu: GpuSpec, kind: str, rows: float, width: float) -> float:
    """Seconds of a small kernel: floors as measured on an H100, elements scaled by the bandwidth."""
    slower = gpu_spec("h100").memory_bandwidth / gpu.memory_bandwidth
    return small_seconds(facts()["small"]["kinds"][kind], rows, width, slower=slower)


def small_all_reduce(gpu: GpuSpec, ranks: int, size: float) -> float | None:
    """Seconds of an engine's own all-reduce in a node; None where there is no table of it."""
    for name in (gpu.name, gpu.scaled_from or ""):
        points = facts()["all_reduce"].get(name, {}).get(str(ranks))
        if points:
            sizes, seconds = zip(*points, strict=True)
            if size > sizes[-1]:
                return None
            return float(np.exp(np.interp(np.log(max(size, 1.0)), np.log(sizes), np.log(seconds))))
    return None
