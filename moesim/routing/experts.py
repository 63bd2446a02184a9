"""Routed experts as grouped matrix products, and the shared experts beside them.

Legend: T tokens, H hidden size, K selections per token, E routed experts, R kept rows, I expert width, F = 2 I.

Permute by a stable argsort of expert ids, multiply each expert's rows with its own weights in one `grouped_mm`, and add
the weighted results back: never a loop over experts. CPU computes in float32, CUDA in bfloat16.
"""

import math

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
