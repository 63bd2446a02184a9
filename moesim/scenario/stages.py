"""Which GPU runs which rank, which layers a pipeline stage holds, and how long the parts that it is cut by take.

Parts: what one token of a rank costs, forward and backward: FLOPs over peak, bytes that the software's kernels move
over the memory's bandwidth, and what the ranks of a layer send each other where the schedule does not hide it. No
routing and no kernel profile is needed, so that every reader of a scenario - memory, plans, the simulation - sees the
same split. Only ratios of parts count.

Pools of several kinds: ranks are numbered with the pipeline slowest, so that pools in their order cross it. Where
another axis is to cross pools, the nodes of every pool are dealt out: in each pipeline stage (data) or each expert
group (expert) every pool has the same share of nodes.

Stages: as the scenario lists their layers, or so that ranks take equally long. Every layer goes to the rank that would
be done first with it, the earliest of equal ones, and there to the shortest of its stages; the later ones may be half a
layer longer, since the earlier ones hold more activations. Embedding, head and prediction layers count, where they are.

Legend: h hidden size, K experts per token, D ranks of an expert group, c copies of a token that leave for other ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from moesim.errors import UserError
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.cluster import NIC_BANDWIDTH, Cluster, Pool
from moesim.scenario.flops import (
    attention_layer_parameters,
    attention_score_flops,
    expert_parameters,
    latent_parameters,
    up_projection_parameters,
)

if TYPE_CHECKING:
    from moesim.scenario.schema import Parallelism, Recomputable, Scenario


# Shares of the data sheet that kernels and links reach, for all GPUs; those of `moesim.kernels.roofline` and
# `moesim.network.parameters`, but for the products of fp8, which stay further below their peak.
PRODUCT_SHARE, GROUPED_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE = 0.8, 0.7, 0.5, 0.85, 0.8
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
    join = parts.products(2 * model.hidden**2) + 3 * parts.moved(parts.norm_bytes)
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

    def products(
        self, parameters: float, *, share: float = PRODUCT_SHARE, wide: bool = False, forwards: int = 1
    ) -> float:
        """Products with weights of so many elements: so many forward passes, and two products backward."""
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
        products = self.products(up, forwards=self._forwards("mla_up_projection"))
        products += self.products(attention_layer_parameters(model) - up, forwards=self._forwards())
        return core + products + self.moved(self._norm() + rotary) + (2 * self._forwards() + 1) * self.shared_tokens()

    def _network(self, width: float, *words: "Recomputable") -> float:
        """A gated network of this width for every token, which these words repeat: norm apart."""
        forwards = self._forwards(*words)
        products = self.products(self.model.ffn_matrices * self.model.hidden * width, forwards=forwards)
        return products + self.moved(self._activation_bytes(width, *words)) + (2 * forwards + 1) * self.shared_tokens()

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
        compute += self.products(model.hidden * model.experts, wide=True, forwards=forwards)
        compute += self.products(latent_parameters(model), forwards=forwards)
        routed = self.products(model.top_k * expert_parameters(model), share=GROUPED_SHARE, forwards=forwards)
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
        logits = self.products(model.hidden * model.vocab, wide=True)
        bytes_ = self.norm_bytes + LOGITS[self.switches.loss] * model.vocab
        work, mesh = self.scenario.workload, self.scenario.parallelism
        tokens = work.micro_batch * work.sequence_length / mesh.context  # of which tensor ranks share columns
        bytes_ += (
            3 * WIDE * (self.switches.loss_chunks - 1) * model.vocab * model.hidden / tokens
        )  # their gradients' sums
        return logits + self.moved(bytes_) + self.shared_tokens()


DIGITS = 3  # of speeds and of parts in layers: a last bit that differs between machines must not move a layer
NEAR = 64  # micro-batches around a pool's exact share that are tried


def ranked_cluster(cluster: Cluster, mesh: "Parallelism") -> Cluster:
    """The cluster with its nodes in the order of the ranks: pools may come several times, with a part of their nodes.

    Raises UserError where the nodes of a pool cannot be dealt out evenly.
    """
    deals = _deals(mesh)
    if len(cluster.pools) == 1 or deals == 1:
        return cluster
    dealt = []
    for pool in cluster.pools:
        if pool.nodes % deals or (pool.nodes // deals) % cluster.trays_per_domain(pool):
            where = "pipeline stages" if mesh.across_pools == "data" else "expert groups"
            what = f'pool "{pool.name}" has {pool.nodes} nodes, which do not divide among {deals} {where}'
            raise UserError(
                f"parallelism.across_pools: {mesh.across_pools}: {what} (whole nodes, in nvl72 whole racks)"
            )
        dealt.append(pool.model_copy(update={"nodes": pool.nodes // deals}))
    return cluster.model_copy(update={"pools": tuple(dealt) * deals})


def _deals(mesh: "Parallelism") -> int:
    """Into how many like parts the ranks fall that each have a share of every pool."""
    if mesh.across_pools == "data":
        return mesh.pipeline
    if mesh.across_pools == "expert":
        return mesh.pipeline * (mesh.stage_ranks // (mesh.expert * mesh.expert_tensor))
    return 1


def pools_of_ranks(cluster: Cluster, mesh: "Parallelism") -> tuple[int, ...]:
    """The number of the pool of every rank, in `cluster.pools`."""
    numbers = {pool.name: number for number, pool in enumerate(cluster.pools)}
    found: list[int] = []
    for pool in ranked_cluster(cluster, mesh).pools:
        found += [numbers[pool.name]] * (pool.nodes * pool.gpus_per_node)
    return tuple(found[: mesh.world_size])


def kinds_of_pools(cluster: Cluster) -> tuple[int, ...]:
    """The kind of GPU of every pool: the number of the first pool that has it."""
    gpus = [pool.gpu for pool in cluster.pools]
    return tuple(map(gpus.index, gpus))


def specs_of_ranks(cluster: Cluster, mesh: "Parallelism") -> tuple[GpuSpec, ...]:
    """The GPU of every rank."""
    specs = [pool.spec for pool in cluster.pools]
    return tuple(specs[number] for number in pools_of_ranks(cluster, mesh))


def fewest_sms(cluster: Cluster, mesh: "Parallelism", ranks: Sequence[int]) -> int:
    """SMs of the smallest GPU among some ranks."""
    if len(set(kinds_of_pools(cluster))) == 1:
        return cluster.main_pool.spec.sm_count
    pools = pools_of_ranks(cluster, mesh)
    return min(cluster.pools[pool].spec.sm_count for pool in {pools[rank] for rank in ranks})


def rank_counts(cluster: Cluster, mesh: "Parallelism") -> tuple[int, ...]:
    """How many ranks every pool has."""
    if len(cluster.pools) == 1:
        return (mesh.world_size,)
    if _deals(mesh) == 1:
        counts, left = [], mesh.world_size
        for pool in cluster.pools:
            counts.append(min(left, pool.nodes * pool.gpus_per_node))
            left -= counts[-1]
        return tuple(counts)
    pools = pools_of_ranks(cluster, mesh)
    return tuple(pools.count(number) for number in range(len(cluster.pools)))


def is_mixed(cluster: Cluster, mesh: "Parallelism") -> bool:
    """Whether ranks are on GPUs of several kinds."""
    kinds = {pool.gpu for pool, count in zip(cluster.pools, rank_counts(cluster, mesh), strict=True) if count}
    return len(kinds) > 1


def relative_speeds(scenario: "Scenario") -> tuple[float, ...]:
    """Tokens per second of one GPU of each pool through the model's layers, as estimated from data sheets."""
    seconds = []
    for pool in scenario.cluster.pools:
        parts = part_seconds(scenario, pool=pool)
        model = scenario.model
        seconds.append(parts.dense_layer * model.dense_layers + parts.moe_layer * model.moe_layers)
    return tuple(1.0 / each for each in seconds)


