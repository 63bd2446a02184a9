"""Shapes of the lists that came after the first ones, each where those have few or none.

FP8 as training does it, and by DeepGEMM. Edges: few rows, narrow outputs, few rows an expert, FP8 experts of short
sides, weights stored the other way. Between: memory-bound kernels of training sizes at widths of more models, casts of
FP8, FP8 experts and block-scaled GEMMs of some 10 us. Of all but the first half of the shapes, by a checksum of
their sizes, are `held_out`: kept out of every fit, all directions on one side.

Legend: m tokens, k and n the sides of the forward weight, E local experts, R rows, W width.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from moesim.kernels.families import GEMM_DIRECTIONS, MEMORY_KINDS, kernel_of, memory_bytes
from moesim.kernels.fp8 import BLOCK, BLOCK_SCALED, DEEP_GEMM
from moesim.seeding import stream

Shape = dict[str, Any]
CASTS = tuple(kind for kind, facts in MEMORY_KINDS.items() if facts.apart)


def later_shapes(family: str, count: int) -> list[Shape]:
    """The first `count` shapes of one of `LATER` in measuring order."""
    rng, shapes = stream(0, "benchmark shapes", family), dict[str, Shape]()
    while len(shapes) < count:
        for sort in LATER[family]:
            for shape in sort(rng):
                shapes.setdefault(repr(sorted(shape.items())), shape)
    return list(shapes.values())[:count]


def _kept_out(*sizes: Any) -> Shape:
    """Marks half of all sizes, as for the FP8 shapes of the profile of H100."""
    return {"held_out": 1} if zlib.crc32(str(sizes).encode()) % 2 else {}


_FP8_WEIGHT_SIDES = (512, 1024, 1536, 2048, 3072, 4096, 5120, 7168, 8192, 14336, 16384)
_FP8_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_FP8_EXPERTS = ((2048, 1536), (4096, 2048), (7168, 4096), (2048, 7168), (4096, 14336), (2048, 2816))


def _fp8(rng: Any) -> Iterator[Shape]:
    """Dense GEMMs of every recipe and direction, grouped ones, casts."""
    m, k, n = int(rng.choice(_FP8_TOKENS)), int(rng.choice(_FP8_WEIGHT_SIDES)), int(rng.choice(_FP8_WEIGHT_SIDES))
    for dtype in (BLOCK_SCALED, "fp8") if m * k * n <= 5e12 else ():
        for direction in GEMM_DIRECTIONS:
            yield {"family": "gemm_fp8", "dtype": dtype, "direction": direction, "m": m, "k": k, "n": n}
    experts, (k, n) = int(rng.choice((2, 4, 8, 16, 32, 64))), _FP8_EXPERTS[rng.integers(len(_FP8_EXPERTS))]
    rows = int(rng.choice((2048, 8192, 16384, 32768, 65536)))
    rows_E = [max(16, int(rows * share) // 16 * 16) for share in _shares(rng, experts)]
    for direction in GEMM_DIRECTIONS if rows * k * n <= 5e12 and experts * k * n <= 2e9 else ():
        sizes = {"rows_per_expert": rows_E, "k": k, "n": n}
        yield {"family": "grouped_gemm", "dtype": "fp8", "direction": direction} | sizes
    rows = int(rng.choice((2048, 8192, 32768, 65536)))
    for cast in CASTS:
        width = int(rng.choice((1024, 2048, 4096, 7168)))
        moved = float(memory_bytes(cast, rows=rows, width=width))
        yield {"family": "memory_bound", "kind": cast, "rows": rows, "width": width, "bytes": moved}


def _shares(rng: Any, experts: int) -> Any:
    """Of the rows, each expert's: from very uneven to nearly even."""
    return rng.dirichlet([float(rng.choice((0.5, 4.0, 50.0)))] * experts)


