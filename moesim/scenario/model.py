"""The `model` section: the architecture of the language model whose training is simulated."""

from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario.base import Count, Flag, PositiveFloat, PositiveInt, Section


class Mha(Section):
    """Multi-head attention: as many key/value heads as query heads."""

    kind: Literal["mha"] = "mha"


class Gqa(Section):
    """Grouped-query attention: `kv_heads` of the model share the query heads."""

    kind: Literal["gqa"]


class Mla(Section):
    """Multi-head latent attention (arXiv 2405.04434): low-rank q and kv compression, the rope part apart."""

    kind: Literal["mla"]
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    rope_head_dim: PositiveInt
    value_head_dim: PositiveInt | None = None  # head_dim when absent


class LocalGlobal(Section):
    """A window of `window` tokens plus one global token every `global_every`: O(n W) instead of O(n^2).

    `global_every: null` has no global tokens: a plain sliding window.
    """

    kind: Literal["local_global"]
    window: PositiveInt = 64
    global_every: PositiveInt | None = 32


Attention = Annotated[Mha | Gqa | Mla | LocalGlobal, Field(discriminator="kind")]


class Model(Section):
    """One decoder-only transformer. A dense model has experts = 0 and dense_layers = layers.

    `head_dim` is the query/key dimension without the rope part of MLA. `expert_intermediate` is the width of one
    routed or shared expert (SwiGLU: three matrices). `shared_experts` run for every token and are replicated.
    `router_groups` and `router_group_limit` are the group limit of the model's own router, which holds where `routing`
    names no other. `left_out` says what the model's source states and this section cannot: every run warns of it.
    """

    preset: str | None = None
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    attention: Attention = Mha()
    dense_layers: Count = 0
    dense_intermediate: Count = 0
    experts: Count = 0
    top_k: Count = 0
    shared_experts: Count = 0
    expert_intermediate: Count = 0
    vocab: PositiveInt
    tied_embeddings: Flag = False
    routed_scaling_factor: PositiveFloat = 1.0
    router_groups: PositiveInt = 1
    router_group_limit: PositiveInt = 1
    mtp_layers: Count = 0
    source: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def moe_layers(self) -> int:
        """Number of layers with a router."""
        return self.layers - self.dense_layers
