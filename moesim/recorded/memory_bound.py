"""Memory-bound kernels of recorded operations: which kinds of the profiles they are, and how many bytes of these.

What moves is what an operation reads and writes, with the exceptions that the tables name. Kernels that no profile
holds cost the bytes of a measured one that take as long (`moesim.kernels.unprofiled`).
"""

import math
from collections.abc import Callable

from moesim.kernels.families import MemoryBound, memory_bytes
from moesim.kernels.unprofiled import (
    BINCOUNT_S,
    FEW_BYTES,
    FEW_IDS,
    FEW_S,
    LONG_ROWS,
    ODD_CAT,
    ODD_SOFTMAX,
    ODD_SOFTMAX_BACKWARD,
    PART_OF_ROWS,
    PUT_BYTES,
    REPEATED_S,
    SCAN_S,
    SCATTER_ADD_BYTES,
    SIDE_BY_SIDE_BYTES,
    SINGLY,
    SUMMED_BYTES,
    SUMMED_S,
    TABLE_BYTES,
    TABLE_S,
    WARP_NUMBERS,
    WIDE_SOFTMAX,
    gathered_bytes,
)
from moesim.recorded.step_file import RecordedOp, Seen

# aten operation -> kind of memory-bound kernel; its bytes are those of operands and results
KINDS = {
    "clone": "copy",
    "stack": "copy",
    "silu": "silu",
    "silu_backward": "silu_backward",
    "_log_softmax": "cross_entropy_fp32",
    "sum": "reduce",
    "mean": "reduce",
    "native_layer_norm": "rms_norm",
    "native_layer_norm_backward": "rms_norm_backward",
    "_fused_rms_norm": "rms_norm",
    "_fused_rms_norm_backward": "rms_norm_backward",
}
# Of what is filled, and of what is copied over, nothing is read: what moves is the result, or twice that.
FILLS = {"fill_", "new_ones", "new_zeros", "ones", "ones_like", "zero_", "zeros", "zeros_like"}
OVERWRITES = {"copy_", "split_with_sizes_copy", "_chunk_cat"}
ELEMENTWISE = {
    "_local_scalar_dense", "abs", "add", "add_", "addcmul", "all", "amax", "amin", "any", "arange", "bitwise_and",
    "bitwise_not", "clamp", "clamp_", "complex", "constant_pad_nd", "cos",
    "div", "div_", "eq", "exp", "floor_divide", "full", "full_like", "ge", "gelu", "gelu_backward", "gt",
    "histc", "le", "lift_fresh_copy", "logical_and", "logical_and_", "logical_not", "logical_or", "lt", "masked_fill_",
    "max",
    "maximum", "min", "minimum", "mul", "mul_", "native_dropout",
    "native_dropout_backward", "ne", "neg", "one_hot", "polar", "pow", "randint", "relu",
    "remainder", "repeat", "rsqrt", "rsub", "scalar_tensor", "select_scatter", "sigmoid", "sigmoid_",
    "sigmoid_backward", "sin", "sqrt", "sub", "sub_", "tanh", "tanh_backward", "threshold_backward",
    "tril", "triu", "view_as_complex", "where",
}  # fmt: skip
# Reads of a few rows out of many: what moves is the result, twice. Writes of rows into a larger tensor: the rows, and
# where the result is a new tensor this one, too.
GATHERS = {"index", "index_select", "gather", "embedding"}
SCATTERS = {"scatter", "scatter_"}
PADDED = {"slice_backward", "select_backward"}  # a new tensor of zeros with the rows in it


PADDING = 0.1  # rows more than places, at most, that are taken to be padding

# Elementwise operations whose kernels depend on how their operands lie in memory.
LAID_OUT = ELEMENTWISE | {"_to_copy", "cat", "clone", "silu", "silu_backward"}


