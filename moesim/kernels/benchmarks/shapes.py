"""Which shapes are benchmarked: a grid over the matrices of real models, and random shapes between and beside them.

Every list is a fixed function of its family, in an order of which any beginning is a fair sample: a benchmark that
runs out of time has seen all regions. Sizes are bounded by `Limits`, so that the same lists serve a GPU and a CPU.

Legend: E local experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from moesim.kernels.benchmarks.later_shapes import LATER, Shape, later_shapes
from moesim.kernels.families import MEMORY_KINDS, FloatArray, kernel_of, memory_bytes
from moesim.seeding import stream

# (k, n) of one forward GEMM: hidden to qkv, output, gated FFN (both halves), down projection, vocabulary.
MODEL_MATRICES = (
    (2048, 2816), (1408, 2048), (2048, 6144), (2048, 2048), (2048, 102400), (2048, 64), (4096, 28672), (14336, 4096),
    (4096, 6144), (4096, 4096), (2048, 1536), (768, 2048), (2048, 151936), (7168, 2112), (1536, 24576), (512, 32768),
    (16384, 7168), (7168, 4096), (2048, 7168), (5120, 12288), (1024, 3072), (1024, 1024), (1024, 50304), (6144, 32768),
    (8192, 28672), (8192, 10240), (2048, 21888), (10944, 2048), (7168, 256), (2048, 576),
)  # fmt: skip
HIDDEN = (1024, 1280, 1536, 2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
EXPERT_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds of one benchmarked call."""

    flops: float
    bytes: float
    optimizer_bytes: float  # one optimizer step moves all of a rank's parameters, far more than any other kernel
    sequences: tuple[int, int]  # powers of two of the shortest and longest attention sequence
    counts: dict[str, int]  # shapes per family


GPU_LIMITS = Limits(
    flops=2.5e13,
    bytes=3e9,
    optimizer_bytes=4.2e10,
    sequences=(9, 15),
    counts={
        "gemm": 2400,
        "gemm_fp8": 560,
        "fp8": 420,
        "edges": 640,
        "between": 1600,
        "deep_gemm": 400,
        "grouped_gemm": 1900,
        "attention": 900,
        "memory_bound": 64,
        "sustained": 100,
    },
)
CPU_LIMITS = Limits(
    flops=2e8,
    bytes=2e7,
    optimizer_bytes=2e7,
    sequences=(4, 7),
    counts={
        "gemm": 8,
        "gemm_fp8": 0,
        "fp8": 0,
        "edges": 0,
        "between": 0,
        "deep_gemm": 0,
        "grouped_gemm": 6,
        "attention": 4,
        "memory_bound": 2,
        "sustained": 0,
    },
)


def kernel_flops(shape: Shape) -> float:
    """FLOPs of one call of a row (with its family) of gemm, grouped_gemm or attention."""
    return float(kernel_of(shape).flops)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _rounded(rng: np.random.Generator, value: float, *, multiples: tuple[int, ...]) -> int:
    multiple = int(rng.choice(multiples))
    return max(multiple, round(value / multiple) * multiple)


def _matrix(rng: np.random.Generator) -> tuple[int, int]:
    """(k, n): half of real models, half random, most but not all multiples of 128."""
    if rng.random() < 0.5:
        k, n = MODEL_MATRICES[rng.integers(len(MODEL_MATRICES))]
        return k, n
    multiples = (128, 128, 64, 32, 16)
    k = _rounded(rng, _log_uniform(rng, 256, 16384), multiples=multiples)
    n = _rounded(rng, _log_uniform(rng, 64, 40000), multiples=multiples)
    return k, n


def _tokens(rng: np.random.Generator, high: float) -> int:
    """Powers of two and arbitrary counts in equal parts."""
    if rng.random() < 0.5:
        return int(2 ** rng.integers(0, int(np.log2(high)) + 1))
    return max(1, round(_log_uniform(rng, 1, high)))


