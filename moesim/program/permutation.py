"""How rows get in the order of the experts and back, by the switches, on one rank: permute, expand, reduce, unpermute.

    permute    tokens to the rows (or, deduplicated, the copies of tokens) that leave
    expand     what has arrived to the rows of the local experts
    reduce     results back to what arrived
    unpermute  the weighted sum of a token's results
Fused each is a gather of rows or a sum that reads every row once and writes every sum once. Otherwise ids are sorted,
or masks of tokens by experts made, rows gathered, scaled and added by kernels of their own; gradients of a gather are
added into zeros. A dispatch that moves rows itself (DeepEP's kernels) takes tokens where they lie and brings back sums:
permute and unpermute are part of it, and what arrives in FP8 is put in the order of the experts in FP8.

Legend: see `moesim.program.loads`.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.kernels.unprofiled import SUMMED_BYTES, SUMMED_S, gathered_bytes, in_one_kernel
from moesim.program.gemms import DISPATCHED
from moesim.program.host import backward, forward
from moesim.program.loads import LayerLoads
from moesim.program.operations import Operation, compute, readback
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import BF16, FP32, INT64, KernelWriter

MAP_BYTES = 37.0  # per token and expert: gates and map filled, scattered into, and the map as numbers and as flags
FLAG_SORT_BYTES = 24.0  # per flag sorted, of an elementwise kernel (traced)
FLOOR = 4096.0  # bytes of a kernel that takes the least


def _sum_bytes(read_rows: ArrayLike, written_rows: ArrayLike, hidden: int) -> NDArray[np.float64]:
    """A fused weighted sum reads every row once and writes every sum once."""
    return np.asarray((np.asarray(read_rows) + np.asarray(written_rows)) * float(hidden * BF16))


def _summed(w: KernelWriter, name: str, *, values: ArrayLike) -> list[Operation]:
    """`values` numbers added to the rows that ids name, which are sorted first."""
    add = w.moved(name, "elementwise", 0.0, bytes_=SUMMED_BYTES * np.asarray(values, dtype=np.float64))
    passes = compute(w.label(f"{name}.sort"), SUMMED_S, source=add.source, chain=w.chain, launches=0.0)
    return [passes, add]


def _gather(
    w: KernelWriter, name: str, launches: float = 1.0, *, rows: ArrayLike, of: ArrayLike, row_bytes: float
) -> Operation:
    """`rows` rows written from `of` different ones, in another order."""
    return w.moved(name, "copy", launches, bytes_=gathered_bytes(rows, of=of, row_bytes=row_bytes))


def _gathered(
    w: KernelWriter, step: Step, name: str, *, rows: NDArray[Any], of: ArrayLike, width: int, bytes_each: float = BF16
) -> Passes:
    """`rows` rows gathered from `of` rows; backward they are added into as many zeros."""
    zeros = bytes_each * width * np.asarray(of, dtype=np.float64)
    zero = w.backward.moved(name, "zero", backward("index_select"), bytes_=zeros)
    ahead = _gather(w, name, forward("index_select"), rows=rows, of=of, row_bytes=bytes_each * width)
    if step.switches.gather_backward == "index_put":
        return [ahead], [zero, *_summed(w.backward, name, values=rows * float(width))]
    return [ahead], [zero, w.backward.memory(name, "unpermute", 0.0, rows=rows, width=width)]


def _rows_gathered(
    w: KernelWriter, step: Step, name: str, *, rows: NDArray[Any], of: ArrayLike, fused: bool = False
) -> Passes:
    """As `_gathered`, of whole rows; a fused sum of gradients needs no zeros."""
    width = step.model.row_width
    if fused or step.switches.gather_backward == "fused":
        add = w.backward.moved(name, "elementwise", bytes_=_sum_bytes(rows, of, width))
        return [_gather(w, name, forward("index_select"), rows=rows, of=of, row_bytes=BF16 * width)], [add]
    return _gathered(w, step, name, rows=rows, of=of, width=width)


def _masked_on_arrival(step: Step) -> bool:
    """Whether masks are made of copies that have arrived: the dispatch takes tokens as they are."""
    return step.switches.permute == "mask" and step.deduplicated and step.remote


def _leaving(step: Step, loads: LayerLoads) -> NDArray[Any]:
    """Rows, or copies of tokens, that a rank sends; all rows where it sends none."""
    return loads.copies_out_MSR if step.remote else loads.rows_MSR


def permute(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The rows, or copies of tokens, that leave this rank, or stay where it is alone."""
    if step.moves_rows:
        return [], []
    way = "fused" if _masked_on_arrival(step) else step.switches.permute
    out = _leaving(step, loads)
    inside = _masked_on_arrival(step)  # of the dispatch's own kernels
    if way == "fused":
        return _rows_gathered(w, step, "permute", rows=out, of=step.tokens, fused=inside)
    order = {"sort": _sorted_ids, "mask": _masked_ids, "sentinels": _checked_ids}
    ahead = order[way](w, step, out)
    return chain(ahead, _rows_gathered(w, step, "permute.gather", rows=out, of=step.tokens), _emptied(w, step, out))


