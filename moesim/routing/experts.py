"""Routed experts as grouped matrix products, and the shared experts beside them.

Legend: T tokens, H hidden size, K selections per token, E routed experts, R kept rows, I expert width, F = 2 I.

Permute by a stable argsort of expert ids, multiply each expert's rows with its own weights in one `grouped_mm`, and add
the weighted results back: never a loop over experts. CPU computes in float32, CUDA in bfloat16.

`RoutedExperts` leaves rows that are not kept out of its products, and the host must know how many are left.
`StaticExperts` have shapes that never depend on the routing, so that a CUDA graph can capture a training step: every
row is computed (R = T * K) and a row that is not kept weighs nothing, the same output and gradients for up to 1 / kept
share more work. Moving rows is a permutation both ways, so its gradient is a gather too and no atomic addition rounds
differently from run to run.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


BYTE_EXPERTS = 256  # up to so many ids are sorted as bytes, in a fourth of the time


class StaticExperts(RoutedExperts):
    """`RoutedExperts` of the same parameters, computed over all T * K rows.

    `kept_share`: share of the last call's rows that were kept, a tensor on the device.
    """

    kept_share: Tensor

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, keep_TK: Tensor) -> Tensor:
        """sum_k gate * FFN_{id}(hidden) over the kept rows, [T, H]."""
        dtype = torch.bfloat16 if hidden_TH.is_cuda else torch.float32
        self.kept_share = keep_TK.float().mean()
        order_R, place_TK, offsets_E = static_permutation(expert_ids_TK, num_experts=self.num_experts)
        rows_RH = _Dispatch.apply(hidden_TH.to(dtype), order_R, place_TK)  # type: ignore[no-untyped-call]
        weights_R = _Permute.apply((gates_TK * keep_TK).flatten(), order_R, place_TK)  # type: ignore[no-untyped-call]
        gate_RI, up_RI = functional.grouped_mm(rows_RH, self.w13_EHF.to(dtype), offs=offsets_E).chunk(2, dim=-1)
        inner_RI = functional.silu(gate_RI) * up_RI * weights_R.to(dtype).unsqueeze(1)
        outer_RH = functional.grouped_mm(inner_RI, self.w2_EIH.to(dtype), offs=offsets_E)
        output_TH: Tensor = _Combine.apply(outer_RH, order_R, place_TK)  # type: ignore[no-untyped-call]
        return output_TH.to(hidden_TH.dtype)


def static_permutation(expert_ids_TK: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert order of the flattened rows: (order_R, place_TK, offsets_E).

    Row `order_R[r]` of the [T * K] selections comes r-th, `place_TK` is the inverse, and expert n's rows end at
    `offsets_E[n]` (int32). Id -1, which weighs nothing, goes to expert 0.
    """
    dtype = torch.uint8 if num_experts <= BYTE_EXPERTS else torch.int16
    ids_R = expert_ids_TK.clamp_min(0).flatten().to(dtype)
    sorted_R, order_R = torch.sort(ids_R, stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    experts_E = torch.arange(num_experts, device=ids_R.device, dtype=dtype)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    return order_R, place_R.view_as(expert_ids_TK), offsets_E


def _sum_of_rows(rows_RH: Tensor, place_TK: Tensor) -> Tensor:
    """Each token's K rows added up, [T, H]."""
    return rows_RH.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1).sum(dim=1)


class _Dispatch(torch.autograd.Function):
    """Token t's hidden state to each of its K rows; back: the sum of the K gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return hidden_TH.index_select(0, order_R // place_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of_rows(gradients[0], ctx.saved_tensors[0]), None, None


class _Combine(torch.autograd.Function):
    """Each token's K rows added up; back: the token's gradient to each row."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = place_TK.shape[1]
        return _sum_of_rows(rows_RH, place_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0] // ctx.top_k), None, None


class _Permute(torch.autograd.Function):
    """One number per row into expert order; back: into token order."""

    @staticmethod
    def forward(ctx: Any, values_R: Tensor, order_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return values_R.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0].flatten()), None, None