def micro_batches_of_pools(scenario: "Scenario") -> tuple[int, ...]:
    """Micro-batches that each data-parallel rank of every pool runs in a step.

    Raises UserError where a share by speed cannot give every rank whole micro-batches.
    """
    mesh, work, cluster = scenario.parallelism, scenario.workload, scenario.cluster
    if mesh.batch_share == "even" or len(cluster.pools) == 1:
        return (work.global_batch // (mesh.data * work.micro_batch),) * len(cluster.pools)
    if isinstance(mesh.batch_share, tuple):
        return mesh.batch_share
    ranks = data_ranks_of_pools(scenario)
    total, left = divmod(work.global_batch, work.micro_batch)
    speeds = relative_speeds(scenario)
    rounded = tuple(round(speed / max(speeds), 6) for speed in speeds)  # the last bits must not move a micro-batch
    found = None if left else _shares(total, ranks, rounded)
    if found is None:
        unit = work.micro_batch * math.gcd(*(count for count in ranks if count))
        remedy = f"use a multiple of {unit} that is large enough, or give parallelism.batch_share as a list"
        what = (
            f"{work.global_batch} sequences do not go into whole micro-batches of {_joined(ranks)} data-parallel ranks"
        )
        raise UserError(f"workload.global_batch: {what} of the pools; {remedy}")
    return found


def _joined(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def data_ranks_of_pools(scenario: "Scenario") -> tuple[int, ...]:
    """Data-parallel ranks on the GPUs of each pool, where data parallelism crosses pools."""
    mesh = scenario.parallelism
    return tuple(count // (mesh.pipeline * mesh.tensor * mesh.context) for count in rank_counts(scenario.cluster, mesh))


@lru_cache(maxsize=256)
def _shares(total: int, ranks: tuple[int, ...], speeds: tuple[float, ...]) -> tuple[int, ...] | None:
    """Micro-batches of a rank of each pool, at least 1, `total` on all ranks together: the slowest takes least long.

    >>> _shares(24, (2, 2), (1.0, 2.0))
    (4, 8)
    """
    pace = total / sum(count * speed for count, speed in zip(ranks, speeds, strict=True))
    best: tuple[float, tuple[int, ...]] | None = None
    for chosen in _choices(total, ranks, tuple(pace * speed for speed in speeds)):
        longest = max(each / speed for each, speed, n in zip(chosen, speeds, ranks, strict=True) if n)
        if best is None or longest < best[0]:
            best = longest, chosen
    return None if best is None else best[1]


def _choices(total: int, ranks: tuple[int, ...], ideal: tuple[float, ...]) -> list[tuple[int, ...]]:
    count, *others = ranks
    if not others:
        exact = count and total >= count and total % count == 0
        return [(total // count,)] if exact else [(0,)] if not count and not total else []
    if not count:
        return [(0, *rest) for rest in _choices(total, tuple(others), ideal[1:])]
    near = range(max(1, int(ideal[0]) - NEAR), min(total // count, int(ideal[0]) + NEAR) + 1)
    return [(each, *rest) for each in near for rest in _choices(total - each * count, tuple(others), ideal[1:])]


def speeds_of_stages(scenario: "Scenario") -> tuple[float, ...]:
    """The speed of every pipeline rank's slowest GPU against the fastest of all; empty where all are alike."""
    cluster, mesh = scenario.cluster, scenario.parallelism
    if not is_mixed(cluster, mesh):
        return ()
    of_pool, pools = relative_speeds(scenario), pools_of_ranks(cluster, mesh)
    slowest = [
        min(of_pool[pool] for pool in set(pools[first : first + mesh.stage_ranks]))
        for first in range(0, mesh.world_size, mesh.stage_ranks)
    ]
    speeds = tuple(round(speed / max(slowest), DIGITS) for speed in slowest)
    return speeds if min(speeds) < 1 else ()


Lengths = tuple[int, ...]

LATER = 0.5  # layers by which the last stage of the model may be longer than the first, where one rank holds both
ALIKE = 0.05  # layers: ranks that differ by less are alike, so that an embedding moves no layer


def stages_of_ranks(mesh: "Parallelism") -> tuple[tuple[int, ...], ...]:
    """The stages of every pipeline rank; where the schedule goes both ways, two ranks hold each."""
    return mesh.schedule.facts.stages(mesh.pipeline, mesh.schedule.virtual)


def stage_lengths(scenario: "Scenario") -> Lengths:
    """The number of layers of every stage, first stage first."""
    mesh, model = scenario.parallelism, scenario.model
    if mesh.stages is not None:
        return mesh.stages
    if mesh.num_stages == 1:
        return (model.layers,)
    rank_of_stage = {
        stage: rank for rank, stages in reversed(list(enumerate(stages_of_ranks(mesh)))) for stage in stages
    }
    parts = part_seconds(scenario)
    layer = parts.moe_layer or parts.dense_layer
    last = parts.head + model.mtp_layers * parts.prediction
    return even_lengths(
        ModelEnds(
            layers=model.layers,
            rank_of_stage=tuple(rank_of_stage[stage] for stage in range(mesh.num_stages)),
            num_short=model.dense_layers if model.experts and model.dense_at is None else 0,
            short_at=model.dense_at or (),
            short=round(parts.dense_layer / layer, DIGITS),
            first=round(parts.embedding / layer, DIGITS),
            last=round(last / layer, DIGITS),
            speed_of_rank=speeds_of_stages(scenario),
        )
    )


@dataclass(frozen=True, kw_only=True)
class ModelEnds:
    """What is to be split, in times of one layer: the first `num_short` layers or those of `short_at` take `short`, all
    others 1. `first` and `last` are what the ends of the model take beside their layers. `speed_of_rank`: of each
    pipeline rank against the fastest, empty where all are alike.
    """

    layers: int
    rank_of_stage: tuple[int, ...]
    num_short: int = 0
    short_at: Lengths = ()
    short: float = 1.0
    first: float = 0.0
    last: float = 0.0
    speed_of_rank: tuple[float, ...] = ()

    def seconds_on(self, rank: int, seconds: float) -> float:
        """What takes so long on the fastest rank, on this one."""
        return seconds / self.speed_of_rank[rank] if self.speed_of_rank else seconds

    def shorts(self, lengths: Lengths) -> Lengths:
        """How many of the short layers each stage holds."""
        if self.short_at:
            ends = list(accumulate(lengths))
            return tuple(
                sum(end - length <= layer < end for layer in self.short_at)
                for end, length in zip(ends, lengths, strict=True)
            )
        counts, left = [], self.num_short
        for length in lengths:
            counts.append(min(length, left))
            left -= counts[-1]
        return tuple(counts)

    def of_stages(self, lengths: Lengths, shorts: Lengths) -> list[float]:
        """What each stage takes, if it holds so many layers and so many short ones among them."""
        seconds = [length + (self.short - 1) * n for length, n in zip(lengths, shorts, strict=True)]
        seconds[0] += self.first
        seconds[-1] += self.last
        return seconds

    def of_ranks(self, lengths: Lengths, shorts: Lengths | None = None) -> list[float]:
        """The same for each rank."""
        of_rank = [0.0] * (max(self.rank_of_stage) + 1)
        seconds = self.of_stages(lengths, self.shorts(lengths) if shorts is None else shorts)
        for rank, value in zip(self.rank_of_stage, seconds, strict=True):
            of_rank[rank] += self.seconds_on(rank, value)
        return of_rank

    def slowest(self, lengths: Lengths) -> float:
        """What the slowest rank takes."""
        return max(self.of_ranks(lengths))


@lru_cache(maxsize=1024)
def even_lengths(ends: ModelEnds) -> Lengths:
    """Lengths of stages with which the slowest rank takes about as little time as can be.

    >>> even_lengths(ModelEnds(layers=9, rank_of_stage=(0, 1, 2), last=1.6))
    (4, 3, 2)
    """
    found: list[Lengths] = []
    shorts: Lengths = (0,) * len(ends.rank_of_stage)
    while len(found) <= len(shorts):  # which stages hold the short layers is known once the lengths are
        lengths = _filled(ends, shorts)
        if lengths in found:
            break
        found.append(lengths)
        shorts = ends.shorts(lengths)
    count, more = divmod(ends.layers, len(shorts))
    found.append(tuple(count + (stage < more) for stage in range(len(shorts))))
    tried = [_improved(ends, lengths) for lengths in dict.fromkeys(found)]
    return min(tried, key=lambda lengths: round(ends.slowest(lengths) / ALIKE))


def _filled(ends: ModelEnds, shorts: Lengths) -> Lengths:
    """Layers given out one by one, where it is assumed which stages hold the short ones."""
    lengths = [0] * len(shorts)
    seconds = ends.of_stages(tuple(lengths), shorts)
    of_rank = ends.of_ranks(tuple(lengths), shorts)
    lag = LATER / max(1, len(lengths) - 1)

    def urgency(stage: int) -> tuple[float, ...]:
        rank = ends.rank_of_stage[stage]
        return round(of_rank[rank] / (2 * ALIKE)), rank, seconds[stage] - lag * stage

    for _ in range(ends.layers):
        stage = min(range(len(lengths)), key=urgency)
        lengths[stage] += 1
        seconds[stage] += 1
        of_rank[ends.rank_of_stage[stage]] += ends.seconds_on(ends.rank_of_stage[stage], 1)
    return tuple(lengths)


def _improved(ends: ModelEnds, lengths: Lengths) -> Lengths:
    """The split after moving single layers off the slowest rank for as long as that helps."""
    while True:
        better = min(_moves(ends, lengths), key=ends.slowest, default=lengths)
        if ends.slowest(better) > ends.slowest(lengths) - ALIKE:
            return lengths
        lengths = better


def _moves(ends: ModelEnds, lengths: Lengths) -> Iterator[Lengths]:
    """Splits with one layer less in a stage of the slowest rank, and one more in any other."""
    of_rank = ends.of_ranks(lengths)
    slowest = of_rank.index(max(of_rank))
    for source, rank in enumerate(ends.rank_of_stage):
        if rank != slowest or not lengths[source]:
            continue
        for target in range(len(lengths)):
            moved = list(lengths)
            moved[source] -= 1
            moved[target] += 1
            yield tuple(moved)
