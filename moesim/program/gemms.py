"""GEMMs: the casts around those of a byte or less, and GEMMs that tensor-parallel ranks share.

Casts (recipes: `moesim.scenario.software`). Y = X W runs in few bits forward, for dX and for dW, whose depth is the
tokens: there both operands need scales along tokens, and Hopper's tensor cores need FP8 operands that lie along the
depth.

    blockwise   X to FP8 along its rows before the forward GEMM, unless the kernel before it wrote FP8; that copy is
                kept, and turned (FP8 along rows to FP8 along columns) before dW. dY to FP8 along rows (for dX) and
                along columns (for dW) in one kernel, unless the kernel before it did so. GEMMs of one input share
                its copies, and shared experts those of a dispatch in FP8: tokens, and the gradients of their results.
    per_tensor  the largest magnitude of X in one pass, then FP8 and its transpose in another; dY likewise.
    mxfp8       X both ways in one pass, dY likewise: scales along the depth differ by direction.
    nvfp4       as per_tensor (it has a scale of the whole operand, too), in 4 bits.

What arrives from a dispatch in FP8 with scales of 1 x 128 is widened first where the recipe is another. Weights are
cast once in a step, in both orders, whatever the number of micro-batches; a block of 128 x 128 has one scale both ways,
which is as little work as a scale that is known. Every kernel is a memory-bound kind of its
own, measured as Triton kernels of this project on an H100 (`moesim calibrate --families fp8`).

Tensor ranks share GEMMs as in Megatron-Core, with sequence parallelism (arXiv 1909.08053, 2205.05198). Between
GEMMs a rank holds its share of the tokens. A GEMM whose columns are shared out begins by gathering the tokens;
one whose rows are shared out ends by a reduce-scatter of the partial sums. In the backward pass each of them has its
opposite. Only the share of a gathered input is kept: it is gathered again for the weight's gradient, beside the GEMM
of the input's gradient; the reduce-scatter of the input's gradient runs beside the GEMM of the weight's. Activations
travel in bf16.

Without sequence parallelism every tensor rank holds all tokens: nothing is gathered, and partial sums are summed by an
all-reduce instead of a reduce-scatter.

So a layer of attention and dense network gathers 2 + 4 times and scatters 2 + 2 times, of which 2 + 2 lie beside
GEMMs. A rank without tensor peers has the plain GEMMs.
"""

import math
from functools import partial
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from moesim.program.collectives import PeerCollective, Peers
from moesim.program.host import backward, forward, in_phase
from moesim.program.operations import MAIN, SIDE, Operation, fork, join, transfer
from moesim.program.sizes import Passes, Step
from moesim.program.writer import KernelWriter
from moesim.results.spans import Collective, Phase
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.software import RECIPES

WIDE = BYTES_PER_ELEMENT["bf16"]
# Kinds of memory-bound kernels.
ALONG, TURN, WIDEN, LARGEST, KNOWN = "fp8_cast", "fp8_turn", "fp8_widen", "largest", "scaled_cast_both"
DISPATCHED = RECIPES["blockwise"].value_bytes  # as rows travel between ranks


class Casts(NamedTuple):
    """What comes before the forward GEMM, before that of the input's gradient, and before that of the weight's."""

    forward: list[Operation]
    input_gradient: list[Operation]
    weight_gradient: list[Operation]


class FusedCasts(TypedDict, total=False):
    """What the kernels before a GEMM did already, where the recipe lets them.

    input_is_fp8: X comes in FP8 along rows. gradient_is_fp8: so does dY, and only has to be turned. gradient_is_turned:
    it comes both ways. arrives: the first two are of a dispatch that carries FP8, not of a kernel. input_is_shared:
    another GEMM has X cast, and turned.
    """

    input_is_fp8: bool
    input_is_shared: bool
    gradient_is_fp8: bool
    gradient_is_turned: bool
    arrives: bool


NO_CASTS = Casts([], [], [])


def fp8_casts(
    w: KernelWriter, name: str, *, inputs: ArrayLike, outputs: ArrayLike, **fused: Unpack[FusedCasts]
) -> Casts:
    """The casts of one GEMM with so many input and output values, numbers or [M, S, R]."""
    assert w.recipe is not None
    return _fused(w, name, inputs, outputs, fused) if w.recipe.fuses else _apart(w, name, inputs, outputs, fused)


