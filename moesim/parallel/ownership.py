"""Which tokens of a sequence each of the ranks holds that share it under context and tensor parallelism.

Context parallelism cuts a sequence into 2 * context chunks and gives rank c the chunks c and 2 * context - 1 - c, so
that causal attention costs every rank the same (zig-zag, as Megatron-Core and Llama 3 do, arXiv 2407.21783 section
3.3.2). Sequence parallelism then cuts what a context rank holds into one run per tensor rank (arXiv 2205.05198).
Pieces are the runs that both cuts leave whole: sequence length / (2 context tensor) tokens, or / tensor at context 1.

Legend: R ranks that share a sequence (tensor fastest), V pieces of one rank.
"""

import numpy as np
from numpy.typing import NDArray


def pieces_of_ranks(*, context: int, tensor: int) -> NDArray[np.int64]:
    """The pieces of a sequence that each rank holds, in token order: int64 [R, V]; every piece is held once."""
    context_R, tensor_R = np.divmod(np.arange(context * tensor), tensor)
    if context == 1:
        return tensor_R[:, None]
    held_RV = 2 * tensor_R[:, None] + np.arange(2)  # among the 2 * tensor pieces of the context rank's two chunks
    early_RV = context_R[:, None] * tensor + held_RV
    late_RV = (2 * context - 1 - context_R[:, None]) * tensor + held_RV - tensor
    return np.where(held_RV < tensor, early_RV, late_RV)
