"""How a trainer of fused kernels moves rows to experts and back, on one rank or on several (tools/fused_program.py).

On several ranks each has as many experts; rows go to them and come back by an all-to-all. Routing is even, so that
every rank knows what it will get.

Legend: T tokens, R rows (token and expert), K selections of a token, E experts of a rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fused_kernels as kernels
import torch
import torch.distributed as dist
from fused_cases import Sizes
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Route:
    """Even routing. ids_TK: experts; source_R: tokens of a rank's own rows in the order of experts; places_TK: the
    rows of a token; slots_R: place of a row among all of [T, K]; begins: of each local expert's rows, and their end;
    whole: of all tokens; order_R: of arrived rows, in the order of experts; arrived_R: their numbers.
    """

    ids_TK: Tensor
    source_R: Tensor
    places_TK: Tensor
    slots_R: Tensor
    begins: Tensor
    whole: Tensor
    order_R: Tensor
    back_R: Tensor
    arrived_R: Tensor
    is_spread: bool


def even_route(sizes: Sizes, device: str) -> Route:
    """Token t goes to experts t K, t K + 1, ... around, on every rank alike."""
    slots = torch.arange(sizes.tokens * max(sizes.top_k, 1), device=device)
    ids = slots % max(sizes.experts, 1)
    order = torch.argsort(ids, stable=True)
    own = ids[ids < sizes.local_experts].sort().values if sizes.experts else ids
    arrived = own.repeat(sizes.ranks)
    by_expert = torch.argsort(arrived, stable=True)
    begins = torch.searchsorted(arrived[by_expert].contiguous(), torch.arange(sizes.local_experts + 1, device=device))
    return Route(
        ids_TK=ids.view(sizes.tokens, -1),
        source_R=order // max(sizes.top_k, 1),
        places_TK=torch.argsort(order).view(sizes.tokens, -1),
        slots_R=order,
        begins=begins.to(torch.int32),
        whole=torch.tensor([0, sizes.tokens], dtype=torch.int32, device=device),
        order_R=by_expert,
        back_R=torch.argsort(by_expert),
        arrived_R=torch.arange(len(arrived), device=device),
        is_spread=sizes.ranks > 1,
    )


MOMENTS: dict[str, int] = {}  # the allocator's peak by moment of the step


@contextmanager
def moment(name: str) -> Iterator[None]:
    """Counts a moment's peak where the allocator is asked (never while a graph is captured)."""
    asks = torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()
    if asks:
        _note(f"before {name}")
    yield
    if asks:
        _note(name)


def _note(name: str) -> None:
    MOMENTS[name] = max(MOMENTS.get(name, 0), torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


class Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        shares, gates = kernels.choose(logits, ids)
        ctx.save_for_backward(shares, ids)
        return gates

    @staticmethod
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor | None, ...]:
        shares, ids = ctx.saved_tensors
        return kernels.choose_back(dgates, ids, shares), None


class Rows(torch.autograd.Function):
    """Rows in the order of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return kernels.gather(x, route.source_R)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        with moment("rows"):
            return kernels.sum_rows(drows, ctx.route.places_TK), None


class Combine(torch.autograd.Function):
    """The residual stream, a token's rows and the shared experts' results in one sum."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, rows: Tensor, shared: Tensor | None, route: Route) -> Tensor:
        ctx.route, ctx.shares = route, shared is not None
        return kernels.sum_rows(rows, route.places_TK, residual, *([] if shared is None else [shared]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with moment("combine"):
            drows = kernels.gather(dy, ctx.route.source_R)
        return dy, drows, (dy if ctx.shares else None), None


def exchanged(rows: Tensor) -> Tensor:
    """As many to and from each rank."""
    found = torch.empty_like(rows)
    dist.all_to_all_single(found, rows)
    return found


class Arrive(torch.autograd.Function):
    """Rows and their gates go to the experts' ranks, and are put in the order of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, route: Route) -> tuple[Tensor, Tensor]:
        ctx.route, ctx.shape = route, gates.shape
        came = exchanged(kernels.gather(x, route.source_R))
        given = exchanged(gates.view(-1)[route.slots_R])[route.order_R]
        return kernels.gather(came, route.order_R), given

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dgates: Tensor) -> tuple[Tensor | None, ...]:
        route = ctx.route
        with moment("arrive"):
            mine = exchanged(kernels.gather(drows, route.back_R))
            back = torch.empty_like(dgates)
            back[route.slots_R] = exchanged(dgates[route.back_R])
            return kernels.sum_rows(mine, route.places_TK), back.view(ctx.shape), None


class Leave(torch.autograd.Function):
    """Results go back to the tokens' ranks, and are summed with the residual stream and the shared experts'."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, rows: Tensor, shared: Tensor | None, route: Route) -> Tensor:
        ctx.route, ctx.shares = route, shared is not None
        came = exchanged(kernels.gather(rows, route.back_R))
        return kernels.sum_rows(came, route.places_TK, residual, *([] if shared is None else [shared]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        route = ctx.route
        with moment("leave"):
            came = exchanged(kernels.gather(dy, route.source_R))
            drows = kernels.gather(came, route.order_R)
        return dy, drows, (dy if ctx.shares else None), None
