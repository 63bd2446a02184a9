"""How long the parts of a model take, as data sheets have it: what ranks share the batch and layers by.

What one token of a rank costs, forward and backward: FLOPs over peak, bytes that the software's kernels move over the
memory's bandwidth, and what the ranks of a layer send each other where the schedule does not hide it. No routing and no
kernel profile is needed, so that every reader of a scenario - memory, plans, the simulation - sees the same split. Only
ratios of parts count.

Legend: h hidden size, K experts per token, D ranks of an expert group, c copies of a token that leave for other ranks.
"""

from typing import TYPE_CHECKING, NamedTuple

from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.cluster import NIC_BANDWIDTH, Pool
from moesim.scenario.flops import (
    attention_layer_parameters,
    attention_score_flops,
    expert_parameters,
    latent_parameters,
    up_projection_parameters,
)

if TYPE_CHECKING:
    from moesim.scenario.schema import Recomputable, Scenario


# Shares of the data sheet that kernels and links reach, for all GPUs; those of `moesim.kernels.roofline` and
# `moesim.network.parameters`, but for the GEMMs of fp8, which stay further below their peak.
GEMM_SHARE, GROUPED_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.7, 0.5, 0.85, 0.8
FP8_SHARE = 0.7  # of the share of bf16
SM_SHARE = 0.12  # of the SMs, held by communication where the scenario names no share
WIDE = BYTES_PER_ELEMENT["bf16"]  # activations
# Bytes of the settings of a software, forward and backward, as its kernels move them (`moesim.program`): of a norm and
# the sum around it, per value; of a rotary embedding, per number that turns; of an activation, per value of the result;
# of attention's scores, per pair; of the loss, per logit in all; and beyond fused ones, per value of a row: where
# gradients of rows are gathered, results combined, scaled by gates, and ordered.
NORMS = {"fused": (8.0, 8.0), "kernel": (10.0, 12.0), "unfused": (42.0, 98.0)}
ROTARY = {"fused": (4.0, 4.0), "cached": (20.0, 34.0), "remade": (26.0, 30.0), "complex": (20.0, 20.0)}
ROTARY |= {"unfused": (22.0, 30.0)}
ACTIVATIONS = {"fused": (6.0, 10.0), "compiled": (6.0, 19.0), "unfused": (10.0, 26.0)}
SCORES = {"fused": (0.0, 0.0), "unfused": (8.0, 10.0), "fp32": (25.0, 49.0)}
LOGITS = {"fused": 6.0, "parallel": 43.0, "fp32": 28.0}
GATHERED = {"fused": 0.0, "index_add": 4.0, "index_put": 6.0}
COMBINED = {"fused": 0.0, "index_add": 4.0, "sum": 28.0}
GATES = {"inside": 0.0, "bf16": 14.0, "fp32": 46.0}
ORDERED = {"fused": 0.0, "sort": 8.0, "mask": 16.0, "sentinels": 12.0}


class PartSeconds(NamedTuple):
    """Seconds of one token of a rank, forward and backward, through one of each; `prediction` is an MTP layer's all."""

    embedding: float
    dense_layer: float
    moe_layer: float
    head: float
    prediction: float


def part_seconds(scenario: "Scenario", *, pool: Pool | None = None) -> PartSeconds:
    """The estimate of every part on the GPUs of a pool (the first if none is named); 0 for what the model lacks."""
    parts = _Parts(scenario, scenario.cluster.main_pool if pool is None else pool)
    model = scenario.model
    moe = parts.moe_layer() if model.experts else 0.0
    head = parts.head()
    join = parts.gemms(2 * model.hidden**2) + 3 * parts.moved(parts.norm_bytes)
    layer = moe if model.experts else parts.dense_layer()
    return PartSeconds(
        embedding=parts.moved(8 * model.hidden) + 2 * parts.shared_tokens(),
        dense_layer=parts.dense_layer() if model.dense_layers else 0.0,
        moe_layer=moe,
        head=head,
        prediction=layer + head + join if model.mtp_layers else 0.0,
    )


