"""A trainer whose large GEMMs are in bf16 or in FP8, its host out of the way: what `implementation: fused` lists.

What lies between GEMMs is one kernel (tools/fused_kernels.py, tools/fp8_kernels.py): norms with the sum of the
residual stream, rotary embedding in place, rows gathered once, gates inside of the activation, a token's rows summed
once, the gradient of the logits in their place. Gate, head and attention are in bf16. Weights are cast once behind
Adam, which has fp32 master copies and moments. Routing is even, whatever the gate says. Needs torch, triton, a GPU,
DeepGEMM for blockwise, and nothing of moesim.

Legend: T tokens, R rows (token and expert), K selections of a token, E experts.
"""

from typing import Any

import fp8_kernels as casts
import fused_kernels as kernels
import torch
import torch.nn.functional as F
from fp8_recipes import Group, Weight, Wide
from fused_cases import Sizes
from fused_rows import even_route
from torch import Tensor


def _kept(ctx: Any) -> Any:
    """What the forward pass kept, once."""
    kept, ctx.kept = ctx.kept, None
    return kept


class Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begins: Tensor, ids: Tensor, weight: Weight) -> Tensor:
        ctx.kept = ids, weight
        return F.embedding(ids, weight.value)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, ...]:
        ids, weight = _kept(ctx)
        weight.gradient = torch.ops.aten.embedding_dense_backward(dx, ids, len(weight.value), -1, False)
        return None, None, None


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, weight: Weight) -> tuple[Tensor, Tensor]:
        total, y, root = kernels.norm(x, branch, weight.value)
        ctx.kept = total, root, weight, branch is not None
        return (total if branch is not None else x.view_as(x)), y

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, root, weight, joins = _kept(ctx)
        weight.gradient = torch.zeros_like(weight.master)
        dx = kernels.norm_back(dy, dtotal, total, weight.value, root, weight.gradient)
        return dx, (dx if joins else None), None


class Queries(torch.autograd.Function):
    """Queries, keys and values from one GEMM, turned in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, sizes: Sizes, recipe: Wide) -> tuple[Tensor, ...]:
        operand = recipe.operand(x, None)
        qkv = recipe.product(operand, weight, None)
        casts.rotate(qkv, heads=sizes.heads + sizes.kv_heads, length=sizes.sequence, width=sizes.head_dim)
        ctx.kept = operand, weight, sizes, recipe
        parts = qkv.view(sizes.batch, sizes.sequence, -1, sizes.head_dim)
        return parts.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=2)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[Tensor | None, ...]:
        operand, weight, sizes, recipe = _kept(ctx)
        gradient = recipe.gradient(casts.joined_back([*parts], length=sizes.sequence), None)
        dx = recipe.back(gradient, weight, None)
        recipe.weight_back(gradient, operand, weight, None)
        return dx, None, None, None


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, recipe: Wide) -> Tensor:
        operand = recipe.operand(x, None)
        ctx.kept = operand, weight, recipe
        return recipe.product(operand, weight, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        operand, weight, recipe = _kept(ctx)
        gradient = recipe.gradient(dy, None)
        dx = recipe.back(gradient, weight, None)
        recipe.weight_back(gradient, operand, weight, None)
        return dx, None, None


class Network:
    """Down(silu(left) * right) of up(x), of experts with their gates or of all tokens."""

    def __init__(self, up: Weight, down: Weight, recipe: Wide, group: Group | None, slots: Tensor | None) -> None:
        self.up, self.down, self.recipe, self.group, self.slots = up, down, recipe, group, slots

    def ahead(self, x: Tensor, gates: Tensor | None) -> tuple[Tensor, Any]:
        """The result, and what is kept."""
        operand = self.recipe.operand(x, self.group)
        h = self.recipe.product(operand, self.up, self.group)
        act = self.recipe.activated(h, gates, self.slots, self.group)
        return self.recipe.product(act, self.down, self.group), (operand, h, act)

    def back(self, dy: Tensor, gates: Tensor | None, kept: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Gradients of the input and of the gates; `kept` is empty behind it."""
        (operand, h, act), recipe, group = kept, self.recipe, self.group
        kept.clear()
        gradient = recipe.gradient(dy, group)
        dact = recipe.back(gradient, self.down, group)
        recipe.weight_back(gradient, act, self.down, group)
        del gradient, act
        inner, dgates = recipe.activated_back(dact, h, gates, self.slots, group)
        del dact, h
        dx = recipe.back(inner, self.up, group)
        recipe.weight_back(inner, operand, self.up, group)
        return dx, dgates


class Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: Network) -> Tensor:
        out, kept = network.ahead(x, None)
        ctx.kept = network, [*kept]
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        network, kept = _kept(ctx)
        return network.back(dy, None, kept)[0], None


