"""What kernels cost that no profile holds, over their plain sisters: ratios measured by themselves on an H100.

`python tools/measure_unprofiled.py` and `tools/measure_row_moves.py` measure them,
tests/data/odd_kernels_h100.json.gz and row_moves_h100.json.gz keep the rows of these numbers; those that are marked
come from traced steps of the first size of 13 programs (`python tools/measure_library_steps.py`). Other GPUs are taken
to have the same ratios.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from moesim.kernels.families import FloatArray
from moesim.kernels.physics import PAGE

# A GEMM in which rows of some matrix begin at multiples of 2, 4 or 8 bytes, and not of 16 (a vocabulary of 50,257
# in bf16: 2), over the aligned one.
UNALIGNED: Mapping[int, Mapping[str, float]] = {
    2: {"forward": 7.9, "dgrad": 5.7, "wgrad": 5.3},
    4: {"forward": 2.8, "dgrad": 3.3, "wgrad": 2.9},
    8: {"forward": 2.9, "dgrad": 3.3, "wgrad": 2.95},
}
UNALIGNED_BATCH = 2.0  # of a batch of them (traced)
# Causal attention that draws a random number for each score, over that without.
DROPOUT: Mapping[str, float] = {"forward": 2.2, "backward": 1.2}
# Sums into rows by places that are sorted first (the backward pass of `x[ids]`): seconds of the sort's passes, and the
# bytes of an elementwise kernel that take as long as one added element does, whatever its format.
SUMMED_S, SUMMED_BYTES = 5e-5, 8.0
# The gradient of a table of rows: zeros over all of it, a sort of the ids, and their rows added up; up to FEW_IDS ids
# by another kernel, which has no sort and takes the ids one behind the other.
TABLE_S, TABLE_BYTES = 1.15e-4, 36.0
FEW_IDS, FEW_S, FEW_BYTES = 3072, 4.4e-8, 8.0  # seconds and bytes of each id, and of each of its numbers
# Kernels that take number by number, since operands are broadcast or lie in memory in another order: the bytes of the
# measured row scaling (`mul`) that take as long as one number of the result, by its own bytes (traced).
SINGLY: Mapping[int, float] = {1: 4.0, 2: 4.0, 4: 5.0, 8: 8.0}
# Writes of rows by their places, and of rows behind each other in the last dimension: bytes of an elementwise kernel
# per number, whatever its format.
PUT_BYTES, SIDE_BY_SIDE_BYTES = 13.5, 12.5
# Rows added to rows at places of the same shape (`scatter_add`), bytes per number.
SCATTER_ADD_BYTES = 12.0
# The gradient of log-softmax over a vocabulary in fp32, over the bytes of that of short rows (traced).
LONG_ROWS = 0.675
# Softmax of 16-bit numbers whose rows are too long for the registers of a warp, over that of short ones.
WARP_NUMBERS, WIDE_SOFTMAX = 1024, 2.0
# Rows of 16-bit numbers that begin at no multiple of 16 bytes (scores beside a sink: 2,049 of them), over aligned ones:
# softmax, its gradient, and rows that are joined (traced).
ODD_SOFTMAX, ODD_SOFTMAX_BACKWARD, ODD_CAT = 1.9, 1.23, 1.44
# A copy into a part of each row of a larger tensor, over one of whole rows (traced).
PART_OF_ROWS = 1.8
# Rows that are added to one row follow each other: seconds of each, on the row that most are added to (traced).
REPEATED_S = 9.5e-7
# Batches of GEMMs whose depth is 1, and of those of one row, over the bytes that they move (traced).
OUTER_BATCH, ROW_BATCH = 5.5, 1.8
# The gradient of a gated activation that torch compiled, over an elementwise kernel of its bytes; and gradients in bf16
# that are added to a buffer in fp32 (traced, Megatron-Core 0.19 without Transformer Engine).
COMPILED_BACKWARD, ADDED_WIDE = 1.3, 1.23
BINCOUNT_S = 7.2e-5  # counts, behind which the host waits for the largest
SCAN_S = 1.75e-7  # of each step along a dimension that is not the last
# Rows that are gathered take as long as a copy of what the memory moves. Of so many bytes of source half is still in
# the L2 when a row is read again (fitted to half of 234 gathers).
HELD_BYTES = 22e6
# Keys of latent attention joined from their parts, or taken apart, over a copy of what they read and write.
JOINED = 1.06
# Torch's fused AdamW takes the weights in launches of so many tensors, each in blocks of so many numbers: seconds of a
# launch, and of a block, which is as long as the launch where blocks are few.
ADAM_TENSORS, ADAM_BLOCK, ADAM_LAUNCH_S, ADAM_BLOCK_S = 36, 65536, 3e-6, 41e-6


def gathered_bytes(rows: ArrayLike, *, of: ArrayLike, row_bytes: float) -> FloatArray:
    """What the memory moves where `rows` rows are gathered from `of` different ones.

    Each is written; of the source each row is read once, and again as often as it is wanted and no longer in the L2.
    In whole pages, see `in_one_kernel`.
    """
    rows_R, of_R = np.asarray(rows, float), np.asarray(of, float)
    read_R = np.minimum(rows_R, of_R)
    missed_R = 1.0 / (1.0 + (HELD_BYTES / np.maximum(row_bytes * of_R, 1.0)) ** 2)
    return in_one_kernel(row_bytes * (rows_R + read_R + (rows_R - read_R) * missed_R))


def in_one_kernel(moved_bytes: ArrayLike) -> FloatArray:
    """Bytes that a kernel reads and writes, as a copy of whole pages moves them: a part of a page costs the driver's
    copy a second kernel, and a kernel that gathers or joins nothing."""
    return np.ceil(np.asarray(moved_bytes, float) / (2.0 * PAGE)) * 2.0 * PAGE


def adam_floor(parameters: float, tensors: float) -> float:
    """Seconds that a fused step over so many numbers in so many tensors takes at least."""
    share = min(parameters / max(tensors, 1.0), ADAM_BLOCK) / ADAM_BLOCK
    return float(np.ceil(tensors / ADAM_TENSORS) * (ADAM_LAUNCH_S + ADAM_BLOCK_S * share))