def memory_kernels(op: RecordedOp) -> tuple[list[MemoryBound], float, bool]:
    """The kernels of an operation, seconds beside them that follow no size, and whether the tables know it."""
    if op.name in SPECIAL:
        kernels, seconds = SPECIAL[op.name](op)
        return kernels, seconds, True
    read, written = _bytes(op.reads), _bytes(op.writes)
    if op.name in GATHERS:
        return [_gathered(op, written)], 0.0, True
    if op.name in SCATTERS:
        rows = min((size for shape, _, size in op.reads if len(shape) > 1), default=0)
        new = 0.0 if op.name.endswith("_") else 2.0 * written
        return [MemoryBound("permute", 2.0 * rows + new)], 0.0, True
    if op.name in PADDED:
        part = op.reads and op.writes and op.reads[0][0][-1:] != op.writes[0][0][-1:]
        copied = 2.0 * min(read, written) * (PART_OF_ROWS if part else 1.0)
        return [MemoryBound("zero", float(written)), MemoryBound("copy", copied)], 0.0, True
    if op.name in FILLS:
        return [MemoryBound("zero", float(written))], 0.0, True
    if op.name in OVERWRITES:
        return [MemoryBound("copy", 2.0 * written)], 0.0, True
    if op.name in KINDS and not (op.name in LAID_OUT and op.facts.get("strided")):
        return [MemoryBound(KINDS[op.name], float(read + written))], 0.0, True
    return [_elementwise(op)], 0.0, op.name in ELEMENTWISE or op.name in KINDS


def _gathered(op: RecordedOp, written: int) -> MemoryBound:
    """Rows of the first operand, or single numbers of it."""
    if op.name == "gather":
        return MemoryBound("permute", 2.0 * written)
    return MemoryBound("copy", float(gathered_bytes(written, of=op.reads[0][2], row_bytes=1.0)))


def _bytes(tensors: tuple[Seen, ...]) -> int:
    return sum(size for _, _, size in tensors)


def _numbers(seen: Seen) -> int:
    return math.prod(seen[0])


def _elementwise(op: RecordedOp) -> MemoryBound:
    """One number of the result after the other where operands are broadcast or lie in different orders."""
    sizes = {_numbers(seen) for seen in (*op.reads, *op.writes) if _numbers(seen) > 1}
    if len(sizes) < 2 and not op.facts.get("strided"):
        return MemoryBound("elementwise", float(_bytes(op.reads) + _bytes(op.writes)))
    largest = max((*op.writes, *op.reads), key=_numbers)
    return MemoryBound("mul", _singly(largest))


def _singly(seen: Seen) -> float:
    return max(_numbers(seen), 1) * SINGLY[ITEM_BYTES.get(seen[1], 4)]


ITEM_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "int64": 8, "float64": 8}
Special = tuple[list[MemoryBound], float]


def _table_gradient(op: RecordedOp) -> Special:
    """Zeros of the whole table, and the rows of gradients added up by their ids."""
    gradient, ids = op.reads[:2]
    zeros, number, rows = MemoryBound("zero", float(_bytes(op.writes))), _numbers(gradient), _numbers(ids)
    if rows <= FEW_IDS:
        return [zeros, MemoryBound("elementwise", FEW_BYTES * number)], FEW_S * rows
    return [zeros, MemoryBound("elementwise", TABLE_BYTES * number)], TABLE_S


def _index_put(op: RecordedOp) -> Special:
    rows = op.reads[-1] if len(op.reads) > 1 else op.reads[0]
    if op.works == "backward":  # added up
        return [MemoryBound("elementwise", SUMMED_BYTES * _numbers(rows))], SUMMED_S + REPEATED_S * _repeated(op)
    copied = [] if op.name.endswith("_") else [MemoryBound("copy", 2.0 * _bytes(op.writes))]
    return [*copied, MemoryBound("elementwise", PUT_BYTES * _numbers(rows))], 0.0


def _repeated(op: RecordedOp) -> float:
    """How many rows are added to the same one at most, beyond the first: evenly many; where there are a few more than
    places, these are padding and all go to one.
    """
    places, rows = (op.writes or op.reads)[0][0], op.reads[-1][0]
    if not places or not rows or not places[0]:
        return 0.0
    more = rows[0] - places[0]
    return max(rows[0] / places[0], float(more if more < PADDING * places[0] else 0.0)) - 1.0 if more > 0 else 0.0


def _odd_rows(seen: Seen) -> bool:
    """Whether rows of 16-bit numbers begin at no multiple of 16 bytes."""
    return ITEM_BYTES.get(seen[1], 4) == 2 and len(seen[0]) > 1 and seen[0][-1] % 8 > 0 and seen[0][-1] > WARP_NUMBERS


def _index_add(op: RecordedOp) -> Special:
    rows = max(op.reads[1:], key=_numbers)
    copied = [] if op.name.endswith("_") else [MemoryBound("copy", 2.0 * _bytes(op.writes))]
    *_, width = rows[0]
    return [
        *copied,
        MemoryBound("unpermute", float(memory_bytes("unpermute", rows=_numbers(rows) / width, width=width))),
    ], 0.0


