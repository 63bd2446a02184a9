"""Shapes at the edges of the other lists: few rows, narrow outputs, few rows an expert, FP8 experts of short sides.

Half of the shapes, by a checksum of their sizes, are `held_out`: kept out of every fit, all directions on one side.

Legend: m tokens, k and n the sides of the forward weight, E local experts.
"""

import zlib
from collections.abc import Iterator
from typing import Any

from moesim.kernels.families import GEMM_DIRECTIONS, kernel_of
from moesim.seeding import stream

Shape = dict[str, Any]
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


def kept_out(*sizes: Any) -> int:
    """1 for half of all sizes, as for the FP8 shapes of the profile of H100."""
    return zlib.crc32(str(sizes).encode()) % 2


def edge_shapes(count: int) -> list[Shape]:
    """The first `count` shapes in measuring order."""
    rng, shapes = stream(0, "benchmark shapes", "edges"), dict[str, Shape]()
    sorts = (_dense, _dense, _narrow, _grouped, _grouped, _grouped_fp8, _grouped_fp8, _layouts)
    while len(shapes) < count:
        for sort in sorts:
            for shape in sort(rng):
                shapes.setdefault(repr(sorted(shape.items())), shape)
    return list(shapes.values())[:count]


def _products(m: int, k: int, n: int) -> Iterator[Shape]:
    for direction in GEMM_DIRECTIONS:
        row = {"family": "gemm", "dtype": "bf16", "direction": direction, "m": m, "k": k, "n": n}
        yield row | ({"held_out": 1} if kept_out(m, k, n) else {})


def _dense(rng: Any) -> Iterator[Shape]:
    k, n = _MATRICES[rng.integers(len(_MATRICES))]
    yield from _products(int(rng.choice(_FEW)), k, n)


def _narrow(rng: Any) -> Iterator[Shape]:
    k, n = _NARROW[rng.integers(len(_NARROW))]
    yield from _products(int(2 ** rng.uniform(11.5, 15)) // 8 * 8, k, n)


def experts_of(*, dtype: str, rows_E: list[int], k: int, n: int) -> Iterator[Shape]:
    """The three products of experts of these rows."""
    for direction in GEMM_DIRECTIONS:
        sizes: Shape = {"rows_per_expert": rows_E, "k": k, "n": n}
        row = {"family": "grouped_gemm", "dtype": dtype, "direction": direction} | sizes
        yield row | ({"held_out": 1} if kept_out(rows_E, k, n) else {})


def _sides(rng: Any) -> tuple[int, int]:
    hidden, width = int(rng.choice(_HIDDEN)), int(rng.choice(_WIDTHS))
    return (hidden, 2 * width) if rng.random() < 0.5 else (width, hidden)


def shares_of(rng: Any, experts: int) -> Any:
    """Of the rows, each expert's: from very uneven to nearly even."""
    return rng.dirichlet([float(rng.choice((0.5, 4.0, 50.0)))] * experts)


def _grouped(rng: Any) -> Iterator[Shape]:
    experts, (k, n) = int(rng.choice(_EXPERTS)), _sides(rng)
    rows_E = [int(rows) for rows in rng.multinomial(experts * int(rng.choice(_MEAN_ROWS)), shares_of(rng, experts))]
    if experts * k * n <= 1.5e9:
        yield from experts_of(dtype="bf16", rows_E=rows_E, k=k, n=n)


def _grouped_fp8(rng: Any) -> Iterator[Shape]:
    experts = int(rng.choice((4, 8, 16, 32, 64)))
    short, other = int(rng.choice(_FP8_SIDES)), int(rng.choice((1024, 2048, 4096, 7168)))
    k, n = (short, other) if rng.random() < 0.5 else (other, short)
    mean = 2.0 ** rng.uniform(6, 11)
    rows_E = [max(16, int(experts * mean * share) // 16 * 16) for share in shares_of(rng, experts)]
    if experts * k * n <= 1e9 and sum(rows_E) <= 65536:
        yield from experts_of(dtype="fp8", rows_E=rows_E, k=k, n=n)


def _layouts(rng: Any) -> Iterator[Shape]:
    """Products whose weight lies the other way: [k, n] of dense ones, [E, n, k] of experts."""
    (k, n), m = _MATRICES[rng.integers(len(_MATRICES))], int(2 ** rng.uniform(6, 14))
    dense = [] if k * n > 2e8 else list(_products(m, k, n))
    experts, (k, n) = int(rng.choice((8, 16, 32, 64))), _sides(rng)
    rows_E = [int(rows) for rows in rng.multinomial(experts * int(2 ** rng.uniform(3, 12)), shares_of(rng, experts))]
    grouped = [] if experts * k * n > 1e9 else list(experts_of(dtype="bf16", rows_E=rows_E, k=k, n=n))
    for of in [*dense, *grouped]:
        if of["direction"] != "wgrad" and float(kernel_of(of).flops) < 1e13:
            yield of  # as it is stored usually
            yield {"family": LAYOUT, "of": {key: value for key, value in of.items() if key != "held_out"}}
