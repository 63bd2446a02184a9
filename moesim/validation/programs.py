"""The torch programs of a real run by layout: whole states, ZeRO 1, FSDP2, and tensor ranks.

All are the model of `moesim.routing.sharded_model`, kernel for kernel; they differ in what ranks share. ZeRO 1 keeps
whole weights and gradients, and a shard of the optimizer's states. FSDP2 is torch's `fully_shard` of each block and of
the whole. Tensor ranks hold shares of heads, of the width of networks and of the vocabulary (arXiv 1909.08053), each
with all tokens, and add up what they have by all-reduces.

Legend: B sequences, S tokens per sequence, T = B S tokens, H hidden size, V logits of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesim.routing.sharded_model import ExpertGroup, ShardedModel, ShardedTrainer, build_sharded_model
from moesim.scenario import Scenario


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank: of its expert group, of all with the same dense weights, of those with the same
    experts, and of its tensor ranks.
    """

    expert: ExpertGroup
    dense: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None


def build_groups(scenario: Scenario, rank: int) -> Groups:
    """Expert and tensor groups are consecutive ranks; every rank makes every group, as torch.distributed wants."""
    mesh = scenario.parallelism
    world = mesh.world_size
    if world == 1:
        return Groups(ExpertGroup())
    if mesh.tensor > 1:
        return Groups(
            ExpertGroup(),
            dense=_own(_strided(world, mesh.tensor), rank) if mesh.data > 1 else None,
            tensor=_own(_consecutive(world, mesh.tensor), rank),
        )
    size = mesh.expert
    handle = _own(_consecutive(world, size), rank) if size > 1 else None
    replicas = _own(_strided(world, size), rank) if size < world else None
    return Groups(ExpertGroup(rank % size, size, handle), dense=dist.group.WORLD, replicas=replicas)


def _consecutive(world: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, world, size)]


def _strided(world: int, stride: int) -> list[list[int]]:
    return [list(range(index, world, stride)) for index in range(stride)]


