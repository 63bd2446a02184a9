"""How long a step takes: tables over tokens of what its kernels, its routing and its transfers cost, and their sum.

A step computes, on every rank of a data group, one token of each request that is being answered and parts of prompts.
Tables hold seconds of one layer at a few numbers of tokens; between them they are interpolated.

Legend: G numbers of tokens, N tokens, K experts of a token, R ranks, E experts of a rank, D data groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Attention, Gemm, GroupedGemm, Kernel, KernelModel, MemoryBound, kernel_model, memory_bytes
from moesim.kernels.estimate import SOURCES
from moesim.network import Fabric, all_reduce_seconds, build_fabric, prepare_combine, prepare_dispatch
from moesim.parallel.mesh import GroupLayout
from moesim.parallel.traffic import node_stages, without_diagonal
from moesim.run import obtain_trace
from moesim.scenario import BYTES_PER_ELEMENT, Mla, Model, scenario_from_mapping
from moesim.scenario.model import LocalGlobal
from moesim.seeding import stream
from moesim.serving.memory import KV_BYTES, SCALES, WEIGHT_BYTES
from moesim.serving.schema import ServingScenario
from moesim.trace import RoutingTrace

FloatArray = NDArray[np.float64]

SAMPLES = 6  # draws of tokens behind each number of tokens of the routing's table
MOST_DRAWN = 16_384
RECORDED = 16_384  # tokens of routing that are made
ACTIVATION_BYTES = 2.0  # bf16


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of one step by part."""

    projections: float
    attention: float
    experts: float
    exchange: float
    head: float
    host: float

    @property
    def total(self) -> float:
        """All of it: nothing runs beside anything else."""
        return self.projections + self.attention + self.experts + self.exchange + self.head + self.host