def _fused(w: KernelWriter, name: str, inputs: ArrayLike, outputs: ArrayLike, fused: FusedCasts) -> Casts:
    """Scales of blocks: kernels before a GEMM may have written them, and what is kept is turned when it is needed."""
    assert w.recipe is not None
    late, size = w.during(Phase.WEIGHT_GRADIENT), w.recipe.value_bytes
    shared = fused.get("input_is_shared")
    forward = [] if shared or fused.get("input_is_fp8") else [cast_along(w, f"{name}.cast", inputs)]
    turned = [_moved(late, f"{name}.turn", TURN, inputs, 2 * size)] if w.recipe.turns and not shared else []
    if fused.get("gradient_is_turned"):
        return Casts(forward, [], turned)
    if fused.get("gradient_is_fp8"):
        return Casts(forward, [], [_moved(late, f"{name}.turn_gradient", TURN, outputs, 2 * size), *turned])
    return Casts(forward, cast_both_ways(w.backward, name, outputs), turned)


def _apart(w: KernelWriter, name: str, inputs: ArrayLike, outputs: ArrayLike, fused: FusedCasts) -> Casts:
    """Every operand is cast both ways by kernels of its own; what a dispatch brought is widened before."""
    arrives, widened = fused.get("arrives"), WIDE + DISPATCHED
    forward, backward = cast_both_ways(w, name, inputs), cast_both_ways(w.backward, name, outputs)
    if arrives and fused.get("input_is_fp8") and not fused.get("gradient_is_fp8"):
        forward.insert(0, _moved(w, f"{name}.widen", WIDEN, inputs, widened))
    if arrives and fused.get("gradient_is_fp8"):
        backward.insert(0, _moved(w.backward, f"{name}.widen", WIDEN, outputs, widened))
    return Casts(forward, backward, [])


def cast_along(w: KernelWriter, name: str, values: ArrayLike) -> Operation:
    """One operand along its rows."""
    assert w.recipe is not None
    return _moved(w, name, ALONG, values, WIDE + w.recipe.value_bytes)


def cast_both_ways(w: KernelWriter, name: str, values: ArrayLike) -> list[Operation]:
    """One operand in both orders, behind the pass that finds its largest magnitude where the recipe wants it."""
    assert w.recipe is not None
    found = [_moved(w, f"{name}.largest", LARGEST, values, WIDE)] if w.recipe.searches else []
    return [*found, _moved(w, f"{name}.cast", w.recipe.both_kind, values, WIDE + 2 * w.recipe.value_bytes)]


def weight_casts(w: KernelWriter, *, weights: float, are_narrow: bool) -> list[Operation]:
    """The casts of so many weights after an update; `are_narrow`: the optimizer wrote them in FP8, in one order."""
    if w.recipe is None or not weights:
        return []
    if are_narrow:
        return [_moved(w, "weights.turn", TURN, weights, 2 * w.recipe.value_bytes)]
    if w.recipe.fuses:
        return [_moved(w, "weights.cast", KNOWN, weights, WIDE + 2 * w.recipe.value_bytes)]
    return cast_both_ways(w, "weights", weights)


def _moved(w: KernelWriter, name: str, kind: str, values: ArrayLike, bytes_each: float) -> Operation:
    return w.moved(name, kind, bytes_=np.asarray(values, dtype=np.float64) * bytes_each)


ACTIVATION_BYTES = BYTES_PER_ELEMENT["bf16"]  # activations between kernels


class _Kernels(NamedTuple):
    """The forward GEMM, those of its input's and its weight's gradient, each behind its casts."""

    forward: list[Operation]
    input_gradient: list[Operation]
    weight_gradient: list[Operation]


def _kernels(
    w: KernelWriter,
    name: str,
    *,
    m: int,
    k: int,
    n: int,
    dtype: str | None,
    fused_casts: FusedCasts,
    module: bool = True,
) -> _Kernels:
    """One node of autograd issues both GEMMs of the backward pass."""
    casts = NO_CASTS
    if w.recipe and dtype in (None, w.dtype):
        casts = fp8_casts(w, name, inputs=m * k, outputs=m * n, **fused_casts)
    gemm = partial(w.gemm, name, m=m, k=k, n=n, dtype=dtype)
    half = backward("gemm") / 2
    return _Kernels(
        [*casts.forward, gemm(forward("module", "gemm") if module else forward("gemm"))],
        [*casts.input_gradient, gemm(half, direction="dgrad")],
        [*casts.weight_gradient, gemm(half, direction="wgrad")],
    )


def projection(
    w: KernelWriter,
    name: str,
    *,
    m: int,
    k: int,
    n: int,
    dtype: str | None = None,
    module: bool = True,
    **fused_casts: Unpack[FusedCasts],
) -> Passes:
    """A GEMM that no other rank takes part in; `fused_casts`: what kernels before it did, see `fp8_casts`.

    module: whether it is a module of its own, which the host calls.
    """
    kernels = _kernels(w, name, m=m, k=k, n=n, dtype=dtype, fused_casts=fused_casts, module=module)
    return kernels.forward, [*kernels.input_gradient, *kernels.weight_gradient]


