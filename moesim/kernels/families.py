"""A kernel as a value: its family, its sizes, its number format and its direction; what it computes and what it moves.

Sizes may be arrays, one value per rank: FLOPs, bytes and seconds then have their shape. `direction` says which GEMM
of a layer it is: m, k, n stay those of the forward one, so that a gradient finds the rows that were measured of it.

Bytes are those that the algorithm must move: every input read once, every output written once (also where a library
kernel moves more: its measured efficiency is then lower). A fused kernel that torch does not have is described by the
memory-bound kind `elementwise` with the bytes it moves.

Legend: R ranks, E local experts.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import UserError

FloatArray = NDArray[np.float64]
GemmDirection = Literal["forward", "dgrad", "wgrad"]
AttentionDirection = Literal["forward", "backward"]

GEMM_DIRECTIONS: tuple[GemmDirection, ...] = ("forward", "dgrad", "wgrad")
ATTENTION_DIRECTIONS: tuple[AttentionDirection, ...] = ("forward", "backward")
DTYPE_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0}
DTYPE_BYTES |= {"mxfp8": 1.0 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
"""Bytes of an operand's element: `fp8` with one scale for all, `fp8_block` with one for 1 x 128 or 128 x 128 (whose
bytes do not count), `mxfp8` with one byte for 32, `nvfp4` with one for 16."""
OUTPUT_BYTES = 2.0  # GEMMs write bf16, also those of fp8 operands


def peak_format(dtype: str) -> str:
    """The number format under which a data sheet states the peak of such GEMMs."""
    return {"fp8_block": "fp8", "nvfp4": "fp4"}.get(dtype, dtype)


def chip_format(dtype: str) -> str:
    """The units that GEMMs of a dtype run on: fp8 whatever their scales are, or fp4."""
    return {"mxfp8": "fp8"}.get(dtype, peak_format(dtype))


def is_narrow(dtype: str) -> bool:
    """Whether operands have a byte or less, and so need casts around their GEMMs."""
    return DTYPE_BYTES[dtype] < DTYPE_BYTES["bf16"]


def gemm_sides(m: Any, k: Any, n: Any, direction: str) -> tuple[Any, Any, Any]:
    """(rows, columns, depth) of the GEMM that runs for a layer [m, k] x [k, n]: its forward, dgrad or wgrad."""
    return {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[direction]


@dataclass(frozen=True)
class Gemm:
    """Y[m, n] = X[m, k] W[k, n], or its gradients dX = dY W^T (dgrad) and dW = X^T dY (wgrad)."""

    m: ArrayLike
    k: ArrayLike
    n: ArrayLike
    dtype: str = "bf16"
    direction: GemmDirection = "forward"

    @property
    def flops(self) -> FloatArray:
        """2 m k n, in every direction."""
        return np.asarray(2.0 * np.asarray(self.m, float) * np.asarray(self.k, float) * np.asarray(self.n, float))

    @property
    def moved_bytes(self) -> FloatArray:
        """Both operands read once and the result written once."""
        sides = gemm_sides(self.m, self.k, self.n, self.direction)
        rows, columns, depth = (np.asarray(side, float) for side in sides)
        operands = (rows * depth + depth * columns) * DTYPE_BYTES[self.dtype]
        return np.asarray(operands + rows * columns * OUTPUT_BYTES)


@dataclass(frozen=True)
class GroupedGemm:
    """One launch over all local experts, rows_per_expert [E] or [R, E]; weights are [E, k, n] in every direction."""

    rows_per_expert: ArrayLike
    k: int
    n: int
    dtype: str = "bf16"
    direction: GemmDirection = "forward"

    @property
    def flops(self) -> FloatArray:
        """2 k n for every row."""
        rows_R = np.asarray(self.rows_per_expert, float).sum(-1)
        return np.asarray(2.0 * rows_R * float(self.k) * float(self.n))

    @property
    def moved_bytes(self) -> FloatArray:
        """Activations of all rows, and weights of the experts that have rows.

        wgrad writes the gradient of every expert that has rows; torch hands back one zero-filled tensor for the others,
        whose bytes count too.
        """
        rows_RE, k, n = np.asarray(self.rows_per_expert, float), self.k, self.n
        rows_R, size = rows_RE.sum(-1), DTYPE_BYTES[self.dtype]
        if self.direction == "wgrad":
            return np.asarray(rows_R * (k + n) * size + rows_RE.shape[-1] * k * n * OUTPUT_BYTES)
        read, written = (k, n) if self.direction == "forward" else (n, k)
        active_R = np.count_nonzero(rows_RE, axis=-1)
        return np.asarray(rows_R * (read * size + written * OUTPUT_BYTES) + active_R * (k * n * size))


@dataclass(frozen=True)
class Attention:
    """Fused attention of `heads` query heads, forward or backward (all three gradients at once).

    `head_dim` is that of queries and keys, `value_dim` that of values.
    """

    batch: ArrayLike
    sequence: ArrayLike
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool = True
    dtype: str = "bf16"
    direction: AttentionDirection = "forward"

    @property
    def flops(self) -> FloatArray:
        """Q K^T and P V forward; backward recomputes Q K^T and adds dP, dV, dQ, dK. Causal attention skips half."""
        width = self.head_dim + self.value_dim
        if self.direction == "backward":
            width = 3 * self.head_dim + 2 * self.value_dim
        squares = np.asarray(self.batch, float) * np.square(np.asarray(self.sequence, float))
        return np.asarray(2.0 * self.heads * width * (squares * (0.5 if self.causal else 1.0)))

    @property
    def moved_bytes(self) -> FloatArray:
        """Queries, keys, values and output once; backward also the output's gradient, and it writes three gradients."""
        width = (self.heads + self.kv_heads) * (self.head_dim + self.value_dim)
        if self.direction == "backward":
            width = 2 * width + self.heads * self.value_dim
        tokens = np.asarray(self.batch, float) * np.asarray(self.sequence, float)
        return np.asarray(tokens * width * DTYPE_BYTES[self.dtype])


