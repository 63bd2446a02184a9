"""Matrix products that tensor-parallel ranks share, with sequence parallelism (arXiv 1909.08053, 2205.05198).

As Megatron-Core runs them. Between products a rank holds its share of the tokens. A product whose columns are shared
out begins by gathering the tokens; one whose rows are shared out ends by a reduce-scatter of the partial sums. In the
backward pass each of them has its opposite. Only the share of a gathered input is kept: it is gathered again for the
weight's gradient, beside the product of the input's gradient; the reduce-scatter of the input's gradient runs beside
the product of the weight's. Activations travel in bf16.

Without sequence parallelism every tensor rank holds all tokens: nothing is gathered, and partial sums are summed by an
all-reduce instead of a reduce-scatter.

So a layer of attention and dense network gathers 2 + 4 times and scatters 2 + 2 times, of which 2 + 2 lie beside
products. A rank without tensor peers has the plain products.
"""

import math
from typing import NamedTuple, Unpack

from moesim.program.fp8_casts import NO_CASTS, FusedCasts, fp8_casts
from moesim.program.group_collectives import PeerCollective, Peers
from moesim.program.operations import MAIN, SIDE, Operation, fork, join, transfer
from moesim.program.sizes import Passes, Step
from moesim.program.torch_host import backward, forward
from moesim.program.torch_kernels import issued
from moesim.program.writer import KernelWriter
from moesim.results.spans import Collective, Phase
from moesim.scenario.base import BYTES_PER_ELEMENT

ACTIVATION_BYTES = BYTES_PER_ELEMENT["bf16"]  # activations between kernels


class _Kernels(NamedTuple):
    """The forward GEMM of a product, those of its input's and its weight's gradient, each behind its casts."""

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
    dgrad, wgrad = w.gemm_backward(name, m=m, k=k, n=n, dtype=dtype)
    half = backward("product") / 2
    launches = forward("module", "product") if module else forward("product")
    return _Kernels(
        [*casts.forward, issued(w.gemm(name, m=m, k=k, n=n, dtype=dtype), launches)],
        [*casts.input_gradient, issued(dgrad, half)],
        [*casts.weight_gradient, issued(wgrad, half)],
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
    """A product that no other rank takes part in; `fused_casts`: what kernels before it did, see `fp8_casts`.

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
    operation = transfer(
        name,
        "tensor",
        (prepared,),
        layer=w.layer,
        phase=w.phase,
        part=w.part,
        collective=kind,
        chain=chain,
        peers=members,
    )
    return issued(operation, (forward if w.phase is Phase.FORWARD else backward)("exchange"))


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
    """A product whose n columns are shared out; its input is gathered, `width` values a token (default: k)."""
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
    """A product whose k rows are shared out; the partial sums are reduced and scattered."""
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
