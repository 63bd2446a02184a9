"""Attention variants against explicit computations, and causality of all of them."""

import math

import pytest
import torch
from torch import Tensor

from moesim.routing.transformer import (
    GroupedQueryAttention,
    LatentAttention,
    LocalGlobalAttention,
    build_attention,
    rotate,
)

B, H = 2, 32


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_TT: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v with -inf where the mask is False."""
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~mask_TT, -math.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla", "local_global"])
def test_changing_the_future_leaves_the_past(kind: str) -> None:
    torch.manual_seed(0)
    attention = build_attention(kind, hidden=H, heads=4)
    hidden_BTH = torch.randn(B, 150, H)
    changed_BTH = hidden_BTH.clone()
    changed_BTH[:, 100:] += 1.0
    before, after = attention(hidden_BTH), attention(changed_BTH)
    torch.testing.assert_close(before[:, :100], after[:, :100], rtol=0, atol=1e-6)
    assert (before[:, 100:] - after[:, 100:]).abs().amax(2).min() > 1e-4


@pytest.mark.parametrize("length", [1, 16, 50, 64])
def test_local_global_equals_masked_full_attention(length: int) -> None:
    torch.manual_seed(length)
    attention = LocalGlobalAttention(hidden=H, heads=4, kv_heads=2, head_dim=8, window=16, global_every=5)
    query, key, value = (torch.randn(B, 4, length, 8) for _ in range(3))
    distance_TT = torch.arange(length).unsqueeze(1) - torch.arange(length)
    mask_TT = (distance_TT >= 0) & ((distance_TT < 16) | (torch.arange(length) % 5 == 0))
    torch.testing.assert_close(attention.attend(query, key, value), masked_attention(query, key, value, mask_TT))


def test_local_global_with_a_window_of_everything_is_full_attention() -> None:
    torch.manual_seed(0)
    local = LocalGlobalAttention(hidden=H, heads=4, kv_heads=4, head_dim=8, window=64)
    full = GroupedQueryAttention(hidden=H, heads=4, kv_heads=4, head_dim=8)
    full.load_state_dict(local.state_dict())
    hidden_BTH = torch.randn(B, 60, H)
    torch.testing.assert_close(local(hidden_BTH), full(hidden_BTH))


def test_grouped_query_equals_multi_head_with_repeated_heads() -> None:
    torch.manual_seed(0)
    grouped = GroupedQueryAttention(hidden=H, heads=4, kv_heads=2, head_dim=8)
    full = GroupedQueryAttention(hidden=H, heads=4, kv_heads=4, head_dim=8)
    state = grouped.state_dict()
    for name in ("key.weight", "value.weight"):
        state[name] = state[name].view(2, 8, H).repeat_interleave(2, dim=0).reshape(32, H)
    full.load_state_dict(state)
    hidden_BTH = torch.randn(B, 40, H)
    torch.testing.assert_close(grouped(hidden_BTH), full(hidden_BTH))


def test_latent_attention_equals_the_expanded_computation() -> None:
    torch.manual_seed(0)
    heads, head_dim, value_dim, rope_dim, kv_rank, length = 4, 8, 6, 4, 10, 20
    attention = LatentAttention(
        hidden=H, heads=heads, head_dim=head_dim, value_dim=value_dim, q_rank=12, kv_rank=kv_rank, rope_dim=rope_dim
    ).double()
    hidden_BTH = torch.randn(B, length, H, dtype=torch.float64)

    def normalised(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()

    latent = normalised(hidden_BTH @ attention.kv_down.weight[:kv_rank].T)
    shared_key = rotate(hidden_BTH @ attention.kv_down.weight[kv_rank:].T)
    low_query = normalised(hidden_BTH @ attention.query_down.weight.T)
    mask_TT = torch.ones(length, length, dtype=torch.bool).tril()
    outputs = []
    for head in range(heads):
        up_query = attention.query_up.weight.view(heads, head_dim + rope_dim, -1)[head]
        up_kv = attention.kv_up.weight.view(heads, head_dim + value_dim, -1)[head]
        query = torch.cat([low_query @ up_query[:head_dim].T, rotate(low_query @ up_query[head_dim:].T)], dim=-1)
        key = torch.cat([latent @ up_kv[:head_dim].T, shared_key], dim=-1)
        outputs.append(masked_attention(query, key, latent @ up_kv[head_dim:].T, mask_TT))
    wanted_BTH = torch.cat(outputs, dim=-1) @ attention.output.weight.T
    torch.testing.assert_close(attention(hidden_BTH), wanted_BTH)


def test_rotation_makes_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(8, dtype=torch.float64).expand(1, 1, 30, 8) for _ in range(2))
    scores_TT = (rotate(query) @ rotate(key).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores_TT[:-3, :-3], scores_TT[3:, 3:], rtol=1e-4, atol=1e-5)
    assert scores_TT[0].std() > 0.01
    torch.testing.assert_close(rotate(query).norm(dim=-1), query.norm(dim=-1))
