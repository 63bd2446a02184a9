"""The mesh of ranks: which ranks form which group, on which node each of them sits, and which tokens of a sequence it
holds.

Ranks are numbered with tensor fastest, then context, data and pipeline (slowest); GPU i of the cluster runs rank i,
and GPUs are numbered node by node through the pools, dealt out by `moesim.scenario.stages` where an axis crosses them.
The layers with experts see the same ranks of a stage in another order, chosen apart (parallel folding, arXiv
2504.14960): expert-tensor fastest, then expert, then expert-data.

Context parallelism cuts a sequence into 2 * context chunks and gives rank c the chunks c and 2 * context - 1 - c, so
that causal attention costs every rank the same (zig-zag, as Megatron-Core and Llama 3 do, arXiv 2407.21783 section
3.3.2). Sequence parallelism then cuts what a context rank holds into one run per tensor rank (arXiv 2205.05198).
Pieces are the runs that both cuts leave whole: sequence length / (2 context tensor) tokens, or / tensor at context 1.

Legend: W ranks of the world, R and D ranks of one expert-parallel group (R: also those that share a sequence, tensor
fastest), V pieces of one rank, J nodes that the group touches.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.cluster import Cluster
from moesim.scenario.pools import ranked_cluster
from moesim.scenario.schema import Parallelism

Ranks = NDArray[np.int64]


class IntoNode(NamedTuple):
    """How copies for a node of a group come to it: its ranks, those of other nodes and the relay of each of them, and
    which of its ranks that is, as 1 of [ranks, others].
    """

    members: Ranks
    remote: Ranks
    relay: Ranks
    from_relay: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """On which nodes and rails the ranks of one expert-parallel group sit.

    node_of_rank_R: node of each rank, numbered 0..M-1 within the group.
    local_rank_R: its rail, which is its index among the GPUs of its node.
    """

    node_of_rank_R: Ranks
    local_rank_R: Ranks

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.node_of_rank_R)

    @cached_property
    def num_nodes(self) -> int:
        """Nodes that the group touches."""
        return int(self.node_of_rank_R.max()) + 1

    @cached_property
    def same_node_RD(self) -> NDArray[np.bool_]:
        """Whether two ranks share a node."""
        return np.equal.outer(self.node_of_rank_R, self.node_of_rank_R)

    @cached_property
    def relay_RJ(self) -> Ranks:
        """The rank on each node that receives rank r's copies for that node: the one on the same rail.

        A node that holds only part of the group and lacks the rail takes its ranks in turn.
        """
        relay_RJ = np.empty((self.num_ranks, self.num_nodes), dtype=np.int64)
        for node in range(self.num_nodes):
            members = np.flatnonzero(self.node_of_rank_R == node)
            same_rail_RG = self.local_rank_R[:, None] == self.local_rank_R[members]
            in_turn_R = self.local_rank_R % len(members)
            relay_RJ[:, node] = members[np.where(same_rail_RG.any(axis=1), same_rail_RG.argmax(axis=1), in_turn_R)]
        return relay_RJ

    @cached_property
    def into_nodes(self) -> tuple[IntoNode, ...]:
        """The ways into every node of the group."""
        found = []
        for node in range(self.num_nodes):
            members, remote = (
                np.flatnonzero(at_R) for at_R in (self.node_of_rank_R == node, self.node_of_rank_R != node)
            )
            relay = self.relay_RJ[remote, node]
            found.append(IntoNode(members, remote, relay, np.equal.outer(members, relay).astype(np.float64)))
        return tuple(found)


@dataclass(frozen=True)
class Mesh:
    """The groups of ranks that `parallelism` makes out of the GPUs of `cluster`."""

    parallelism: Parallelism
    cluster: Cluster

    def __post_init__(self) -> None:
        assert self.world_size <= self.cluster.num_gpus, "the scenario's checks refuse more ranks than GPUs"
        assert self.stage_ranks % self.expert_block == 0, "the scenario's checks refuse such an expert-parallel size"
        small, large = sorted((self.attention_block, self.expert_block))
        assert large % small == 0, "the scenario's checks refuse layouts of which neither fits into the other"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.parallelism.world_size

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.parallelism.stage_ranks

    @property
    def expert_block(self) -> int:
        """Consecutive ranks that hold every expert of a layer once: expert * expert_tensor."""
        return self.parallelism.expert * self.parallelism.expert_tensor

    @property
    def attention_block(self) -> int:
        """Consecutive ranks that share the tokens of the same sequences: context * tensor."""
        return self.parallelism.context * self.parallelism.tensor

    @property
    def shards_by_layer(self) -> bool:
        """Whether ZeRO 2 or 3 reduces gradients, or gathers parameters, layer by layer in every micro-batch."""
        return max(self.parallelism.zero.dense, self.parallelism.zero.expert) >= 2

    @property
    def group_size(self) -> int:
        """Ranks of one rank group: the fewest consecutive ones that are closed under what they do layer by layer.

        Whole tensor, context, expert and expert-tensor groups; with ZeRO 2 or 3, which reduces and gathers layer by
        layer among all data-parallel ranks, the whole stage.
        """
        if self.shards_by_layer:
            return self.stage_ranks
        return max(self.attention_block, self.expert_block)

    @property
    def num_expert_groups(self) -> int:
        """Expert-parallel groups of one pipeline stage."""
        return self.stage_ranks // self.parallelism.expert

    @cached_property
    def node_of_rank_W(self) -> Ranks:
        """Node of every rank, numbered in the order of ranks: its NVLink domain, in nvl72 the rack."""
        sizes = ranked_cluster(self.cluster, self.parallelism).domain_sizes
        return np.repeat(np.arange(len(sizes)), sizes)[: self.world_size]

    @cached_property
    def local_rank_W(self) -> Ranks:
        """Index of every rank among the GPUs of its node."""
        first_of_node = np.searchsorted(self.node_of_rank_W, self.node_of_rank_W, side="left")
        return np.arange(self.world_size) - first_of_node

    def rank(self, *, stage: int, index: int) -> int:
        """Global rank of position `index` within pipeline stage `stage`."""
        return stage * self.stage_ranks + index

    def expert_groups(self, stage: int = 0) -> list[Ranks]:
        """Global ranks of each expert-parallel group of a stage.

        They are `expert` consecutive ranks; with expert_tensor = t, ranks at stride t inside a block of expert * t.
        """
        blocks = self._stage(stage).reshape(-1, self.parallelism.expert, self.parallelism.expert_tensor)
        return list(blocks.transpose(0, 2, 1).reshape(-1, self.parallelism.expert))

    def rank_groups(self, stage: int = 0) -> list[Ranks]:
        """Global ranks of the units of a stage that are simulated together (`group_size` consecutive ranks each)."""
        return list(self._stage(stage).reshape(-1, self.group_size))

    def layout(self, ranks: Ranks) -> GroupLayout:
        """Nodes and rails of the global `ranks` of one group."""
        _, node_of_rank_R = np.unique(self.node_of_rank_W[ranks], return_inverse=True)
        return GroupLayout(node_of_rank_R.reshape(-1), self.local_rank_W[ranks])

    def expert_gradient_groups(self, stage: int = 0) -> list[Ranks]:
        """Ranks that hold the same experts: stage ranks / (expert * expert_tensor) of them, one reduction each."""
        return list(self._stage(stage).reshape(-1, self.expert_block).T)

    def dense_gradient_groups(self, stage: int = 0) -> list[Ranks]:
        """Ranks that hold the same dense parameters: data * context of them, one group per tensor index."""
        return list(self._stage(stage).reshape(-1, self.parallelism.tensor).T)

    def tensor_groups(self, stage: int = 0) -> list[Ranks]:
        """Ranks that share each dense matrix: runs of `tensor` consecutive ranks."""
        return list(self._stage(stage).reshape(-1, self.parallelism.tensor))

    def context_groups(self, stage: int = 0) -> list[Ranks]:
        """Ranks that share one sequence: `context` ranks at stride `tensor`."""
        p = self.parallelism
        return list(self._stage(stage).reshape(p.data, p.context, p.tensor).transpose(0, 2, 1).reshape(-1, p.context))

    def _stage(self, stage: int) -> Ranks:
        assert 0 <= stage < self.parallelism.pipeline
        return np.arange(stage * self.stage_ranks, (stage + 1) * self.stage_ranks)


def pieces_of_ranks(*, context: int, tensor: int) -> NDArray[np.int64]:
    """The pieces of a sequence that each rank holds, in token order: int64 [R, V]; every piece is held once."""
    context_R, tensor_R = np.divmod(np.arange(context * tensor), tensor)
    if context == 1:
        return tensor_R[:, None]
    held_RV = 2 * tensor_R[:, None] + np.arange(2)  # among the 2 * tensor pieces of the context rank's two chunks
    early_RV = context_R[:, None] * tensor + held_RV
    late_RV = (2 * context - 1 - context_R[:, None]) * tensor + held_RV - tensor
    return np.where(held_RV < tensor, early_RV, late_RV)
