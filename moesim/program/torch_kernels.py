"""Single kernels of eager PyTorch, forward and backward, with what they cost the host."""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from moesim.kernels import MemoryBound
from moesim.program.operations import Operation, compute
from moesim.program.sizes import Passes
from moesim.program.torch_host import backward, forward
from moesim.program.writer import KernelWriter

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
