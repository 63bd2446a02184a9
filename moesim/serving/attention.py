"""Attention's core: of generated tokens by its own kernels, of prompts by those of training.

Legend: G points of a table, D data groups, K kinds of layers.
"""

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Attention
from moesim.scenario import Mla
from moesim.serving.decode_kernels import KeyShape, attention_seconds, grouped_shape, latent_shape
from moesim.serving.keys import KeyLayout, key_layout
from moesim.serving.memory import KV_BYTES
from moesim.serving.pricing import Pricing
from moesim.serving.schema import ServingScenario

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class AttentionTables:
    """Parameters of generated tokens' attention, and seconds of a layer over the length of a causal square."""

    def __init__(self, scenario: ServingScenario, pricing: Pricing) -> None:
        model, tensor = scenario.model, scenario.parallelism.tensor
        self.layout: KeyLayout = key_layout(model, page=scenario.engine.page)
        heads, size = model.heads // tensor, KV_BYTES[scenario.workload.kv]
        self.shape: KeyShape
        if isinstance(model.attention, Mla):
            mla = model.attention
            self.shape = latent_shape(heads, mla.kv_lora_rank, mla.rope_head_dim, size=size)
            kv_heads, dim = heads, model.head_dim + mla.rope_head_dim
            value_dim, kind = mla.value_head_dim or model.head_dim, "latent"
        else:
            kv_heads = -(-model.kv_heads // tensor)
            self.shape = grouped_shape(heads, kv_heads, model.head_dim, size=size)
            dim, value_dim, kind = model.head_dim, model.head_dim, "grouped"
        self.parameters = pricing.attention(f"{kind}/{scenario.workload.kv}")
        self.length_G = np.unique(np.geomspace(16, 1 << 20, 33).round())
        sizes = partial(Attention, batch=1, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=value_dim)
        self._prompt_G = np.array([float(pricing.seconds(sizes(sequence=length))) for length in self.length_G])

    def generating(self, keys_DK: IntArray, requests_D: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of all layers for generated tokens: keys seen in each kind of layer, each by `rows` queries."""
        columns = zip(self.layout.kinds, keys_DK.T, strict=True)
        return np.asarray(sum(kind.layers * self.one_layer(keys_D, requests_D, rows) for kind, keys_D in columns))

    def one_layer(self, keys_D: IntArray, requests_D: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of one layer for generated tokens of so many requests that see so many keys together."""
        several = replace(self.shape, key_flops=rows * self.shape.key_flops, query_bytes=rows * self.shape.query_bytes)
        mean_D = keys_D / np.maximum(requests_D, 1)
        return np.asarray(
            np.where(keys_D > 0, attention_seconds(self.parameters, several, requests_D, mean_D), 0.0), dtype=float
        )

    def prompt(self, tokens: int, before: int) -> float:
        """Seconds of all layers for a part of a prompt: as a causal square of as many pairs."""
        return sum(
            kind.layers
            * float(np.interp(np.sqrt(2.0 * kind.seen_by_part(tokens, before)), self.length_G, self._prompt_G))
            for kind in self.layout.kinds
        )
