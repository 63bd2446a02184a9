"""Single kernels of eager PyTorch, forward and backward, that `moesim.sim.torch_eager` puts together."""

import numpy as np
from numpy.typing import ArrayLike

from moesim.sim.operations import Operation, compute
from moesim.sim.sizes import Passes, Step, chain
from moesim.sim.writer import KernelWriter

BF16, FP32, INT64 = 2, 4, 8  # bytes
SMALL = 4096.0  # bytes of a kernel on a few numbers: it takes the floor


def many(
    w: KernelWriter, name: str, kind: str, *, bytes_: ArrayLike, count: int = 1, launches: int | None = None
) -> Operation:
    """`count` kernels of one kind, each over `bytes_`; one launch each unless said otherwise."""
    estimate = w.model.memory_bound(kind=kind, bytes=bytes_)
    seconds = np.asarray(estimate.seconds) * count
    return compute(
        name,
        w.category,
        seconds,
        layer=w.layer,
        source=estimate.source,
        chain=w.chain,
        launches=count if launches is None else launches,
    )


def small(w: KernelWriter, name: str, count: int) -> Operation:
    """`count` kernels on a few numbers."""
    return many(w, name, "elementwise", bytes_=SMALL, count=count)


def sum_of(w: KernelWriter, name: str, tokens: int, width: int) -> Operation:
    """A bf16 sum of two tensors."""
    return many(w, name, "elementwise", bytes_=3.0 * BF16 * tokens * width)


def norm(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """RMS norm of every token."""
    return (
        [w.memory(name, "rms_norm", rows=tokens, width=width)],
        [w.memory(f"{name}.backward", "rms_norm_backward", rows=tokens, width=width)],
    )


def linear(w: KernelWriter, name: str, *, m: int, k: int, n: int) -> Passes:
    """A product with a weight [k, n], and the two products of its gradients."""
    return [w.gemm(name, m=m, k=k, n=n)], w.gemm_backward(name, m=m, k=k, n=n)


def residual(w: KernelWriter, name: str, step: Step) -> Passes:
    """The sum of a branch with its input; backward the gradient goes both ways, and meets again in `branch`."""
    return [sum_of(w, name, step.tokens, step.model.hidden)], []


def branch(w: KernelWriter, name: str, step: Step) -> Passes:
    """Where a branch leaves the residual: backward its gradient is added to that of the way around it."""
    return [], [sum_of(w, f"{name}.backward", step.tokens, step.model.hidden)]


def copied(w: KernelWriter, name: str, numbers: float, *, backward: bool = True) -> Passes:
    """A copy into another order; backward either copies too or only looks at the gradient differently."""
    moved = 2.0 * BF16 * numbers
    back = [many(w, f"{name}.backward", "copy", bytes_=moved)] if backward else []
    return [many(w, name, "copy", bytes_=moved)], back


def gated(w: KernelWriter, name: str, *, tokens: int, hidden: int, width: int) -> Passes:
    """W2(silu(W1 x) * W3 x) with W1 and W3 in one product."""
    activation = (
        [w.memory(f"{name}.activation", "activation", rows=tokens, width=width, launches=2)],
        [w.memory(f"{name}.activation.backward", "activation_backward", rows=tokens, width=width, launches=3)],
    )
    return chain(
        linear(w, f"{name}.w13", m=tokens, k=hidden, n=2 * width),
        activation,
        linear(w, f"{name}.w2", m=tokens, k=width, n=hidden),
    )
