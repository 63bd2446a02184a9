"""How long a step takes: tables over tokens of what its kernels, its routing and its transfers cost, and their sum.

A step computes, on every rank of a data group, the rows of each request that is being answered and parts of prompts.
Tables hold seconds of one layer at a few numbers of tokens; between them they are interpolated.

A step is one batch, or two halves that hide each other's exchange: one half of its requests is computed while dispatch
and combine of the other are on their way. With C seconds of compute of both halves, X of their exchange, and a share f
of the SMs that the exchange takes while it lasts, the layers take max(X, C + f X), and once more the shorter of both in
one layer of one half, where nothing is beside it. C is more than that of whole batches, as weights are read twice.
Head, host and swapping stay whole.

Legend: G numbers of tokens, D data groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, all_reduce_seconds, build_fabric, send_recv_seconds
from moesim.scenario import Mla
from moesim.scenario.dispatch import DISPATCH
from moesim.serving.attention import AttentionTables
from moesim.serving.batch import Chunk, Formed
from moesim.serving.decode_kernels import small_all_reduce
from moesim.serving.experts import ExpertTables
from moesim.serving.memory import drafting_layers, memory_of
from moesim.serving.pricing import Pricing
from moesim.serving.schema import ServingScenario
from moesim.serving.software import Small, end_kernels, num_launches


class StepCost(NamedTuple):
    """Seconds of one step by part; `hidden`: those of the exchange that compute hides, in no part."""

    projections: float
    attention: float
    experts: float
    exchange: float
    head: float
    draft: float
    swap: float
    host: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing runs beside anything else."""
        return float(sum(self[: len(PARTS)]))

    def longer(self, seconds: float) -> "StepCost":
        """The same step with an exchange that takes so much longer."""
        return self._replace(exchange=self.exchange + seconds)


PARTS = tuple(part for part in StepCost._fields if part != "hidden")


def halves(formed: Sequence[Formed]) -> tuple[list[Formed], list[Formed]]:
    """Every group's step in two: requests that get tokens and parts of prompts cut in the middle."""
    pairs = [(_half(each, upper=False), _half(each, upper=True)) for each in formed]
    return [lower for lower, _ in pairs], [upper for _, upper in pairs]


def _half(each: Formed, *, upper: bool) -> Formed:
    generated = each.generated - each.generated // 2 if not upper else each.generated // 2
    share = generated / each.generated if each.generated else 0.0
    chunks = []
    for chunk in each.chunks:
        first = chunk.tokens - chunk.tokens // 2
        part = (chunk.tokens - first, chunk.before + first) if upper else (first, chunk.before)
        if part[0]:
            chunks.append(Chunk(chunk.job, *part))
    padding = each.padding // 2 if upper else each.padding - each.padding // 2
    keys = tuple(round(keys * share) for keys in each.keys)
    return replace(each, generated=generated, keys=keys, chunks=tuple(chunks), padding=padding, moved=0)


def shown_exchange(compute: float, exchange: float, *, layers: int, taken: float) -> float:
    """Seconds beyond `compute` of both halves that the step takes for their exchange, on `taken` of the SMs."""
    fill = min(compute, exchange) / (2 * max(layers, 1))
    return max(exchange, compute + taken * exchange) - compute + fill


def overlapped(
    formed: Sequence[Formed], plain: Callable[[Sequence[Formed]], StepCost], *, layers: int, taken: float
) -> StepCost:
    """The cost of a step as two batches; `plain`: that of one."""
    whole, lower, upper = plain(formed), *(plain(half) for half in halves(formed))
    parts = {name: getattr(lower, name) + getattr(upper, name) for name in ("projections", "attention", "experts")}
    exchange = lower.exchange + upper.exchange
    shown = shown_exchange(sum(parts.values()), exchange, layers=layers, taken=taken)
    return whole._replace(**parts, exchange=shown, hidden=max(0.0, exchange - shown))


FloatArray = NDArray[np.float64]

ACTIVATION_BYTES = 2.0  # bf16


