"""Causal self-attention in the variants of the models that are simulated, with rotary positions.

Legend: B sequences, T tokens, H hidden size, A heads, D head dimension (query and key), V value dimension, C blocks,
W window, G global tokens, Q keys that one block of queries sees.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

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
