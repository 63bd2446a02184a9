"""From an operation of a trace to a recorded one: names, number formats, the tensors that it reads and those it writes.

A trace has the dimensions of what is read alone. What is written follows from the memory that the operation asks for,
where it does so as an operation of its own, and else from its rule: the first tensor for changes in place, sums over
their dimensions, and for the rest what the operands broadcast to.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesim.importing.trace_file import CpuOp
from moesim.importing.trace_links import TracedOp
from moesim.recorded.memory_bound import LAID_OUT
from moesim.recorded.pricing import GEMMS, OPTIMIZER, SDPA, knows
from moesim.recorded.step_file import RecordedOp, Seen, gemm_facts, layout_facts, pieces_facts, scan_facts

NAMESPACE = "aten::"
# A number format as a trace names it -> as torch does, and its bytes.
FORMATS = {
    "c10::BFloat16": ("bfloat16", 2),
    "c10::Half": ("float16", 2),
    "float": ("float32", 4),
    "double": ("float64", 8),
    "c10::Float8_e4m3fn": ("float8_e4m3fn", 1),
    "c10::Float8_e5m2": ("float8_e5m2", 1),
    "long int": ("int64", 8),
    "long": ("int64", 8),
    "int": ("int32", 4),
    "short": ("int16", 2),
    "signed char": ("int8", 1),
    "unsigned char": ("uint8", 1),
    "bool": ("bool", 1),
    "c10::complex<float>": ("complex64", 8),
    "c10::complex<double>": ("complex128", 16),
}
# Numbers that stand for formats in concrete inputs.
NUMBERED = {"0": "uint8", "3": "int32", "4": "int64", "5": "float16", "6": "float32", "7": "float64", "9": "complex64"}
NUMBERED |= {"11": "bool", "15": "bfloat16", "23": "float8_e5m2", "24": "float8_e4m3fn"}
BYTES = dict(FORMATS.values())
NOT_TENSORS = {"", "Scalar", "ScalarList"}
LIST = "TensorList"
SCATTER = "reduce_scatter"
ACCUMULATION = "torch::autograd::AccumulateGrad"
ALIASES = {"_index_put_impl_": "index_put_"}
# Gradients that are added in place in the backward pass; a recorded step has the form that makes a new tensor.
IN_PLACE = {"_index_put_impl_": "index_put", "index_put_": "index_put", "add_": "add", "scatter_": "scatter"}
COMPARISONS = {"all", "any", "eq", "ge", "gt", "le", "lt", "ne", "logical_and", "logical_not", "logical_or", "isin"}
REDUCTIONS = {"sum", "mean", "amax", "amin", "all", "any", "prod", "var", "norm", "linalg_vector_norm", "logsumexp"}


@dataclass(frozen=True, kw_only=True)
class AttentionArguments:
    """At which place of an operation's arguments queries, mask, share of dropout and flag of causality stand."""

    query: int
    mask: int | None
    dropout: int
    causal: int


ATTENTION = {
    "scaled_dot_product_attention": AttentionArguments(query=0, mask=3, dropout=4, causal=5),
    "_scaled_dot_product_flash_attention": AttentionArguments(query=0, mask=None, dropout=3, causal=4),
    "_scaled_dot_product_efficient_attention": AttentionArguments(query=0, mask=3, dropout=5, causal=6),
    "_scaled_dot_product_cudnn_attention": AttentionArguments(query=0, mask=3, dropout=5, causal=6),
    "_scaled_dot_product_flash_attention_backward": AttentionArguments(query=1, mask=None, dropout=10, causal=11),
    "_scaled_dot_product_efficient_attention_backward": AttentionArguments(query=1, mask=4, dropout=9, causal=11),
    "_scaled_dot_product_cudnn_attention_backward": AttentionArguments(query=1, mask=8, dropout=13, causal=14),
}


def knows_traced(name: str) -> bool:
    """Whether the price list knows an operation by the name that a trace gives it."""
    bare = name.removeprefix(NAMESPACE)
    return name.startswith(NAMESPACE) and (bare in ATTENTION or knows(ALIASES.get(bare, bare)))


def parameters_seen(ops: Sequence[CpuOp], *, micro_batches: int) -> Seen:
    """The parameters that a rank updates as one tensor: the shapes of what is accumulated for each micro-batch, or what
    is left of it for one rank where gradients are reduced and scattered.
    """
    found = [op for op in ops if op.name == ACCUMULATION and op.dims]
    scattered = [op.message for op in ops if op.message and SCATTER in str(op.message.get("Collective name"))]
    count = sum(math.prod(op.dims[0]) for op in found)
    if scattered:
        count = sum(int(message.get("Out msg nelems", 0)) for message in scattered)
    count //= max(micro_batches, 1)
    formats = [FORMATS.get(op.types[0], ("float32", 4))[0] for op in found if op.types]
    return _seen((count,), max(set(formats), key=formats.count, default="float32"))