def _scatter_add(op: RecordedOp) -> Special:
    rows = op.reads[-1]
    copied = [] if op.name.endswith("_") else [MemoryBound("copy", 2.0 * _bytes(op.writes))]
    return [*copied, MemoryBound("elementwise", SCATTER_ADD_BYTES * _numbers(rows))], 0.0


def _cat(op: RecordedOp) -> Special:
    """A copy; number by number where pieces of rows that lie apart are put side by side in the last dimension."""
    whole = float(_bytes(op.reads) + _bytes(op.writes))
    if not op.facts.get("strided"):
        return [MemoryBound("copy", whole * (ODD_CAT if op.writes and _odd_rows(op.writes[0]) else 1.0))], 0.0
    return [MemoryBound("elementwise", SIDE_BY_SIDE_BYTES * sum(map(_numbers, op.reads)))], 0.0


def _cast(op: RecordedOp) -> Special:
    """To a narrower format all numbers of a load at once; to a wider one as it was measured."""
    if op.facts.get("strided"):
        return [_elementwise(op)], 0.0
    whole = float(_bytes(op.reads) + _bytes(op.writes))
    narrower = _bytes(op.writes) < _bytes(op.reads[:1])
    return [MemoryBound("elementwise" if narrower else "cast", whole)], 0.0


def _topk(op: RecordedOp) -> Special:
    *rows, width = op.reads[0][0]
    return [MemoryBound("topk", float(memory_bytes("topk", rows=math.prod(rows), width=width)))], 0.0


def _sort(op: RecordedOp) -> Special:
    """One long row of ids; many short ones as a search of the largest."""
    *rows, width = op.reads[0][0] or (1,)
    if math.prod(rows) > 1:
        return _topk(op)
    return [MemoryBound("sort", float(memory_bytes("sort", rows=width)))], 0.0


def _softmax(op: RecordedOp) -> Special:
    whole = float(_bytes(op.reads) + _bytes(op.writes))
    long = op.reads[0][0][-1:] > (WARP_NUMBERS,)
    odd = ODD_SOFTMAX if _odd_rows(op.reads[0]) else 1.0
    return [MemoryBound("softmax", whole * (WIDE_SOFTMAX if long else 1.0) * odd)], 0.0


def _softmax_backward(op: RecordedOp) -> Special:
    whole = float(_bytes(op.reads) + _bytes(op.writes))
    return [MemoryBound("softmax_backward", whole * (ODD_SOFTMAX_BACKWARD if _odd_rows(op.reads[0]) else 1.0))], 0.0


def _log_softmax_backward(op: RecordedOp) -> Special:
    whole = float(_bytes(op.reads) + _bytes(op.writes))
    long = op.reads[0][0][-1:] > (WARP_NUMBERS,)
    return [MemoryBound("softmax_backward", whole * (LONG_ROWS if long else 1.0))], 0.0


def _masked_fill(op: RecordedOp) -> Special:
    return [MemoryBound("copy", 2.0 * _bytes(op.writes)), _elementwise(op)], 0.0


def _scan(op: RecordedOp) -> Special:
    """Sums along the last dimension at the memory's pace, along another step by step."""
    return [_elementwise(op)], SCAN_S * op.facts.get("steps", 0)


SPECIAL: dict[str, Callable[[RecordedOp], Special]] = {
    "_foreach_copy_": lambda op: ([MemoryBound("cast", 2.0 * _bytes(op.writes))], 0.0),
    "_log_softmax_backward_data": _log_softmax_backward,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "_to_copy": _cast,
    "argsort": _sort,
    "bincount": lambda op: ([_elementwise(op)], BINCOUNT_S),
    "cat": _cat,
    "cumsum": _scan,
    "embedding_dense_backward": _table_gradient,
    "index_add": _index_add,
    "index_add_": _index_add,
    "index_put": _index_put,
    "index_put_": _index_put,
    "masked_fill": _masked_fill,
    "nll_loss_backward": lambda op: ([MemoryBound("zero", float(_bytes(op.writes)))], 0.0),  # but for a number a row
    "nll_loss_forward": lambda op: ([MemoryBound("elementwise", 64.0 * op.reads[-1][2])], 0.0),  # a cache line a row
    "scatter_add": _scatter_add,
    "scatter_add_": _scatter_add,
    "sort": _sort,
    "topk": _topk,
}
MEMORY_BOUND = GATHERS | SCATTERS | PADDED | FILLS | OVERWRITES | ELEMENTWISE | KINDS.keys() | SPECIAL.keys()
