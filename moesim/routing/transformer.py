"""The thin byte-level language model: small in width, depth and vocabulary, its expert layout the real model's.

Experts: permute by a stable argsort of expert ids, multiply each expert's rows with its own weights in one
`grouped_mm`, and add the weighted results back: never a loop over experts. CPU computes in float32, CUDA in bfloat16.
Attention: causal, in the variants of the models that are simulated, with rotary positions.

Legend: B sequences, T tokens (per sequence; of experts: all), H hidden size, K selections per token, E routed experts,
R kept rows, I expert width, F = 2 I, V vocabulary, S sequences of the micro-batch (= B). Of attention: A heads, D head
dimension (query and key), V value dimension, C blocks, W window, G global tokens, Q keys that a block of queries sees.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesim.routing.balance import keep_mask
from moesim.routing.request import TrainingRequest
from moesim.routing.routers import HashRouter, RouterInputs, Routing, build_router
from moesim.scenario.routing import NoCapacity

ROW_ALIGNMENT = 8  # grouped_mm wants rows of 16 bytes: 8 elements of bfloat16, 4 of float32


class RoutedExperts(nn.Module):
    """E SwiGLU experts, W2(silu(W1 x) * W3 x), with W1 and W3 fused into one matrix."""

    def __init__(self, *, hidden: int, num_experts: int, width: int) -> None:
        super().__init__()
        assert hidden % ROW_ALIGNMENT == 0 and width % ROW_ALIGNMENT == 0
        self.num_experts = num_experts
        self.w13_EHF = nn.Parameter(torch.empty(num_experts, hidden, 2 * width))
        self.w2_EIH = nn.Parameter(torch.empty(num_experts, width, hidden))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw weights of variance 1 / fan-in."""
        for weight in (self.w13_EHF, self.w2_EIH):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]), generator=generator)

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, keep_TK: Tensor) -> Tensor:
        """sum_k gate * FFN_{id}(hidden) over the kept rows, [T, H]; rows that are not kept are not computed."""
        rows_R, count_E = permutation(expert_ids_TK, keep_TK, num_experts=self.num_experts)
        tokens_R = rows_R // expert_ids_TK.shape[1]
        offsets_E = count_E.cumsum(0, dtype=torch.int32)
        dtype = torch.bfloat16 if hidden_TH.is_cuda else torch.float32
        rows_RH = hidden_TH.to(dtype).index_select(0, tokens_R)
        fused_RF = functional.grouped_mm(rows_RH, self.w13_EHF.to(dtype), offs=offsets_E)
        gate_RI, up_RI = fused_RF.chunk(2, dim=-1)
        # W2 is linear: weighing the narrow rows before it equals weighing the wide ones behind it, at half the traffic
        weights_R1 = gates_TK.reshape(-1, 1).index_select(0, rows_R).to(dtype)
        inner_RI = functional.silu(gate_RI) * up_RI * weights_R1
        outer_RH = functional.grouped_mm(inner_RI, self.w2_EIH.to(dtype), offs=offsets_E)
        return torch.zeros_like(hidden_TH).index_add(0, tokens_R, outer_RH.to(hidden_TH.dtype))

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> None:
        """Scale each expert's gradient (both matrices together) to a norm of at most `max_norm`."""
        gradients = [weight.grad for weight in (self.w13_EHF, self.w2_EIH) if weight.grad is not None]
        if not gradients:
            return
        squares_E = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0)
        scale_E11 = (max_norm / squares_E.sqrt().clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1)
        for gradient in gradients:
            gradient.mul_(scale_E11)