def recorded(traced: TracedOp, *, parameters: Seen) -> RecordedOp:
    """The operation as a recorded step has it; `parameters`, where the trace leaves a long list of them out."""
    bare = traced.op.name.removeprefix(NAMESPACE)
    facts: dict[str, Any] = {}
    reads = _tensors(traced)
    if bare in ATTENTION:
        at = ATTENTION[bare]
        facts, reads = _attention_facts(traced.op, at), reads[at.query : at.query + 3]
        writes: tuple[Seen, ...] = reads
    elif bare == OPTIMIZER:
        weights = [tensor for tensor in _tensors(traced, only=0) if tensor[0]] or [parameters]
        facts = {"parameters": sum(math.prod(shape) for shape, _, _ in weights)}
        reads = writes = (((facts["parameters"],), weights[0][1], sum(size for _, _, size in weights)),)
    else:
        writes = _written(bare, traced, reads)
        facts = _gemm_facts(traced.op, reads) if bare in GEMMS else _layout_facts(traced.op, bare)
    return RecordedOp(
        name=SDPA if bare in ATTENTION else _name(bare, traced.phase),
        phase=traced.phase,
        module=traced.module,
        reads=reads,
        writes=writes,
        facts=facts,
    )


def _name(bare: str, phase: str) -> str:
    renamed = IN_PLACE if phase == "backward" else ALIASES
    return renamed.get(bare, bare)


def _gemm_facts(op: CpuOp, reads: Sequence[Seen]) -> dict[str, Any]:
    """As a recorded step has them: the operands are the last two tensors, the result has their outer sizes."""
    size = BYTES[reads[0][1]]
    matrices = [(dims, steps) for dims, steps in zip(op.dims, op.strides, strict=False) if dims][-2:]
    columns = reads[-1][0][-1]
    shapes, strides = [dims for dims, _ in matrices] + [(2,)], [steps for _, steps in matrices] + [(columns,)]
    return gemm_facts(shapes, strides, element_bytes=size)


def _layout_facts(op: CpuOp, bare: str) -> dict[str, Any]:
    if bare == "cumsum" and op.dims and len(op.concrete) > 1 and str(op.concrete[1]).lstrip("-").isdigit():
        return scan_facts(op.dims[0], int(op.concrete[1]))
    if bare not in LAID_OUT:
        return {}
    if bare == "cat":
        return pieces_facts(op.dims[0], op.strides[0]) if op.dims and op.strides and op.types[0] == LIST else {}
    tensors = [
        (dims, steps)
        for dims, steps, kind in zip(op.dims, op.strides, op.types, strict=False)
        if kind not in NOT_TENSORS and kind != LIST and all(isinstance(step, int) for step in steps)
    ]
    result = [(dims, _contiguous(dims)) for dims, _ in tensors[:1] if bare == "clone"]
    return layout_facts(*zip(*tensors, *result, strict=True)) if tensors else {}


def _contiguous(dims: Sequence[int]) -> list[int]:
    return [math.prod(dims[place + 1 :]) for place in range(len(dims))]


def _attention_facts(op: CpuOp, at: AttentionArguments) -> dict[str, Any]:
    masked = at.mask is not None and len(op.dims) > at.mask and bool(op.dims[at.mask])
    causal = len(op.concrete) > at.causal and op.concrete[at.causal] == "True"
    dropped = len(op.concrete) > at.dropout and re.fullmatch(r"[0.]*", str(op.concrete[at.dropout])) is None
    return {"causal": masked or causal} | ({"dropout": True} if dropped else {})


def _tensors(traced: TracedOp, *, only: int | None = None) -> tuple[Seen, ...]:
    """The tensors that an operation is given, lists of them in their order; `only`: those of one argument."""
    op, found = traced.op, []
    for place, (dims, kind) in enumerate(zip(op.dims, op.types, strict=False)):
        if kind in NOT_TENSORS or (only is not None and place != only):
            continue
        strides = op.strides[place] if place < len(op.strides) else ()
        if kind == LIST or any(isinstance(each, tuple) for each in dims):
            name = next((FORMATS[other][0] for other in op.types if other in FORMATS), _listed_format(traced.kernel))
            each = strides if len(strides) == len(dims) else ((),) * len(dims)
            found += [_seen(shape, name, stride) for shape, stride in zip(dims, each, strict=True)]
        else:
            found.append(_seen(dims, FORMATS.get(kind, ("float32", 4))[0], strides))
    return tuple(found)