def _own(groups: Sequence[Sequence[int]], rank: int) -> Any:
    """Make all groups; the one that has this rank."""
    made: list[Any] = [dist.group.WORLD if len(groups) == 1 else dist.new_group(list(ranks)) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def build_trainer(scenario: Scenario, *, rank: int, device: torch.device) -> ShardedTrainer:
    """The trainer of a scenario's layout on this rank."""
    mesh, groups = scenario.parallelism, build_groups(scenario, rank)
    common: dict[str, Any] = {"micro_batches": scenario.num_micro_batches}
    if groups.tensor is not None:
        built = tensor_model(scenario, groups.tensor, device=device)
        return TensorTrainer(built, groups.tensor, world=mesh.data, dense_group=groups.dense, **common)
    model = build_sharded_model(
        scenario.model, scenario.router_shape() if scenario.model.experts else None, group=groups.expert,
        device=device, seed=scenario.seed,
    )  # fmt: skip
    common |= {"world": mesh.world_size, "dense_group": groups.dense, "replica_group": groups.replicas}
    trainers = {0: ShardedTrainer, 1: ZeroTrainer, 3: FsdpTrainer}
    return trainers[mesh.zero.dense if mesh.world_size > 1 else 0](model, **common)


class ZeroTrainer(ShardedTrainer):
    """Gradients are reduced and scattered, each rank updates its shard of all weights, and the shards are gathered."""

    def __init__(self, model: ShardedModel, **common: Any) -> None:
        super().__init__(model, **common)
        self.shards = [_Shard(weights, group) for weights, group in self.groups if weights and group is not None]
        alone = [weight for weights, group in self.groups if group is None for weight in weights]
        updated = [*alone, *(shard.part for shard in self.shards)]
        self.optimizer = torch.optim.AdamW(updated, lr=1e-4, fused=True)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums of the gradients of this rank's shards."""
        for shard in self.shards:
            shard.reduce()

    @torch.no_grad()
    def optimize(self) -> None:
        """Update the shards, gather them, and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for shard in self.shards:
            shard.gather()
        self.model.zero_grad(set_to_none=True)


class _Shard:
    """This rank's part of some weights laid end to end, and the collectives on them."""

    def __init__(self, weights: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.weights, self.group = list(weights), group
        ranks, own = dist.get_world_size(group), dist.get_rank(group)
        self.sizes = [weight.numel() for weight in weights]
        self.padding = -sum(self.sizes) % ranks
        flat = self._flat([weight.detach() for weight in weights])
        self.part = nn.Parameter(flat.chunk(ranks)[own].clone())

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        padding = [tensors[0].new_zeros(self.padding)] if self.padding else []
        return torch.cat([*(tensor.reshape(-1) for tensor in tensors), *padding])

    def reduce(self) -> None:
        """The sum of this rank's part of all ranks' gradients."""
        given = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        self.part.grad = torch.empty_like(self.part)
        dist.reduce_scatter_tensor(self.part.grad, self._flat(given), group=self.group)

    def gather(self) -> None:
        """All parts as they are now, into the weights."""
        flat = self.part.new_empty(sum(self.sizes) + self.padding)
        dist.all_gather_into_tensor(flat, self.part.data, group=self.group)
        parts = torch.split(flat[: sum(self.sizes)], self.sizes)
        views = [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]
        torch._foreach_copy_([weight.data for weight in self.weights], views)


class FsdpTrainer(ShardedTrainer):
    """torch's FSDP2: every block is a unit, the ends are the root's; gradients are reduced in the backward pass."""

    def __init__(self, model: ShardedModel, **common: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        super().__init__(model, **common)
        self.share *= common["world"]  # it takes the mean over ranks itself

    def reduce(self) -> None:
        """Done in the backward pass."""


class _Entered(torch.autograd.Function):
    """The identity, whose gradients are summed over the tensor ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Summed(torch.autograd.Function):
    """The sum over the tensor ranks, whose gradient every rank has whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        summed = tensor.contiguous()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Shared(nn.Module):
    """A module of which every tensor rank holds a share: the input enters all of them, their outputs are summed."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, *, sums: bool = True) -> None:
        super().__init__()
        self.module, self.group, self.sums = module, group, sums

    def forward(self, tensor: Tensor) -> Tensor:
        """The output of all shares, or of this rank's where it is not summed."""
        output: Tensor = self.module(_Entered.apply(tensor, self.group))  # type: ignore[no-untyped-call]
        return _Summed.apply(output, self.group) if self.sums else output  # type: ignore[no-untyped-call]


class _SharedEmbedding(nn.Module):
    """A share of the vocabulary's rows; tokens of the others count zero."""

    def __init__(self, rows: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rows, self.group = rows, group
        self.first = dist.get_rank(group) * rows.num_embeddings

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Hidden states [B, S, H]."""
        at_BS = tokens_BS - self.first
        other_BS = (at_BS < 0) | (at_BS >= self.rows.num_embeddings)
        own_BSH = self.rows(at_BS.masked_fill(other_BS, 0)).masked_fill(other_BS.unsqueeze(-1), 0.0)
        return _Summed.apply(own_BSH, self.group)  # type: ignore[no-any-return,no-untyped-call]


def tensor_model(scenario: Scenario, group: dist.ProcessGroup, *, device: torch.device) -> ShardedModel:
    """A dense model whose layers, embedding and head are shared by the ranks of `group`."""
    model, ranks, own = scenario.model, dist.get_world_size(group), dist.get_rank(group)
    names = ("heads", "kv_heads", "dense_intermediate", "vocab")
    shares = {name: getattr(model, name) // ranks for name in names}
    whole = build_sharded_model(model, None, group=ExpertGroup(), device=device, seed=scenario.seed)
    built = build_sharded_model(model.model_copy(update=shares), None, group=ExpertGroup(), device=device, seed=0)
    with torch.no_grad():
        for (name, share), weight in zip(built.named_parameters(), whole.parameters(), strict=True):
            blocks = 2 if name.endswith("w13.weight") else 1  # gate and inputs of a network, one over the other
            share.copy_(_share_of(weight, share, ranks, own, blocks))
    del whole
    ends: Any = built
    for block in ends.blocks:
        block.attention, block.ffn = _Shared(block.attention, group), _Shared(block.ffn, group)
    ends.embedding, ends.head = _SharedEmbedding(built.embedding, group), _Shared(built.head, group, sums=False)
    return built


def _share_of(weight: Tensor, share: Tensor, ranks: int, own: int, blocks: int) -> Tensor:
    """The part of a matrix that a rank holds: of each block of outputs where these are fewer, else of the inputs."""
    if weight.shape == share.shape:
        return weight
    if weight.shape[0] == share.shape[0]:
        return weight.chunk(ranks, dim=1)[own]
    return torch.cat([block.chunk(ranks)[own] for block in weight.chunk(blocks)])


class _ParallelLoss(torch.autograd.Function):
    """Mean cross entropy over shares of the vocabulary, step by step in fp32 as Megatron-Core has it."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        logits_TV = logits_TV.float()
        most_T = logits_TV.max(dim=-1).values
        dist.all_reduce(most_T, op=dist.ReduceOp.MAX, group=group)
        logits_TV = logits_TV - most_T.unsqueeze(-1)
        at_T = targets_T - dist.get_rank(group) * logits_TV.shape[1]
        other_T = (at_T < 0) | (at_T >= logits_TV.shape[1])
        at_T = at_T.masked_fill(other_T, 0)
        target_T = logits_TV.gather(1, at_T.unsqueeze(1)).squeeze(1).masked_fill(other_T, 0.0)
        dist.all_reduce(target_T, group=group)
        share_TV = logits_TV.exp_()
        sum_T = share_TV.sum(dim=-1)
        dist.all_reduce(sum_T, group=group)
        share_TV.div_(sum_T.unsqueeze(-1))
        ctx.save_for_backward(share_TV, at_T, other_T)
        return (sum_T.log() - target_T).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        share_TV, at_T, other_T = ctx.saved_tensors
        share_TV[torch.arange(len(at_T), device=at_T.device), at_T] -= (~other_T).float()
        share_TV.mul_(gradients[0] / len(at_T))
        return share_TV.to(torch.bfloat16 if share_TV.is_cuda else torch.float32), None, None


class TensorTrainer(ShardedTrainer):
    """Tensor ranks, and replicas of them."""

    def __init__(self, model: ShardedModel, group: dist.ProcessGroup, **common: Any) -> None:
        super().__init__(model, **common)
        self.tensor_group = group

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """As the trainer of whole layers, of logits that are shared."""
        logits_TV = self.model(tokens_BS).flatten(0, 1)
        loss: Tensor = _ParallelLoss.apply(logits_TV, targets_BS.flatten(), self.tensor_group)  # type: ignore[no-untyped-call]
        return loss * self.share