def collective(
    w: KernelWriter,
    name: str,
    step: Step,
    prepared: PeerCollective,
    peers: Peers,
    *,
    kind: Collective,
    chain: int = MAIN,
) -> Operation:
    """A transfer of the `tensor` category among peers of the rank group."""
    assert step.links is not None
    members = peers.set_of_place(len(step.links.ranks_R))
    return transfer(
        name,
        "tensor",
        (prepared,),
        layer=w.layer,
        phase=w.phase,
        part=w.part,
        collective=kind,
        chain=chain,
        launches=in_phase(w.phase, "exchange"),
        peers=members,
    )


def gather_tokens(w: KernelWriter, name: str, step: Step, *, width: int, chain: int = MAIN) -> list[Operation]:
    """All-gather of the tensor ranks' tokens, `width` values each; nothing for a rank that holds all of them."""
    return gather_columns(w, name, step, width=width, chain=chain) if step.switches.sequence_parallel else []


def gather_columns(w: KernelWriter, name: str, step: Step, *, width: int, chain: int = MAIN) -> list[Operation]:
    """All-gather of what each tensor rank has of all tokens; nothing for a rank alone."""
    if step.tensor == 1:
        return []
    assert step.links is not None
    size = float(step.gathered_tokens * width * ACTIVATION_BYTES)
    prepared = step.links.gather(step.tensor_peers, size)
    return [collective(w, name, step, prepared, step.tensor_peers, kind=Collective.ALL_GATHER, chain=chain)]


def scatter_tokens(w: KernelWriter, name: str, step: Step, *, width: int, chain: int = MAIN) -> list[Operation]:
    """Reduce-scatter of partial sums to the tensor ranks' tokens; nothing for a rank alone."""
    if step.tensor == 1:
        return []
    assert step.links is not None
    size = float(step.gathered_tokens * width * ACTIVATION_BYTES)
    if not step.switches.sequence_parallel:
        prepared = step.links.reduce(step.tensor_peers, size)
        return [collective(w, name, step, prepared, step.tensor_peers, kind=Collective.ALL_REDUCE, chain=chain)]
    prepared = step.links.scatter(step.tensor_peers, size)
    return [collective(w, name, step, prepared, step.tensor_peers, kind=Collective.REDUCE_SCATTER, chain=chain)]


def column_parallel(
    w: KernelWriter,
    name: str,
    step: Step,
    *,
    k: int,
    n: int,
    dtype: str | None = None,
    width: int | None = None,
    **fused_casts: Unpack[FusedCasts],
) -> Passes:
    """A GEMM whose n columns are shared out; its input is gathered, `width` values a token (default: k)."""
    columns = math.ceil(n / step.tensor)
    kernels = _kernels(w, name, m=step.gathered_tokens, k=k, n=columns, dtype=dtype, fused_casts=fused_casts)
    if step.tensor == 1:
        return kernels.forward, [*kernels.input_gradient, *kernels.weight_gradient]
    width = k if width is None else width
    late = w.during(Phase.WEIGHT_GRADIENT)
    again = gather_tokens(late, f"{name}.gather.wgrad", step, width=width, chain=SIDE)
    reduced = scatter_tokens(w.backward, f"{name}.scatter", step, width=width, chain=SIDE)
    return (
        [*gather_tokens(w, f"{name}.gather", step, width=width), *kernels.forward],
        [
            *_beside(late, again, kernels.input_gradient),
            *_beside(w.backward, reduced, kernels.weight_gradient),
        ],
    )


def row_parallel(
    w: KernelWriter, name: str, step: Step, *, k: int, n: int, **fused_casts: Unpack[FusedCasts]
) -> Passes:
    """A GEMM whose k rows are shared out; the partial sums are reduced and scattered."""
    forward, backward = projection(w, name, m=step.gathered_tokens, k=k // step.tensor, n=n, **fused_casts)
    return (
        [*forward, *scatter_tokens(w, f"{name}.scatter", step, width=n)],
        [*gather_tokens(w.backward, f"{name}.gather", step, width=n), *backward],
    )


def _beside(w: KernelWriter, transfers: list[Operation], kernels: list[Operation]) -> list[Operation]:
    """Transfers of the side chain and kernels of the main chain that start together; what follows waits for both.

    The fork and the join are of the writer's phase: they move with the transfer where a schedule puts gradients off.
    """
    return [
        fork(layer=w.layer, phase=w.phase, part=w.part),
        *transfers,
        *kernels,
        join(layer=w.layer, phase=w.phase, part=w.part),
    ]
