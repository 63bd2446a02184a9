"""What a rank holds: weights, room for a step, and pages for keys and values in what is left; which keys a token sees.

A token sees and stores keys of all tokens, of a window, of a chunk, or of a window and every n-th token. Room is
counted in layer-pages: `page` tokens of one layer (or of as many as all kinds of layers share). A prefix cache holds
keys and values of beginnings that several prompts share once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np

from moesim.errors import InfeasibleError
from moesim.scenario import Mla, Model
from moesim.scenario.flops import parameters
from moesim.scenario.model import LocalGlobal
from moesim.serving.schema import ServingScenario
from moesim.serving.software import serving_software
from moesim.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class LayerKeys:
    """Layers of one kind. window 0: all tokens; every > 0: one in so many beyond the window, too."""

    layers: int
    window: int = 0
    every: int = 0
    is_chunked: bool = False

    def seen(self, tokens: Any) -> Any:
        """Keys that a token sees when it is number `tokens` (an int or an array), which are those stored of it."""
        if not self.window:
            return tokens
        if self.is_chunked:
            return np.where(tokens > 0, (tokens - 1) % self.window + 1, 0)
        near = np.minimum(tokens, self.window)
        return near + np.maximum(tokens - self.window, 0) // self.every if self.every else near

    def seen_by_part(self, tokens: int, before: int) -> float:
        """(query, key) pairs of `tokens` tokens behind `before` others, each seeing what came before it and itself."""
        if not self.window:
            return tokens * before + tokens * (tokens + 1) / 2
        return float(self._pairs_of(before + tokens) - self._pairs_of(before))

    def _pairs_of(self, tokens: int) -> float:
        """Pairs of the first so many tokens."""
        window = self.window
        if self.is_chunked:
            whole, rest = divmod(tokens, window)
            return whole * window * (window + 1) / 2 + rest * (rest + 1) / 2
        near, beyond = min(tokens, window), max(tokens - window, 0)
        pairs = near * (near + 1) / 2 + float(beyond) * window
        if self.every:
            whole, rest = divmod(beyond, self.every)
            pairs += self.every * whole * (whole - 1) / 2 + whole * (rest + 1)
        return pairs


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """What all layers of a model store; `page` tokens to a page."""

    kinds: tuple[LayerKeys, ...]
    page: int

    @cached_property
    def unit(self) -> int:
        """Layers behind one layer-page."""
        return gcd(*(kind.layers for kind in self.kinds))

    @cached_property
    def _is_plain(self) -> bool:
        return len(self.kinds) == 1 and not self.kinds[0].window

    def pages(self, tokens: Any) -> Any:
        """Layer-pages that a request of so many tokens holds (an int or an array)."""
        if self._is_plain:
            return -(-tokens // self.page)
        return sum(kind.layers // self.unit * self._pages(kind, tokens) for kind in self.kinds)

    def shared_pages(self, tokens: int) -> int:
        """Those of them that requests with the same first tokens share: of layers that see all tokens."""
        if not tokens:
            return 0
        return sum(kind.layers // self.unit * (tokens // self.page) for kind in self.kinds if not kind.window)

    def seen(self, tokens_S: Any) -> tuple[int, ...]:
        """Keys that tokens see together, by kind of layer."""
        if self._is_plain:
            return (int(tokens_S.sum()),)
        return tuple(int(kind.seen(tokens_S).sum()) for kind in self.kinds)

    def _pages(self, kind: LayerKeys, tokens: Any) -> Any:
        if not kind.window:
            return -(-tokens // self.page)
        most = -(-kind.window // self.page) + 1  # a window that moves covers parts of two pages
        far = np.maximum(tokens - kind.window, 0) // kind.every if kind.every else 0
        return np.minimum(-(-tokens // self.page), most) + -(-far // self.page)


def key_layout(model: Model, *, page: int, extra: int = 0) -> KeyLayout:
    """That of a model's layers, with `extra` ones behind them that are like the last."""
    attention, local, layers = model.attention, model.local, model.layers + extra
    if isinstance(attention, LocalGlobal):
        kind = LayerKeys(layers=layers, window=attention.window, every=attention.global_every or 0)
        return KeyLayout(kinds=(kind,), page=page)
    number = sum(model.is_local(layer) for layer in range(layers))
    if local is None or number == 0:
        return KeyLayout(kinds=(LayerKeys(layers=layers),), page=page)
    kinds = [LayerKeys(layers=number, window=local.window, is_chunked=local.chunked)]
    if number < layers:
        kinds.append(LayerKeys(layers=layers - number))
    return KeyLayout(kinds=tuple(kinds), page=page)