class _Parts:
    """The terms of the estimate for one scenario."""

    def __init__(self, scenario: "Scenario", pool: Pool) -> None:
        self.scenario, self.model, self.pool = scenario, scenario.model, pool
        self.gpu: GpuSpec = pool.spec
        self.precision = scenario.workload.precision
        self.switches = scenario.implementation.switches
        self.norm_bytes = sum(NORMS[self.switches.norm]) * self.model.hidden

    def _forwards(self, *words: "Recomputable") -> int:
        """Forward passes per backward pass of what each of these words of workload.recompute repeats."""
        work = self.scenario.workload
        return 2 if work.recompute == "full" or work.recomputed_parts.intersection(words) else 1

    def _both_ways(self, bytes_: tuple[float, float], *words: "Recomputable") -> float:
        """Of kernels that run forward, as often as that pass does, and backward."""
        return self._forwards(*words) * bytes_[0] + bytes_[1]

    def _norm(self) -> float:
        """Bytes of the norm of a part of a layer and of the sum around it; half of them are its forward pass."""
        return self.norm_bytes * (1 + (self._forwards("rms_norm") - 1) / 2)

    def gemms(self, parameters: float, *, share: float = GEMM_SHARE, wide: bool = False, forwards: int = 1) -> float:
        """GEMMs with weights of so many elements: so many forward passes, and two GEMMs backward."""
        dtype = self.precision.wide if wide else self.precision.gemm
        rate = share * self.gpu.peak_flops[dtype] * (1.0 if wide or self.precision.scaling is None else FP8_SHARE)
        return 2 * parameters * (2 + forwards) / rate

    def moved(self, bytes_: float) -> float:
        """Reading and writing so many bytes."""
        return bytes_ / (MEMORY_SHARE * self.gpu.memory_bandwidth)

    def shared_tokens(self) -> float:
        """One gather, or one reduce-scatter, of the hidden states of all tensor ranks."""
        others = self.scenario.parallelism.tensor - 1
        return self._sent(others * self.model.hidden * WIDE, 0.0) if others else 0.0

    def _sent(self, inside: float, between: float) -> float:
        """Bytes inside the node and between nodes: each over its own links."""
        fabric = self.scenario.cluster.fabric
        nvlink = fabric.nvlink or self.gpu.nvlink_bandwidth
        nic = self.pool.nic or fabric.nic or NIC_BANDWIDTH
        return max(inside / nvlink, between / nic) / (LINK_SHARE * fabric.bandwidth_factor)

    def _attention(self) -> float:
        model, length = self.model, self.scenario.workload.sequence_length
        fused = self.switches.attention == "fused"
        scores = attention_score_flops(model, sequence_length=length, causal=fused)
        peak = self.gpu.peak_flops[self.precision.wide]
        core = scores * (self._forwards("core_attention") + (2.5 if fused else 2.0)) / (ATTENTION_SHARE * peak)
        core += self.moved(self._both_ways(SCORES[self.switches.attention], "core_attention") * model.heads * length)
        rotary = self._both_ways(ROTARY[self.switches.rotary]) * (model.heads + model.kv_heads) * model.head_dim
        up = up_projection_parameters(model)
        gemms = self.gemms(up, forwards=self._forwards("mla_up_projection"))
        gemms += self.gemms(attention_layer_parameters(model) - up, forwards=self._forwards())
        return core + gemms + self.moved(self._norm() + rotary) + (2 * self._forwards() + 1) * self.shared_tokens()

    def _network(self, width: float, *words: "Recomputable") -> float:
        """A gated network of this width for every token, which these words repeat: norm apart."""
        forwards = self._forwards(*words)
        gemms = self.gemms(self.model.ffn_matrices * self.model.hidden * width, forwards=forwards)
        return gemms + self.moved(self._activation_bytes(width, *words)) + (2 * forwards + 1) * self.shared_tokens()

    def _activation_bytes(self, width: float, *words: "Recomputable") -> float:
        """Fused, silu(a) * b reads two values and writes one; its gradient reads three and writes two."""
        return self._both_ways(ACTIVATIONS[self.switches.activation], "swiglu", *words) * width

    def dense_layer(self) -> float:
        """Attention and the dense network."""
        return self._attention() + self._network(self.model.dense_intermediate, "dense_ffn") + self.moved(self._norm())

    def moe_layer(self) -> float:
        """Attention, router, shared and routed experts, and what moves tokens between them."""
        model, mesh = self.scenario.model, self.scenario.parallelism
        forwards = self._forwards("moe")
        compute = self._attention() + self.moved(self._norm() + 20 * model.experts)
        compute += self.gemms(model.hidden * model.experts, wide=True, forwards=forwards)
        compute += self.gemms(latent_parameters(model), forwards=forwards)
        routed = self.gemms(model.top_k * expert_parameters(model), share=GROUPED_SHARE, forwards=forwards)
        compute += routed + self.moved(self._activation_bytes(model.top_k * model.expert_intermediate, "moe"))
        shared = self._network(model.shared_width, "shared_experts", "moe") if model.shared_experts else 0.0
        compute += self.moved(self._permuted_bytes())
        if mesh.expert * mesh.expert_tensor == 1:
            return compute + shared
        sent = self._dispatched()
        overlap = self.scenario.overlap
        if mesh.schedule.facts.overlaps_pairs and overlap.micro_batches is not False:
            return self._beside(compute + shared, sent)
        if overlap.shared_experts is False:
            return compute + shared + sent
        return compute + self._beside(shared, sent / 2) + sent / 2

    def _beside(self, compute: float, sent: float) -> float:
        """Kernels beside transfers, which hold some of the SMs while they are open."""
        share = self.scenario.dispatch.sm_share
        return max(sent, compute + sent * (SM_SHARE if share is None else share))

    def _copies(self, bins: float) -> float:
        """Distinct ones of `bins` equal domains that hold the experts of a token, spread evenly within its groups."""
        shape = self.scenario.router_shape()
        within = max(1.0, bins * shape.group_limit / shape.num_groups)
        return within * (1 - (1 - 1 / within) ** self.model.top_k)

    def _permuted_bytes(self) -> float:
        """Gathers and sums of rows, forward and backward: see `moesim.program.permutation`."""
        model, mesh = self.model, self.scenario.parallelism
        copies = self.model.top_k if self._per_expert else self._copies(mesh.expert)
        per_row = (8 * copies + 6 * model.top_k + 2) if mesh.expert * mesh.expert_tensor > 1 else 6 * model.top_k + 2
        quantise = 3 if self.scenario.dispatch.dtype == "fp8" else 0
        ways = self.switches
        more = GATHERED[ways.gather_backward] + COMBINED[ways.combine] + GATES[ways.gates] + ORDERED[ways.permute]
        return ((1 + self._forwards("moe")) * (per_row + quantise) + more * model.top_k) * model.row_width

    @property
    def _per_expert(self) -> bool:
        return self.scenario.dispatch.deduplicate == "per_expert"

    def _dispatched(self) -> float:
        """Dispatch and combine, forward and backward, and the exchange of ranks with slices of the same experts."""
        model, mesh, dispatch = self.model, self.scenario.parallelism, self.scenario.dispatch
        ranks, node = mesh.expert, self.scenario.cluster.domain_sizes[0]
        nodes = max(1.0, ranks * mesh.expert_tensor / node)
        copies = model.top_k if self._per_expert else self._copies(ranks)
        between = (self._copies(nodes) if dispatch.deduplicate == "per_node" else copies) * (1 - 1 / nodes)
        inside = copies * (1 / nodes - 1 / ranks)
        if dispatch.deduplicate == "all_ranks":  # round a ring, which leaves a node once
            between = (ranks - 1) * (nodes / ranks if nodes > 1 else 0.0)
            inside = ranks - 1 - between
        if dispatch.deduplicate == "per_node":
            inside = copies * (1 - 1 / ranks)  # fanned out behind the network
        width = model.row_width * (BYTES_PER_ELEMENT[dispatch.dtype] + BYTES_PER_ELEMENT[dispatch.combine_dtype])
        slices = 2 * copies * (mesh.expert_tensor - 1) * model.row_width * WIDE
        return (1 + self._forwards("moe")) * (self._sent(inside * width, between * width) + self._sent(slices, 0.0))

    def head(self) -> float:
        """Norm, logits and loss."""
        model = self.model
        logits = self.gemms(model.hidden * model.vocab, wide=True)
        bytes_ = self.norm_bytes + LOGITS[self.switches.loss] * model.vocab
        work, mesh = self.scenario.workload, self.scenario.parallelism
        tokens = work.micro_batch * work.sequence_length / mesh.context  # of which tensor ranks share columns
        bytes_ += (
            3 * WIDE * (self.switches.loss_chunks - 1) * model.vocab * model.hidden / tokens
        )  # their gradients' sums
        return logits + self.moved(bytes_) + self.shared_tokens()
