"""Expert parallelism over torch.distributed: the MoE layer whose experts are spread over the ranks of a group.

Legend: T tokens of this rank, H hidden size, K selections per token, E routed experts, D ranks of the expert group,
P experts of this rank (its slots), R = T K rows that leave, I rows that arrive.

The plain eager way: rows sorted by expert (stable argsort), counts exchanged and read back on the host, one row per
(token, expert) in one all-to-all, a second sort by local expert, two grouped products, and the way back. Nothing is
dropped. Expert weights are those of `RoutedExperts`, gates those of the routers, shared experts `SharedExperts`.
The settings of `torch_eager` (`moesim.scenario.software`) have the kernels of this file one by one, in
`moesim.program.permutation` and `router`: change both together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moesim.routing.experts import RoutedExperts, SharedExperts
from moesim.routing.routers import LearnedRouter, RouterInputs, Routing
from moesim.scenario.routers import facts_in_training
from moesim.scenario.routing import RouterShape

Mark = Callable[[Tensor, str], Tensor]


def unmarked(tensor: Tensor, part: str) -> Tensor:
    """The mark of a run that is not instrumented: nothing."""
    del part
    return tensor


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that hold every expert once. `handle` is None for a group of one, which exchanges nothing."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None


class ShardedGate(LearnedRouter):
    """The router by its facts in plain torch kernels: product in the dtype of the weights, s in float32, torch's top-k.

    Logits as affinities are taken as a softmax over all experts, whose normalised gates are the same. Without groups.
    Ids given in `forced_ids_TK` take the place of the selection, whose kernels run all the same.
    """

    forced_ids_TK: Tensor | None = None

    def __init__(self, hidden: int, shape: RouterShape) -> None:
        super().__init__(hidden, replace(shape, kind=facts_in_training(shape.kind).name))

    def forward(self, hidden_TH: Tensor, inputs: RouterInputs | None = None) -> Routing:
        """Route `hidden_TH`; `inputs` is not looked at."""
        del inputs
        logits_TE = functional.linear(hidden_TH, self.centroids_EH).float()
        affinities_TE = logits_TE.sigmoid() if self.facts.affinity == "sigmoid" else logits_TE.softmax(dim=-1)
        ids_TK = self.select(affinities_TE)
        affinities_TK = affinities_TE.gather(1, ids_TK)
        return Routing(ids_TK, self.weigh(affinities_TK), affinities_TK, affinities_TE)

    def select(self, affinities_TE: Tensor) -> Tensor:
        """The best K, or the forced ids."""
        scores_TE = affinities_TE.detach()
        if self.facts.biased:
            scores_TE = scores_TE + self.bias_E
        ids_TK = scores_TE.topk(self.shape.top_k, dim=-1).indices
        return ids_TK if self.forced_ids_TK is None else self.forced_ids_TK

    def weigh(self, affinities_TK: Tensor) -> Tensor:
        """s, divided by their sum and times the factor where the facts say so."""
        gates_TK = affinities_TK
        if self.facts.normalised:
            gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)
        return gates_TK * self.shape.routed_scaling_factor if self.facts.scaled else gates_TK


class ExpertShard(RoutedExperts):
    """The experts of one rank, on rows that are already in expert order."""

    def compute(self, rows_IH: Tensor, offsets_P: Tensor) -> Tensor:
        """FFN of every row by its expert, [I, H]; `offsets_P` (int32) ends each expert's rows."""
        if len(rows_IH) == 0:
            return rows_IH * 1.0  # no kernel takes an empty product; the weights then get no gradient
        gate_IF, up_IF = functional.grouped_mm(rows_IH, self.w13_EHF, offs=offsets_P).chunk(2, dim=-1)
        return functional.grouped_mm(functional.silu(gate_IF) * up_IF, self.w2_EIH, offs=offsets_P)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradient takes the opposite way."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, sent_D: list[int], received_D: list[int], group: ExpertGroup) -> Tensor:
        ctx.sent_D, ctx.received_D, ctx.group = sent_D, received_D, group
        return _all_to_all(rows_RH, sent_D, received_D, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.received_D, ctx.sent_D, ctx.group), None, None, None


def _all_to_all(rows_RH: Tensor, sent_D: list[int], received_D: list[int], group: ExpertGroup) -> Tensor:
    arrived_IH = rows_RH.new_empty((sum(received_D), rows_RH.shape[1]))
    dist.all_to_all_single(arrived_IH, rows_RH.contiguous(), received_D, sent_D, group=group.handle)
    return arrived_IH


