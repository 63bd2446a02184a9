"""The language model of a scenario at full width, its experts spread over ranks, and one optimizer step of it.

Legend: B sequences, S tokens per sequence, T = B S tokens of this rank, H hidden size, K selections per token.

Weights, gradients and optimizer states are bfloat16 on CUDA and float32 on a CPU. Every weight is drawn from a seed of
its own, so that any number of ranks holds the same model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moesim.routing.attention import GroupedQueryAttention, LatentAttention
from moesim.routing.expert_parallel import ExpertGroup, ExpertParallelMoE, Mark, unmarked
from moesim.routing.experts import RoutedExperts, SharedExperts
from moesim.scenario import Model
from moesim.scenario.model import LocalGlobal, Mla
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream_seed


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