def _sorted_ids(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """Counts by scatter-add; a stable argsort of the ids; the token of each row."""
    del step
    return [
        w.small("permute.zeros", forward("zeros", "view")),
        w.moved("permute.ones", "zero", forward("zeros"), bytes_=float(INT64) * out),
        w.memory("permute.count", "histogram", forward("plain"), rows=out),
        w.memory("permute.sort", "sort", forward("sort"), rows=out),
        w.moved("permute.tokens", "copy", forward("plain"), bytes_=2.0 * INT64 * out),
    ], []


def _masked_ids(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """A map of tokens by experts turned around; a sort of its flags tells the tokens, and the gates, of each row.

    How many rows each expert has the host reads back.
    """
    places = float(step.tokens * step.model.experts)
    chosen = float(step.tokens * step.model.top_k)

    def each(name: str, kernels: int, bytes_each: float) -> Operation:
        """So many kernels over all places."""
        cost = forward(*["plain"] * kernels)
        return w.moved(name, "elementwise", cost, bytes_=max(places * bytes_each, kernels * FLOOR))

    ahead = [
        each("permute.map", 8, MAP_BYTES),
        each("permute.count", 3, 17.0),
        readback("permute.readback", layer=w.layer),
        each("permute.turn", 2, 2.0 + 2.0 * FP32),
        each("permute.sort", 8, FLAG_SORT_BYTES),
        w.moved("permute.tokens", "elementwise", forward("plain", "gather"), bytes_=(2 * INT64 + 2 * FP32) * out),
    ]
    sorted_ = max(FP32 * places + 3 * FLAG_SORT_BYTES * chosen, 14 * FLOOR)
    back = w.backward.moved("permute.gates", "elementwise", backward("gather", "gather", "gather"), bytes_=sorted_)
    return ahead, [back]


def _checked_ids(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """A sort of the ids, the token and the gate of each row, counts, and which rows belong to no expert."""
    size = float(FP32 if step.switches.gates == "fp32" else BF16)
    ids = float(INT64) * out
    ahead = [
        w.memory("permute.sort", "sort", forward("sort"), rows=out),
        w.moved("permute.tokens", "elementwise", forward("plain"), bytes_=2 * ids),
        w.moved("permute.ids", "cast", forward("cast"), bytes_=1.5 * ids),
        w.small("permute.offsets", forward("plain", "cumsum"), count=2),
        w.moved("permute.check", "elementwise", forward("plain"), bytes_=1.125 * ids),
        w.moved("permute.clamp", "elementwise", forward("plain"), bytes_=2 * ids),
    ]
    gates = _gathered(w, step, "permute.gates", rows=out, of=out, width=1, bytes_each=size)
    return chain((ahead, []), gates)


def _emptied(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """Rows of no expert set to zero in place; backward in a copy."""
    if step.switches.permute != "sentinels":
        return [], []
    each = 2.0 * BF16 * step.model.row_width * out
    return (
        [w.moved("permute.fill", "mul", forward("plain"), bytes_=each)],
        [w.backward.moved("permute.fill", kind, backward("mul") / 2, bytes_=each) for kind in ("copy", "mul")],
    )


def expand(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The rows of the local experts, from the copies that have arrived; where nothing travels, where they end."""
    rows, hidden = loads.rows_MSR, step.model.row_width
    way = step.switches.permute
    if not step.remote:
        if way == "mask" and not step.gathers:
            return _chunks(w, "permute.chunks", rows, hidden)
        return ([w.small("permute.offsets", forward("cumsum"))], []) if way == "sort" else ([], [])
    if way == "fused":
        ahead, back = _rows_gathered(w, step, "expand", rows=rows, of=loads.copies_in_MSR)
        return [_arrived(w, step, "expand", rows, loads)] if step.moves_rows else ahead, back
    if _masked_on_arrival(step):
        gathered = _rows_gathered(w, step, "permute.gather", rows=rows, of=loads.copies_in_MSR)
        return chain(_masked_ids(w, step, rows), gathered)
    if way == "mask":
        return _chunks(w, "permute.chunks", rows, hidden)
    order = [
        w.small("permute.local_ids", forward("plain", "plain", "cumsum"), count=3),
        w.moved("permute.local_rows", "zero", forward("plain"), bytes_=float(INT64) * rows),
        w.moved("permute.local_experts", "copy", forward("index_select"), bytes_=2.0 * INT64 * rows),
        w.memory("permute.local_sort", "sort", forward("sort"), rows=rows),
        w.moved("permute.numbers", "zero", forward("empty", "plain"), bytes_=float(INT64) * rows),
        w.moved("permute.inverse", "elementwise", forward("plain"), bytes_=3.0 * INT64 * rows),
        w.small("permute.offsets", forward("reduce", "cumsum"), count=2),
    ]
    return chain((order, []), _rows_gathered(w, step, "permute.expand", rows=rows, of=rows))


def _arrived(w: KernelWriter, step: Step, name: str, rows: NDArray[Any], loads: LayerLoads) -> Operation:
    """What a dispatch brought in the order of the experts, as it came: FP8 with a scale for 128 where it is."""
    each = DISPATCHED if step.moves_rows and step.quantise and w.recipe is not None else float(BF16)
    return _gather(w, name, rows=rows, of=loads.copies_in_MSR, row_bytes=each * step.model.row_width)


def _chunks(w: KernelWriter, name: str, rows: NDArray[Any], hidden: int) -> Passes:
    """Chunks of rows, by rank and expert, joined in another order."""
    each = in_one_kernel(2.0 * BF16 * hidden * rows)
    return (
        [w.moved(name, "copy", forward("chunk", "cat"), bytes_=each)],
        [w.backward.moved(name, "copy", backward("chunk", "cat"), bytes_=each)],
    )


def reduce(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """What travels back: results in the order of arrival, those of one copy summed where it had several experts."""
    rows, hidden = loads.rows_MSR, step.model.row_width
    if not step.remote:
        in_chunks = step.switches.permute == "mask" and not step.gathers
        return _chunks(w, "permute.restore", rows, hidden) if in_chunks else ([], [])
    if step.switches.permute == "fused":
        return (
            [w.moved("reduce", "elementwise", bytes_=_sum_bytes(rows, loads.copies_in_MSR, hidden))],
            [_arrived(w.backward, step, "reduce", rows, loads)],
        )
    if _masked_on_arrival(step):
        return _added(w, rows, of=loads.copies_in_MSR, hidden=hidden)
    if step.switches.permute == "mask":
        return _chunks(w, "permute.restore", rows, hidden)
    return _rows_gathered(w, step, "permute.restore", rows=rows, of=rows)


def unpermute(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The weighted sum of every token's results."""
    hidden = step.model.row_width
    if step.moves_rows:
        return [], []
    if step.switches.combine == "fused" or _masked_on_arrival(step):
        back = _leaving(step, loads)
        return (
            [w.moved("unpermute", "elementwise", bytes_=_sum_bytes(back, step.tokens, hidden))],
            [_gather(w.backward, "unpermute", rows=back, of=step.tokens, row_bytes=float(BF16 * hidden))],
        )
    out = _leaving(step, loads)
    if step.switches.combine == "sum":
        return chain(_scaled(w, step, out), _summed_in_order(w, step, out))
    add = _added(w, out, of=step.tokens, hidden=hidden)
    if step.switches.gates == "inside":
        return add
    if step.switches.gates == "fp32":
        return chain(_gates(w, out), _scaled(w, step, out), _narrowed(w, out * float(hidden)), add)
    w_back = w.backward
    scale = (
        [w.memory("combine.scale", "mul", forward("mul"), rows=out, width=hidden)],
        [
            w_back.memory("combine.scale", "mul_backward", backward("mul", "mul", "reduce"), rows=out, width=hidden),
            w_back.small("combine.cast", backward("view", "cast")),
        ],
    )
    cast = [w.moved("combine.cast", "cast", forward("cast", "view"), bytes_=float(BF16 + FP32) * out)]
    zeros, added = add[0]
    return [*_gates(w, out)[0], *cast, zeros, *scale[0], added], [*add[1], *scale[1], *_gates(w, out)[1]]


def _added(w: KernelWriter, rows: NDArray[Any], *, of: ArrayLike, hidden: int) -> Passes:
    """`rows` rows added into `of` rows of zeros; backward a gather."""
    zeros = float(BF16) * hidden * np.asarray(of, dtype=np.float64)
    return (
        [
            w.moved("combine.zeros", "zero", forward("zeros"), bytes_=zeros),
            w.memory("combine.add", "unpermute", forward("index_add"), rows=rows, width=hidden),
        ],
        [_gather(w.backward, "combine.add", backward("index_add"), rows=rows, of=of, row_bytes=float(BF16 * hidden))],
    )


def _gates(w: KernelWriter, out: NDArray[Any]) -> Passes:
    """The gate of each row."""
    bytes_ = float(INT64 + 2 * FP32) * out
    return (
        [w.moved("combine.gates", "elementwise", forward("view", "index_select"), bytes_=bytes_)],
        [w.backward.moved("combine.gates", "elementwise", backward("index_select", "view"), bytes_=bytes_)],
    )


def _scaled(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """Rows times their gates, in the format of the gates; backward of either, and the sums of the gates'."""
    values = out * float(step.model.row_width)
    wide = step.switches.gates == "fp32"
    size = float(FP32 if wide else BF16)
    back = w.backward
    narrow = [back.moved("combine.narrow", "cast", backward("cast"), bytes_=(FP32 + BF16) * values)] if wide else []
    return (
        [w.moved("combine.scale", "mul", forward("mul"), bytes_=(BF16 + size) * values)],
        [
            back.moved("combine.scale", "elementwise", backward("mul"), bytes_=(2 * size + BF16) * values),
            back.moved("combine.scale", "mul", backward("mul"), bytes_=2 * size * values),
            *narrow,
            back.moved("combine.scale", "reduce", backward("reduce"), bytes_=size * values),
        ],
    )


def _narrowed(w: KernelWriter, values: NDArray[Any]) -> Passes:
    """fp32 results to bf16."""
    bytes_ = (FP32 + BF16) * values
    return (
        [w.moved("combine.narrow", "cast", forward("cast"), bytes_=bytes_)],
        [w.backward.moved("combine.widen", "cast", backward("cast"), bytes_=bytes_)],
    )


def _summed_in_order(w: KernelWriter, step: Step, out: NDArray[Any]) -> Passes:
    """Rows back in the order of tokens by the inverse of the sort, and a sum over each token's."""
    hidden = step.model.row_width
    wide = step.switches.gates == "fp32"
    size, total = float(FP32 if wide else BF16), float(step.tokens * hidden)
    ids = [w.moved("combine.inverse", "elementwise", forward("plain", "plain"), bytes_=4.0 * INT64 * out)]
    values = out * float(hidden)
    sums = (
        [w.moved("combine.sum", "reduce", forward("reduce"), bytes_=size * (values + total))],
        [w.backward.moved("combine.sum", "copy", backward("reduce"), bytes_=in_one_kernel(size * (values + total)))],
    )
    rows = _gathered(w, step, "combine.rows", rows=out, of=out, width=hidden, bytes_each=size)
    return chain((ids, []), rows, sums, _narrowed(w, np.asarray(total)) if wide else ([], []))
