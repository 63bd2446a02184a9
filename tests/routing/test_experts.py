"""Routed experts by grouped GEMMs against a plain float64 loop, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moesim.routing.transformer import RoutedExperts, SharedExperts, permutation

T, H, K, N, WIDTH = 37, 16, 3, 8, 24


def expert_inputs(seed: int) -> tuple[RoutedExperts, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = RoutedExperts(hidden=H, num_experts=N, width=WIDTH)
    experts.reset_parameters(generator)
    hidden_TH = torch.randn(T, H, generator=generator).requires_grad_()
    weights_TE = torch.linspace(2, -2, N).exp().masked_fill(torch.arange(N) == 2, 1e-12).expand(T, N)
    ids_TK = torch.multinomial(weights_TE, K, generator=generator)  # expert 2 gets nothing
    ids_TK[5:9, 1] = -1
    gates_TK = torch.rand(T, K, generator=generator).requires_grad_()
    keep_TK = torch.rand(T, K, generator=generator) < 0.8
    return experts, hidden_TH, ids_TK, gates_TK, keep_TK


def plain(experts: RoutedExperts, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor, keep_TK: Tensor) -> Tensor:
    """The formula, one row after the other, in float64."""
    rows = []
    for token in range(T):
        total = torch.zeros(H, dtype=torch.float64)
        for k in range(K):
            expert = int(ids_TK[token, k])
            if expert < 0 or not keep_TK[token, k]:
                continue
            w1, w3 = experts.w13_EHF[expert].double().chunk(2, dim=1)
            x = hidden_TH[token].double()
            inner = functional.silu(x @ w1) * (x @ w3)
            total = total + gates_TK[token, k].double() * (inner @ experts.w2_EIH[expert].double())
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_equal_the_loop(seed: int) -> None:
    experts, hidden_TH, ids_TK, gates_TK, keep_TK = expert_inputs(seed)
    leaves = [hidden_TH, gates_TK, experts.w13_EHF, experts.w2_EIH]
    weight_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(9))
    output_TH = experts(hidden_TH, ids_TK, gates_TK, keep_TK)
    gradients = torch.autograd.grad((output_TH * weight_TH).sum(), leaves)
    wanted_TH = plain(experts, hidden_TH, ids_TK, gates_TK, keep_TK)
    wanted = torch.autograd.grad((wanted_TH * weight_TH).sum(), leaves)
    torch.testing.assert_close(output_TH.double(), wanted_TH, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_permutation_holds_each_kept_row_once_in_expert_then_token_order(seed: int) -> None:
    _, _, ids_TK, _, keep_TK = expert_inputs(seed)
    rows_R, count_E = permutation(ids_TK, keep_TK, num_experts=N)
    wanted = [r for e in range(N) for r in range(T * K) if ids_TK.flatten()[r] == e and keep_TK.flatten()[r]]
    assert rows_R.tolist() == wanted
    assert int(count_E.sum()) == len(wanted) and int(count_E[2]) == 0


def test_dropped_rows_are_neither_computed_nor_added(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, hidden_TH, ids_TK, gates_TK, keep_TK = expert_inputs(3)
    rows = []
    real = functional.grouped_mm
    monkeypatch.setattr(functional, "grouped_mm", lambda a, b, offs: rows.append(len(a)) or real(a, b, offs=offs))
    assert experts(hidden_TH, ids_TK, gates_TK, torch.zeros_like(keep_TK)).abs().max() == 0
    experts(hidden_TH, ids_TK, gates_TK, keep_TK)
    assert rows == [0, 0, *2 * [int((keep_TK & (ids_TK >= 0)).sum())]]


def test_gradient_clipping_limits_each_expert_alone() -> None:
    experts, hidden_TH, ids_TK, gates_TK, keep_TK = expert_inputs(4)
    experts(hidden_TH, ids_TK, gates_TK, keep_TK).square().sum().backward()
    assert experts.w13_EHF.grad is not None and experts.w2_EIH.grad is not None

    def norms_E() -> Tensor:
        return torch.cat([experts.w13_EHF.grad.flatten(1), experts.w2_EIH.grad.flatten(1)], dim=1).norm(dim=1)

    before_E, limit = norms_E(), float(norms_E().median())
    experts.clip_gradients(limit)
    torch.testing.assert_close(norms_E(), before_E.clamp_max(limit), rtol=1e-5, atol=1e-6)


def test_shared_experts_are_the_sum_of_their_parts() -> None:
    shared = SharedExperts(hidden=H, num_experts=2, width=WIDTH)
    shared.reset_parameters(torch.Generator().manual_seed(0))
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    w1, w3 = shared.w13.weight.chunk(2)
    wanted_TH = torch.zeros(T, H)
    for part in (slice(0, WIDTH), slice(WIDTH, 2 * WIDTH)):
        wanted_TH += (functional.silu(x_TH @ w1[part].T) * (x_TH @ w3[part].T)) @ shared.w2.weight[:, part].T
    torch.testing.assert_close(shared(x_TH), wanted_TH)
