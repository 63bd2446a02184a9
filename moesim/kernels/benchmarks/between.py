"""Shapes between and beside those of the other lists, where their rows lie far apart: memory-bound kernels of training
sizes at widths of more models, casts of FP8, FP8 experts and block-scaled products of some 10 us.

Half of the shapes, by a checksum of their sizes, are `held_out`: kept out of every fit.

Legend: R rows, W width, m tokens, k and n the sides of the forward weight, E local experts.
"""

from collections.abc import Iterator
from typing import Any

from moesim.kernels.benchmarks.edges import experts_of, kept_out, shares_of
from moesim.kernels.families import GEMM_DIRECTIONS, MEMORY_KINDS, memory_bytes
from moesim.seeding import stream

Shape = dict[str, Any]
_HIDDEN = (1024, 1152, 1280, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 4608, 5120, 6144, 6656, 7168, 8192)
_VOCABULARIES = (8000, 32000, 50304, 65536, 100352, 102400, 128256, 129280, 151936, 152064, 163840, 200064)
_CHOICES = (8, 16, 32, 64, 96, 128, 160, 256, 384, 512)  # experts, of a router's softmax
_FFN = (512, 768, 1024, 1408, 1536, 2048, 2816, 3072, 4096, 8192, 11008, 14336)
_WIDTHS = {
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), _VOCABULARIES),
    **dict.fromkeys(("cross_entropy_fp32", "cross_entropy_fp32_backward"), _VOCABULARIES),
    **dict.fromkeys(("softmax", "softmax_backward"), _CHOICES),
    **dict.fromkeys(("silu", "silu_backward", "activation", "activation_backward"), _FFN),
}
_KINDS = (
    "copy", "elementwise", "reduce", "rms_norm", "rms_norm_backward", "permute", "unpermute_backward", "embedding",
    "embedding_backward", "index_put", "silu", "silu_backward", "activation", "activation_backward", "mul_backward",
    "softmax", "softmax_backward", *(kind for kind in _WIDTHS if kind.startswith("cross")),
)  # fmt: skip
_BYTES = 5e5, 1.5e9  # of memory-bound kernels
_CASTS = tuple(kind for kind, facts in MEMORY_KINDS.items() if facts.apart)
_BLOCK = 128  # rows and columns that a cast's tile has
_SIDES = (512, 768, 1024, 1408, 1536, 2048, 2816, 4096, 7168)


def between_shapes(count: int) -> list[Shape]:
    """The first `count` shapes in measuring order."""
    rng, shapes = stream(0, "benchmark shapes", "between"), dict[str, Shape]()
    while len(shapes) < count:
        for sort in (_memory, _casts, _grouped_fp8, _blocks):
            for shape in sort(rng):
                shapes.setdefault(repr(sorted(shape.items())), shape)
    return list(shapes.values())[:count]


def _row(kind: str, rows: int, width: int) -> Shape:
    moved = float(memory_bytes(kind, rows=rows, width=width))
    row = {"family": "memory_bound", "kind": kind, "rows": rows, "width": width, "bytes": moved}
    return row | ({"held_out": 1} if kept_out(kind, rows, width) else {})


def _memory(rng: Any) -> Iterator[Shape]:
    for kind in _KINDS:
        width = int(rng.choice(_WIDTHS.get(kind, _HIDDEN)))
        low, high = _BYTES
        moved = low * (high / low) ** rng.random()
        rows = max(1, round(moved / float(memory_bytes(kind, rows=1, width=width))))
        # A model has some thousand tokens, or such a count cut by a sequence's end.
        yield _row(kind, rows if rows < 16 or rng.random() < 0.5 else rows // 16 * 16, width)


def _casts(rng: Any) -> Iterator[Shape]:
    for kind in _CASTS:
        width = int(rng.choice((512, 1024, 1536, 2048, 2816, 4096, 7168, 14336)))
        rows = int(2 ** rng.uniform(8, 16)) // _BLOCK * _BLOCK
        if memory_bytes(kind, rows=rows, width=width) <= 2 * _BYTES[1]:
            yield _row(kind, rows, width)


def _grouped_fp8(rng: Any) -> Iterator[Shape]:
    experts, k, n = int(rng.choice((2, 4, 8, 16, 32, 64))), int(rng.choice(_SIDES)), int(rng.choice(_SIDES))
    mean = 2.0 ** rng.uniform(4, 11)
    rows_E = [max(16, int(experts * mean * share) // 16 * 16) for share in shares_of(rng, experts)]
    if experts * k * n <= 1e9 and sum(rows_E) <= 65536:
        yield from experts_of(dtype="fp8", rows_E=rows_E, k=k, n=n)


def _blocks(rng: Any) -> Iterator[Shape]:
    m, k, n = int(2 ** rng.uniform(8, 14)) // _BLOCK * _BLOCK, int(rng.choice(_SIDES)), int(rng.choice(_SIDES))
    k, n = k // _BLOCK * _BLOCK, n // _BLOCK * _BLOCK
    for direction in GEMM_DIRECTIONS if m * k * n <= 1e11 else ():
        row = {"family": "gemm_fp8", "dtype": "fp8_block", "direction": direction, "m": m, "k": k, "n": n}
        yield row | ({"held_out": 1} if kept_out(m, k, n) else {})
