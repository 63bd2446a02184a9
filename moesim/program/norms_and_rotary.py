"""Norms with the sums around them, by the switch `norm`, and rotary embedding of queries and keys, by `rotary`.

Unfused, as transformers' modules write an RMS norm: to fp32, square, mean, two kernels on a number a row, product with
that, to bf16, product with the weight; backward sixteen kernels for these eight.

Rotary embedding of N numbers of a tensor, in bytes; backward the like, and where the tensor was in the order of heads a
copy to tokens'.
    fused     one kernel: read and written once, 4 N
    cached    over tables that the step makes once: two products, the negated half, a concatenation, a sum, as in
              transformers; in pairs, as latent attention's, four products of halves, difference, sum, concatenation
    complex   to fp32, a product of complex numbers, and back (torchtitan)
    unfused   tables made in every layer, four products of halves, difference, sum, concatenation (torch_eager)
"""

from collections.abc import Callable

from moesim.program.host import backward, forward
from moesim.program.operations import Operation
from moesim.program.sizes import Passes, Step
from moesim.program.writer import BF16, FP32, KernelWriter, accumulated, reordered
from moesim.results.spans import Part

CAST = BF16 + FP32
# (kind, bytes per value, operations of autograd) of the kernels that see all values; those of a number a row apart.
UNFUSED = (
    ("cast", CAST, "cast"),
    ("elementwise", 2 * FP32, "mul"),
    ("reduce", FP32, "reduce"),
    ("mul", 2 * FP32, "mul"),
    ("cast", CAST, "cast"),
    ("mul", 2 * BF16, "mul"),
)
UNFUSED_BACKWARD = (
    ("mul", 2 * BF16, "mul"),
    ("elementwise", 3 * BF16, "mul"),
    ("reduce", BF16, "reduce"),
    ("cast", CAST, "cast"),
    ("elementwise", 3 * FP32, "mul"),
    ("mul", 2 * FP32, "mul"),
    ("reduce", FP32, "reduce"),
    ("elementwise", FP32, "mul"),
    ("elementwise", 2 * FP32, "mul"),
    ("elementwise", 2 * FP32, "mul"),
    ("elementwise", 3 * FP32, "mul"),
    ("elementwise", 3 * FP32, "accumulate"),
    ("cast", CAST, "cast"),
)
ROW_KERNELS, ROW_KERNELS_BACKWARD = ("plain", "plain"), ("mul", "mul", "mul")


def norm(w: KernelWriter, name: str, step: Step, *, tokens: int, width: int) -> Passes:
    """RMS norm of every token; fused with the residual add the sum is written beside the normalised rows."""
    w = w.at(Part.NORM)
    again = w.repeated_by("rms_norm")
    if step.switches.norm == "fused":
        bytes_ = 4 * tokens * width * BF16
        return [again.moved(name, "rms_norm", bytes_=bytes_)], [w.backward.moved(name, "rms_norm", bytes_=bytes_)]
    if step.switches.norm == "unfused":
        return _unfused(again, name, float(tokens) * width)
    return (
        [again.memory(name, "rms_norm", forward("module", "norm"), rows=tokens, width=width)],
        [w.backward.memory(name, "rms_norm_backward", backward("norm"), rows=tokens, width=width)],
    )


def _unfused(w: KernelWriter, name: str, values: float) -> Passes:
    def kernels(
        writer: KernelWriter, each: tuple[tuple[str, int, str], ...], cost: Callable[..., float]
    ) -> list[Operation]:
        return [writer.moved(name, kind, cost(call), bytes_=values * bytes_) for kind, bytes_, call in each]

    rows = w.small(f"{name}.rows", forward(*ROW_KERNELS), count=len(ROW_KERNELS))
    rows_back = w.backward.small(f"{name}.rows", backward(*ROW_KERNELS_BACKWARD), count=len(ROW_KERNELS_BACKWARD))
    ahead, back = kernels(w, UNFUSED, forward), kernels(w.backward, UNFUSED_BACKWARD, backward)
    return [*ahead[:3], rows, *ahead[3:]], [*back[:7], rows_back, *back[7:]]


def branch(w: KernelWriter, name: str, step: Step) -> Passes:
    """Where a branch leaves the residual: backward its gradient is added to that of the way around it."""
    return summed_gradients(w, name, step, tokens=step.tokens)


def summed_gradients(w: KernelWriter, name: str, step: Step, *, tokens: int) -> Passes:
    """Where a second GEMM, or branch, reads the same tokens: backward its gradient is added to the first."""
    return ([], []) if step.switches.norm == "fused" else accumulated(w, name, tokens, step.model.hidden)


def residual(w: KernelWriter, name: str, step: Step) -> Passes:
    """The sum of a branch with its input; backward the gradient goes both ways, and meets again in `branch`."""
    if step.switches.norm == "fused":
        return [], []
    total = 3.0 * BF16 * step.tokens * step.model.hidden
    return [w.moved(name, "elementwise", forward("sum"), bytes_=total)], []


FOUR_DIMENSIONS = 1.5  # an unvectorised product over four strided dimensions, relative to one number per row