def permutation(expert_ids_TK: Tensor, keep_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """The kept rows in expert order, token order within an expert: (rows_R, count_E).

    `rows_R` indexes the flattened [T * K] selections, `count_E` counts the rows of each expert.
    """
    ids = torch.where(keep_TK & (expert_ids_TK >= 0), expert_ids_TK, num_experts).reshape(-1)
    count_E = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    order = torch.argsort(ids, stable=True)
    return order[: int(count_E.sum())], count_E


class SharedExperts(nn.Module):
    """The experts that run for every token: several SwiGLU experts of one width are one of their summed width."""

    def __init__(self, *, hidden: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(hidden, 2 * num_experts * width, bias=False)
        self.w2 = nn.Linear(num_experts * width, hidden, bias=False)
        self.width = width

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw weights of variance 1 / fan-in, the fan-in of W2 being one expert's width."""
        nn.init.normal_(self.w13.weight, std=1 / math.sqrt(self.w13.in_features), generator=generator)
        nn.init.normal_(self.w2.weight, std=1 / math.sqrt(self.width), generator=generator)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """sum_i FFN^s_i(hidden), [T, H]."""
        gate, up = self.w13(hidden_TH).chunk(2, dim=-1)
        output: Tensor = self.w2(functional.silu(gate) * up)
        return output


ROPE_BASE = 10_000.0


def rotate(x_BATD: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of positions 0..T-1: halves of D are the two parts of a plane."""
    length, dim = x_BATD.shape[-2:]
    frequency_P = ROPE_BASE ** (-torch.arange(0, dim, 2, device=x_BATD.device, dtype=torch.float32) / dim)
    angle_TP = torch.arange(length, device=x_BATD.device, dtype=torch.float32).unsqueeze(1) * frequency_P
    cos_TP, sin_TP = angle_TP.cos().to(x_BATD.dtype), angle_TP.sin().to(x_BATD.dtype)
    first, second = x_BATD.chunk(2, dim=-1)
    return torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], dim=-1)


def _heads(x_BTH: Tensor, num_heads: int) -> Tensor:
    """[B, T, A * D] as [B, A, T, D]."""
    batch, length, width = x_BTH.shape
    return x_BTH.view(batch, length, num_heads, width // num_heads).transpose(1, 2)


def _merge(x_BATD: Tensor) -> Tensor:
    """[B, A, T, D] as [B, T, A * D]."""
    return x_BATD.transpose(1, 2).flatten(2)


class GroupedQueryAttention(nn.Module):
    """`kv_heads` key/value heads, each shared by heads / kv_heads query heads; multi-head where they are equal."""

    def __init__(self, *, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        assert heads % kv_heads == 0 and head_dim % 2 == 0
        self.num_heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(hidden, heads * head_dim, bias=False)
        self.key = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Attend, [B, T, H]."""
        query_BATD = rotate(_heads(self.query(hidden_BTH), self.num_heads))
        key_BATD = rotate(_heads(self.key(hidden_BTH), self.kv_heads))
        value_BATD = _heads(self.value(hidden_BTH), self.kv_heads)
        copies = self.num_heads // self.kv_heads
        if copies > 1:
            key_BATD = key_BATD.repeat_interleave(copies, dim=1)
            value_BATD = value_BATD.repeat_interleave(copies, dim=1)
        output: Tensor = self.output(_merge(self.attend(query_BATD, key_BATD, value_BATD)))
        return output

    def attend(self, query_BATD: Tensor, key_BATD: Tensor, value_BATD: Tensor) -> Tensor:
        """Each token over itself and everything before it."""
        return functional.scaled_dot_product_attention(query_BATD, key_BATD, value_BATD, is_causal=True)


class LocalGlobalAttention(GroupedQueryAttention):
    """Each token over the last `window` tokens (itself included) and the earlier ones at multiples of `global_every`.

    Queries are cut into blocks of `window`: a block sees itself, the block before it and the global tokens, so the
    local cost is O(n W) instead of O(n^2).
    """

    def __init__(
        self, *, hidden: int, heads: int, kv_heads: int, head_dim: int, window: int = 64, global_every: int = 32
    ) -> None:
        super().__init__(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        self.window, self.global_every = window, global_every

    def attend(self, query_BATD: Tensor, key_BATD: Tensor, value_BATD: Tensor) -> Tensor:
        """Blocked attention over the visible keys only."""
        length, window = query_BATD.shape[2], self.window
        num_blocks = math.ceil(length / window)
        padding = num_blocks * window - length
        query_BACWD = functional.pad(query_BATD, (0, 0, 0, padding)).reshape(
            query_BATD.shape[0], query_BATD.shape[1], num_blocks, window, -1
        )
        key_BACQD = self._visible(key_BATD, num_blocks)
        value_BACQD = self._visible(value_BATD, num_blocks)
        mask_CWQ = self._mask(length, num_blocks, query_BATD.device)
        output_BACWD = functional.scaled_dot_product_attention(query_BACWD, key_BACQD, value_BACQD, attn_mask=mask_CWQ)
        return output_BACWD.flatten(2, 3)[:, :, :length]

    def _visible(self, x_BATD: Tensor, num_blocks: int) -> Tensor:
        """Keys (or values) that each block of queries may see: the block before, its own, the global tokens."""
        batch, heads, length, dim = x_BATD.shape
        padded = functional.pad(x_BATD, (0, 0, self.window, num_blocks * self.window - length))
        blocks = padded.view(batch, heads, num_blocks + 1, self.window, dim)
        shared = x_BATD[:, :, :: self.global_every].unsqueeze(2).expand(batch, heads, num_blocks, -1, dim)
        return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:], shared], dim=3)

    def _mask(self, length: int, num_blocks: int, device: torch.device) -> Tensor:
        """[C, W, Q] bool: which of the visible keys a query attends; a global token in the window counts once."""
        window = self.window
        query_CW1 = torch.arange(num_blocks * window, device=device).view(num_blocks, window, 1)
        near_C1Q = (
            torch.arange(2 * window, device=device)
            + (torch.arange(num_blocks, device=device) - 1).view(-1, 1, 1) * window
        )
        distance_CWQ = query_CW1 - near_C1Q
        near_CWQ = (distance_CWQ >= 0) & (distance_CWQ < window) & (near_C1Q >= 0)
        far_CWQ = query_CW1 - torch.arange(0, length, self.global_every, device=device) >= window
        return torch.cat([near_CWQ, far_CWQ], dim=2)


class _WideNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, where autocast hands it a narrower one."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return super().forward(x.to(self.weight.dtype))


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): low-rank queries and key/values, the rotary part apart.

    Keys and values are expanded from a normalised latent of `kv_rank`; one rotary key of `rope_dim` is shared by all
    heads. A query and a key have head_dim + rope_dim components, so the cache holds kv_rank + rope_dim numbers a token.
    """

    def __init__(
        self, *, hidden: int, heads: int, head_dim: int, value_dim: int, q_rank: int, kv_rank: int, rope_dim: int
    ) -> None:
        super().__init__()
        assert rope_dim % 2 == 0
        self.num_heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.kv_rank, self.rope_dim = kv_rank, rope_dim
        self.query_down = nn.Linear(hidden, q_rank, bias=False)
        self.query_norm = _WideNorm(q_rank)
        self.query_up = nn.Linear(q_rank, heads * (head_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(hidden, kv_rank + rope_dim, bias=False)
        self.kv_norm = _WideNorm(kv_rank)
        self.kv_up = nn.Linear(kv_rank, heads * (head_dim + value_dim), bias=False)
        self.output = nn.Linear(heads * value_dim, hidden, bias=False)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Attend, [B, T, H]."""
        query_BATD = _heads(self.query_up(self.query_norm(self.query_down(hidden_BTH))), self.num_heads)
        plain_query, rope_query = torch.split(query_BATD, [self.head_dim, self.rope_dim], dim=-1)
        latent, rope_key = self.kv_down(hidden_BTH).split([self.kv_rank, self.rope_dim], dim=-1)
        expanded = _heads(self.kv_up(self.kv_norm(latent)), self.num_heads)
        plain_key, value_BATV = torch.split(expanded, [self.head_dim, self.value_dim], dim=-1)
        rope_key = rotate(rope_key.unsqueeze(1)).expand(-1, self.num_heads, -1, -1)
        output_BATV = functional.scaled_dot_product_attention(
            torch.cat([plain_query, rotate(rope_query)], dim=-1),
            torch.cat([plain_key, rope_key], dim=-1),
            value_BATV,
            is_causal=True,
        )
        output: Tensor = self.output(_merge(output_BATV))
        return output


