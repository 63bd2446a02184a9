"""Parameter and FLOP counts of a Model: what it holds, and what one token costs.

Notation: h hidden size, H query heads, n sequence length. A matrix of p parameters costs 2 p FLOPs per token forward;
the backward pass costs twice the forward. Norms and the embedding lookup count as parameters but not as FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moesim.scenario.model import LocalGlobal, Mla, Model

TRAINING_PASSES = 3  # one forward and a backward of twice its cost


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of the whole model by part, in elements. `mtp` (multi-token prediction) is outside the totals.

    `latent`: projections between the model's width and that of the experts' rows.
    """

    embedding: int
    head: int
    attention: int
    norms: int
    router: int
    routed_experts: int
    shared_experts: int
    dense_ffn: int
    latent: int
    inactive_experts: int
    mtp: int

    @property
    def total(self) -> int:
        """All parameters of the main model, as published totals count them."""
        dense = self.embedding + self.head + self.attention + self.norms + self.router
        return dense + self.routed_experts + self.shared_experts + self.dense_ffn + self.latent

    @property
    def activated(self) -> int:
        """Parameters that one token uses: the total less the experts that its router did not select."""
        return self.total - self.inactive_experts

    @property
    def expert(self) -> int:
        """Parameters sharded by expert parallelism: the routed experts."""
        return self.routed_experts


def attention_layer_parameters(model: Model) -> int:
    """Parameters of the projections of one attention layer, norms of MLA's compressions left out.

    mha/gqa/local_global: h H d + 2 h KV d + H d h. mla (arXiv 2405.04434): q through its low rank (or direct without
    one), the compressed kv with the shared rope key, the up-projections to keys and values, and the output.
    """
    h, heads, dim = model.hidden, model.heads, model.head_dim
    if not isinstance(model.attention, Mla):
        return 2 * h * heads * dim + 2 * h * model.kv_heads * dim + _attention_extras(model)
    mla = model.attention
    query = h * (mla.q_lora_rank or heads * (dim + mla.rope_head_dim))
    compressed = h * (mla.kv_lora_rank + mla.rope_head_dim)
    output = heads * (mla.value_head_dim or dim) * h
    return query + compressed + up_projection_parameters(model) + output + _indexer_parameters(model, mla)


def up_projection_parameters(model: Model) -> int:
    """Of these, what makes queries, keys and values from their compressed form; 0 without latent attention."""
    heads, dim, mla = model.heads, model.head_dim, model.attention
    if not isinstance(mla, Mla):
        return 0
    queries = (mla.q_lora_rank or 0) * heads * (dim + mla.rope_head_dim)
    return queries + mla.kv_lora_rank * heads * (dim + (mla.value_head_dim or dim))


def _attention_extras(model: Model) -> int:
    """Biases of the projections and sinks of the heads."""
    bias = 0 if model.attention_bias == "none" else (model.heads + 2 * model.kv_heads) * model.head_dim
    output = model.hidden if model.attention_bias == "all" else 0
    return bias + output + (model.heads if model.attention_sinks else 0)


def _indexer_parameters(model: Model, mla: Mla) -> int:
    """The indexer's queries (from the compressed ones), keys with a norm, and the weights of its heads."""
    if mla.indexer is None:
        return 0
    heads, dim = mla.indexer.heads, mla.indexer.head_dim
    return (mla.q_lora_rank or model.hidden) * heads * dim + model.hidden * (dim + heads) + 2 * dim


def expert_parameters(model: Model) -> int:
    """Parameters of one routed expert: three matrices (SwiGLU) or two, and biases."""
    width = model.expert_intermediate
    bias = (model.ffn_matrices - 1) * width + model.row_width if model.expert_bias else 0
    return model.ffn_matrices * model.row_width * width + bias


def ffn_parameters(model: Model, width: int) -> int:
    """Parameters of a feed-forward network of `width` that every token passes."""
    return model.ffn_matrices * model.hidden * width


def shared_parameters(model: Model) -> int:
    """Parameters of the shared experts of a layer, their gate included."""
    return ffn_parameters(model, model.shared_width) + (model.hidden if model.shared_gate else 0)


def router_parameters(model: Model) -> int:
    """Parameters of the router of a layer."""
    return model.experts * (model.hidden + (1 if model.expert_bias else 0))


def latent_parameters(model: Model) -> int:
    """Parameters of the projections of a layer to the width of the experts' rows and back."""
    return 2 * model.hidden * model.expert_hidden


def parameters(model: Model) -> Parameters:
    """Parameters of `model` by part."""
    h, moe_layers = model.hidden, model.moe_layers
    expert, attention = expert_parameters(model), attention_layer_parameters(model)
    norms = 2 * h + _mla_norms(model)
    shared, router, latent = shared_parameters(model), router_parameters(model), latent_parameters(model)
    moe_layer = model.experts * expert + shared + router + latent
    embedding = model.vocab * h
    return Parameters(
        embedding=embedding,
        head=0 if model.tied_embeddings else embedding,
        attention=model.layers * attention,
        norms=model.layers * norms + h,
        router=moe_layers * router,
        routed_experts=moe_layers * model.experts * expert,
        shared_experts=moe_layers * shared,
        dense_ffn=model.dense_layers * ffn_parameters(model, model.dense_intermediate),
        latent=moe_layers * latent,
        inactive_experts=moe_layers * (model.experts - model.top_k) * expert,
        mtp=model.mtp_layers * (attention + norms + moe_layer + 2 * h * h + 3 * h),
    )


