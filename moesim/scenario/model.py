"""The `model` section: the architecture of the language model whose training is simulated."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario.base import (
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


class Mha(Section):
    """Multi-head attention: as many key/value heads as query heads."""

    kind: Literal["mha"] = Field(
        default="mha", description="Multi-head attention: every query head has keys and values."
    )


class Gqa(Section):
    """Grouped-query attention: `kv_heads` of the model share the query heads."""

    kind: Literal["gqa"] = Field(description="Grouped-query attention: query heads share model.kv_heads.")


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


class LocalGlobal(Section):
    """A window of `window` tokens plus one global token every `global_every`: O(n W) instead of O(n^2)."""

    kind: Literal["local_global"] = Field(description="A local window and regularly spaced global tokens.")
    window: Tokens = Field(default=64, description="Tokens of the local window.")
    global_every: Tokens | None = Field(
        default=32, description="One token in so many is seen by every other token; null: a plain sliding window."
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
    dense_intermediate: Width = Field(
        default=0,
        description="Width of the dense feed-forward network (SwiGLU: three matrices); needed with dense layers.",
    )
    experts: Experts = Field(default=0, description="Routed experts of each MoE layer; 0: a dense model.")
    top_k: Experts = Field(default=0, description="Experts that each token is routed to.")
    shared_experts: Experts = Field(default=0, description="Experts that every token passes, a copy on each rank.")
    expert_intermediate: Width = Field(
        default=0, description="Width of one routed or shared expert (SwiGLU: three matrices)."
    )
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
