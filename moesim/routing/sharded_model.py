"""Expert parallelism over torch.distributed: a MoE layer whose experts are spread over the ranks of a group, and the
language model of a scenario at full width that is built of such layers, with one optimizer step.

Legend: B sequences, S tokens per sequence, T = B S tokens of this rank, H hidden size, K selections per token.

Weights, gradients and optimizer states are bfloat16 on CUDA and float32 on a CPU. Every weight is drawn from a seed of
its own, so that any number of ranks holds the same model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moesim.routing.routers import LearnedRouter, RouterInputs, Routing
from moesim.routing.transformer import GroupedQueryAttention, LatentAttention, RoutedExperts, SharedExperts
from moesim.scenario import Model
from moesim.scenario.model import LocalGlobal, Mla
from moesim.scenario.routers import facts_in_training
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream_seed

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
    """The router by its facts in plain torch kernels: GEMM in the dtype of the weights, s in float32, torch's top-k.

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
            return rows_IH * 1.0  # no kernel takes an empty GEMM; the weights then get no gradient
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


def unsupported(model: Model) -> str | None:
    """Why this software cannot run `model`, with the remedy; None when it can."""
    if isinstance(model.attention, LocalGlobal):
        return "model.attention.kind local_global is not in the torch_eager software; use mha, gqa or mla"
    if isinstance(model.attention, Mla) and model.attention.q_lora_rank is None:
        return "the torch_eager software needs model.attention.q_lora_rank for mla; set it"
    if model.mtp_layers:
        return "model.mtp_layers are not in the torch_eager software; set mtp_layers to 0"
    return None


def build_attention(model: Model) -> nn.Module:
    """The attention of a scenario's model."""
    if isinstance(model.attention, Mla):
        mla = model.attention
        assert mla.q_lora_rank is not None
        return LatentAttention(
            hidden=model.hidden,
            heads=model.heads,
            head_dim=model.head_dim,
            value_dim=mla.value_head_dim or model.head_dim,
            q_rank=mla.q_lora_rank,
            kv_rank=mla.kv_lora_rank,
            rope_dim=mla.rope_head_dim,
        )
    return GroupedQueryAttention(
        hidden=model.hidden, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim
    )


class ShardedBlock(nn.Module):
    """Pre-norm attention and feed-forward network (dense, or MoE), each added to the residual."""

    def __init__(self, model: Model, shape: RouterShape | None, group: ExpertGroup) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.hidden)
        self.attention = build_attention(model)
        self.ffn_norm = nn.RMSNorm(model.hidden)
        self.ffn: SharedExperts | ExpertParallelMoE
        if shape is None:
            self.ffn = SharedExperts(hidden=model.hidden, num_experts=1, width=model.dense_intermediate)
        else:
            self.ffn = ExpertParallelMoE(
                shape,
                hidden=model.hidden,
                width=model.expert_intermediate,
                shared_experts=model.shared_experts,
                group=group,
            )

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """The block's output."""
        hidden_BSH = hidden_BSH + self.attention(self.attention_norm(hidden_BSH))
        output_TH = self.ffn(self.ffn_norm(hidden_BSH).flatten(0, 1))
        output_BSH: Tensor = hidden_BSH + output_TH.view_as(hidden_BSH)
        return output_BSH


