"""What keeps the load of experts even: balance losses, loss-free balancing, and which rows survive a limited capacity.

Formulas: spec, "Balance losses and dynamics" and "Capacity and dropping" (here the training side, in torch).
Legend: T tokens, K selections per token, E routed experts, D devices, S sequences, R rows = T * K in token order.

Statistics of a set of tokens are sums, so those of a step are the sum of its micro-batches' (`RoutingSums.__add__`):
`balance.scope` only decides over which sums the losses are taken. f comes from counts and carries no gradient; P does.

s is normalised per token to sum 1 over the experts before P is taken, in every form. Where s are sigmoids, their size
then changes no loss: raw, all of them can shrink together, which lowers the losses and balances nothing. A shift of all
logits is such a common factor, but for rounding, while all lie below about -16 (s = e^logit), however far below, and
always for a softmax; at logits around 0 and above it also changes the ratios of sigmoids, upwards towards equal ones.

A row is one (token, expert) selection; id -1 is no row. Gates are not renormalised after a drop.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesim.routing.routers import Routing, normalise
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import Balance, Capacity, DeviceCapacity, ExpertCapacity, RouterShape


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """Additive routing statistics of one layer.

    `count_E` tokens that selected each expert, `probability_E` sum of normalised s over tokens, `reach_D` tokens that
    sent at least one row to each device, `sequence_terms` sum over sequences of the sequence's own sum_i f_i P_i.
    """

    num_tokens: int
    num_sequences: int
    count_E: Tensor
    probability_E: Tensor
    reach_D: Tensor
    sequence_terms: Tensor

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return RoutingSums(
            num_tokens=self.num_tokens + other.num_tokens,
            num_sequences=self.num_sequences + other.num_sequences,
            count_E=self.count_E + other.count_E,
            probability_E=self.probability_E + other.probability_E,
            reach_D=self.reach_D + other.reach_D,
            sequence_terms=self.sequence_terms + other.sequence_terms,
        )


def routing_sums(routing: Routing, *, shape: RouterShape, num_sequences: int) -> RoutingSums:
    """Statistics of T tokens that are `num_sequences` equally long sequences in order."""
    ids_TK = routing.expert_ids_TK
    num_tokens, num_experts = len(ids_TK), shape.num_experts
    # one spare column takes the selections that are none (-1)
    chosen_TE = torch.zeros(num_tokens, num_experts + 1, device=ids_TK.device)
    chosen_TE.scatter_(1, torch.where(ids_TK < 0, num_experts, ids_TK), 1.0)
    chosen_TE = chosen_TE[:, :num_experts]
    count_SE = chosen_TE.reshape(num_sequences, -1, num_experts).sum(dim=1)
    reach_D = chosen_TE.reshape(num_tokens, _num_devices(shape), -1).amax(dim=2).sum(dim=0)
    if routing.probabilities_TE is None:
        probability_E = torch.zeros_like(count_SE[0])
        sequence_terms = torch.zeros((), device=ids_TK.device)
    else:
        shares_TE = normalise(routing.probabilities_TE)
        normal = ROUTERS[shape.kind].sums_to_one  # but for rounding, which is left as it is
        probability_E = (routing.probabilities_TE if normal else shares_TE).sum(dim=0)
        length = num_tokens // num_sequences
        share_SE = shares_TE.reshape(num_sequences, -1, num_experts).mean(dim=1)
        sequence_terms = (count_SE * (num_experts / (shape.top_k * length)) * share_SE).sum()
    return RoutingSums(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        count_E=count_SE.sum(dim=0),
        probability_E=probability_E,
        reach_D=reach_D,
        sequence_terms=sequence_terms,
    )


def expert_loss(sums: RoutingSums, *, shape: RouterShape) -> Tensor:
    """sum_i f_i P_i with f_i = E/(K T) * tokens that select i, P_i = mean s_i; 1 at perfect balance."""
    return (_frequency_E(sums, shape) * _mean_probability_E(sums)).sum()


def device_loss(sums: RoutingSums, *, shape: RouterShape) -> Tensor:
    """sum_d f'_d P'_d: f' the mean of f and P' the sum of P over the experts of a device; 1 at perfect balance."""
    devices = _num_devices(shape)
    frequency_D = _frequency_E(sums, shape).view(devices, -1).mean(dim=1)
    return (frequency_D * _device_probability_D(sums, shape)).sum()


def communication_loss(sums: RoutingSums, *, shape: RouterShape) -> Tensor:
    """sum_d f''_d P''_d with f''_d = D/(M T) * tokens sent to d; mean distinct devices / M at perfect balance."""
    scale = _num_devices(shape) / (most_devices(shape) * sums.num_tokens)
    return (sums.reach_D * scale * _device_probability_D(sums, shape)).sum()


def variance_loss(sums: RoutingSums, *, shape: RouterShape) -> Tensor:
    """sum_i (P_i - 1/E)^2, the form of older descriptions; 0 at perfect balance."""
    return (_mean_probability_E(sums) - 1 / shape.num_experts).square().sum()


def sequence_loss(sums: RoutingSums, *, shape: RouterShape) -> Tensor:
    """DeepSeek-V3's form: the expert form per sequence, mean over sequences."""
    del shape
    return sums.sequence_terms / sums.num_sequences


BALANCE_LOSSES = {
    "expert": expert_loss,
    "device": device_loss,
    "communication": communication_loss,
    "variance": variance_loss,
    "sequence": sequence_loss,
}


def balance_loss(sums: RoutingSums, *, shape: RouterShape, balance: Balance) -> Tensor:
    """The sum of every loss of one layer, each times its coefficient in `balance`."""
    total = torch.zeros((), device=sums.count_E.device)
    for name, form in BALANCE_LOSSES.items():
        coefficient = getattr(balance, name)
        if coefficient:
            total = total + coefficient * form(sums, shape=shape)
    return total


def most_devices(shape: RouterShape) -> int:
    """M of the communication loss: the group limit; without one, the most devices that K experts can lie on."""
    return shape.group_limit if shape.num_groups > 1 else min(shape.top_k, _num_devices(shape))


@torch.no_grad()
def loss_free_update(bias_E: Tensor, count_E: Tensor, *, gamma: float) -> None:
    """Move DeepSeek-V3's bias in place after a step: b_i += gamma * sign(mean load - load_i)."""
    bias_E += gamma * torch.sign(count_E.mean() - count_E)


def load_imbalance(count_E: Tensor) -> float:
    """max / mean of the experts' loads; 1 is perfect balance."""
    return float(count_E.max() / count_E.mean())


def _num_devices(shape: RouterShape) -> int:
    """Devices of the EP group; 1 (no device structure) where the experts do not divide evenly among them."""
    return shape.num_devices if shape.num_experts % shape.num_devices == 0 else 1


def _frequency_E(sums: RoutingSums, shape: RouterShape) -> Tensor:
    return sums.count_E * (shape.num_experts / (shape.top_k * sums.num_tokens))


def _mean_probability_E(sums: RoutingSums) -> Tensor:
    return sums.probability_E / sums.num_tokens


def _device_probability_D(sums: RoutingSums, shape: RouterShape) -> Tensor:
    return _mean_probability_E(sums).view(_num_devices(shape), -1).sum(dim=1)


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
