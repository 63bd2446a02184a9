"""A trainer of the kind of `implementation: fused`: what lies between GEMMs is one kernel, written by hand.

Norms are one with the sum of the residual stream, queries, keys and values one GEMM whose rotary embedding is in
place, rows are gathered once, gates are inside of the activation, a token's rows are summed with the residual stream in
one kernel, the gradient of the logits takes their place, and gradients of weights are added to buffers by the kernel
that makes them. Weights, gradients and states lie in flat buffers that one kernel updates. Routing is even, whatever
the gate says. Needs torch, triton and a GPU (or TRITON_INTERPRET=1 on small sizes), and nothing of moesim.

Legend: T tokens, R rows (token and expert), K selections of a token, E experts.
"""

from typing import Any

import fused_kernels as kernels
import torch
import torch.nn.functional as F
from fused_cases import Sizes
from fused_rows import Arrive, Combine, Gates, Leave, Rows, even_route, moment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


class Weight:
    """A weight with its place in the buffer of gradients."""

    def __init__(self, value: Tensor, gradient: Tensor) -> None:
        self.value, self.gradient = value, gradient


class Buffers:
    """Weights, gradients and states of all weights, each flat."""

    def __init__(self, sizes: Sizes, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        counts = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
        total = sum(counts.values())
        self.weights = torch.empty(total, dtype=torch.bfloat16, device=device)
        self.gradients = torch.zeros(total, dtype=getattr(torch, sizes.gradients), device=device)
        states = getattr(torch, sizes.states)
        self.master = torch.empty(total, dtype=torch.float32, device=device) if sizes.master else None
        self.moments = [torch.zeros(total, dtype=states, device=device) for _ in range(2)]
        self.of: dict[str, Weight] = {}
        at = 0
        for name, shape in shapes.items():
            end = at + counts[name]
            value = self.weights[at:end].view(shape)
            value.fill_(1.0) if len(shape) == 1 else value.normal_(std=0.02)
            self.of[name] = Weight(value, self.gradients[at:end].view(shape))
            at = end
        if self.master is not None:
            self.master.copy_(self.weights)

    def step(self) -> None:
        """One step of Adam."""
        kernels.adam(self.weights, self.gradients, self.master, *self.moments)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every weight's."""
    h, wide = sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab, h)}
    for layer in range(sizes.layers):
        own: dict[str, tuple[int, ...]] = {
            "norm1": (h,), "qkv": (wide, h), "out": (h, sizes.heads * sizes.head_dim), "norm2": (h,),
        }  # fmt: skip
        if layer < sizes.dense_layers:
            own |= {"up": (2 * sizes.dense_width, h), "down": (h, sizes.dense_width)}
        else:
            own |= {
                "gate": (sizes.experts, h),
                "ups": (sizes.local_experts, 2 * sizes.expert_width, h),
                "downs": (sizes.local_experts, h, sizes.expert_width),
            }
            if sizes.shared_width:
                own |= {"up": (2 * sizes.shared_width, h), "down": (h, sizes.shared_width)}
        shapes |= {f"{layer}.{name}": shape for name, shape in own.items()}
    return shapes | {"norm": (h,), "head": (sizes.vocab, h)}


class Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begins: Tensor, ids: Tensor, weight: Weight) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return weight.value[ids]

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, ...]:
        if ctx.weight.gradient.dtype == torch.float32:
            kernels.add_rows(ctx.weight.gradient, ctx.ids, dx)
        else:
            ctx.weight.gradient.index_add_(0, ctx.ids, dx)
        return None, None, None


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, weight: Weight) -> tuple[Tensor, Tensor]:
        total, y, root = kernels.norm(x, branch, weight.value)
        ctx.save_for_backward(total, root)
        ctx.weight, ctx.joins = weight, branch is not None
        return (total if branch is not None else x.view_as(x)), y

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, root = ctx.saved_tensors
        with moment("norm"):
            gradient = ctx.weight.gradient
            wide = gradient if gradient.dtype == torch.float32 else gradient.float()
            dx = kernels.norm_back(dy, dtotal, total, ctx.weight.value, root, wide)
            if wide is not gradient:
                gradient.copy_(wide)
        return dx, (dx if ctx.joins else None), None


