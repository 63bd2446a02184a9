"""Single kernels of eager PyTorch, forward and backward, that `moesim.program.torch_eager` puts together."""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from moesim.kernels import MemoryBound
from moesim.program.eager_host import backward, forward
from moesim.program.operations import Operation, compute
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part

BF16, FP32, INT64 = 2, 4, 8  # bytes
SMALL = 4096.0  # bytes of a kernel on a few numbers: it takes the floor


def issued(operation: Operation, launches: float) -> Operation:
    """The operation with what the host needs for it."""
    return replace(operation, launches=launches)


def moved(w: KernelWriter, name: str, kind: str, launches: float, *, bytes_: ArrayLike) -> Operation:
    """A kernel of one kind over `bytes_`."""
    return issued(w.moved(name, kind, bytes_=bytes_), launches)


def small(w: KernelWriter, name: str, launches: float, *, count: int = 1) -> Operation:
    """`count` kernels on a few numbers, one behind the other."""
    estimate = w.model.seconds(MemoryBound("elementwise", SMALL))
    seconds = np.asarray(estimate.seconds) * count
    return compute(w.label(name), seconds, source=estimate.source, chain=w.chain, launches=launches)


def accumulated(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """Backward only: a second gradient of bf16 activations is added to the first."""
    bytes_ = 3.0 * BF16 * tokens * width
    return [], [moved(w.backward, name, "elementwise", backward("accumulate"), bytes_=bytes_)]


def norm(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """RMS norm of every token, as a module."""
    w = w.at(Part.NORM)
    back = w.backward.memory(name, "rms_norm_backward", rows=tokens, width=width)
    return (
        [issued(w.memory(name, "rms_norm", rows=tokens, width=width), forward("module", "norm"))],
        [issued(back, backward("norm"))],
    )


def product(w: KernelWriter, name: str, *, m: int, k: int, n: int, module: bool = True) -> Passes:
    """A product with a weight [k, n], and the two products of its gradients; one autograd node issues both."""
    dgrad, wgrad = w.gemm_backward(name, m=m, k=k, n=n)
    half = backward("product") / 2
    launches = forward("module", "product") if module else forward("product")
    return [issued(w.gemm(name, m=m, k=k, n=n), launches)], [issued(dgrad, half), issued(wgrad, half)]


def residual(w: KernelWriter, name: str, step: Step) -> Passes:
    """The sum of a branch with its input; backward the gradient goes both ways, and meets again in `branch`."""
    total = 3.0 * BF16 * step.tokens * step.model.hidden
    return [moved(w, name, "elementwise", forward("sum"), bytes_=total)], []


def branch(w: KernelWriter, name: str, step: Step) -> Passes:
    """Where a branch leaves the residual: backward its gradient is added to that of the way around it."""
    return accumulated(w, name, step.tokens, step.model.hidden)


def reordered(w: KernelWriter, name: str, launches: float, *, numbers: float) -> Operation:
    """A strided copy of bf16 numbers: unvectorised, as fast as the row scaling of kind `mul`."""
    return moved(w, name, "mul", launches, bytes_=2.0 * BF16 * numbers)


def copied(w: KernelWriter, name: str, numbers: float, *, both: bool = True) -> Passes:
    """A copy into another order; backward either copies too or only looks at the gradient differently."""
    back = [reordered(w.backward, name, backward("cat"), numbers=numbers)] if both else []
    return [reordered(w, name, forward("cat", "view"), numbers=numbers)], back


def activation(w: KernelWriter, name: str, *, rows: ArrayLike, width: int) -> Passes:
    """silu of one half of the columns times the other half: two kernels, backward three products and a joining copy."""
    ahead = w.memory(name, "activation", rows=rows, width=width)
    back = w.backward.memory(name, "activation_backward", rows=rows, width=width)
    return (
        [issued(ahead, forward("chunk", "silu", "mul"))],
        [issued(back, backward("mul", "mul", "silu", "chunk"))],
    )


def gated(w: KernelWriter, name: str, *, tokens: int, hidden: int, width: int) -> Passes:
    """W2(silu(W1 x) * W3 x) with W1 and W3 in one product."""
    return chain(
        product(w, f"{name}.w13", m=tokens, k=hidden, n=2 * width),
        activation(w, f"{name}.activation", rows=tokens, width=width),
        product(w, f"{name}.w2", m=tokens, k=width, n=hidden),
    )
