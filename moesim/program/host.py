"""What a software's host costs: seconds per launch and read-back, and operations of eager PyTorch in launches.

A kernel model gives one number per direction, for an operation of middling cost; operations differ eightfold. The table
holds their ratios as measured on the host of an H200 machine (profile h200, family host; microseconds, torch 2.11); the
costs of one autograd node are those of one operation's backward less 5 us for the gradient of each leaf that the
benchmark has and a step has not. A GEMM with a weight keeps that of its weight.

Benchmarks issue one operation over and over; a model's code issues each once, from Python that is not in the caches,
and spends time between operations. `COLD` is how much longer the same operations take there: measured on forward passes
of 1024 tokens, where the host sets the time (validation table h200, cases of one GPU). The backward pass is issued by
autograd's compiled engine and shows no such difference.
"""

from dataclasses import dataclass

from moesim.results.spans import Phase


@dataclass(frozen=True, kw_only=True)
class HostModel:
    """Seconds the host needs per launch in either direction and per read-back; FREE_HOST where it never limits.

    `ahead`: seconds before the GPU ends a step at which the host begins to launch the next one; 0 where it waits.
    """

    forward_launch: float
    backward_launch: float
    readback: float
    ahead: float = 0.0


FREE_HOST = HostModel(forward_launch=0.0, backward_launch=0.0, readback=0.0)


FORWARD_MICROSECONDS = {
    "view": 2.1,
    "empty": 2.6,
    "chunk": 4.1,
    "module": 6.0,
    "compiled": 30.0,  # a function that torch compiled (as the next, from traced and measured steps)
    "expert": 100.0,  # of Megatron-Core, in modules of its own: two GEMMs by functions of Python, one activation
    "plain": 7.6,  # an elementwise operation without autograd
    "zeros": 8.9,
    "silu": 8.9,
    "cast": 9.6,
    "cat": 11.2,
    "reduce": 11.3,
    "softmax": 12.3,
    "mul": 12.4,
    "sum": 12.9,
    "gather": 13.2,
    "index_select": 13.5,
    "cumsum": 14.8,
    "index_add": 18.7,
    "norm": 18.8,
    "cross_entropy": 20.7,
    "topk": 21.0,
    "gemm": 24.4,
    "attention": 25.1,
    "grouped": 26.1,
    "sort": 35.7,
    "exchange": 190.0,  # a collective through torch.distributed; from a tiny validation run, not from the profile
}
BACKWARD_MICROSECONDS = {
    "sum": 3.0,
    "view": 4.7,
    "accumulate": 6.0,  # a second gradient added to the first: a kernel, but no node
    "cat": 8.0,
    "mul": 12.0,
    "cast": 12.0,
    "reduce": 12.0,
    "gather": 15.0,
    "silu": 15.4,
    "index_add": 14.7,
    "chunk": 15.0,
    "index_select": 20.8,
    "softmax": 21.9,
    "norm": 23.1,
    "cross_entropy": 30.0,
    "gemm": 43.1,
    "grouped": 53.5,
    "attention": 62.4,
    "exchange": 190.0,
    "compiled": 30.0,
    "expert": 100.0,
}
FORWARD_UNIT = 12.3  # what the profile h200 gives as the cost of one launch
BACKWARD_UNIT = 25.8
COLD = 1.6


def forward(*kinds: str) -> float:
    """Launches of these operations in the forward pass."""
    return COLD * sum(FORWARD_MICROSECONDS[kind] for kind in kinds) / FORWARD_UNIT


def backward(*kinds: str) -> float:
    """Launches of these autograd nodes."""
    return sum(BACKWARD_MICROSECONDS[kind] for kind in kinds) / BACKWARD_UNIT


def in_phase(phase: Phase, *kinds: str) -> float:
    """Launches of these in the forward pass, or in another one."""
    return (forward if phase is Phase.FORWARD else backward)(*kinds)