class OverTokens:
    """Seconds at a few numbers of tokens; in between they are interpolated, beyond them they are in proportion."""

    def __init__(self, tokens_G: NDArray[np.int64], seconds_G: FloatArray) -> None:
        self.tokens_G, self.seconds_G = tokens_G.astype(float), seconds_G  # floats, as every step asks for them
        self._most = int(tokens_G[-1])

    def at(self, tokens_D: NDArray[np.int64]) -> FloatArray:
        """Seconds [D] of so many tokens; none of none."""
        found_D = np.interp(tokens_D, self.tokens_G, self.seconds_G)
        if max(tokens_D.tolist()) > self._most:
            found_D *= np.maximum(tokens_D / self._most, 1.0)
        return np.asarray(np.where(tokens_D > 0, found_D, 0.0))

    def of(self, tokens: float) -> float:
        """Seconds of so many tokens; beyond the table those of its end."""
        return float(np.interp(tokens, self.tokens_G, self.seconds_G))


class StepCosts:
    """The tables of one deployment."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.scenario, self.model = scenario, scenario.model
        self.pricing = Pricing(scenario)
        self.together = scenario.parallelism.expert > 1
        self.page_bytes = memory_of(scenario).page_bytes
        most = scenario.engine.token_budget
        self.tokens_G = np.unique(np.geomspace(1, most, 2 * int(np.ceil(np.log2(most))) + 1).round()).astype(int)
        self.layer, self.dense, self.head = self._tables(self._dense_part)
        self.absorbed, self.apart = self._tables(self._latents)
        self.reduce, self.send = self._messages()
        self.draft, self.draft_absorbed = self._drafting_layer()
        self.attention = AttentionTables(scenario, self.pricing)
        self.experts = ExpertTables(scenario, self.pricing) if self.model.moe_layers else None

    def step(self, formed: Sequence[Formed]) -> StepCost:
        """Seconds of a step of all data groups together, or of a single one: the slowest counts in each part."""
        if not self.scenario.engine.two_batches:
            return self._one_batch(formed)
        dispatch, sms = self.scenario.dispatch, self.scenario.cluster.main_pool.spec.sm_count
        taken = dispatch.sms(sms) or DISPATCH[dispatch.algorithm].sms or 0.0
        cost = overlapped(formed, self._one_batch, layers=self.model.moe_layers, taken=min(1.0, taken / sms))
        return cost._replace(
            host=self._host(float(max(each.tokens for each in formed)), cost.total - cost.host, formed)
        )

    def _one_batch(self, formed: Sequence[Formed]) -> StepCost:
        model, mesh = self.model, self.scenario.parallelism
        software = self.pricing.software
        routed_D = np.array([max(each.tokens, 1) if self.together else each.tokens for each in formed])
        tokens_D = software.filled(routed_D)
        routed_D = tokens_D if software.routes_filling else routed_D
        layer_D, generated_D = self.layer.at(tokens_D), np.array([each.generated * each.rows for each in formed])
        if isinstance(model.attention, Mla):
            layer_D = layer_D + (self.absorbed.at(generated_D) + self.apart.at(self._taken_apart(formed)))
        projections_D = model.layers * layer_D
        if model.dense_layers:
            projections_D = projections_D + model.dense_layers * self.dense.at(tokens_D)
        attention_D = self.attention.seconds(formed)
        slowest = int(np.argmax(projections_D + attention_D))
        experts, exchange = self._experts(routed_D, generated_D)
        longest = float(tokens_D.max())
        reduces = 2 * model.layers * self.reduce.of(longest) if mesh.tensor > 1 else 0.0
        sends = (mesh.pipeline - 1) * self.send.of(longest)
        ended_D = generated_D + np.array([len(each.chunks) for each in formed])
        if software.routes_filling:
            ended_D = np.minimum(software.filled(ended_D), max(self.scenario.engine.running, int(ended_D.max())))
        moved = max(each.moved for each in formed) * self.page_bytes
        cost = StepCost(
            projections=float(projections_D[slowest]),
            attention=float(attention_D[slowest]),
            experts=model.moe_layers * experts,
            exchange=model.moe_layers * exchange + reduces + sends,
            head=float(self.head.at(ended_D).max()),
            draft=self._draft(formed, experts + exchange),
            swap=moved / self.scenario.engine.host_link,
            host=0.0,
        )
        return cost._replace(host=self._host(longest, cost.total, formed))

    def _host(self, tokens: float, device: float, formed: Sequence[Formed]) -> float:
        """Seconds of the host that show: of every step, and of launching kernels that the GPU does not wait for."""
        software = self.pricing.software
        launching = self.num_kernels * software.launch if tokens > software.graph_tokens else 0.0
        requests = max(each.generated + len(each.chunks) for each in formed)
        keys = max(sum(each.keys) + sum(chunk.tokens + chunk.before for chunk in each.chunks) for each in formed)
        ahead = self.scenario.engine.host + software.step + software.request * requests + software.listed_key * keys
        if software.hides_host:
            return max(0.0, launching + ahead - device)
        return ahead + max(0.0, launching + software.plan - device)

    @cached_property
    def num_kernels(self) -> int:
        """Kernels of a step; a grouped GEMM is two, as its sizes are prepared by one."""
        model, lists, tensor = self.model, self.pricing.lists, self.scenario.parallelism.tensor
        gemms = 6 if isinstance(model.attention, Mla) else 4 if self.pricing.software.separate_heads else 2
        around = num_launches(lists.attention(model, tensor, 1.0)) + gemms + 1 + (2 if tensor > 1 else 0)
        network = num_launches(lists.network(1.0, 1)) + 2
        experts = num_launches(lists.experts(model, 1.0, 1.0, 1)) + 5 + (2 if self.together else 0)
        experts += network if model.shared_experts else 0
        return model.layers * around + model.dense_layers * network + model.moe_layers * experts + 4

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Sources of kernel durations, the firmest first."""
        return self.pricing.rests_on

    def _experts(self, tokens_D: NDArray[np.int64], generated_D: NDArray[np.int64]) -> tuple[float, float]:
        """One layer's routed experts, and its dispatch and combine."""
        if self.experts is None:
            return 0.0, 0.0
        total, generated = (tokens_D.sum(), generated_D.sum()) if self.together else (tokens_D.max(), generated_D.max())
        cost = self.experts.at(float(total), float(generated))
        return cost.seconds, cost.exchange

    def _draft(self, formed: Sequence[Formed], experts: float) -> float:
        """Seconds of a layer of multi-token prediction and of the head, once for each drafted token."""
        if not drafting_layers(self.scenario):
            return 0.0
        drafted = formed[0].rows - 1
        generated_D = np.array([each.generated for each in formed])
        layer_D = self.draft_absorbed.at(generated_D) + self.head.at(generated_D)
        attention_D = self.attention.one_layer(np.array([each.keys[-1] for each in formed]), generated_D, 1)
        once = float((layer_D + attention_D).max())
        if once and self.experts is not None:
            once += sum(self._experts(generated_D, generated_D))
        prompts = sum(len(each.chunks) for each in formed)  # their keys are needed, too: the layer once for all
        return drafted * once + (self._prompt_draft(formed, experts) if prompts else 0.0)

    def _prompt_draft(self, formed: Sequence[Formed], experts: float) -> float:
        tokens_D = np.array([sum(chunk.tokens for chunk in each.chunks) for each in formed])
        return float((self.draft.at(tokens_D) + self.apart.at(self._taken_apart(formed))).max()) + experts

    def _tables(self, seconds: Callable[[int], tuple[float, ...]]) -> list[OverTokens]:
        """A table of each of the numbers that `seconds` gives for a number of tokens."""
        rows = [seconds(tokens) for tokens in self.tokens_G.tolist()]
        return [OverTokens(self.tokens_G, np.array(column)) for column in zip(*rows, strict=True)]

    def _messages(self) -> list[OverTokens]:
        """An all-reduce of the ranks of a data group, and a message to the next stage."""
        fabric, mesh = build_fabric(self.scenario.cluster), self.scenario.parallelism
        ranks = np.arange(mesh.tensor)

        def seconds(tokens: int) -> tuple[float, float]:
            size = tokens * self.model.hidden * ACTIVATION_BYTES
            send = 0.0
            if mesh.pipeline > 1:
                send = send_recv_seconds(fabric, 0, mesh.stage_size, size / mesh.tensor).seconds
            return self._all_reduce(fabric, ranks, size), send

        return self._tables(seconds)

    def _all_reduce(self, fabric: Fabric, ranks: NDArray[np.int64], size: float) -> float:
        """NCCL's, or an engine's own where that is faster and the ranks share a node."""
        seconds = all_reduce_seconds(fabric, ranks, size).seconds
        if self.pricing.software.stack != "engines" or len(ranks) > self.scenario.cluster.domain_sizes[0]:
            return seconds
        own = small_all_reduce(self.pricing.gpu, len(ranks), size)
        return seconds if own is None else min(own, seconds)

    def _dense_part(self, tokens: int) -> tuple[float, float, float]:
        """Seconds of a layer without attention's core and routed experts, of a dense network, and of the head."""
        model, tensor, pricing = self.model, self.scenario.parallelism.tensor, self.pricing
        layer = self._projections(tokens) + pricing.small(pricing.lists.attention(model, tensor, tokens))
        shared = self._network(tokens, model.shared_width // tensor) if model.shared_experts else 0.0
        layer += shared * model.moe_layers / model.layers
        dense = 0.0
        if model.dense_layers:
            dense = self._network(tokens, model.dense_intermediate // tensor)
            dense += pricing.small([Small("rms_norm", tokens, model.hidden)])
        chosen = self.scenario.engine.sampling
        kinds = pricing.lists.greedy if chosen == "greedy" else (chosen,)
        head = pricing.gemm(tokens, model.hidden, model.vocab // tensor, wide=True)
        return layer, dense, head + pricing.small(end_kernels(model, tensor, tokens, kinds))

    def _drafting_layer(self) -> list[OverTokens]:
        """A drafting layer without attention and experts, without and with latents: it joins embedding and output."""
        if not drafting_layers(self.scenario):
            return [OverTokens(self.tokens_G, np.zeros(len(self.tokens_G)))] * 2
        hidden, dense_G = self.model.hidden, np.zeros(1) if self.model.moe_layers else self.dense.seconds_G
        join_G = np.array([self.pricing.gemm(float(tokens), 2 * hidden, hidden) for tokens in self.tokens_G])
        draft_G = join_G + self.layer.seconds_G + dense_G
        return [OverTokens(self.tokens_G, each_G) for each_G in (draft_G, draft_G + self.absorbed.seconds_G)]

    def _network(self, tokens: int, width: int) -> float:
        matrices, hidden = self.model.ffn_matrices, self.model.hidden
        up = self.pricing.gemm(tokens, hidden, (matrices - 1) * width) + self.pricing.gemm(tokens, width, hidden)
        return up + self.pricing.small(self.pricing.lists.network(tokens, width))

    def _projections(self, tokens: int) -> float:
        model, tensor, gemm = self.model, self.scenario.parallelism.tensor, self.pricing.gemm
        heads, dim = model.heads // tensor, model.head_dim
        if not isinstance(model.attention, Mla):
            keys = -(-model.kv_heads // tensor) * dim
            if self.pricing.software.separate_heads:
                apart = gemm(tokens, model.hidden, heads * dim) + 2 * gemm(tokens, model.hidden, keys)
                return apart + gemm(tokens, heads * dim, model.hidden)
            wide = heads * dim + 2 * keys
            return gemm(tokens, model.hidden, wide) + gemm(tokens, heads * dim, model.hidden)  # one GEMM for q, k, v
        mla = model.attention
        query = heads * (dim + mla.rope_head_dim)
        seconds = gemm(tokens, model.hidden, mla.kv_lora_rank + mla.rope_head_dim)
        if mla.q_lora_rank is None:
            seconds += gemm(tokens, model.hidden, query)
        else:
            seconds += gemm(tokens, model.hidden, mla.q_lora_rank) + gemm(tokens, mla.q_lora_rank, query)
        return seconds + gemm(tokens, heads * (mla.value_head_dim or dim), model.hidden)

    def _latents(self, tokens: int) -> tuple[float, float]:
        """Seconds of a layer of MLA: of generated tokens, whose queries go into the latent space and outputs out of
        it, a GEMM for each head; and of tokens of prompts, whose latents become keys and values in one GEMM."""
        mla, dim = self.model.attention, self.model.head_dim
        if not isinstance(mla, Mla):
            return 0.0, 0.0
        heads, value = self.model.heads // self.scenario.parallelism.tensor, mla.value_head_dim or dim
        absorbed = self.pricing.batched(heads, tokens, dim, mla.kv_lora_rank)
        absorbed += self.pricing.batched(heads, tokens, mla.kv_lora_rank, value)
        return absorbed, self.pricing.gemm(tokens, mla.kv_lora_rank, heads * (dim + value))

    def _taken_apart(self, formed: Sequence[Formed]) -> NDArray[np.int64]:
        """Latents [D] that become keys and values: those of parts of prompts, and of what lies before them again."""
        return np.array([sum(chunk.tokens + chunk.before for chunk in each.chunks) + each.padding for each in formed])
