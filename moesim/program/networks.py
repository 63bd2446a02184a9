"""Feed-forward networks by the switches: dense ones, shared experts, and the routed experts of every rank.

Legend: see `moesim.program.loads`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.kernels.families import GemmDirection
from moesim.kernels.unprofiled import COMPILED_BACKWARD
from moesim.program.gemms import (
    ACTIVATION_BYTES,
    NO_CASTS,
    FusedCasts,
    column_parallel,
    fp8_casts,
    gather_tokens,
    projection,
    row_parallel,
    scatter_tokens,
)
from moesim.program.host import backward, forward
from moesim.program.loads import LayerLoads
from moesim.program.norms_and_rotary import branch, norm, residual, summed_gradients
from moesim.program.operations import SIDE, Operation
from moesim.program.sizes import Passes, Step, chain, repeated_whole
from moesim.program.writer import BF16, KernelWriter, accumulated
from moesim.results.spans import Part, Phase


def _activation_bytes(w: KernelWriter, inputs: int) -> tuple[float, float]:
    """Bytes per value of the result, forward and backward, of a fused activation of so many inputs.

    All inputs read and one result written; backward those read and the gradients written. In FP8 the result is written
    in FP8 where the recipe fuses, and each gradient in FP8 both ways, which are as many bytes as in bf16.
    """
    result = w.recipe.value_bytes if w.recipe and w.recipe.fuses else ACTIVATION_BYTES
    return inputs * ACTIVATION_BYTES + result, (2 * inputs + 1) * ACTIVATION_BYTES


def _activation(w: KernelWriter, name: str, step: Step, *, rows: ArrayLike, width: int, joined: bool) -> Passes:
    """silu of one half of the columns times the other half, or, where networks are not gated, of all columns.

    Unfused two kernels, backward three GEMMs and, where both halves come from one GEMM, a joining copy. What
    torch compiles reads and writes as little as a fused kernel; its backward kernel is slower than one by its bytes.
    """
    inputs, again = step.model.ffn_matrices - 1, w.repeated_by("swiglu")
    values = np.asarray(rows) * float(width)
    if step.switches.activation == "compiled":
        return (
            [again.moved(name, "elementwise", forward("compiled"), bytes_=(inputs + 1) * BF16 * values)],
            [
                w.backward.moved(
                    name,
                    "elementwise",
                    backward("compiled"),
                    bytes_=COMPILED_BACKWARD * (2 * inputs + 1) * BF16 * values,
                )
            ],
        )
    if step.switches.activation == "fused":
        forward_bytes, backward_bytes = _activation_bytes(w, inputs)
        narrow = w.recipe is not None and w.recipe.fuses
        kind = "fp8_swiglu" if narrow else "elementwise"
        gradient = "fp8_swiglu_backward" if narrow and inputs == 2 else "elementwise"
        return (
            [again.moved(name, kind, forward("silu"), bytes_=forward_bytes * values)],
            [w.backward.moved(name, gradient, backward("silu"), bytes_=backward_bytes * values)],
        )
    if inputs == 1:
        return (
            [again.moved(name, "silu", forward("silu"), bytes_=2 * BF16 * values)],
            [w.backward.moved(name, "silu_backward", backward("silu"), bytes_=3 * BF16 * values)],
        )
    if joined:
        ahead, back = forward("chunk", "silu", "mul"), backward("mul", "mul", "silu", "chunk")
        return (
            [again.memory(name, "activation", ahead, rows=rows, width=width)],
            [w.backward.memory(name, "activation_backward", back, rows=rows, width=width)],
        )
    product = 3.0 * BF16 * values
    return (
        [
            again.moved(f"{name}.silu", "silu", forward("silu"), bytes_=2 * BF16 * values),
            again.moved(name, "elementwise", forward("mul"), bytes_=product),
        ],
        [
            *[w.backward.moved(name, "elementwise", backward("mul"), bytes_=product)] * 2,
            w.backward.moved(f"{name}.silu", "silu_backward", backward("silu"), bytes_=product),
        ],
    )


class _Network:
    """W2(silu(W1 x) * W3 x), shared by tensor ranks; where the model's networks are not gated, W2 act(W1 x)."""

    def __init__(self, w: KernelWriter, name: str, step: Step, *, width: int, is_cast: bool = False) -> None:
        """`is_cast`: tokens come in FP8 along rows, gradients of the result both ways."""
        self.w, self.name, self.step = w, name, step
        self.width = width // step.tensor
        self.separate = step.switches.ffn_inputs == "separate" and step.model.gated
        self.activation = _activation(
            w, f"{name}.activation", step, rows=step.gathered_tokens, width=self.width, joined=not self.separate
        )
        self.inputs = step.model.ffn_matrices - 1
        in_fp8 = step.switches.activation == "fused"  # which then writes FP8, and gradients both ways
        self.first: FusedCasts = {"input_is_fp8": is_cast, "gradient_is_turned": in_fp8}
        self.last: FusedCasts = {"input_is_fp8": in_fp8, "gradient_is_turned": is_cast}

    def in_line(self) -> Passes:
        """All of it on the writer's chain, collectives beside GEMMs where they can be."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        width = self.width * step.tensor
        if self.separate:
            ends = self.enter(), self.leave()
            return chain((ends[0][0], ends[1][1]), self.gemms(), (ends[1][0], ends[0][1]))
        return chain(
            column_parallel(w, f"{name}.w13", step, k=hidden, n=self.inputs * width, **self.first),
            self.activation,
            row_parallel(w, f"{name}.w2", step, k=width, n=hidden, **self.last),
        )

    def gemms(self) -> Passes:
        """The kernels alone, for gathered tokens."""
        m, hidden, casts = self.step.gathered_tokens, self.step.model.hidden, self.first
        last = projection(self.w, f"{self.name}.w2", m=m, k=self.width, n=hidden, **self.last)
        if self.separate:
            again: FusedCasts = {**casts, "input_is_shared": True}
            return chain(
                projection(self.w, f"{self.name}.w1", m=m, k=hidden, n=self.width, **casts),
                accumulated(self.w, f"{self.name}.w1.branch", m, hidden),
                projection(self.w, f"{self.name}.w3", m=m, k=hidden, n=self.width, **again),
                self.activation,
                last,
            )
        first = projection(self.w, f"{self.name}.w13", m=m, k=hidden, n=self.inputs * self.width, **casts)
        return chain(first, self.activation, last)

    def enter(self) -> Passes:
        """The gathers before the kernels; backward those of the result's gradient and, once more, of the input."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        backward = gather_tokens(w.backward, f"{name}.w2.gather", step, width=hidden)
        backward += gather_tokens(w.during(Phase.WEIGHT_GRADIENT), f"{name}.w13.gather.wgrad", step, width=hidden)
        return gather_tokens(w, f"{name}.w13.gather", step, width=hidden), backward

    def leave(self) -> Passes:
        """The reduce-scatters behind the kernels."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        forward = scatter_tokens(w, f"{name}.w2.scatter", step, width=hidden)
        return forward, scatter_tokens(w.backward, f"{name}.w13.scatter", step, width=hidden)


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, the dense feed-forward network and residual sum."""
    model, rest = step.model, w.at(Part.RESIDUAL)
    return chain(
        branch(rest, "ffn.branch", step),
        norm(w, "ffn_norm", step, tokens=step.tokens, width=model.hidden),
        repeated_whole("dense_ffn", _Network(w, "ffn", step, width=model.dense_intermediate).in_line()),
        residual(rest, "ffn.residual", step),
    )