def exchange_rows(rows_RH: Tensor, *, sent_D: list[int], received_D: list[int], group: ExpertGroup) -> Tensor:
    """Send `sent_D[d]` consecutive rows to each rank d and receive `received_D[d]` from it, in order of d: [I, H]."""
    arrived_IH: Tensor = _Exchange.apply(rows_RH, sent_D, received_D, group)  # type: ignore[no-untyped-call]
    return arrived_IH


class ExpertParallelMoE(nn.Module):
    """Router, this rank's routed experts, the exchange of rows with the other ranks, and the shared experts."""

    def __init__(self, shape: RouterShape, *, hidden: int, width: int, shared_experts: int, group: ExpertGroup) -> None:
        super().__init__()
        assert shape.num_experts % group.size == 0
        self.group = group
        self.num_local = shape.num_experts // group.size
        self.router = ShardedGate(hidden, shape)
        self.experts = ExpertShard(hidden=hidden, num_experts=self.num_local, width=width)
        self.shared: SharedExperts | None = None
        if shared_experts:
            self.shared = SharedExperts(hidden=hidden, num_experts=shared_experts, width=width)
        self.mark: Mark = unmarked
        self.last_count_E: Tensor | None = None  # rows per expert that this rank sent in the last forward pass

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The layer's output, [T, H]."""
        hidden_TH = self.mark(hidden_TH, "start")
        routing = self.router(hidden_TH)
        gates_TK = self.mark(routing.gates_TK, "router")
        with torch.no_grad():
            count_E, order_R = _sort_by_expert(routing.expert_ids_TK, self.router.shape.num_experts)
            self.last_count_E = count_E
            tokens_R = order_R // routing.expert_ids_TK.shape[1]
        rows_RH = self.mark(hidden_TH.index_select(0, tokens_R), "permute")
        if self.group.size == 1:
            results_RH = self.mark(self.experts.compute(rows_RH, count_E.cumsum(0, dtype=torch.int32)), "experts")
        else:
            results_RH = self._compute_remote(rows_RH, count_E)
        weights_R1 = gates_TK.reshape(-1).index_select(0, order_R).to(hidden_TH.dtype).unsqueeze(1)
        output_TH = torch.zeros_like(hidden_TH).index_add_(0, tokens_R, results_RH * weights_R1)
        output_TH = self.mark(output_TH, "combine")
        if self.shared is not None:
            output_TH = output_TH + self.shared(hidden_TH)
        return self.mark(output_TH, "shared")

    def _compute_remote(self, rows_RH: Tensor, count_E: Tensor) -> Tensor:
        """Rows in the order of experts to the ranks that hold them, through their experts, and back in that order."""
        received_DP, sent_D, received_D = self._exchange_counts(count_E)
        arrived_IH = exchange_rows(rows_RH, sent_D=sent_D, received_D=received_D, group=self.group)
        arrived_IH = self.mark(arrived_IH, "dispatch")
        with torch.no_grad():
            order_I = self._sort_by_local_expert(received_DP, sum(received_D))
            inverse_I = torch.empty_like(order_I)
            inverse_I.scatter_(0, order_I, torch.arange(len(order_I), device=order_I.device))
            offsets_P = received_DP.sum(0).cumsum(0, dtype=torch.int32)
        sorted_IH = self.mark(arrived_IH.index_select(0, order_I), "permute")
        results_IH = self.mark(self.experts.compute(sorted_IH, offsets_P), "experts")
        returned_IH = self.mark(results_IH.index_select(0, inverse_I), "permute")
        return exchange_rows(returned_IH, sent_D=received_D, received_D=sent_D, group=self.group)

    @torch.no_grad()
    def _exchange_counts(self, count_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Rows that arrive, by source rank and local expert, and both lists of split sizes, read back on the host."""
        received_E = torch.empty_like(count_E)
        dist.all_to_all_single(received_E, count_E, group=self.group.handle)
        shape = (self.group.size, self.num_local)
        received_DP = received_E.view(shape)
        sent_D, received_D = torch.stack([count_E.view(shape).sum(1), received_DP.sum(1)]).tolist()
        return received_DP, sent_D, received_D

    def _sort_by_local_expert(self, received_DP: Tensor, num_rows: int) -> Tensor:
        local_DP = torch.arange(self.num_local, device=received_DP.device).repeat(self.group.size)
        local_I = local_DP.repeat_interleave(received_DP.flatten(), output_size=num_rows)
        return torch.argsort(local_I, stable=True)


def _sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows per expert [E], and the selections [R] in expert order, token order within an expert."""
    ids_R = expert_ids_TK.reshape(-1)
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_R.device)
    count_E.scatter_add_(0, ids_R, torch.ones_like(ids_R))
    return count_E, torch.argsort(ids_R, stable=True)
