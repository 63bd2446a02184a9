"""Norms and the sums around them, as the switch `norm` says.

Unfused, as transformers' modules write an RMS norm: to fp32, square, mean, two kernels on a number a row, product with
that, to bf16, product with the weight; backward sixteen kernels for these eight.
"""

from collections.abc import Callable

from moesim.program.operations import Operation
from moesim.program.sizes import Passes, Step
from moesim.program.torch_host import backward, forward
from moesim.program.torch_kernels import BF16, FP32, accumulated, issued, moved, small
from moesim.program.writer import KernelWriter
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
        residual = 2 * tokens * width * BF16
        forward_bytes = 2 * residual
        return [again.moved(name, "rms_norm", bytes_=forward_bytes)], [
            w.backward.moved(name, "rms_norm", bytes_=forward_bytes)
        ]
    if step.switches.norm == "unfused":
        return _unfused(again, name, float(tokens) * width)
    back = w.backward.memory(name, "rms_norm_backward", rows=tokens, width=width)
    return (
        [issued(again.memory(name, "rms_norm", rows=tokens, width=width), forward("module", "norm"))],
        [issued(back, backward("norm"))],
    )


def _unfused(w: KernelWriter, name: str, values: float) -> Passes:
    def kernels(
        writer: KernelWriter, each: tuple[tuple[str, int, str], ...], cost: Callable[..., float]
    ) -> list[Operation]:
        return [moved(writer, name, kind, cost(call), bytes_=values * bytes_) for kind, bytes_, call in each]

    rows = small(w, f"{name}.rows", forward(*ROW_KERNELS), count=len(ROW_KERNELS))
    rows_back = small(w.backward, f"{name}.rows", backward(*ROW_KERNELS_BACKWARD), count=len(ROW_KERNELS_BACKWARD))
    ahead, back = kernels(w, UNFUSED, forward), kernels(w.backward, UNFUSED_BACKWARD, backward)
    return [*ahead[:3], rows, *ahead[3:]], [*back[:7], rows_back, *back[7:]]


def branch(w: KernelWriter, name: str, step: Step) -> Passes:
    """Where a branch leaves the residual: backward its gradient is added to that of the way around it."""
    return summed_gradients(w, name, step, tokens=step.tokens)


def summed_gradients(w: KernelWriter, name: str, step: Step, *, tokens: int) -> Passes:
    """Where a second product, or branch, reads the same tokens: backward its gradient is added to the first."""
    return ([], []) if step.switches.norm == "fused" else accumulated(w, name, tokens, step.model.hidden)


def residual(w: KernelWriter, name: str, step: Step) -> Passes:
    """The sum of a branch with its input; backward the gradient goes both ways, and meets again in `branch`."""
    if step.switches.norm == "fused":
        return [], []
    total = 3.0 * BF16 * step.tokens * step.model.hidden
    return [moved(w, name, "elementwise", forward("sum"), bytes_=total)], []