def _gemms(rng: np.random.Generator, limits: Limits, dtype: str) -> Iterator[Shape | None]:
    while True:
        k, n = _matrix(rng)
        m = _tokens(rng, 100_000 if rng.random() < 0.3 else 32768)
        # The regime of training, some thousand tokens, deserves more than a log-uniform share.
        if rng.random() < 0.35:
            m = round(_log_uniform(rng, 1024, 32768))
        direction = "forward" if dtype == "fp8" else str(rng.choice(["forward", "forward", "dgrad", "wgrad"]))
        if dtype == "fp8":
            k, n = max(16, k // 16 * 16), max(16, n // 16 * 16)
        if 2.0 * m * k * n <= limits.flops and 2.0 * (m * k + k * n + m * n) <= limits.bytes:
            yield {"m": m, "k": k, "n": n, "dtype": dtype, "direction": direction}
        else:
            yield None


def _rows_per_expert(rng: np.random.Generator, experts: int, rows: int) -> list[int]:
    """Rows of E experts: equal, multinomial, skewed by a power law or a Dirichlet draw, or with many empty experts."""
    kind = rng.choice(["equal", "multinomial", "zipf", "dirichlet", "sparse", "hot"])
    if kind == "equal":
        return [max(1, rows // experts)] * experts
    shares_E: FloatArray = np.ones(experts)
    if kind == "zipf":
        shares_E = np.asarray(np.arange(1, experts + 1) ** -rng.uniform(0.2, 1.5), float)
    elif kind == "dirichlet":
        shares_E = rng.dirichlet(np.full(experts, rng.choice([0.3, 1.0, 4.0])))
    elif kind == "sparse":
        shares_E[rng.random(experts) < 0.5] = 0.0
    elif kind == "hot":
        shares_E[rng.integers(experts)] = experts * rng.uniform(0.3, 3.0)
    if shares_E.sum() == 0.0:
        shares_E[0] = 1.0
    rows_E = rng.multinomial(rows, rng.permutation(shares_E) / shares_E.sum())
    return [int(value) for value in rows_E]


def _grouped_gemms(rng: np.random.Generator, limits: Limits) -> Iterator[Shape | None]:
    while True:
        experts = int(rng.choice(EXPERT_COUNTS))
        hidden = int(rng.choice(HIDDEN))
        width = _rounded(rng, _log_uniform(rng, 256, 16384), multiples=(128, 128, 64, 16))
        k, n = (hidden, 2 * width) if rng.random() < 0.5 else (width, hidden)
        rows = _tokens(rng, 131072)
        if rng.random() < 0.5:
            rows = round(_log_uniform(rng, 1024, 100_000))
        rows_E = _rows_per_expert(rng, experts, rows)
        total = sum(rows_E)
        direction = str(rng.choice(["forward", "forward", "dgrad", "wgrad"]))
        work = 2.0 * total * k * n
        moved = 2.0 * (total * (k + n) + experts * k * n)
        if work <= limits.flops and moved <= 2 * limits.bytes:
            yield {"rows_per_expert": rows_E, "k": k, "n": n, "dtype": "bf16", "direction": direction}
        else:
            yield None


def _attentions(rng: np.random.Generator, limits: Limits) -> Iterator[Shape | None]:
    while True:
        kind = rng.choice(["mha", "gqa", "mla"])
        low, high = limits.sequences
        sequence = int(2 ** rng.integers(low, high + 1))
        if rng.random() < 0.35:
            sequence = _rounded(rng, _log_uniform(rng, 0.6 * 2**low, 0.75 * 2**high), multiples=(1, 16, 128))
        head_dim = 192 if kind == "mla" else int(rng.choice([64, 128, 128, 128]))
        value_dim = 128 if kind == "mla" else head_dim
        heads = int(rng.choice([4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 128]))
        kv_heads = heads
        if kind == "gqa":
            kv_heads = int(rng.choice([count for count in range(1, heads + 1) if heads % count == 0][:-1]))
        batch = int(2 ** rng.integers(0, 6))
        if rng.random() < 0.2:
            batch = int(rng.integers(1, 12))
        causal = bool(rng.random() < 0.9)
        flops = 2.0 * batch * heads * sequence**2 * (head_dim + value_dim) * 0.5
        moved = 2.0 * batch * sequence * 2 * (heads + kv_heads) * (head_dim + value_dim)
        if flops <= limits.flops / 2.5 and moved <= limits.bytes:
            shape = {"batch": batch, "sequence": sequence, "heads": heads, "kv_heads": kv_heads}
            shape |= {"head_dim": head_dim, "value_dim": value_dim, "causal": causal}
            yield shape | {"direction": "forward"}
            yield shape | {"direction": "backward"}
        else:
            yield None


# Widths that each kind meets in a model; others use the hidden size.
_WIDTHS: dict[str, tuple[int, ...]] = {
    "softmax": (8, 16, 64, 128, 160, 256),
    "topk": (8, 16, 64, 128, 160, 256),
    "cross_entropy": (8000, 32000, 50304, 102400, 129280, 151936),
    "sort": (1,),
    "histogram": (1,),
    "silu": (512, 768, 1408, 2048, 4096, 14336),
    "activation": (512, 768, 1408, 2048, 4096, 14336),
    "optimizer": (1,),
}


def _widths(kind: str) -> tuple[int, ...]:
    for prefix, widths in _WIDTHS.items():
        if kind.startswith(prefix):
            return widths
    return HIDDEN


_LATER = ("index_put",)  # kinds whose shapes come from a stream of their own, so that those of the others stay


def _memory_bound(rng: np.random.Generator, limits: Limits, per_kind: int) -> list[Shape]:
    first = [kind for kind, facts in MEMORY_KINDS.items() if not facts.apart and kind not in _LATER]
    shapes = _stratified(rng, limits, per_kind, first)
    for kind in _LATER:
        shapes += _stratified(stream(0, "benchmark shapes", kind), limits, per_kind, [kind])
    return shapes + _large_optimizers(limits)


def _stratified(rng: np.random.Generator, limits: Limits, per_kind: int, kinds: list[str]) -> list[Shape]:
    shapes = []
    for position in range(per_kind):
        for kind in kinds:
            width = int(rng.choice(_widths(kind)))
            row_bytes = float(memory_bytes(kind, rows=1, width=width))
            high = min(limits.bytes, 1e8 if kind in ("sort", "histogram") else limits.bytes)
            # Stratified over the logarithm of the bytes; the order of strata mixes small and large ones.
            stratum = (position * 7) % per_kind
            share = (stratum + rng.random()) / per_kind
            moved = 2e3 * (high / 2e3) ** share
            # Models' parameters have even lengths; at odd ones the fused optimizer takes half the bandwidth.
            multiple = 64 if kind.startswith("optimizer") else 1
            rows = max(1, round(moved / row_bytes / multiple)) * multiple
            shapes.append({"kind": kind, "rows": rows, "width": width, "bytes": rows * row_bytes})
    return shapes


_OPTIMIZER_STEPS = 6  # sizes between the bound of other kernels and that of the optimizer, both kinds at each


def _large_optimizers(limits: Limits) -> list[Shape]:
    """Optimizer steps beyond the bytes of other kernels, evenly apart in the logarithm of their bytes."""
    if limits.optimizer_bytes <= limits.bytes:
        return []
    sizes = np.geomspace(limits.bytes, limits.optimizer_bytes, _OPTIMIZER_STEPS + 1)[1:]
    kinds = [kind for kind in MEMORY_KINDS if kind.startswith("optimizer")]
    per_row = {kind: float(memory_bytes(kind, rows=1, width=1)) for kind in kinds}
    rows = [(kind, round(size / per_row[kind] / 64) * 64) for size in sizes for kind in kinds]
    return [{"kind": kind, "rows": count, "width": 1, "bytes": count * per_row[kind]} for kind, count in rows]


_MIN_SUSTAINED_FLOPS = 2e10  # shorter kernels wait for the host when nothing else is issued ahead of them


def _sustained(rng: np.random.Generator, limits: Limits) -> Iterator[Shape | None]:
    """Kernels of all three families that compute, each as `of`; a tenth of the usual bound keeps single calls short."""
    small = replace(limits, flops=limits.flops / 10)
    families: dict[str, Iterator[Shape | None]] = {
        "gemm": _gemms(rng, small, "bf16"),
        "grouped_gemm": _grouped_gemms(rng, small),
        "attention": _attentions(rng, small),
    }
    while True:
        for family, candidates in families.items():
            shape = next(candidates)
            of = None if shape is None else {"family": family} | shape
            yield {"of": of} if of is not None and kernel_flops(of) >= _MIN_SUSTAINED_FLOPS else None


def family_shapes(family: str, limits: Limits) -> list[Shape]:
    """The shapes of one family, each once, in measuring order."""
    rng = stream(0, "benchmark shapes", family)
    count = limits.counts[family]
    if family == "memory_bound":
        listed = _memory_bound(rng, limits, count)
        candidates: Iterator[Shape | None] = iter(listed)
        count = len(listed)
    elif family in LATER:
        candidates = iter(later_shapes(family, count))
    elif family == "attention":
        candidates = _attentions(rng, limits)
    elif family == "grouped_gemm":
        candidates = _grouped_gemms(rng, limits)
    elif family == "sustained":
        candidates = _sustained(rng, limits)
    else:
        candidates = _gemms(rng, limits, "fp8" if family == "gemm_fp8" else "bf16")
    chosen: dict[str, Shape] = {}
    for shape in islice(candidates, 200 * count):  # a candidate beyond the limits is None
        if shape is not None:
            chosen.setdefault(repr(sorted(shape.items())), shape)
        if len(chosen) >= count:
            break
    return list(chosen.values())