class Moe(torch.autograd.Function):
    """Gate, rows to experts and back, shared experts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Weight, experts: Network, shared: Network | None, route: Any) -> Tensor:
        shares, gates = kernels.choose(y @ gate.value.T, route.ids_TK)
        out, kept = experts.ahead(kernels.gather(y, route.source_R), gates)
        beside, kept_shared = shared.ahead(y, None) if shared else (None, None)
        ctx.kept = y, gate, experts, shared, route, shares, gates, [*kept], [*(kept_shared or ())]
        return kernels.sum_rows(out, route.places_TK, *([] if beside is None else [beside]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, experts, shared, route, shares, gates, kept, kept_shared = _kept(ctx)
        beside = [shared.back(dy, None, kept_shared)[0]] if shared else []
        drows, dgates = experts.back(kernels.gather(dy, route.source_R), gates, kept)
        dlogits = kernels.choose_back(dgates, route.ids_TK, shares)
        of_gate = dlogits @ gate.value
        gate.gradient = dlogits.T @ y
        return kernels.sum_rows(drows, route.places_TK, of_gate, *beside), None, None, None, None


class HeadLoss(torch.autograd.Function):
    """Logits and their mean cross entropy; backward, their gradient takes their place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weight: Weight) -> Tensor:
        logits = x @ weight.value.T
        ctx.kept = x, labels, weight, logits
        return kernels.losses_of(logits, labels).mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, weight, logits = _kept(ctx)
        kernels.loss_back(logits, labels, 1.0 / len(labels))
        dx = logits @ weight.value
        weight.gradient = logits.T @ x
        return dx, None, None


class Trainer:
    """The model, its states and one micro-batch of random tokens."""

    def __init__(self, sizes: Sizes, recipe: Wide) -> None:
        self.sizes, self.recipe = sizes, recipe
        self.weights = {name: Weight(_made(shape)) for name, shape in _shapes(sizes).items()}
        self.cast = [
            name for name in self.weights if name.rpartition(".")[2] in ("qkv", "out", "up", "down", "ups", "downs")
        ]
        self.route = even_route(sizes, "cuda") if sizes.experts else None
        self.group = _group(sizes, self.route) if self.route else None
        self.tokens = torch.randint(sizes.vocab, (sizes.tokens,), device="cuda")
        self.begins = torch.zeros((), device="cuda", requires_grad=True)
        recipe.begin()
        self._cast_weights()

    def _cast_weights(self) -> None:
        for name in self.cast:
            self.recipe.prepare(self.weights[name], grouped=name.endswith("s"))

    def _network(self, layer: int, name: str) -> Network:
        """`name`: "" for dense networks and shared experts, "s" for routed ones."""
        up, down = (self.weights[f"{layer}.{side}{name}"] for side in ("up", "down"))
        slots = self.route.slots_R if name and self.route else None
        return Network(up, down, self.recipe, self.group if name else None, slots)

    def _layer(self, x: Tensor, branch: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
        sizes = self.sizes
        x, y = Norm.apply(x, branch, self.weights[f"{layer}.norm1"])
        parts = Queries.apply(y, self.weights[f"{layer}.qkv"], sizes, self.recipe)
        out = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in parts), is_causal=True, enable_gqa=sizes.kv_heads < sizes.heads
        )
        joined = out.transpose(1, 2).reshape(sizes.tokens, -1)
        branch = Linear.apply(joined, self.weights[f"{layer}.out"], self.recipe)
        x, y = Norm.apply(x, branch, self.weights[f"{layer}.norm2"])
        if layer < sizes.dense_layers:
            return x, Dense.apply(y, self._network(layer, ""))
        shared = self._network(layer, "") if sizes.shared_width else None
        return x, Moe.apply(y, self.weights[f"{layer}.gate"], self._network(layer, "s"), shared, self.route)

    def step(self) -> Tensor:
        """Forward, backward, Adam, casts of weights."""
        self.recipe.begin()
        x, branch = Embed.apply(self.begins, self.tokens, self.weights["embedding"]), None
        for layer in range(self.sizes.layers):
            x, branch = self._layer(x, branch, layer)
        _, y = Norm.apply(x, branch, self.weights["norm"])
        loss = HeadLoss.apply(y, self.tokens, self.weights["head"])
        loss.backward()
        for weight in self.weights.values():
            weight.step()
        self._cast_weights()
        return loss.detach()  # type: ignore[no-any-return]


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every weight's."""
    h, wide = sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (sizes.vocab, h)}
    for layer in range(sizes.layers):
        own = {"norm1": (h,), "qkv": (wide, h), "out": (h, sizes.heads * sizes.head_dim), "norm2": (h,)}
        width = sizes.dense_width if layer < sizes.dense_layers else sizes.shared_width
        if width:
            own |= {"up": (2 * width, h), "down": (h, width)}
        if layer >= sizes.dense_layers:
            ups, downs = (sizes.experts, 2 * sizes.expert_width, h), (sizes.experts, h, sizes.expert_width)
            own |= {"gate": (sizes.experts, h), "ups": ups, "downs": downs}
        shapes |= {f"{layer}.{name}": shape for name, shape in own.items()}
    return shapes | {"norm": (h,), "head": (sizes.vocab, h)}


def _made(shape: tuple[int, ...]) -> Tensor:
    value = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    return value.fill_(1.0) if len(shape) == 1 else value.normal_(std=0.02)


def _group(sizes: Sizes, route: Any) -> Group:
    each, left = divmod(sizes.tokens * sizes.top_k, sizes.experts)
    assert not left and not each % 128, "rows of an expert are a multiple of 128"
    experts = torch.arange(sizes.experts, dtype=torch.int32, device="cuda")
    return Group(
        experts=sizes.experts,
        each=each,
        ends_E=route.begins[1:],
        ids_R=experts.repeat_interleave(each),
        counts_E=torch.full_like(experts, each),
    )