def _mla_norms(model: Model) -> int:
    if not isinstance(model.attention, Mla):
        return 0
    return model.attention.kv_lora_rank + (model.attention.q_lora_rank or 0)


@dataclass(frozen=True, kw_only=True)
class KeysPerQuery:
    """Average number of keys that one query sees: near ones (all, or the window) and global tokens beyond it."""

    near: float
    beyond: float = 0.0

    @property
    def total(self) -> float:
        """Keys of both kinds."""
        return self.near + self.beyond


def keys_per_query(model: Model, *, sequence_length: int, causal: bool, local: bool = False) -> KeysPerQuery:
    """Average keys per query in a sequence of n tokens.

    Full attention: n, or (n + 1) / 2 when causal. local_global with window W and a global token every G: W keys near
    (min(t, W) for the causal query t), and one G-th of the visible tokens outside the window (none without G).
    `local`: a layer of `model.local`: its window likewise, or the keys of the query's chunk. An indexer leaves its
    top_k keys, as many as a window.
    """
    n = sequence_length
    visible = (n + 1) / 2 if causal else float(n)
    if local and model.local is not None:
        if not model.local.chunked:
            return KeysPerQuery(near=_window_keys(model.local.window, n, causal=causal))
        chunk = min(model.local.window, n)
        whole, rest = divmod(n, chunk)
        squares = whole * chunk * (chunk + 1 if causal else 2 * chunk) + rest * (rest + 1 if causal else 2 * rest)
        return KeysPerQuery(near=squares / (2 * n))
    if isinstance(model.attention, Mla) and model.attention.indexer is not None:
        return KeysPerQuery(near=_window_keys(model.attention.indexer.top_k, n, causal=causal))
    if not isinstance(model.attention, LocalGlobal):
        return KeysPerQuery(near=visible)
    near = _window_keys(model.attention.window, n, causal=causal)
    every = model.attention.global_every
    return KeysPerQuery(near=near, beyond=(visible - near) / every if every else 0.0)


def _window_keys(window: int, n: int, *, causal: bool) -> float:
    window = min(window, n)
    return window - window * (window - 1) / (2 * n) if causal else float(window)


def attention_score_flops(model: Model, *, sequence_length: int, causal: bool) -> float:
    """Forward FLOPs per token of Q K^T and P V, 2 keys H (query dim + value dim), in the mean over all layers.

    An indexer adds 2 H_I d_I for every key before the query.
    """
    query_dim, value_dim = model.head_dim, model.head_dim
    if isinstance(model.attention, Mla):
        query_dim += model.attention.rope_head_dim
        value_dim = model.attention.value_head_dim or model.head_dim
    keys = keys_per_query(model, sequence_length=sequence_length, causal=causal).total
    if model.local is not None:
        near = keys_per_query(model, sequence_length=sequence_length, causal=causal, local=True).total
        keys += (near - keys) * len(model.local.layers) / model.layers
    scores = 2.0 * keys * model.heads * (query_dim + value_dim)
    if isinstance(model.attention, Mla) and (indexer := model.attention.indexer) is not None:
        scores += 2.0 * indexer.heads * indexer.head_dim * ((sequence_length + 1) / 2 if causal else sequence_length)
    return scores


# Parts of a step whose GEMMs stay in two bytes and more where those of the others are in fp8 or fp4.
WIDE_PARTS = frozenset({"attention_scores", "router", "head"})


def forward_flops_per_token(model: Model, *, sequence_length: int, causal: bool) -> Mapping[str, float]:
    """Forward FLOPs of one token by part, over all layers of the main model.

    Keys: attention_projections, attention_scores, router, routed_experts, shared_experts, dense_ffn, head, latent,
    embedding (a lookup: 0). Only the experts that the token selects count; multi-token prediction does not.
    """
    count = parameters(model)
    scores = attention_score_flops(model, sequence_length=sequence_length, causal=causal)
    return MappingProxyType(
        {
            "embedding": 0.0,
            "attention_projections": 2.0 * count.attention,
            "attention_scores": model.layers * scores,
            "router": 2.0 * count.router,
            "routed_experts": 2.0 * (count.routed_experts - count.inactive_experts),
            "shared_experts": 2.0 * count.shared_experts,
            "dense_ffn": 2.0 * count.dense_ffn,
            "head": 2.0 * model.vocab * model.hidden,
            "latent": 2.0 * count.latent,
        }
    )


def model_flops_per_token(model: Model, *, sequence_length: int, causal: bool) -> float:
    """Training FLOPs of one token for MFU: 3 x forward. Recomputation, padding and drops do not change it."""
    return TRAINING_PASSES * sum(
        forward_flops_per_token(model, sequence_length=sequence_length, causal=causal).values()
    )