def build_attention(kind: str, *, hidden: int, heads: int) -> nn.Module:
    """The attention of the thin model: `mha`, `gqa` (two query heads per key head), `mla` or `local_global`."""
    head_dim = hidden // heads
    if kind == "mha":
        return GroupedQueryAttention(hidden=hidden, heads=heads, kv_heads=heads, head_dim=head_dim)
    if kind == "gqa":
        kv_heads = heads // 2 if heads % 2 == 0 else 1
        return GroupedQueryAttention(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    if kind == "mla":
        return LatentAttention(
            hidden=hidden,
            heads=heads,
            head_dim=head_dim,
            value_dim=head_dim,
            q_rank=max(1, hidden // 2),
            kv_rank=max(1, hidden // 4),
            rope_dim=max(2, head_dim // 4 * 2),
        )
    assert kind == "local_global", kind
    return LocalGlobalAttention(hidden=hidden, heads=heads, kv_heads=heads, head_dim=head_dim)


VOCABULARY = 256


class Mode(NamedTuple):
    """How one forward pass routes.

    `generator` (CPU) for routers that draw; `protected_S` the protected sequences while rows are dropped, None in
    evaluation, where nothing is; `fixed` uses the hash router instead of the learned one (warm-up).
    """

    generator: torch.Generator
    protected_S: Tensor | None = None
    fixed: bool = False


class MoELayer(nn.Module):
    """Router, routed experts and shared experts: sum_i FFN^s_i(u) + sum_i g_i FFN^r_i(u)."""

    def __init__(self, request: TrainingRequest, generator: torch.Generator, experts: type[RoutedExperts]) -> None:
        super().__init__()
        hidden, width = request.thin.hidden, request.thin.expert_intermediate
        self.shape, self.capacity = request.router, request.capacity
        self.router = build_router(self.shape, hidden=hidden, generator=generator)
        self.fixed_router = HashRouter(self.shape)
        self.fixed_router.reset_parameters(generator)
        self.experts = experts(hidden=hidden, num_experts=self.shape.num_experts, width=width)
        self.experts.reset_parameters(generator)
        self.shared: SharedExperts | None = None
        if request.shared_experts:
            self.shared = SharedExperts(hidden=hidden, num_experts=request.shared_experts, width=width)
            self.shared.reset_parameters(generator)

    def forward(self, hidden_BTH: Tensor, hash_keys_BT: Tensor, mode: Mode) -> tuple[Tensor, Routing]:
        """The layer's output [B, T, H] and the routing of its B * T tokens, before dropping."""
        hidden_TH = hidden_BTH.flatten(0, 1)
        router = self.fixed_router if mode.fixed else self.router
        routing: Routing = router(hidden_TH, RouterInputs(hash_keys_BT.flatten(), mode.generator))
        with torch.no_grad():
            keep_TK = self._keep(routing, hidden_BTH, mode)
        output_TH = self.experts(hidden_TH, routing.expert_ids_TK, routing.gates_TK, keep_TK)
        if self.shared is not None:
            output_TH = output_TH + self.shared(hidden_TH)
        return output_TH.view_as(hidden_BTH), routing

    def _keep(self, routing: Routing, hidden_BTH: Tensor, mode: Mode) -> Tensor:
        if mode.protected_S is None or isinstance(self.capacity, NoCapacity):
            return routing.expert_ids_TK >= 0
        batch, length = hidden_BTH.shape[:2]
        return keep_mask(
            self.capacity,
            routing.expert_ids_TK,
            routing.affinities_TK,
            router=self.shape,
            sequence_T=torch.arange(batch, device=hidden_BTH.device).repeat_interleave(length),
            protected_S=mode.protected_S,
        )


class Block(nn.Module):
    """Pre-norm attention and MoE layer, each added to the residual."""

    def __init__(self, request: TrainingRequest, generator: torch.Generator, experts: type[RoutedExperts]) -> None:
        super().__init__()
        hidden = request.thin.hidden
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = build_attention(request.thin.attention, hidden=hidden, heads=request.thin.heads)
        self.moe_norm = nn.RMSNorm(hidden)
        self.moe = MoELayer(request, generator, experts)

    def forward(self, hidden_BTH: Tensor, hash_keys_BT: Tensor, mode: Mode) -> tuple[Tensor, Routing]:
        """The block's output and its routing."""
        hidden_BTH = hidden_BTH + self.attention(self.attention_norm(hidden_BTH))
        output_BTH, routing = self.moe(self.moe_norm(hidden_BTH), hash_keys_BT, mode)
        return hidden_BTH + output_BTH, routing


class LanguageModel(nn.Module):
    """Embedding, blocks and head over bytes; all parameters drawn from `generator` (CPU).

    `experts` is how the routed experts are computed: the class changes neither parameters nor what is drawn for them.
    """

    def __init__(
        self, request: TrainingRequest, generator: torch.Generator, *, experts: type[RoutedExperts] = RoutedExperts
    ) -> None:
        super().__init__()
        hidden = request.thin.hidden
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(request, generator, experts) for _ in range(request.thin.layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=hidden**-0.5, generator=generator)
        for block in self.blocks:
            for module in block.get_submodule("attention").modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layer of every block, in order."""
        return [block.moe for block in self.blocks if isinstance(block, Block)]

    def forward(self, bytes_BT: Tensor, mode: Mode) -> tuple[Tensor, list[Routing]]:
        """Logits [B, T, V] of the next byte, and every layer's routing before dropping."""
        hash_keys_BT = hash_keys(bytes_BT)
        hidden_BTH = self.embedding(bytes_BT)
        routings = []
        for block in self.blocks:
            hidden_BTH, routing = block(hidden_BTH, hash_keys_BT, mode)
            routings.append(routing)
        return self.head(self.norm(hidden_BTH)), routings


def hash_keys(bytes_BT: Tensor) -> Tensor:
    """The last three bytes as one number [B, T]: what fixed routing hashes.

    One byte is a poor token (a fifth of source text is spaces); three stand for the sub-word of a real vocabulary.
    """
    padded = functional.pad(bytes_BT, (2, 0))
    return padded[:, :-2] * 65_536 + padded[:, 1:-1] * 256 + padded[:, 2:]