@dataclass(frozen=True)
class MemoryKind:
    """What a kind is in torch; bytes = rows * width * per_element + rows * per_row.

    `searches`: it sorts, counts or adds to places that its values name, many times slower than its bytes would be.
    `apart`: a Triton kernel of this project beside FP8 GEMMs, measured with the family fp8. `clock`: how strongly
    its seconds fall with the clock that a step's load leaves, though it moves many bytes: of optimizer steps behind
    0.25 s of GEMMs on an H100 (tests/kernels/test_regimes.py). `bandwidth`: the power of the memory's
    bandwidth that its rate follows from H100 to H200, whose SMs are the same (median of rows from 100 us on; 1 where
    that is 0.88 or more); the rest of the limit is theirs. `formula`: the kind of class (`KINDS` of
    `moesim.kernels.kernel_classes`) that says what its seconds are made of.
    """

    what: str
    per_element: float
    per_row: float = 0.0
    searches: bool = False
    apart: bool = False
    clock: float = 0.0
    bandwidth: float = 1.0
    formula: str = "memory_bound"


MIDDLE = 0.7  # of `bandwidth`, the median of kinds measured on both GPUs; for kinds measured on one
MEMORY_KINDS: dict[str, MemoryKind] = {
    "copy": MemoryKind("bf16 copy", 4, formula="memory_copy"),
    "elementwise": MemoryKind("bf16 out = a + b; stands for any fused elementwise kernel", 6),
    "mul": MemoryKind("bf16 rows times one number each", 4, bandwidth=0.1),
    "mul_backward": MemoryKind(
        "gradients of rows times one number each: of the rows and of the numbers", 10, 4, bandwidth=0.5
    ),
    "zero": MemoryKind("fill with zeros, bf16", 2, bandwidth=0.1),
    "cast": MemoryKind("bf16 to fp32", 6, bandwidth=0.2),
    "reduce": MemoryKind("sum of bf16 rows into one value each", 2, 2),
    "rms_norm": MemoryKind("torch.nn.functional.rms_norm of bf16 rows", 4, bandwidth=0.65),
    "rms_norm_backward": MemoryKind("gradients of rows and weight", 6, bandwidth=0.8),
    "permute": MemoryKind("index_select of bf16 rows; rows are those written", 4, 8, bandwidth=0.75),
    "permute_backward": MemoryKind("index_add of the gathered rows into zeros", 6, 8, bandwidth=0.0),
    "unpermute": MemoryKind("index_add of bf16 rows into tokens; rows are those read", 6, 8, bandwidth=0.0),
    "unpermute_backward": MemoryKind(
        "index_select of the tokens' gradients; rows are those written", 4, 8, bandwidth=0.7
    ),
    "index_put": MemoryKind(
        "backward of x[index]: bf16 rows summed into zeros by sorted index", 6, 8, searches=True, bandwidth=0.0
    ),
    "silu": MemoryKind("bf16 silu", 4, bandwidth=0.75),
    "silu_backward": MemoryKind("bf16 gradient of silu", 6),
    "activation": MemoryKind(
        "silu(a) * b of the halves of [rows, 2 width] in eager torch: two kernels", 6, bandwidth=0.15
    ),
    "activation_backward": MemoryKind("gradients of both halves in eager torch", 10, bandwidth=0.45),
    "softmax": MemoryKind("fp32 softmax over width", 8, bandwidth=0.65),
    "softmax_backward": MemoryKind("fp32 gradient of softmax", 12),
    "topk": MemoryKind("fp32 top-8 over width, values and indices", 4, 96, searches=True, bandwidth=0.0),
    "sort": MemoryKind("stable argsort of int64 ids; width 1", 16, searches=True, bandwidth=0.25),
    "histogram": MemoryKind("counts of int64 ids by scatter_add; width 1", 8, searches=True, bandwidth=0.0),
    "cross_entropy": MemoryKind("mean cross entropy of bf16 logits over width", 4, bandwidth=0.7),
    "cross_entropy_backward": MemoryKind("gradient of bf16 logits", 4, bandwidth=0.65),
    "cross_entropy_fp32": MemoryKind("mean cross entropy of fp32 logits over width", 8, bandwidth=0.75),
    "cross_entropy_fp32_backward": MemoryKind("gradient of fp32 logits", 8, bandwidth=0.75),
    "quantise": MemoryKind("bf16 to fp8 (e4m3) cast", 3, bandwidth=0.3),
    "fp8_cast": MemoryKind(
        "bf16 to fp8 with a scale for 1 x 128, along rows", 3 + 4 / 128, apart=True, bandwidth=MIDDLE
    ),
    "fp8_cast_both": MemoryKind(
        "bf16 to fp8 along rows and, transposed, along columns", 4 + 8 / 128, apart=True, bandwidth=MIDDLE
    ),
    "fp8_cast_tiles": MemoryKind("bf16 to fp8 with a scale for 128 x 128: weights", 3, apart=True, bandwidth=MIDDLE),
    "fp8_turn": MemoryKind(
        "fp8 along rows to fp8 along columns, transposed", 2 + 8 / 128, apart=True, bandwidth=MIDDLE
    ),
    "fp8_widen": MemoryKind("fp8 along rows to bf16", 3 + 4 / 128, apart=True, bandwidth=MIDDLE),
    "fp8_swiglu": MemoryKind(
        "silu(a) * b of bf16 halves to fp8 along rows; width is the result's", 5 + 4 / 128, apart=True, bandwidth=MIDDLE
    ),
    "fp8_swiglu_backward": MemoryKind(
        "gradients of both halves of silu(a) * b, in fp8 along rows and, transposed, along columns; width is dY's",
        10 + 16 / 128,
        apart=True,
        bandwidth=MIDDLE,
    ),
    "largest": MemoryKind("largest magnitude of a bf16 matrix", 2, apart=True, bandwidth=MIDDLE),
    "scaled_cast": MemoryKind("bf16 to fp8 with one scale", 3, apart=True, bandwidth=MIDDLE),
    "scaled_cast_both": MemoryKind("bf16 to fp8 with one scale, and its transpose", 4, apart=True, bandwidth=MIDDLE),
    "embedding": MemoryKind("bf16 rows looked up in a table", 4, 8, bandwidth=0.7),
    "embedding_backward": MemoryKind(
        "bf16 gradient of the table, whose own bytes come on top",
        2,
        8,
        searches=True,
        bandwidth=0.0,
        formula="memory_table",
    ),
    "optimizer_bf16": MemoryKind("fused AdamW; parameter, gradient and both states bf16", 14, clock=0.4, bandwidth=0.5),
    "optimizer_fp32": MemoryKind(
        "fused AdamW; parameter, gradient and both states fp32", 28, clock=0.12, bandwidth=0.8
    ),
}