class ShardedModel(nn.Module):
    """Embedding, blocks, final norm and head; logits [B, S, V]."""

    def __init__(self, model: Model, shape: RouterShape | None, group: ExpertGroup) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        dense = model.dense_layers
        self.blocks = nn.ModuleList(
            ShardedBlock(model, shape if layer >= dense else None, group) for layer in range(model.layers)
        )
        self.norm = nn.RMSNorm(model.hidden)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)
        if model.tied_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def moe_layers(self) -> list[ExpertParallelMoE]:
        """The MoE layers, in order."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, ExpertParallelMoE)]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden_BSH = self.embedding(tokens_BS)
        for block in self.blocks:
            hidden_BSH = block(hidden_BSH)
        logits_BSV: Tensor = self.head(self.norm(hidden_BSH))
        return logits_BSV

    def expert_weights(self) -> list[nn.Parameter]:
        """Parameters that differ from rank to rank of an expert group."""
        return [weight for layer in self.moe_layers for weight in layer.experts.parameters()]

    def dense_weights(self) -> list[nn.Parameter]:
        """Parameters that every rank holds."""
        expert = {id(weight) for weight in self.expert_weights()}
        return [weight for weight in self.parameters() if id(weight) not in expert]


@contextmanager
def _building_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(former)


def build_sharded_model(
    model: Model, shape: RouterShape | None, *, group: ExpertGroup, device: torch.device, seed: int
) -> ShardedModel:
    """The model with this rank's experts, all weights of variance 1 / fan-in (embeddings: 1), equal on all ranks."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with _building_on(device, dtype):
        built = ShardedModel(model, shape, group)
    _draw_weights(built, group, seed)
    return built


@torch.no_grad()
def _draw_weights(model: ShardedModel, group: ExpertGroup, seed: int) -> None:
    """Draw each matrix, and each expert's, from its own stream, whose name says which of the whole model it is."""
    generator = torch.Generator(device=model.norm.weight.device)
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            for local in range(module.num_experts):
                expert = group.rank * module.num_experts + local
                for weight in (module.w13_EHF, module.w2_EIH):
                    generator.manual_seed(stream_seed(seed, "weight", name, expert, weight.shape[1]))
                    weight[local].normal_(std=weight.shape[1] ** -0.5, generator=generator)
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2:
                continue  # norms start at one
            generator.manual_seed(stream_seed(seed, "weight", name, key))
            std = 1.0 if isinstance(module, nn.Embedding) else weight.shape[1] ** -0.5
            weight.normal_(std=std, generator=generator)


class ShardedTrainer:
    """One optimizer step in its parts: `forward`, `backward`, `reduce`, `optimize`.

    `world` is the number of ranks that share a step, `dense_group` all of them, `replica_group` those with the same
    experts (None: one). Losses are divided by ranks and micro-batches beforehand, so that every reduction is a sum.
    """

    def __init__(
        self,
        model: ShardedModel,
        *,
        world: int = 1,
        micro_batches: int = 1,
        dense_group: dist.ProcessGroup | None = None,
        replica_group: dist.ProcessGroup | None = None,
        learning_rate: float = 1e-4,
    ) -> None:
        self.model = model
        self.share = 1.0 / (world * micro_batches)
        self.groups = [
            (model.dense_weights(), dense_group if world > 1 else None),
            (model.expert_weights(), replica_group),
        ]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def set_mark(self, mark: Mark = unmarked) -> None:
        """Instrument every MoE layer with `mark`."""
        for layer in self.model.moe_layers:
            layer.mark = mark

    def force_routing(self, ids_LTK: Sequence[Tensor]) -> None:
        """Use these experts in the next forward passes, layer by layer."""
        for layer, ids_TK in zip(self.model.moe_layers, ids_LTK, strict=True):
            layer.router.forced_ids_TK = ids_TK

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """The share of this rank and micro-batch in the mean cross entropy of the step."""
        logits_TV = self.model(tokens_BS).flatten(0, 1).float()
        return functional.cross_entropy(logits_TV, targets_BS.flatten()) * self.share

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum gradients over the ranks that hold the same weights: one flat all-reduce per group."""
        for weights, group in self.groups:
            if group is None:
                continue
            gradients = [_gradient(weight) for weight in weights]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=group)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            views = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, views)

    def optimize(self) -> None:
        """Update the weights and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _gradient(weight: nn.Parameter) -> Tensor:
    """The gradient; zeros where no token came, because the other ranks of the reduction may have some."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
