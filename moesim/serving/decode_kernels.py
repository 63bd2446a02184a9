"""Kernels that only serving has: attention of generated tokens, small kernels in a row, all-reduces of small messages.

Their formulas have few parameters, which `tools/fit_decode_kernels.py` fits to kernels measured on an H100
(`tools/measure_decode_kernels.py`) and to the tables of aiconfigurator-core, for each kind of GPU. A third of
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
    """Parameters of one family on one GPU, and what they rest on."""

    parameters: tuple[float, ...]
    source: str


def attention_of(gpu: GpuSpec, *, stack: str, kind: str) -> Fitted:
    """Those of a stack of software (`engines`, `torch`) for kind `grouped/bf16`, `latent/fp8`, ... on a GPU.

    A GPU without rows has those of the one that it is like, or of the H100, with bandwidth and rate scaled to its own;
    keys in fp8 without rows those of bf16, whose bytes are half as many ("scaled").
    """
    table, wide = facts()["attention"][stack], kind.split("/")[0] + "/bf16"
    for name in (gpu.name, gpu.scaled_from or "h100", "h100"):
        for known in (kind, wide):
            if known not in table.get(name, {}):
                continue
            floor, half, in_turn, block, bandwidth, rate = table[name][known]["parameters"]
            if name == gpu.name:
                parameters = (floor, half, in_turn, block, bandwidth, rate)
                return Fitted(parameters, "interpolated" if known == kind else "scaled")
            base = gpu_spec(name)
            memory = gpu.memory_bandwidth / base.memory_bandwidth
            peak = gpu.peak_flops["bf16"] / base.peak_flops["bf16"]
            return Fitted((floor, half, in_turn, block, bandwidth * memory, rate * peak), "scaled")
    if stack != "engines":
        return attention_of(gpu, stack="engines", kind=kind)  # torch has no kernel of absorbed latents
    raise AssertionError(f"no attention of kind {kind}")


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