def _seen(shape: Sequence[int], dtype: str, strides: Sequence[int] = ()) -> Seen:
    """A dimension of stride 0 repeats what is held once."""
    known = len(strides) == len(shape) and all(isinstance(stride, int) for stride in strides)
    held = strides if known else (1,) * len(shape)
    number = math.prod(size for size, stride in zip(shape, held, strict=True) if stride)
    return tuple(shape), dtype, number * BYTES[dtype]


def _listed_format(kernel: str) -> str:
    """The format of the tensors of a list, which a trace does not say: from the arguments of the kernel's template."""
    opaque = re.search(r"OpaqueType<(\d+)u?>", kernel)
    if opaque:
        return {"1": "uint8", "2": "bfloat16", "4": "float32", "8": "int64"}.get(opaque[1], "float32")
    for word, name in (("BFloat16", "bfloat16"), ("Half", "float16"), ("double", "float64")):
        if word in kernel:
            return name
    return "float32"


def _written(bare: str, traced: TracedOp, reads: Sequence[Seen]) -> tuple[Seen, ...]:
    if not reads:
        return tuple(found for found in (_allocated(traced.inner, "float32"),) if found)
    first = reads[0]
    if bare.endswith("_") or bare.startswith("_foreach"):
        return (first,) if not bare.startswith("_foreach") else tuple(reads[: len(traced.op.dims[0])])
    if bare in ("split_with_sizes_copy", "_chunk_cat"):  # all of it is moved; the trace lists the result, too
        return tuple(_tensors(traced, only=0))
    if bare == "_to_copy":
        return (_seen(first[0], _numbered(traced.op.concrete, 1) or first[1]),)
    if bare in GEMMS and len(reads) > 1:
        return (_seen((*reads[-2][0][:-1], reads[-1][0][-1]), reads[-1][1]),)
    if bare == "cat":
        return (_joined(traced.op, reads),)
    if bare == "embedding_dense_backward":
        rows = traced.op.concrete[2] if len(traced.op.concrete) > 2 else ""
        return (_seen((int(rows) if str(rows).isdigit() else 1, first[0][-1]), first[1]),)
    if bare in ("gather", "index_select"):
        return (_seen(reads[1][0], first[1]),)
    if bare == "embedding":
        return (_seen((*reads[1][0], first[0][-1]), first[1]),)
    if bare == "index":
        strided = next((op.concrete[1] for op in traced.inner if op.name == "aten::as_strided"), None)
        return (_seen(_numbers(strided), first[1]),) if strided else (first,)
    if bare == "native_dropout":
        return (first, _seen(first[0], "bool"))  # and which elements are kept
    if bare in REDUCTIONS:
        return (_reduced(bare, traced.op, first),)
    return (_allocated(traced.inner, first[1]) or _broadcast(bare, reads),)


def _allocated(inner: Sequence[CpuOp], dtype: str) -> Seen | None:
    """The first tensor for which an operation asks for memory."""
    for op in inner:
        if op.name in ("aten::empty", "aten::empty_strided") and op.concrete and _numbers(op.concrete[0]):
            place = 1 if op.name == "aten::empty" else 2
            return _seen(_numbers(op.concrete[0]), _numbered(op.concrete, place) or dtype)
    return None


def _joined(op: CpuOp, reads: Sequence[Seen]) -> Seen:
    shape: list[int] = max((list(shape) for shape, _, _ in reads), key=len)
    dim = int(str(op.concrete[1])) if len(op.concrete) > 1 and str(op.concrete[1]).lstrip("-").isdigit() else 0
    if not shape or not -len(shape) <= dim < len(shape):
        return _seen((sum(math.prod(shape) for shape, _, _ in reads),), reads[0][1])
    shape[dim] = sum(each[dim] for each, _, _ in reads if len(each) == len(shape))
    return _seen(shape, reads[0][1])


def _reduced(bare: str, op: CpuOp, first: Seen) -> Seen:
    shape, dtype, _ = first
    over = _numbers(op.concrete[1]) if len(op.concrete) > 1 else ()
    axes = {axis % len(shape) for axis in over} if shape else set()
    left = tuple(size for axis, size in enumerate(shape) if axis not in axes) if axes else ()
    return _seen(left, "bool" if bare in COMPARISONS else dtype)


def _broadcast(bare: str, reads: Sequence[Seen]) -> Seen:
    length = max(len(shape) for shape, _, _ in reads)
    padded = [(1,) * (length - len(shape)) + shape for shape, _, _ in reads]
    shape = tuple(max(sizes) for sizes in zip(*padded, strict=True))
    widest = max(reads, key=lambda read: (bool(read[0]), "float" in read[1], BYTES[read[1]]))[1]
    return _seen(shape, "bool" if bare in COMPARISONS else widest)


def _numbers(text: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"-?\d+", text)) if isinstance(text, str) else ()


def _numbered(concrete: Sequence[Any], place: int) -> str | None:
    return NUMBERED.get(str(concrete[place])) if len(concrete) > place else None