def _grouped(
    w: KernelWriter, name: str, step: Step, *, rows: NDArray[np.int64], k: int, n: int, **casts: object
) -> Passes:
    """A GEMM of every local expert with its rows, between the casts of FP8; in one launch, or in one for each."""
    each = step.switches.expert_gemms == "each"
    times = rows.shape[-1] if each else 1
    ahead, half = ("expert", times * backward("expert") / 4) if each else ("grouped", backward("grouped") / 2)

    def kernel(direction: GemmDirection, launches: float) -> Operation:
        way = w.gemm_of_each if each else w.grouped_gemm
        return way(name, launches, rows=rows, k=k, n=n, direction=direction)

    found = NO_CASTS
    if w.recipe:
        total = rows.sum(-1)
        found = fp8_casts(w, name, inputs=total * float(k), outputs=total * float(n), **casts)  # type: ignore[arg-type]
    return (
        [*found.forward, kernel("forward", times * forward(ahead) / (2 if each else 1))],
        [*found.input_gradient, kernel("dgrad", half), *found.weight_gradient, kernel("wgrad", half)],
    )


def experts_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The routed experts of every rank; durations follow the rows of its slots."""
    h, width = step.model.row_width, step.model.expert_intermediate // step.expert_tensor
    inputs, slots = step.model.ffn_matrices - 1, loads.slot_rows_MSRP
    separate = step.switches.expert_inputs == "separate" and inputs > 1
    arrives = step.quantise and step.remote  # in FP8, as the dispatch carries it, both ways
    in_fp8 = step.switches.activation == "fused"
    first = {"input_is_fp8": arrives, "gradient_is_turned": in_fp8, "arrives": arrives}
    if separate:
        rows_h = 3.0 * BF16 * loads.rows_MSR * float(h)
        total = w.backward.moved("experts.branch", "elementwise", backward("accumulate"), bytes_=rows_h)
        gemms = chain(
            _grouped(w, "experts.w1", step, rows=slots, k=h, n=width, **first),
            ([], [total]),
            _grouped(w, "experts.w3", step, rows=slots, k=h, n=width, input_is_shared=True, **first),
        )
    else:
        gemms = _grouped(w, "experts.w13", step, rows=slots, k=h, n=inputs * width, **first)
    rows = loads.rows_MSR
    return chain(
        gemms,
        _filled(w, "experts.w13.fill", step, rows * float(inputs * width)),
        _activation(w, "experts.activation", step, rows=rows, width=width, joined=not separate),
        _gates_inside(w, step, rows * float(width)),
        _grouped(
            w,
            "experts.w2",
            step,
            rows=slots,
            k=width,
            n=h,
            input_is_fp8=in_fp8,
            gradient_is_fp8=arrives,
            arrives=arrives,
        ),
        _filled(w, "experts.w2.fill", step, rows * float(h)),
        _joined_rows(w, step, rows * float(h)),
    )


def _joined_rows(w: KernelWriter, step: Step, values: NDArray[np.float64]) -> Passes:
    """Results of experts that run one by one in one tensor; backward the gradients of their inputs."""
    if step.switches.expert_gemms == "grouped":
        return [], []
    both = 2.0 * BF16 * values
    return (
        [w.moved("experts.join", "copy", forward("cat"), bytes_=both)],
        [w.backward.moved("experts.split", "copy", backward("cat"), bytes_=both)],
    )


def _filled(w: KernelWriter, name: str, step: Step, values: NDArray[np.float64]) -> Passes:
    """Results whose rows of no expert are filled with zeros in a copy, as software does that has such rows."""
    if step.switches.permute != "sentinels":
        return [], []
    each, kinds = 2.0 * BF16 * values, ("copy", "mul")
    return (
        [w.moved(name, kind, forward("mul") / 2, bytes_=each) for kind in kinds],
        [w.backward.moved(name, kind, backward("mul") / 2, bytes_=each) for kind in kinds],
    )


def _gates_inside(w: KernelWriter, step: Step, values: NDArray[np.float64]) -> Passes:
    """A row's gate on its activation, where that is no fused kernel."""
    if step.switches.gates != "inside" or step.switches.activation == "fused":
        return [], []
    back = w.backward
    if step.switches.activation == "compiled":  # the gates' gradients are the sums of a kernel of its own
        sums = BF16 * step.model.ffn_matrices * values
        return [], [back.moved("experts.gates", "elementwise", backward("compiled"), bytes_=sums)]
    return (
        [w.moved("experts.gates", "mul", forward("mul"), bytes_=2 * BF16 * values)],
        [back.moved("experts.gates", "mul_backward", backward("mul", "mul", "reduce"), bytes_=5 * BF16 * values)],
    )