def _memory_kind(kind: str) -> MemoryKind:
    if kind not in MEMORY_KINDS:
        raise UserError(f"unknown memory-bound kernel {kind!r}; use one of: {', '.join(MEMORY_KINDS)}")
    return MEMORY_KINDS[kind]


def memory_bytes(kind: str, *, rows: ArrayLike, width: ArrayLike = 1) -> FloatArray:
    """Bytes that `kind` moves for `rows` rows of `width` elements. Raises UserError for an unknown kind."""
    entry = _memory_kind(kind)
    rows_R = np.asarray(rows, float)
    return np.asarray(rows_R * np.asarray(width, float) * entry.per_element + rows_R * entry.per_row)


@dataclass(frozen=True)
class MemoryBound:
    """A kernel of one of MEMORY_KINDS that reads and writes `bytes`, as `memory_bytes` counts them.

    `width`, the length of its rows, sharpens the estimate where known. An unknown kind raises UserError.
    """

    kind: str
    bytes: ArrayLike
    width: ArrayLike | None = None

    def __post_init__(self) -> None:
        _memory_kind(self.kind)

    @property
    def flops(self) -> FloatArray:
        """None that count."""
        return np.zeros(())

    @property
    def moved_bytes(self) -> FloatArray:
        """Read plus written."""
        return np.asarray(self.bytes, float)