@dataclass(slots=True)
class _Held:
    tokens: int
    pages: int
    users: int
    last_use: int


class PrefixCache:
    """Prefixes by number. Those that no request uses make room, the one used longest ago first."""

    def __init__(self, layout: KeyLayout) -> None:
        self._layout = layout
        self._held: dict[int, _Held] = {}
        self._uses = 0
        self.pages = 0  # layer-pages in use

    def __contains__(self, prefix: int) -> bool:
        return prefix in self._held

    def tokens(self, prefix: int) -> int:
        """Tokens of a prefix that is held."""
        return self._held[prefix].tokens

    def keep(self, prefix: int, tokens: int) -> None:
        """Hold the first `tokens` tokens, whole pages; the request that computed them uses them."""
        pages = int(self._layout.pages(tokens))
        self._held[prefix] = _Held(tokens, pages, 0, 0)
        self.pages += pages
        self.use(prefix)

    def use(self, prefix: int) -> None:
        """A request begins to use it."""
        self._uses += 1
        held = self._held[prefix]
        held.users += 1
        held.last_use = self._uses

    def leave(self, prefix: int) -> None:
        """A request is done with it."""
        self._held[prefix].users -= 1

    def evict(self, *, but: int = -1) -> bool:
        """Drop the unused prefix that was used longest ago, `but` one; whether there was one."""
        unused = [prefix for prefix, held in self._held.items() if held.users == 0 and prefix != but]
        if not unused:
            return False
        oldest = min(unused, key=lambda prefix: self._held[prefix].last_use)
        self.pages -= self._held.pop(oldest).pages
        return True


WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
SCALES = {"bf16": 0.0, "fp8": 4.0 / 128**2, "int4": 2.0 / 128}  # bytes per weight: blocks of 128 x 128, groups of 128
WIDE_BYTES = 2.0  # embedding, head, norms and router stay in bf16
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServingMemoryReport:
    """Bytes of one rank. `kv_tokens`: tokens whose keys and values fit, in whole pages, if no layer had a window.

    `pages`: layer-pages of a batch (a data group has as many batches as stages), `page_bytes` of one on a rank, and
    `host_pages` those that host memory holds.
    """

    weights: float
    workspace: float
    kv_per_token: float
    kv: float
    kv_tokens: int
    pages: int
    page_bytes: float
    host_pages: int


def layout_of(scenario: ServingScenario) -> KeyLayout:
    """What a request stores, the layer that drafts tokens with it."""
    return key_layout(scenario.model, page=scenario.engine.page, extra=drafting_layers(scenario))


def drafting_layers(scenario: ServingScenario) -> int:
    """Layers that are there to draft tokens."""
    speculation = scenario.engine.speculation
    return 1 if speculation is not None and speculation.draft == "mtp" else 0


