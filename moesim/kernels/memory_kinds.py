"""The kernels limited by memory: what each kind is in PyTorch, and which bytes are counted for it.

Bytes are those that the algorithm must move: every input read once, every output written once (also where a library
kernel moves more: its measured efficiency is then lower). A fused kernel that torch does not have is described by
`elementwise` with the bytes it moves.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moesim.errors import UserError
from moesim.kernels.estimate import FloatArray


@dataclass(frozen=True)
class MemoryKind:
    """bytes = rows * width * per_element + rows * per_row."""

    what: str
    per_element: float
    per_row: float = 0.0


MEMORY_KINDS: dict[str, MemoryKind] = {
    "copy": MemoryKind("bf16 copy", 4),
    "elementwise": MemoryKind("bf16 out = a + b; stands for any fused elementwise kernel", 6),
    "mul": MemoryKind("bf16 rows times one number each", 4),
    "mul_backward": MemoryKind("gradients of rows times one number each: of the rows and of the numbers", 10, 4),
    "zero": MemoryKind("fill with zeros, bf16", 2),
    "cast": MemoryKind("bf16 to fp32", 6),
    "reduce": MemoryKind("sum of bf16 rows into one value each", 2, 2),
    "rms_norm": MemoryKind("torch.nn.functional.rms_norm of bf16 rows", 4),
    "rms_norm_backward": MemoryKind("gradients of rows and weight", 6),
    "permute": MemoryKind("index_select of bf16 rows; rows are those written", 4, 8),
    "permute_backward": MemoryKind("index_add of the gathered rows into zeros", 6, 8),
    "unpermute": MemoryKind("index_add of bf16 rows into tokens; rows are those read", 6, 8),
    "unpermute_backward": MemoryKind("index_select of the tokens' gradients; rows are those written", 4, 8),
    "silu": MemoryKind("bf16 silu", 4),
    "silu_backward": MemoryKind("bf16 gradient of silu", 6),
    "activation": MemoryKind("silu(a) * b of the halves of [rows, 2 width] in eager torch: two kernels", 6),
    "activation_backward": MemoryKind("gradients of both halves in eager torch", 10),
    "softmax": MemoryKind("fp32 softmax over width", 8),
    "softmax_backward": MemoryKind("fp32 gradient of softmax", 12),
    "topk": MemoryKind("fp32 top-8 over width, values and indices", 4, 96),
    "sort": MemoryKind("stable argsort of int64 ids; width 1", 16),
    "histogram": MemoryKind("counts of int64 ids by scatter_add; width 1", 8),
    "cross_entropy": MemoryKind("mean cross entropy of bf16 logits over width", 4),
    "cross_entropy_backward": MemoryKind("gradient of bf16 logits", 4),
    "cross_entropy_fp32": MemoryKind("mean cross entropy of fp32 logits over width", 8),
    "cross_entropy_fp32_backward": MemoryKind("gradient of fp32 logits", 8),
    "quantise": MemoryKind("bf16 to fp8 (e4m3) cast", 3),
    "embedding": MemoryKind("bf16 rows looked up in a table", 4, 8),
    "embedding_backward": MemoryKind("bf16 gradient of the table, whose own bytes come on top", 2, 8),
    "optimizer_bf16": MemoryKind("fused AdamW; parameter, gradient and both states bf16", 14),
    "optimizer_fp32": MemoryKind("fused AdamW; parameter, gradient and both states fp32", 28),
}


def memory_bytes(kind: str, *, rows: ArrayLike, width: ArrayLike = 1) -> FloatArray:
    """Bytes that `kind` moves for `rows` rows of `width` elements. Raises UserError for an unknown kind."""
    entry = MEMORY_KINDS.get(kind)
    if entry is None:
        raise UserError(f"unknown memory-bound kernel {kind!r}; use one of: {', '.join(MEMORY_KINDS)}")
    rows_R = np.asarray(rows, float)
    return np.asarray(rows_R * np.asarray(width, float) * entry.per_element + rows_R * entry.per_row)