def latent_part(w: KernelWriter, step: Step) -> tuple[Passes, Passes]:
    """The projections of tokens to the width of the experts' rows, and of their results back; none for most models."""
    model = step.model
    if not model.expert_hidden:
        return ([], []), ([], [])
    hidden, width, tokens = model.hidden, model.expert_hidden, step.tokens
    down = projection(w, "experts.down", m=tokens, k=hidden, n=width)
    return down, projection(w, "experts.up", m=tokens, k=width, n=hidden)


class Shared(NamedTuple):
    """One direction of the shared experts: before the dispatch, beside it, behind the combine, last of all."""

    before: list[Operation]
    beside: list[Operation]
    behind: list[Operation]
    last: list[Operation]


def shares_casts(w: KernelWriter, step: Step) -> bool:
    """Whether shared experts take what was cast for a dispatch in FP8: the same tokens, with the same scales."""
    fuses = w.recipe is not None and w.recipe.fuses
    same = step.tensor == 1 and not step.model.expert_hidden and bool(step.model.shared_experts)
    return step.quantise and step.remote and fuses and same


def shared_experts(w: KernelWriter, step: Step) -> tuple[Shared, Shared]:
    """Forward, backward. Beside the dispatch their collectives lie around it, as in Megatron-Core's overlap."""
    model = step.model
    if not model.shared_experts:
        return Shared([], [], [], []), Shared([], [], [], [])
    word, width, is_cast = "shared_experts", model.shared_width, shares_casts(w, step)
    more = summed_gradients(w, "shared.branch", step, tokens=step.tokens)
    total = residual(w, "shared.sum", step)
    if not (step.remote and step.shared_beside):
        network = _Network(w, "shared", step, width=width, is_cast=is_cast)
        whole = chain(more, repeated_whole(word, network.in_line()), total)
        if not step.software.shared_beside:
            return Shared([], [], [], whole[0]), Shared([], [], [], whole[1])
        return Shared([], whole[0], [], []), Shared([], whole[1], [], [])
    network = _Network(w.at(Part.SHARED_EXPERTS, chain=SIDE), "shared", step, width=width, is_cast=is_cast)
    enter, gemms, leave = (
        repeated_whole(word, passes) for passes in (network.enter(), network.gemms(), network.leave())
    )
    return (
        Shared(enter[0], gemms[0], leave[0], total[0]),
        Shared(enter[1], gemms[1], [*leave[1], *more[1]], []),
    )