Kernel = Gemm | GroupedGemm | Attention | MemoryBound

FAMILIES: dict[str, type[Kernel]] = {  # of the rows of a profile
    "gemm": Gemm,
    "gemm_fp8": Gemm,
    "grouped_gemm": GroupedGemm,
    "attention": Attention,
    "memory_bound": MemoryBound,
}
FAMILY_OF: dict[type[Kernel], str] = {kind: family for family, kind in reversed(FAMILIES.items())}


def error_family(kernel: Kernel) -> str:
    """Whose errors a kernel shares: its family, apart `gemm fp8` (mxfp8, fp4), `grouped_gemm fp8` and
    `memory_bound searching`."""
    family = FAMILY_OF[type(kernel)]
    if isinstance(kernel, MemoryBound):
        return f"{family} searching" if MEMORY_KINDS[kernel.kind].searches else family
    return _family_of_format(family, kernel.dtype)


def _family_of_format(family: str, dtype: str) -> str:
    return f"{family} {peak_format(dtype)}" if is_narrow(dtype) else family


def families_without_units(formats: Collection[str]) -> set[str]:
    """Whose errors hold for no GEMM of a chip with peaks of these `formats`, as its data sheet names them."""
    gemms = FAMILY_OF[Gemm], FAMILY_OF[GroupedGemm]
    lacking = [dtype for dtype in DTYPE_BYTES if is_narrow(dtype) and peak_format(dtype) not in formats]
    return {_family_of_format(family, dtype) for family in gemms for dtype in lacking}


def kernel_of(row: Mapping[str, Any]) -> Kernel:
    """The kernel that a row of a profile is about, from its family and sizes.

    Rows of a library (`deep_gemm`) are of experts where they say what rows these have, else of dense GEMMs.
    """
    of_library = GroupedGemm if "rows_per_expert" in row else Gemm
    family = FAMILIES.get(row["family"], of_library)
    return family(**{field.name: row[field.name] for field in fields(family) if field.name in row})