def kv_bytes_per_token(model: Model, *, kv: str, tensor: int) -> float:
    """Bytes of keys and values of one token in one layer on one rank: latents and the rope key of mla are whole."""
    size = KV_BYTES[kv]
    if isinstance(model.attention, Mla):
        return (model.attention.kv_lora_rank + model.attention.rope_head_dim) * size
    heads = -(-model.kv_heads // tensor)  # fewer heads than ranks: copies
    return 2 * heads * model.head_dim * size


def memory_of(scenario: ServingScenario) -> ServingMemoryReport:
    """The memory of a rank; no pages where weights leave no room for one."""
    mesh, layout = scenario.parallelism, layout_of(scenario)
    layers = sum(kind.layers for kind in layout.kinds)
    layer_bytes = kv_bytes_per_token(scenario.model, kv=scenario.workload.kv, tensor=mesh.tensor) / mesh.pipeline
    page_bytes = layer_bytes * layout.unit * layout.page
    whole = layers // layout.unit  # layer-pages of a page of all layers
    pages = int(max(0.0, _left(scenario) * scenario.memory.share) // (page_bytes * whole)) * whole
    return ServingMemoryReport(
        weights=_weights(scenario),
        workspace=_workspace(scenario),
        kv_per_token=layer_bytes * layers,
        kv=pages * page_bytes,
        kv_tokens=pages // whole * layout.page,
        pages=pages // mesh.pipeline,
        page_bytes=page_bytes,
        host_pages=int(scenario.engine.host_memory / page_bytes / mesh.pipeline),
    )


def _left(scenario: ServingScenario) -> float:
    """Bytes of a rank that weights, a step and what is reserved leave; below 0 where they do not fit."""
    memory = scenario.cluster.main_pool.spec.memory_bytes
    return memory - scenario.memory.reserved - _weights(scenario) - _workspace(scenario)


def missing_bytes(scenario: ServingScenario, tokens: int) -> float:
    """Bytes by which a rank is too small for the keys and values of a request of so many tokens; 0: it can hold it."""
    memory, needed = memory_of(scenario), int(layout_of(scenario).pages(tokens))
    if needed <= memory.pages:
        return 0.0
    return needed * scenario.parallelism.pipeline * memory.page_bytes / scenario.memory.share - _left(scenario)


def no_room(
    scenario: ServingScenario, tokens: int, *, pool: str, keys: str, replicas: int, others: int
) -> InfeasibleError:
    """What to say of instances that cannot hold a request of so many tokens: what is missing, and what makes room.

    `keys`: where the keys of a pool of its own begin in a scenario, as "fleet.prefill."; `others`: GPUs of the cluster
    that are not those of its `replicas`. Every change that is named was tried.
    """
    memory, size = memory_of(scenario), scenario.cluster.main_pool.spec.memory_bytes
    kinds = (_sizes(scenario, keys), _formats(scenario), _meshes(scenario, keys, replicas, others))
    fitting = [next((text for text, changed in kind if not missing_bytes(changed, tokens)), "") for kind in kinds]
    changes = [text for text in fitting if text]
    return InfeasibleError(
        f"memory: {pool} cannot hold a request of {tokens:,} tokens: {format_bytes(size)} lack "
        f"{format_bytes(missing_bytes(scenario, tokens))} (weights {format_bytes(memory.weights)}, "
        f"a step {format_bytes(memory.workspace)}, {memory.kv_tokens:,} tokens fit); "
        f"use {' or '.join(changes) or 'GPUs with more memory, or shorter requests'}"
    )


Change = tuple[str, ServingScenario]  # as a user would write it, and the instance with it


def _meshes(scenario: ServingScenario, keys: str, replicas: int, others: int) -> Iterator[Change]:
    """More ranks, the fewest first: with experts spread over them where there are any."""
    mesh, model, cluster = scenario.parallelism, scenario.model, scenario.cluster
    slots, now = model.experts + scenario.engine.redundant_experts, mesh.world_size
    sizes = [
        (data * tensor * mesh.pipeline, tensor != mesh.tensor, data, tensor)
        for tensor in range(mesh.tensor, min(model.heads, 64) + 1)
        for data in range(mesh.data, max(64, 8 * mesh.data) + 1)
        if model.heads % tensor == 0 and (tensor == mesh.tensor or data == mesh.data)
    ]
    for ranks, _, data, tensor in sorted(sizes):
        stage = data * tensor
        expert = stage if model.moe_layers and (mesh.expert > 1 or data > 1) else 1
        if ranks <= now or (expert > 1 and slots % expert):
            continue
        larger = mesh.model_copy(update={"data": data, "tensor": tensor, "expert": expert})
        short = {key: size for key, size in larger.model_dump().items() if size > 1}
        text = f"{keys}parallelism: {{{', '.join(f'{key}: {size}' for key, size in short.items())}}}"
        if (gpus := others + replicas * ranks) > cluster.num_gpus:
            text += f" ({gpus} GPUs in all, of {cluster.num_gpus} now)"
        yield text, scenario.model_copy(update={"parallelism": larger})


def _formats(scenario: ServingScenario) -> Iterator[Change]:
    """Narrower weights, the widest first; then narrower keys and values."""
    load = scenario.workload
    for weights, size in WEIGHT_BYTES.items():
        if size < WEIGHT_BYTES[load.weights]:
            changed = load.model_copy(update={"weights": weights})
            yield f"workload.weights: {weights}", scenario.model_copy(update={"workload": changed})
    if load.kv != "fp8" and not serving_software()[scenario.engine.software].paged:
        changed = load.model_copy(update={"kv": "fp8"})
        yield "workload.kv: fp8", scenario.model_copy(update={"workload": changed})


def _sizes(scenario: ServingScenario, keys: str) -> Iterator[Change]:
    """Smaller steps, the largest first; then fewer requests at a time."""
    engine = scenario.engine
    drafted = len(engine.speculation.acceptance) if engine.speculation else 0
    for key, place, least in (
        ("token_budget", keys or "engine.", max(256 if engine.chunked_prefill else 1_024, drafted + 1)),
        ("running", "engine.", 8),
    ):
        size = getattr(engine, key) // 2
        while size >= least:
            changed = engine.model_copy(update={key: size})
            yield f"{place}{key}: {size}", scenario.model_copy(update={"engine": changed})
            size //= 2


def _weights(scenario: ServingScenario) -> float:
    """Bytes of weights on the fullest rank."""
    model, mesh, load = scenario.model, scenario.parallelism, scenario.workload
    count = parameters(model)
    stored = WEIGHT_BYTES[load.weights] + SCALES[load.weights]
    ranks = mesh.expert if mesh.expert > 1 else mesh.tensor
    stage = -(-model.layers // mesh.pipeline) / model.layers  # of the layers
    ends = max(count.embedding, count.head) if mesh.pipeline > 1 else count.embedding + count.head
    wide = ends / mesh.tensor + (count.norms + count.router) * stage
    split = (count.attention + count.dense_ffn + count.shared_experts + count.latent) * stage / mesh.tensor
    copied = 1.0 + scenario.engine.redundant_experts / max(1, model.experts)  # slots for each expert
    experts = copied * count.routed_experts * stage / ranks
    if drafting_layers(scenario):
        routed = count.routed_experts / max(1, model.moe_layers)
        experts += copied * routed / ranks
        split += max(0.0, count.mtp / model.mtp_layers - routed) / mesh.tensor
    return wide * WIDE_BYTES + (split + experts) * stored


def _workspace(scenario: ServingScenario) -> float:
    """Bytes of the largest step."""
    model, tokens = scenario.model, scenario.engine.token_budget
    rows = tokens * model.top_k * _row_elements(scenario) if model.experts else 0
    workspace = WIDE_BYTES * (tokens * (4 * model.hidden + 2 * model.dense_intermediate) + rows)
    return workspace + 4.0 * scenario.engine.running * model.vocab / scenario.parallelism.tensor  # fp32 logits


def _row_elements(scenario: ServingScenario) -> float:
    """Elements of bf16 that a step holds at once for a row of an expert.

    Its input and both inputs of the activation in an engine. In transformers, which masks results of GEMMs in new
    tensors: the input, twice the activation's inputs, these twice more; or behind the GEMMs input and result, and
    this with its gate and in the order of tokens, in fp32.
    """
    model = scenario.model
    h, f = model.row_width, model.expert_intermediate
    if not serving_software()[scenario.engine.software].masks_rows:
        return h + 2 * f
    return max(h + 4 * f, 6 * h)
