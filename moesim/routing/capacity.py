"""Which rows survive a limited capacity: the training side, in torch (formulas: spec, "Capacity and dropping").

Legend: T tokens, K selections per token, R rows = T * K in token order, S sequences, D devices.

A row is one (token, expert) selection; id -1 is no row. Gates are not renormalised after a drop.
"""

import math

import torch
from torch import Tensor

from moesim.scenario.routing import Capacity, DeviceCapacity, ExpertCapacity, RouterShape


def expert_capacity(*, factor: float, top_k: int, num_tokens: int, num_experts: int) -> int:
    """Rows that one expert computes: C = ceil(factor K T / E), but no more than T: a token chooses it once at most."""
    return math.ceil(min(factor * top_k * num_tokens / num_experts, num_tokens))


def device_budget(*, factor: float, num_rows: Tensor, num_devices: int) -> Tensor:
    """Rows that one device computes, int64: floor(factor * mean rows per device)."""
    return (factor * num_rows.double() / num_devices).floor().long()


def expert_keep_mask(
    expert_ids_TK: Tensor, affinities_TK: Tensor, *, num_experts: int, capacity: int, by: str = "position"
) -> Tensor:
    """True [T, K] where a row is among its expert's first `capacity` rows.

    Order: `position` token order, all K choices alike; `score` the highest affinity first, ties to the earlier token.
    """
    assert by in ("position", "score")
    ids_R = expert_ids_TK.reshape(-1)
    priority_R = affinities_TK.reshape(-1) if by == "score" else torch.zeros_like(affinities_TK.reshape(-1))
    place_R = place_in_bin(_valid_bins(ids_R, num_experts), priority_R, num_bins=num_experts + 1)
    return ((place_R < capacity) & (ids_R >= 0)).view(expert_ids_TK.shape)


def device_keep_mask(
    expert_ids_TK: Tensor,
    affinities_TK: Tensor,
    *,
    sequence_T: Tensor,
    protected_S: Tensor,
    num_experts: int,
    num_devices: int,
    factor: float,
) -> Tensor:
    """True [T, K] where a row is kept under DeepSeek-V2's device budget.

    T runs over all tokens of the EP group in one micro-batch. Rows of protected sequences (`protected_S` bool, indexed
    by `sequence_T`) are always kept and may alone exceed the budget; the others fill what is left, highest affinity
    first (ties to the earlier row). Device d holds experts d E/D .. (d + 1) E/D - 1.
    """
    assert num_experts % num_devices == 0
    ids_R = expert_ids_TK.reshape(-1)
    valid_R = ids_R >= 0
    protected_R = protected_S[sequence_T].unsqueeze(1).expand(expert_ids_TK.shape).reshape(-1) & valid_R
    device_R = torch.where(valid_R, ids_R // (num_experts // num_devices), num_devices)
    budget = device_budget(factor=factor, num_rows=valid_R.sum(), num_devices=num_devices)
    devices_D = torch.arange(num_devices + 1, device=device_R.device)
    # not bincount: it makes the host wait for the device, and no graph can capture that
    protected_rows_D = ((device_R.unsqueeze(1) == devices_D) & protected_R.unsqueeze(1)).sum(dim=0)
    left_D = (budget - protected_rows_D).clamp_min(0)
    # protected rows go last in their device's queue, so that a place counts the unprotected rows before it
    priority_R = affinities_TK.detach().reshape(-1).float().masked_fill(protected_R, -math.inf)
    place_R = place_in_bin(device_R, priority_R, num_bins=num_devices + 1)
    return (valid_R & (protected_R | (place_R < left_D[device_R]))).view(expert_ids_TK.shape)


def keep_mask(
    capacity: Capacity,
    expert_ids_TK: Tensor,
    affinities_TK: Tensor,
    *,
    router: RouterShape,
    sequence_T: Tensor,
    protected_S: Tensor,
) -> Tensor:
    """True [T, K] where a row is kept under `capacity`; without capacity every valid row is.

    For `expert` the T tokens are those of one rank and micro-batch, for `device` those of the EP group and micro-batch.
    """
    if isinstance(capacity, ExpertCapacity):
        rows = expert_capacity(
            factor=capacity.factor,
            top_k=router.top_k,
            num_tokens=len(expert_ids_TK),
            num_experts=router.num_experts,
        )
        return expert_keep_mask(
            expert_ids_TK, affinities_TK, num_experts=router.num_experts, capacity=rows, by=capacity.by
        )
    if isinstance(capacity, DeviceCapacity):
        return device_keep_mask(
            expert_ids_TK,
            affinities_TK,
            sequence_T=sequence_T,
            protected_S=protected_S,
            num_experts=router.num_experts,
            num_devices=router.num_devices,
            factor=capacity.factor,
        )
    return expert_ids_TK >= 0


def place_in_bin(bin_R: Tensor, priority_R: Tensor, *, num_bins: int) -> Tensor:
    """For each row, how many rows of its bin come before it: higher priority first, then row order."""
    narrow_R = bin_R.to(torch.uint8 if num_bins <= 256 else torch.int16)  # a radix sort passes over every byte
    by_priority_R = torch.sort(priority_R.detach(), descending=True, stable=True).indices
    sorted_R, order_R = torch.sort(narrow_R[by_priority_R], stable=True)
    order_R = by_priority_R[order_R]
    first_B = torch.searchsorted(sorted_R, torch.arange(num_bins, device=bin_R.device).to(sorted_R.dtype))
    places_R = torch.arange(len(bin_R), device=bin_R.device) - first_B[sorted_R.long()]
    return torch.empty_like(places_R).scatter_(0, order_R, places_R)


def _valid_bins(ids_R: Tensor, num_bins: int) -> Tensor:
    """Bin of each row; rows that are none share a last bin of their own."""
    return torch.where(ids_R >= 0, ids_R, num_bins)