class Queries(torch.autograd.Function):
    """Queries, keys and values from one GEMM, turned in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, sizes: Sizes, whole: Tensor) -> tuple[Tensor, ...]:
        qkv = x @ weight.value.T
        kernels.turn(qkv, heads=sizes.heads + sizes.kv_heads, length=sizes.sequence, width=sizes.head_dim)
        ctx.save_for_backward(x)
        ctx.weight, ctx.sizes, ctx.whole = weight, sizes, whole
        parts = qkv.view(sizes.batch, sizes.sequence, -1, sizes.head_dim)
        return parts.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=2)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        (x,), sizes = ctx.saved_tensors, ctx.sizes
        with moment("queries"):
            joined = torch.cat([dq, dk, dv], dim=2).view(sizes.tokens, -1)
            heads = sizes.heads + sizes.kv_heads
            kernels.turn(joined, heads=heads, length=sizes.sequence, width=sizes.head_dim, back=True)
            kernels.add_weight_gradient(ctx.weight.gradient[None], joined, x, ctx.whole)
            dx = joined @ ctx.weight.value
        return dx, None, None, None


class Linear(torch.autograd.Function):
    """x @ weight.T, with the residual stream added by the GEMM where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, whole: Tensor, residual: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.whole, ctx.adds, ctx.name = weight, whole, residual is not None, name
        return x @ weight.value.T if residual is None else torch.addmm(residual, x, weight.value.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with moment(ctx.name):
            dx = dy @ ctx.weight.value
            kernels.add_weight_gradient(ctx.weight.gradient[None], dy, x, ctx.whole)
        return dx, None, None, (dy if ctx.adds else None), None


class Grouped(torch.autograd.Function):
    """Rows of each expert times its weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Weight, begins: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight, ctx.begins, ctx.name = weight, begins, name
        return torch._grouped_mm(rows, weight.value.transpose(1, 2), offs=begins[1:])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        with moment(ctx.name):
            dx = torch._grouped_mm(dy, ctx.weight.value, offs=ctx.begins[1:])
            kernels.add_weight_gradient(ctx.weight.gradient, dy, rows, ctx.begins)
        return dx, None, None, None


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, gates: Tensor | None, slots: Tensor) -> Tensor:
        ctx.slots = slots
        ctx.save_for_backward(inputs, *([gates] if gates is not None else []))
        return kernels.gated(inputs, gates, slots if gates is not None else None)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *gates = ctx.saved_tensors
        with moment("activation"):
            given = gates[0] if gates else None
            back = kernels.gated_back(dout, inputs, given, ctx.slots if gates else None)
        return *back, None


class Loss(torch.autograd.Function):
    """The mean cross entropy; backward, the gradient of the logits takes their place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return kernels.losses_of(logits, labels).mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        with moment("loss"):
            kernels.loss_back(logits, labels, 1.0 / len(labels))
        return logits, None


class HeadLoss(torch.autograd.Function):
    """Head and loss in chunks of tokens, with their gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weight: Weight, chunks: int, ends: Tensor) -> Tensor:
        dx, total = torch.empty_like(x), torch.zeros((), device=x.device)
        with moment("loss"):
            for part, own, back in zip(x.chunk(chunks), labels.chunk(chunks), dx.chunk(chunks), strict=True):
                logits = part @ weight.value.T
                total += kernels.losses_of(logits, own).sum()
                kernels.loss_back(logits, own, 1.0 / len(x))
                torch.mm(logits, weight.value, out=back)
                kernels.add_weight_gradient(weight.gradient[None], logits, part, ends)
                del logits
        ctx.save_for_backward(dx)
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None, None, None


class Trainer:
    """The model, its buffers and one micro-batch of random tokens."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.buffers = Buffers(sizes, shapes_of(sizes), device)
        self.route = even_route(sizes, device)
        self.tokens = torch.randint(sizes.vocab, (sizes.tokens,), device=device)
        self.begins = torch.zeros((), device=device, requires_grad=True)
        self.chunk = torch.tensor([0, sizes.tokens // sizes.loss_chunks], dtype=torch.int32, device=device)

    def _of(self, name: str) -> Weight:
        return self.buffers.of[name]

    def _down(self, inputs: Tensor, gates: Tensor | None, slots: Tensor, product: Any) -> Tensor:
        """The activation and the GEMM behind it, which are computed again together."""

        def both(inputs: Tensor, *gates: Tensor) -> Tensor:
            return product(Gated.apply(inputs, gates[0] if gates else None, slots))  # type: ignore[no-any-return]

        given = [inputs] if gates is None else [inputs, gates]
        return _again(both, *given) if self.sizes.recompute == "swiglu" else both(*given)

    def _dense(self, y: Tensor, layer: int, residual: Tensor | None, name: str) -> Tensor:
        inputs = Linear.apply(y, self._of(f"{layer}.up"), self.route.whole, None, name)
        down, whole = self._of(f"{layer}.down"), self.route.whole
        return self._down(inputs, None, whole, lambda act: Linear.apply(act, down, whole, residual, name))

    def _moe(self, total: Tensor, y: Tensor, layer: int) -> Tensor:
        route = self.route
        gates = Gates.apply(Linear.apply(y, self._of(f"{layer}.gate"), route.whole, None, "gate"), route.ids_TK)
        shared = self._dense(y, layer, None, "shared") if self.sizes.shared_width else None
        rows, gates = Arrive.apply(y, gates, route) if route.is_spread else (Rows.apply(y, route), gates)
        inputs = Grouped.apply(rows, self._of(f"{layer}.ups"), route.begins, "ups")
        downs = self._of(f"{layer}.downs")
        slots = route.arrived_R if route.is_spread else route.slots_R
        out = self._down(inputs, gates, slots, lambda act: Grouped.apply(act, downs, route.begins, "downs"))
        return (Leave if route.is_spread else Combine).apply(total, out, shared, route)  # type: ignore[no-any-return]

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        sizes = self.sizes
        x, y = Norm.apply(x, None, self._of(f"{layer}.norm1"))
        parts = Queries.apply(y, self._of(f"{layer}.qkv"), sizes, self.route.whole)
        with sdpa_kernel(BACKENDS[sizes.attention]):
            out = F.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in parts), is_causal=True, enable_gqa=sizes.kv_heads < sizes.heads
            )
        joined = out.transpose(1, 2).reshape(sizes.tokens, -1)
        branch = Linear.apply(joined, self._of(f"{layer}.out"), self.route.whole, None, "out")
        total, y = Norm.apply(x, branch, self._of(f"{layer}.norm2"))
        if layer < sizes.dense_layers:
            return self._dense(y, layer, total, "dense")
        return _again(self._moe, total, y, layer) if sizes.recompute == "moe" else self._moe(total, y, layer)

    def loss(self) -> Tensor:
        """Of the micro-batch."""
        x = Embed.apply(self.begins, self.tokens, self._of("embedding"))
        for layer in range(self.sizes.layers):
            x = _again(self._layer, x, layer) if self.sizes.recompute == "full" else self._layer(x, layer)
        _, y = Norm.apply(x, None, self._of("norm"))
        if self.sizes.loss_chunks > 1:
            return HeadLoss.apply(y, self.tokens, self._of("head"), self.sizes.loss_chunks, self.chunk)  # type: ignore[no-any-return]
        return Loss.apply(Linear.apply(y, self._of("head"), self.route.whole, None, "head"), self.tokens)  # type: ignore[no-any-return]

    def step(self) -> Tensor:
        """All micro-batches and the optimizer."""
        value = torch.zeros((), device=self.device)
        for _ in range(self.sizes.micro_batches):
            with moment("forward"):
                loss = self.loss()
            loss.backward()
            value = loss.detach()
            del loss
        with moment("optimizer"):
            self.buffers.step()
        return value


def _again(what: Any, *given: Any) -> Tensor:
    return checkpoint(what, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