def rotary(w: KernelWriter, name: str, step: Step, *, width: int, head_dim: int, in_pairs: bool = False) -> Passes:
    """Of `width` numbers per token in heads of `head_dim`; `in_pairs`: neighbours turn together, not halves."""
    numbers = step.gathered_tokens * width
    way = step.switches.rotary
    if way == "cached":
        return _halves(w, name, numbers) if in_pairs else _rotated_half(w, name, numbers)
    if way == "remade":
        return _remade(w, name, float(numbers))
    if way == "complex":
        return _complex(w, name, float(numbers))
    if way == "unfused":
        return _with_tables(w, name, step, width=width, head_dim=head_dim)
    rows = step.gathered_tokens
    return [w.memory(name, "copy", rows=rows, width=width)], [w.backward.memory(name, "copy", rows=rows, width=width)]


def _kernels(w: KernelWriter, name: str, cost: float, numbers: float, *each: tuple[str, float]) -> list[Operation]:
    """Kernels of (kind, bytes per number)."""
    return [w.moved(name, kind, cost, bytes_=numbers * bytes_) for kind, bytes_ in each]


PLACED = (("zero", BF16), ("copy", BF16))  # the gradient of a half, placed among zeros: fills, and copies N / 2 numbers


def _rotated_half(w: KernelWriter, name: str, numbers: float) -> Passes:
    product, negated, total = ("mul", 2.0 * BF16), ("elementwise", 1.0 * BF16), ("elementwise", 3.0 * BF16)
    back = w.backward
    return (
        _kernels(w, f"{name}.turn", forward("mul"), numbers, product, negated, ("copy", 2.0 * BF16), product, total),
        [
            *_kernels(back, f"{name}.turn", backward("mul"), numbers, product, negated, *PLACED, *PLACED, total),
            *_kernels(back, f"{name}.turn", backward("mul"), numbers, product, total),
            *_kernels(back, f"{name}.heads", backward("view", "cat"), numbers, ("copy", 2.0 * BF16)),
        ],
    )


def _remade(w: KernelWriter, name: str, numbers: float) -> Passes:
    """As Megatron-Core writes it: tables for each tensor, products of it and of its halves turned round, and a copy.

    A negated half and halves that are joined lie in strides.
    """
    product, negated, joined = ("mul", 2.0 * BF16), ("mul", 1.0 * BF16), ("mul", 3.0 * BF16)
    total, copy, zeros = ("elementwise", 3.0 * BF16), ("copy", 2.0 * BF16), ("zero", 1.0 * BF16)
    tables = w.small(f"{name}.tables", forward(*["plain"] * 6), count=6)
    back = w.backward
    return (
        [tables, *_kernels(w, f"{name}.turn", forward("mul"), numbers, product, negated, joined, product, total, copy)],
        _kernels(
            back, f"{name}.turn", backward("mul"), numbers, product, negated, joined, product, total, zeros, total
        ),
    )


def _halves(w: KernelWriter, name: str, numbers: float) -> Passes:
    product, total = ("mul", 1.0 * BF16), ("elementwise", 1.5 * BF16)
    four, back = (product,) * 4, w.backward
    return (
        _kernels(w, f"{name}.turn", forward("mul"), numbers, *four, total, total, ("copy", 2.0 * BF16)),
        [
            *_kernels(back, f"{name}.turn", backward("mul"), numbers, *four, ("elementwise", 1.0 * BF16), total, total),
            *_kernels(back, f"{name}.turn", backward("mul"), numbers, *PLACED, *PLACED, ("elementwise", 3.0 * BF16)),
        ],
    )


def _complex(w: KernelWriter, name: str, numbers: float) -> Passes:
    kernels = (("cast", BF16 + FP32), ("mul", 2 * FP32), ("cast", BF16 + FP32))
    return (
        _kernels(w, f"{name}.turn", forward("mul"), numbers, *kernels),
        _kernels(w.backward, f"{name}.turn", backward("mul"), numbers, *kernels),
    )


def _with_tables(w: KernelWriter, name: str, step: Step, *, width: int, head_dim: int) -> Passes:
    tokens = step.gathered_tokens
    half = BF16 * tokens * width / 2
    table = FP32 * step.sequence * head_dim / 2

    def products(writer: KernelWriter, count: int, launches: float) -> list[Operation]:
        bytes_ = FOUR_DIMENSIONS * 2 * half
        return [writer.moved(f"{name}.products", "mul", launches, bytes_=bytes_)] * count

    def sums(writer: KernelWriter, launches: float) -> list[Operation]:
        return [writer.moved(f"{name}.sums", "elementwise", launches, bytes_=3 * half)] * 2

    ahead = [
        w.small(f"{name}.frequencies", forward(*["plain"] * 5), count=5),
        *[w.moved(f"{name}.angles", "cast", forward("plain"), bytes_=2 * table)] * 5,
        *products(w, 4, forward("mul")),
        *sums(w, forward("sum")),
        w.moved(f"{name}.cat", "copy", forward("chunk", "cat"), bytes_=4 * half),
    ]
    back = [
        *products(w.backward, 5, backward("mul")),  # one of them the negation
        *sums(w.backward, backward("accumulate")),
        w.backward.moved(f"{name}.split", "copy", backward("chunk", "sum", "sum"), bytes_=4 * half),
        reordered(w.backward, f"{name}.heads", backward("view", "view", "cast"), numbers=tokens * width),
    ]
    return ahead, back
