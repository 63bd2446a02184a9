"""Attention's core: generated tokens by the bytes of keys and values or by their products, prompts by kernels.

Legend: G points of a table, D data groups, K kinds of layers.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Attention, MemoryBound
from moesim.scenario import Mla
from moesim.serving.keys import KeyLayout, key_layout
from moesim.serving.memory import KV_BYTES
from moesim.serving.pricing import Pricing
from moesim.serving.schema import ServingScenario

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class AttentionTables:
    """Seconds of one layer over the bytes of keys, and over the length of a causal square."""

    def __init__(self, scenario: ServingScenario, pricing: Pricing) -> None:
        model, tensor = scenario.model, scenario.parallelism.tensor
        self.layout: KeyLayout = key_layout(model, page=scenario.engine.page)
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
        self._bytes_G = np.geomspace(1e3, 1e11, 33)
        self._read_G = np.array([float(pricing.seconds(MemoryBound("reduce", each))) for each in self._bytes_G])
        self.rate = 0.5 * scenario.cluster.pools[0].spec.peak_flops["bf16"]  # of products with few rows a key
        self.length_G = np.unique(np.geomspace(16, 1 << 20, 33).round())
        sizes = partial(Attention, batch=1, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=value_dim)
        self._prompt_G = np.array([float(pricing.seconds(sizes(sequence=length))) for length in self.length_G])

    def generating(self, keys_DK: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of all layers for generated tokens: keys seen in each kind of layer, each by `rows` queries."""
        columns = zip(self.layout.kinds, keys_DK.T, strict=True)
        return np.asarray(sum(kind.layers * self.one_layer(keys_D, rows) for kind, keys_D in columns))

    def one_layer(self, keys_D: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of one layer for generated tokens that see so many keys together."""
        read_D = np.interp(keys_D * self.key_bytes, self._bytes_G, self._read_G)
        seconds_D = np.maximum(read_D, keys_D * (rows * self.key_flops / self.rate))
        return np.asarray(np.where(keys_D > 0, seconds_D, 0.0))

    def prompt(self, tokens: int, before: int) -> float:
        """Seconds of all layers for a part of a prompt: as a causal square of as many pairs."""
        return sum(
            kind.layers
            * float(np.interp(np.sqrt(2.0 * kind.seen_by_part(tokens, before)), self.length_G, self._prompt_G))
            for kind in self.layout.kinds
        )