_DEEP_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_DEEP_MATRICES = (
    (7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168), (7168, 36864), (18432, 7168),
    (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (2048, 3072), (1408, 2048), (2048, 2816), (5120, 12288),
)  # fmt: skip
_DEEP_EXPERTS = (
    (7168, 4096), (2048, 7168), (4096, 4096), (2048, 4096), (2048, 1536), (768, 2048), (2048, 2816), (5120, 3072),
    (1536, 5120), (4096, 28672), (14336, 4096),
)  # fmt: skip


def _deep_gemm(rng: Any) -> Iterator[Shape]:
    m, (k, n) = int(rng.choice(_DEEP_TOKENS)), _DEEP_MATRICES[rng.integers(len(_DEEP_MATRICES))]
    dense = {"m": m, "k": k, "n": n} | _kept_out(m, k, n)
    experts, (k, n) = int(rng.choice((2, 4, 8, 16, 32))), _DEEP_EXPERTS[rng.integers(len(_DEEP_EXPERTS))]
    rows = int(2 ** rng.uniform(9, 16))
    shares_E = rng.dirichlet([float(rng.choice((1.0, 8.0, 100.0)))] * experts)
    rows_E = [int(value) for value in rng.multinomial(rows, shares_E)]
    grouped = {"rows_per_expert": rows_E, "k": k, "n": n} | _kept_out(rows_E, k, n)
    fits = experts * k * n <= 1e9 and rows * k * n <= 4e12
    for sizes in (dense, grouped) if fits else (dense,):
        for direction in GEMM_DIRECTIONS:
            yield {"family": DEEP_GEMM, "dtype": BLOCK_SCALED, "direction": direction} | sizes


_FEW = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
# (k, n) of qkv, output, FFN, down projection, experts, vocabulary of real models.
_MATRICES = (
    (1024, 3072), (2048, 2560), (2048, 2048), (2048, 1536), (768, 2048), (2048, 102400), (2880, 5120), (4096, 6144),
    (4096, 4096), (4096, 28672), (14336, 4096), (5120, 8192), (5120, 1536), (1536, 5120), (7168, 2112), (7168, 4096),
    (2048, 7168), (1536, 24576), (16384, 7168), (8192, 10240), (8192, 1024), (1024, 8192), (7168, 129280),
)  # fmt: skip
_NARROW = ((512, 2048), (768, 2048), (1024, 1024), (2048, 512), (2048, 1536), (4096, 1024), (7168, 2112), (8192, 2560))
_HIDDEN = (1024, 2048, 2880, 4096, 5120, 7168, 8192)
_WIDTHS = (512, 768, 1024, 1408, 1536, 2048, 2880, 4096)
_EXPERTS = (8, 16, 32, 64, 128)
_MEAN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FP8_SIDES = (512, 768, 1024, 1408, 1536, 1792)  # an expert's side that is short for torch's rule
LAYOUT = "weight_layout"  # family of rows whose `of` ran with the weight stored the other way


def _gemms(m: int, k: int, n: int) -> Iterator[Shape]:
    for direction in GEMM_DIRECTIONS:
        row = {"family": "gemm", "dtype": "bf16", "direction": direction, "m": m, "k": k, "n": n}
        yield row | _kept_out(m, k, n)


def _dense(rng: Any) -> Iterator[Shape]:
    k, n = _MATRICES[rng.integers(len(_MATRICES))]
    yield from _gemms(int(rng.choice(_FEW)), k, n)


def _narrow(rng: Any) -> Iterator[Shape]:
    k, n = _NARROW[rng.integers(len(_NARROW))]
    yield from _gemms(int(2 ** rng.uniform(11.5, 15)) // 8 * 8, k, n)


def _experts(*, dtype: str, rows_E: list[int], k: int, n: int) -> Iterator[Shape]:
    """The three GEMMs of experts of these rows."""
    for direction in GEMM_DIRECTIONS:
        sizes: Shape = {"rows_per_expert": rows_E, "k": k, "n": n}
        row = {"family": "grouped_gemm", "dtype": dtype, "direction": direction} | sizes
        yield row | _kept_out(rows_E, k, n)


def _sides(rng: Any) -> tuple[int, int]:
    hidden, width = int(rng.choice(_HIDDEN)), int(rng.choice(_WIDTHS))
    return (hidden, 2 * width) if rng.random() < 0.5 else (width, hidden)


def _grouped(rng: Any) -> Iterator[Shape]:
    experts, (k, n) = int(rng.choice(_EXPERTS)), _sides(rng)
    rows_E = [int(rows) for rows in rng.multinomial(experts * int(rng.choice(_MEAN_ROWS)), _shares(rng, experts))]
    if experts * k * n <= 1.5e9:
        yield from _experts(dtype="bf16", rows_E=rows_E, k=k, n=n)


def _short_fp8_experts(rng: Any) -> Iterator[Shape]:
    experts = int(rng.choice((4, 8, 16, 32, 64)))
    short, other = int(rng.choice(_FP8_SIDES)), int(rng.choice((1024, 2048, 4096, 7168)))
    k, n = (short, other) if rng.random() < 0.5 else (other, short)
    mean = 2.0 ** rng.uniform(6, 11)
    rows_E = [max(16, int(experts * mean * share) // 16 * 16) for share in _shares(rng, experts)]
    if experts * k * n <= 1e9 and sum(rows_E) <= 65536:
        yield from _experts(dtype="fp8", rows_E=rows_E, k=k, n=n)


def _layouts(rng: Any) -> Iterator[Shape]:
    """GEMMs whose weight lies the other way: [k, n] of dense ones, [E, n, k] of experts."""
    (k, n), m = _MATRICES[rng.integers(len(_MATRICES))], int(2 ** rng.uniform(6, 14))
    dense = [] if k * n > 2e8 else list(_gemms(m, k, n))
    experts, (k, n) = int(rng.choice((8, 16, 32, 64))), _sides(rng)
    rows_E = [int(rows) for rows in rng.multinomial(experts * int(2 ** rng.uniform(3, 12)), _shares(rng, experts))]
    grouped = [] if experts * k * n > 1e9 else list(_experts(dtype="bf16", rows_E=rows_E, k=k, n=n))
    for of in [*dense, *grouped]:
        if of["direction"] != "wgrad" and float(kernel_of(of).flops) < 1e13:
            yield of  # as it is stored usually
            yield {"family": LAYOUT, "of": {key: value for key, value in of.items() if key != "held_out"}}


_MODEL_WIDTHS = (
    1024,
    1152,
    1280,
    1536,
    2048,
    2304,
    2560,
    2880,
    3072,
    3584,
    4096,
    4608,
    5120,
    6144,
    6656,
    7168,
    8192,
)
_VOCABULARIES = (8000, 32000, 50304, 65536, 100352, 102400, 128256, 129280, 151936, 152064, 163840, 200064)
_CHOICES = (8, 16, 32, 64, 96, 128, 160, 256, 384, 512)  # experts, of a router's softmax
_FFN = (512, 768, 1024, 1408, 1536, 2048, 2816, 3072, 4096, 8192, 11008, 14336)
_WIDTHS_OF = {
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), _VOCABULARIES),
    **dict.fromkeys(("cross_entropy_fp32", "cross_entropy_fp32_backward"), _VOCABULARIES),
    **dict.fromkeys(("softmax", "softmax_backward"), _CHOICES),
    **dict.fromkeys(("silu", "silu_backward", "activation", "activation_backward"), _FFN),
}
_KINDS = (
    "copy", "elementwise", "reduce", "rms_norm", "rms_norm_backward", "permute", "unpermute_backward", "embedding",
    "embedding_backward", "index_put", "silu", "silu_backward", "activation", "activation_backward", "mul_backward",
    "softmax", "softmax_backward", *(kind for kind in _WIDTHS_OF if kind.startswith("cross")),
)  # fmt: skip
_BYTES = 5e5, 1.5e9  # of memory-bound kernels
_SIDES = (512, 768, 1024, 1408, 1536, 2048, 2816, 4096, 7168)


def _row(kind: str, rows: int, width: int) -> Shape:
    moved = float(memory_bytes(kind, rows=rows, width=width))
    row = {"family": "memory_bound", "kind": kind, "rows": rows, "width": width, "bytes": moved}
    return row | _kept_out(kind, rows, width)


def _memory(rng: Any) -> Iterator[Shape]:
    for kind in _KINDS:
        width = int(rng.choice(_WIDTHS_OF.get(kind, _MODEL_WIDTHS)))
        low, high = _BYTES
        moved = low * (high / low) ** rng.random()
        rows = max(1, round(moved / float(memory_bytes(kind, rows=1, width=width))))
        # A model has some thousand tokens, or such a count cut by a sequence's end.
        yield _row(kind, rows if rows < 16 or rng.random() < 0.5 else rows // 16 * 16, width)


def _casts(rng: Any) -> Iterator[Shape]:
    for kind in CASTS:
        width = int(rng.choice((512, 1024, 1536, 2048, 2816, 4096, 7168, 14336)))
        rows = int(2 ** rng.uniform(8, 16)) // BLOCK * BLOCK
        if memory_bytes(kind, rows=rows, width=width) <= 2 * _BYTES[1]:
            yield _row(kind, rows, width)


def _fp8_experts(rng: Any) -> Iterator[Shape]:
    experts, k, n = int(rng.choice((2, 4, 8, 16, 32, 64))), int(rng.choice(_SIDES)), int(rng.choice(_SIDES))
    mean = 2.0 ** rng.uniform(4, 11)
    rows_E = [max(16, int(experts * mean * share) // 16 * 16) for share in _shares(rng, experts)]
    if experts * k * n <= 1e9 and sum(rows_E) <= 65536:
        yield from _experts(dtype="fp8", rows_E=rows_E, k=k, n=n)


def _blocks(rng: Any) -> Iterator[Shape]:
    m, k, n = int(2 ** rng.uniform(8, 14)) // BLOCK * BLOCK, int(rng.choice(_SIDES)), int(rng.choice(_SIDES))
    k, n = k // BLOCK * BLOCK, n // BLOCK * BLOCK
    for direction in GEMM_DIRECTIONS if m * k * n <= 1e11 else ():
        row = {"family": "gemm_fp8", "dtype": BLOCK_SCALED, "direction": direction, "m": m, "k": k, "n": n}
        yield row | _kept_out(m, k, n)


LATER: dict[str, tuple[Callable[[Any], Iterator[Shape]], ...]] = {
    "fp8": (_fp8,),
    DEEP_GEMM: (_deep_gemm,),
    "edges": (_dense, _dense, _narrow, _grouped, _grouped, _short_fp8_experts, _short_fp8_experts, _layouts),
    "between": (_memory, _casts, _fp8_experts, _blocks),
}
