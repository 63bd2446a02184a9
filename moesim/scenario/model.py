"""The `model` section: the architecture of the language model whose training is simulated."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario.base import (
    MOST_LAYERS,
    Experts,
    Flag,
    Heads,
    Layers,
    Name,
    PositiveExperts,
    PositiveFloat,
    PositiveLayers,
    PositiveWidth,
    Section,
    Text,
    Tokens,
    Width,
)

LayerNumber = Annotated[int, Field(strict=True, ge=0, lt=MOST_LAYERS)]


class Mha(Section):
    """Multi-head attention: as many key/value heads as query heads."""

    kind: Literal["mha"] = Field(
        default="mha", description="Multi-head attention: every query head has keys and values."
    )


class Gqa(Section):
    """Grouped-query attention: `kv_heads` of the model share the query heads."""

    kind: Literal["gqa"] = Field(description="Grouped-query attention: query heads share model.kv_heads.")


class Indexer(Section):
    """The indexer of sparse attention (arXiv 2512.02556): it scores all keys and leaves `top_k` of them to a query."""

    heads: Heads = Field(description="Heads of the indexer.")
    head_dim: PositiveWidth = Field(description="Dimensions of a head of the indexer.")
    top_k: Tokens = Field(description="Keys that a query attends to at most.")


class Mla(Section):
    """Multi-head latent attention (arXiv 2405.04434): low-rank q and kv compression, the rope part apart."""

    kind: Literal["mla"] = Field(description="Multi-head latent attention of DeepSeek-V2 and -V3.")
    q_lora_rank: PositiveWidth | None = Field(
        default=None, description="Width that queries are compressed to; absent: queries are not compressed."
    )
    kv_lora_rank: PositiveWidth = Field(description="Width that keys and values are compressed to.")
    rope_head_dim: PositiveWidth = Field(description="Extra query and key dimensions per head that carry positions.")
    value_head_dim: PositiveWidth | None = Field(
        default=None, description="Dimensions of a head's values; absent: model.head_dim."
    )
    indexer: Indexer | None = Field(
        default=None, description="Sparse attention by an indexer (DeepSeek-V3.2): counted, not simulated yet."
    )


class LocalGlobal(Section):
    """A window of `window` tokens plus one global token every `global_every`: O(n W) instead of O(n^2)."""

    kind: Literal["local_global"] = Field(description="A local window and regularly spaced global tokens.")
    window: Tokens = Field(default=64, description="Tokens of the local window.")
    global_every: Tokens | None = Field(
        default=32, description="One token in so many is seen by every other token; null: a plain sliding window."
    )


class LocalLayers(Section):
    """Layers that attend to a part of the sequence alone, beside others that attend to all of it."""

    window: Tokens = Field(description="Tokens that a query sees at most, itself included.")
    chunked: Flag = Field(
        default=False, description="Whether the sequence is cut into chunks of window tokens instead of a window."
    )
    layers: tuple[LayerNumber, ...] = Field(
        max_length=MOST_LAYERS, description="Numbers of these layers, counted from 0."
    )


Attention = Annotated[Mha | Gqa | Mla | LocalGlobal, Field(discriminator="kind")]


class Model(Section):
    """One decoder-only transformer. A dense model has experts = 0 and dense_layers = layers."""

    preset: Name | None = Field(default=None, description="A model of the catalogue; keys written beside it win.")
    layers: PositiveLayers = Field(description="Transformer layers, dense and MoE together.")
    hidden: PositiveWidth = Field(description="Width of the residual stream.")
    heads: Heads = Field(description="Query heads of each attention layer.")
    kv_heads: Heads = Field(description="Key and value heads; equal to heads with mha.")
    head_dim: PositiveWidth = Field(description="Query and key dimensions of a head, the rope part of mla left out.")
    attention: Attention = Field(default=Mha(), description="Kind of attention; mha when absent.")
    dense_layers: Layers = Field(
        default=0, description="Layers with a dense feed-forward network; they come first. All of them without experts."
    )
    dense_at: tuple[LayerNumber, ...] | None = Field(
        default=None,
        max_length=MOST_LAYERS,
        description="Numbers of the dense layers, counted from 0, where they do not come first.",
    )
    dense_intermediate: Width = Field(
        default=0, description="Width of the dense feed-forward network; needed with dense layers."
    )
    gated: Flag = Field(
        default=True,
        description="Whether feed-forward networks are gated (SwiGLU: three matrices) or have two matrices.",
    )
    local: LocalLayers | None = Field(
        default=None, description="Layers with a window of attention; absent: attention says it for all layers."
    )
    attention_bias: Literal["none", "qkv", "all"] = Field(
        default="none", description="Biases of attention: of queries, keys and values, or also of the output."
    )
    query_key_norms: Flag = Field(
        default=False,
        description="Whether queries and keys are normed before they turn; free where norms are fused, its weights not "
        "counted.",
    )
    attention_sinks: Flag = Field(default=False, description="Whether every head has a learned sink.")
    experts: Experts = Field(default=0, description="Routed experts of each MoE layer; 0: a dense model.")
    top_k: Experts = Field(default=0, description="Experts that each token is routed to.")
    shared_experts: Experts = Field(default=0, description="Experts that every token passes, a copy on each rank.")
    shared_intermediate: Width = Field(
        default=0, description="Width of one shared expert, or of a dense network beside the experts; 0: as the others."
    )
    shared_gate: Flag = Field(default=False, description="Whether a gate weighs the shared experts' output.")
    expert_intermediate: Width = Field(default=0, description="Width of one routed expert.")
    expert_hidden: Width = Field(
        default=0,
        description="Width of the rows that routed experts take, where hidden is projected down to it and back; 0: it "
        "is not.",
    )
    expert_bias: Flag = Field(default=False, description="Whether routed experts and their router have biases.")
    vocab: Annotated[int, Field(strict=True, gt=0, le=2**24)] = Field(description="Entries of the vocabulary.")
    tied_embeddings: Flag = Field(
        default=False, description="Whether the embedding and the output head are one matrix."
    )
    routed_scaling_factor: PositiveFloat = Field(
        default=1.0, description="Factor on the output of the routed experts; it changes training, not time."
    )
    router_groups: PositiveExperts = Field(
        default=1, description="Groups of experts of the model's own router; it holds where routing names no other."
    )
    router_group_limit: PositiveExperts = Field(
        default=1, description="Groups that a token may reach by the model's own router."
    )
    mtp_layers: Annotated[int, Field(strict=True, ge=0, le=64)] = Field(
        default=0, description="Layers of multi-token prediction behind the last layer, each with the head's work."
    )
    routing: Annotated[Text, Field(pattern="^(uniform|library:.+)$")] | None = Field(
        default=None,
        description="How its tokens choose experts where a scenario has no routing: library:NAME, a router of its "
        "layout that ships trained, or uniform; absent: uniform. Experts or top_k beside a preset take it away.",
    )
    source: Text | None = Field(default=None, description="Where the architecture is published.")
    left_out: tuple[Text, ...] = Field(
        default=(),
        max_length=1_000,
        description="What the model's source states and this section cannot; every run warns of it.",
    )

    @property
    def moe_layers(self) -> int:
        """Number of layers with a router."""
        return self.layers - self.dense_layers

    @property
    def row_width(self) -> int:
        """Width of the rows that travel to routed experts."""
        return self.expert_hidden or self.hidden

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.shared_experts * (self.shared_intermediate or self.expert_intermediate)

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a feed-forward network."""
        return 3 if self.gated else 2

    def is_dense(self, layer: int) -> bool:
        """Whether layer number `layer` has a dense feed-forward network; prediction layers never do."""
        return layer < self.dense_layers if self.dense_at is None else layer in self.dense_at

    def is_local(self, layer: int) -> bool:
        """Whether layer number `layer` sees a window alone; a prediction layer is like the last layer."""
        return self.local is not None and min(layer, self.layers - 1) in self.local.layers

    @property
    def moe_layer_numbers(self) -> tuple[int, ...]:
        """Numbers of the layers with a router, prediction layers last."""
        return tuple(n for n in range(self.layers + self.mtp_layers) if n >= self.layers or not self.is_dense(n))

    def moe_number(self, layer: int) -> int:
        """Which of the layers with a router layer number `layer` is, counted from 0."""
        before = self.dense_layers if self.dense_at is None else sum(dense < layer for dense in self.dense_at)
        return layer - before

    def with_few_layers(self, *, dense: int, moe: int) -> "Model":
        """A model with so many layers of each kind, dense ones first; a share of them local as in this one."""
        local, layers = self.local, dense + moe
        if local is not None:
            count = round(layers * len(local.layers) / self.layers)
            local = local.model_copy(update={"layers": tuple(range(layers - count, layers))}) if count else None
        return self.model_copy(update={"layers": layers, "dense_layers": dense, "dense_at": None, "local": local})