class StepCosts:
    """The tables of one deployment.

    `tokens_D`, `generated_D`: tokens and generated tokens of each data group in a step; `context_D`: keys that the
    generated ones attend to, summed; `chunks`: (group, tokens, tokens before) of the parts of prompts. `imbalance` is
    that of rows of ranks, and `sources` what the kernels rest on.
    """

    def __init__(self, scenario: ServingScenario) -> None:
        self.scenario, self.model = scenario, scenario.model
        self.kernels: KernelModel = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
        self.fabric: Fabric = build_fabric(scenario.cluster)
        self.together = scenario.parallelism.expert > 1
        self.sources: set[str] = set()
        self.imbalance: dict[int, float] = {}
        most = scenario.engine.token_budget
        self.tokens_G = np.unique(np.geomspace(1, most, 2 * int(np.ceil(np.log2(most))) + 1).round()).astype(int)
        layer = [self._dense_part(int(tokens)) for tokens in self.tokens_G]
        self.layer_G, self.dense_G, self.head_G = (np.array(column) for column in zip(*layer, strict=True))
        self._attention = _Tables(self)
        self._build_experts()

    def step(
        self,
        tokens_D: NDArray[np.int64],
        generated_D: NDArray[np.int64],
        context_D: NDArray[np.int64],
        chunks: list[tuple[int, int, int]],
    ) -> StepCost:
        """Seconds of a step of all data groups together, or of a single one: the slowest counts in each part."""
        model = self.model
        at_least = np.maximum(tokens_D, 1) if self.together else tokens_D
        projections = model.layers * self._at(at_least, self.layer_G) + model.dense_layers * self._at(
            at_least, self.dense_G
        )
        attention_D = self._attention.generating(generated_D, context_D)
        ended_D = generated_D.copy()
        for group, tokens, before in chunks:
            attention_D[group] += self._attention.prompt(tokens, before)
            ended_D[group] += 1
        slowest = int(np.argmax(projections + attention_D))
        experts = exchange = 0.0
        if model.moe_layers:
            total = int(at_least.sum()) if self.together else int(at_least.max())
            experts = model.moe_layers * float(np.interp(total, self.total_G, self.experts_G))
            exchange = model.moe_layers * float(np.interp(total, self.total_G, self.exchange_G))
        exchange += 2 * model.layers * float(np.interp(at_least.max(), self.tokens_G, self.reduce_G))
        return StepCost(
            projections=float(projections[slowest]),
            attention=float(attention_D[slowest]),
            experts=experts,
            exchange=exchange,
            head=float(self._at(ended_D, self.head_G).max()),
            host=self.scenario.engine.host,
        )

    def _at(self, tokens_D: NDArray[np.int64], seconds_G: FloatArray) -> FloatArray:
        return np.where(tokens_D > 0, np.interp(tokens_D, self.tokens_G, seconds_G), 0.0)

    def seconds(self, kernel: Kernel) -> Any:
        """Of a kernel, with a note of what they rest on."""
        estimate = self.kernels.seconds(kernel)
        self.sources.add(estimate.source)
        return estimate.seconds

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Sources of kernel durations, the firmest first."""
        return tuple(source for source in SOURCES if source in self.sources)

    def gemm(self, m: float, k: int, n: int, *, wide: bool = False) -> float:
        """Seconds of a product whose weights are stored in workload.weights (bf16 where `wide`)."""
        load = self.scenario.workload
        if wide:
            return float(self.seconds(Gemm(m=m, k=k, n=n)))
        seconds = float(self.seconds(Gemm(m=m, k=k, n=n, dtype=load.gemm)))
        return seconds - self._spared(k * n, floor=seconds)

    def _spared(self, weights: float, *, floor: float) -> float:
        """Seconds that narrower weights spare the memory: at most 0.8 of a product's, which still computes."""
        load = self.scenario.workload
        spared = weights * (BYTES_PER_ELEMENT[load.gemm] - WEIGHT_BYTES[load.weights] - SCALES[load.weights])
        return min(max(0.0, spared) / self.scenario.cluster.pools[0].spec.memory_bandwidth, 0.8 * floor)

    def moved(self, kind: str, rows: float, width: float) -> float:
        """Seconds of a memory-bound kernel."""
        return float(self.seconds(MemoryBound(kind, memory_bytes(kind, rows=rows, width=width))))

    def _dense_part(self, tokens: int) -> tuple[float, float, float]:
        """Seconds of a layer without attention's core and routed experts, of a dense network, and of the head."""
        model, tensor = self.model, self.scenario.parallelism.tensor
        layer = self._projections(tokens) + 2 * self.moved("rms_norm", tokens, model.hidden)
        layer += 2 * self.moved("elementwise", tokens, model.hidden)
        shared = self._network(tokens, model.shared_width // tensor) if model.shared_experts else 0.0
        layer += shared * model.moe_layers / model.layers
        dense = self._network(tokens, model.dense_intermediate // tensor) if model.dense_layers else 0.0
        head = self.gemm(tokens, model.hidden, model.vocab // tensor, wide=True)
        head += self.moved("softmax", tokens, model.vocab // tensor)
        return layer, dense, head

    def _network(self, tokens: int, width: int) -> float:
        matrices, hidden = self.model.ffn_matrices, self.model.hidden
        up = self.gemm(tokens, hidden, (matrices - 1) * width) + self.gemm(tokens, width, hidden)
        return up + self.moved("elementwise", tokens, width)

    def _projections(self, tokens: int) -> float:
        model, tensor = self.model, self.scenario.parallelism.tensor
        heads, dim = model.heads // tensor, model.head_dim
        if not isinstance(model.attention, Mla):
            wide = (heads + 2 * -(-model.kv_heads // tensor)) * dim
            rotary = self.moved("elementwise", tokens, wide)
            return (
                self.gemm(tokens, model.hidden, wide) + rotary + self.gemm(tokens, heads * dim, model.hidden)
            )  # one product for queries, keys and values
        mla = model.attention
        query = heads * (dim + mla.rope_head_dim)
        value = mla.value_head_dim or dim
        seconds = self.gemm(tokens, model.hidden, mla.kv_lora_rank + mla.rope_head_dim)
        if mla.q_lora_rank is None:
            seconds += self.gemm(tokens, model.hidden, query)
        else:
            seconds += self.gemm(tokens, model.hidden, mla.q_lora_rank) + self.gemm(tokens, mla.q_lora_rank, query)
        # queries into the latent space and outputs out of it: a product for each head
        for k, n in ((dim, mla.kv_lora_rank), (mla.kv_lora_rank, value)):
            kernel = GroupedGemm(rows_per_expert=np.full(heads, tokens), k=k, n=n, dtype=self.scenario.workload.gemm)
            seconds += float(self.seconds(kernel))
        return seconds + self.moved("elementwise", tokens, query) + self.gemm(tokens, heads * value, model.hidden)

    @cached_property
    def trace(self) -> RoutingTrace | None:
        """The routing, made or read as for training on as many ranks."""
        if not self.model.experts:
            return None
        return obtain_trace(scenario_from_mapping(_as_training(self.scenario)))

    def _build_experts(self) -> None:
        """Tables over the tokens of all ranks: [G] seconds of a layer's experts, and of dispatch and combine."""
        mesh = self.scenario.parallelism
        ranks = np.arange(mesh.tensor)
        self.reduce_G = np.array(
            [
                all_reduce_seconds(self.fabric, ranks, tokens * self.model.hidden * ACTIVATION_BYTES).seconds
                for tokens in self.tokens_G.tolist()
            ]
        )
        groups = mesh.data if self.together else 1
        most = self.scenario.engine.token_budget * groups
        self.total_G = np.unique(np.geomspace(1, most, int(np.ceil(1.5 * np.log2(most))) + 1).round()).astype(int)
        found = [self._experts(int(total)) for total in self.total_G] if self.trace is not None else [(0.0, 0.0)]
        self.experts_G, self.exchange_G = (np.array(column) for column in zip(*found, strict=True))
        if self.trace is None:
            self.total_G = np.array([1])

    def _experts(self, total: int) -> tuple[float, float]:
        """Mean over samples and layers of the slowest rank's experts, and of dispatch and combine."""
        assert self.trace is not None
        model, mesh = self.model, self.scenario.parallelism
        ids_LNK = self.trace.final.expert_ids_LSTK.reshape(self.trace.num_layers, -1, model.top_k)
        rng = stream(self.scenario.seed, "serving routing", total)
        drawn = min(total, MOST_DRAWN)  # more of them are as many times these
        experts, exchange, imbalance = [], [], []
        for sample in range(SAMPLES):
            ids_NK = ids_LNK[sample % len(ids_LNK)]
            drawn_NK = ids_NK[rng.integers(0, len(ids_NK), drawn)].astype(np.int64)
            rows_E = np.bincount(drawn_NK[drawn_NK >= 0], minlength=model.experts)
            rows_E = np.rint(rows_E * (total / drawn)).astype(np.int64)
            rows_RE = rows_E.reshape(mesh.expert, -1)
            rank_R = rows_RE.sum(axis=1)
            imbalance.append(float(rank_R.max() / rank_R.mean()))
            experts.append(self._grouped(rows_RE, tensor=1 if self.together else mesh.tensor))
            exchange.append(self._exchange(drawn_NK, times=total / drawn) if self.together else 0.0)
        local = total / mesh.expert
        router = self.gemm(max(local, 1.0), model.hidden, model.experts, wide=True)
        router += self.moved("topk", max(local, 1.0), model.experts)
        router += self.moved("permute", local * model.top_k, model.row_width)
        router += self.moved("unpermute", local * model.top_k, model.row_width)
        self.imbalance[total] = float(np.mean(imbalance))
        return float(np.mean(experts)) + router, float(np.mean(exchange))

    def _grouped(self, rows_RE: NDArray[np.int64], *, tensor: int) -> float:
        """Seconds of both products of the slowest rank."""
        model, width = self.model, self.model.expert_intermediate // tensor
        seconds_R = np.zeros(len(rows_RE))
        for k, n in ((model.row_width, (model.ffn_matrices - 1) * width), (width, model.row_width)):
            kernel = GroupedGemm(rows_per_expert=rows_RE, k=k, n=n, dtype=self.scenario.workload.gemm)
            found_R = np.asarray(self.seconds(kernel))
            active_R = np.count_nonzero(rows_RE, axis=1)
            spared_R = [self._spared(a * k * n, floor=s) for a, s in zip(active_R, found_R, strict=True)]
            seconds_R += found_R - np.array(spared_R)
        activation = memory_bytes("elementwise", rows=rows_RE.sum(axis=1), width=width)
        seconds_R += np.asarray(self.seconds(MemoryBound("elementwise", activation)))
        return float(seconds_R.max())

    def _exchange(self, drawn_NK: NDArray[np.int64], *, times: float) -> float:
        """Dispatch and combine of so many times these tokens, which lie evenly on the ranks."""
        model, mesh, dispatch = self.model, self.scenario.parallelism, self.scenario.dispatch
        ranks, tokens = mesh.expert, len(drawn_NK)
        source_N = np.arange(tokens) * ranks // max(tokens, 1)
        target_NK = np.where(drawn_NK >= 0, drawn_NK // (model.experts // ranks), -1)
        to_NR = np.zeros((tokens, ranks + 1), dtype=np.int64)
        np.add.at(to_NR, (np.arange(tokens)[:, None], target_NK), 1)
        to_NR = to_NR[:, :ranks]
        copies_NR = to_NR if dispatch.deduplicate == "per_expert" else (to_NR > 0).astype(np.int64)
        copies_RR = _sum_by(source_N, copies_NR, ranks)
        layout = self._layout
        stages: tuple[FloatArray, ...] = (without_diagonal(copies_RR),)
        if dispatch.deduplicate == "per_node" and layout.num_nodes > 1:
            nodes_NM = np.stack(
                [to_NR[:, layout.node_of_rank_R == node].any(axis=1) for node in range(layout.num_nodes)], axis=1
            ).astype(np.int64)
            stages = node_stages(copies_RR, _sum_by(source_N, nodes_NM, ranks), layout)
        seconds = 0.0
        for prepare, dtype in ((prepare_dispatch, dispatch.dtype), (prepare_combine, dispatch.combine_dtype)):
            prepared = prepare(
                self.fabric,
                stages,
                token_bytes=times * model.row_width * BYTES_PER_ELEMENT[dtype],
                algorithm=dispatch.algorithm,
                ranks=np.arange(ranks),
                model=self.scenario.network.model or "ports",
            )
            seconds += float(prepared.alone_R.max())
        return seconds

    @cached_property
    def _layout(self) -> GroupLayout:
        sizes = self.scenario.cluster.domain_sizes
        node_R = np.repeat(np.arange(len(sizes)), sizes)[: self.scenario.parallelism.expert]
        first_R = np.searchsorted(node_R, node_R, side="left")
        return GroupLayout(node_R, np.arange(len(node_R)) - first_R)


def _sum_by(source_N: NDArray[np.int64], values_NX: NDArray[np.int64], ranks: int) -> FloatArray:
    sums_RX = np.zeros((ranks, values_NX.shape[1]))
    np.add.at(sums_RX, source_N, values_NX)
    return sums_RX


class _Tables:
    """Attention's core: generated tokens by the bytes of keys and values or by their products, prompts by kernels."""

    def __init__(self, costs: StepCosts) -> None:
        scenario, model = costs.scenario, costs.model
        tensor = scenario.parallelism.tensor
        self.windows = _windows(model)
        heads = model.heads // tensor
        kv = KV_BYTES[scenario.workload.kv]
        if isinstance(model.attention, Mla):
            mla = model.attention
            self.key_bytes = (mla.kv_lora_rank + mla.rope_head_dim) * kv
            self.key_flops = 2.0 * heads * (2 * mla.kv_lora_rank + mla.rope_head_dim)
            kv_heads, dim = heads, model.head_dim + mla.rope_head_dim
            value_dim = mla.value_head_dim or model.head_dim
        else:
            kv_heads = -(-model.kv_heads // tensor)
            self.key_bytes = 2 * kv_heads * model.head_dim * kv
            self.key_flops = 4.0 * heads * model.head_dim
            dim = value_dim = model.head_dim
        bytes_G = np.geomspace(1e3, 1e11, 33)
        self._bytes_G = bytes_G
        self._read_G = np.array([float(costs.seconds(MemoryBound("reduce", each))) for each in bytes_G])
        self.rate = 0.5 * scenario.cluster.pools[0].spec.peak_flops["bf16"]  # of products with few rows a key
        self.length_G = np.unique(np.geomspace(16, 1 << 20, 33).round())
        sizes = partial(Attention, batch=1, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=value_dim)
        self._prompt_G = np.array([float(costs.seconds(sizes(sequence=length))) for length in self.length_G])

    def generating(self, generated_D: NDArray[np.int64], context_D: NDArray[np.int64]) -> FloatArray:
        """Seconds of all layers for generated tokens with so many keys together."""
        seconds_D = np.zeros(len(generated_D))
        for layers, window in self.windows:
            keys_D = np.minimum(context_D, generated_D * window) if window else context_D
            read_D = np.interp(keys_D * self.key_bytes, self._bytes_G, self._read_G)
            seconds_D += layers * np.maximum(read_D, keys_D * self.key_flops / self.rate)
        return np.where(generated_D > 0, seconds_D, 0.0)

    def prompt(self, tokens: int, before: int) -> float:
        """Seconds of all layers for a part of a prompt: as a causal square of as many pairs."""
        seconds = 0.0
        for layers, window in self.windows:
            pairs = tokens * before + tokens * (tokens + 1) / 2
            if window:
                pairs = min(pairs, float(tokens * window))
            seconds += layers * float(np.interp(np.sqrt(2.0 * pairs), self.length_G, self._prompt_G))
        return seconds


def _windows(model: Model) -> list[tuple[int, int]]:
    """(layers, keys that a token sees at most; 0: all)."""
    if isinstance(model.attention, LocalGlobal):
        return [(model.layers, model.attention.window)]
    if model.local is None:
        return [(model.layers, 0)]
    local = sum(model.is_local(layer) for layer in range(model.layers))
    return [(local, model.local.window), (model.layers - local, 0)]


def _as_training(scenario: ServingScenario) -> Mapping[str, Any]:
    """A training scenario with the same model, routing and experts per rank: what makes its routing."""
    expert = scenario.parallelism.expert
    plain = scenario.model_dump(mode="json", exclude_none=True)
    return {
        "schema_version": 1,
        "name": scenario.name,
        "model": scenario.model.model_dump(mode="json"),
        "routing": plain["routing"],
        "cluster": plain["cluster"],
        "parallelism": {"data": expert, "expert": expert},
        "workload": {
            "kind": "training",
            "sequence_length": 1_024,
            "micro_batch": 1,
            "global_batch": max(expert, RECORDED // 1_024 // expert * expert),
        },
        "memory": {"check": "warn"},
        "seed": scenario.seed,
    }
