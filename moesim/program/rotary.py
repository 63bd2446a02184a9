"""Rotary embedding of queries and keys, as the switch `rotary` says.

Numbers N of a tensor, in bytes; backward the like, and where the tensor was in the order of heads a copy to tokens'.
    fused     one kernel: read and written once, 4 N
    cached    over tables that the step makes once: two products, the negated half, a concatenation, a sum, as in
              transformers; in pairs, as latent attention's, four products of halves, difference, sum, concatenation
    complex   to fp32, a product of complex numbers, and back (torchtitan)
    unfused   tables made in every layer, four products of halves, difference, sum, concatenation (torch_eager)
"""

from moesim.program.operations import Operation
from moesim.program.sizes import Passes, Step
from moesim.program.torch_host import backward, forward
from moesim.program.torch_kernels import BF16, FP32, moved, reordered, small
from moesim.program.writer import KernelWriter

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
    return [moved(w, name, kind, cost, bytes_=numbers * bytes_) for kind, bytes_ in each]


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
    tables = small(w, f"{name}.tables", forward(*["plain"] * 6), count=6)
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
        return [moved(writer, f"{name}.products", "mul", launches, bytes_=bytes_)] * count

    def sums(writer: KernelWriter, launches: float) -> list[Operation]:
        return [moved(writer, f"{name}.sums", "elementwise", launches, bytes_=3 * half)] * 2

    ahead = [
        small(w, f"{name}.frequencies", forward(*["plain"] * 5), count=5),
        *[moved(w, f"{name}.angles", "cast", forward("plain"), bytes_=2 * table)] * 5,
        *products(w, 4, forward("mul")),
        *sums(w, forward("sum")),
        moved(w, f"{name}.cat", "copy", forward("chunk", "cat"), bytes_=4 * half),
    ]
    back = [
        *products(w.backward, 5, backward("mul")),  # one of them the negation
        *sums(w.backward, backward("accumulate")),
        moved(w.backward, f"{name}.split", "copy", backward("chunk", "sum", "sum"), bytes_=4 * half),
        reordered(w.backward, f"{name}.heads", backward("view", "view", "cast"), numbers=tokens * width),
    ]
    return ahead, back
