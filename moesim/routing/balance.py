"""Balance losses and loss-free balancing (formulas: spec, "Balance losses and dynamics").

Legend: T tokens, K selections per token, E routed experts, D devices, S sequences.

Statistics of a set of tokens are sums, so those of a step are the sum of its micro-batches' (`RoutingSums.__add__`):
`balance.scope` only decides over which sums the losses are taken. f comes from counts and carries no gradient; P does.

s is normalised per token to sum 1 over the experts before P is taken, in every form. Where s are sigmoids, their size
then changes no loss: raw, all of them can shrink together, which lowers the losses and balances nothing. A shift of all
logits is such a common factor, but for rounding, while all lie below about -16 (s = e^logit), however far below, and
always for a softmax; at logits around 0 and above it also changes the ratios of sigmoids, upwards towards equal ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesim.routing.routers import Routing, normalise
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import Balance, RouterShape


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
