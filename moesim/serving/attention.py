"""Attention in a step: of generated tokens by kernels of its own, as the software reads keys; of prompts by those of
training.

Legend: G points of a table, D data groups, K kinds of layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Attention
from moesim.scenario import Mla
from moesim.serving.batch import Formed
from moesim.serving.decode_kernels import KeyShape, attention_seconds, grouped_shape, latent_shape
from moesim.serving.memory import KV_BYTES, KeyLayout, key_layout
from moesim.serving.pricing import Pricing
from moesim.serving.schema import ServingScenario

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Kernels of transformers' attention in profiles of Qwen3's layers on one H100: seconds that a block of FlashAttention 2
# takes for a key in turn, and one of 64 rows of cuDNN's under a mask; shares of the memory's bandwidth that reading and
# writing keys reaches, and that writing them turned and repeated for each head does.
FLASH_KEY, MASKED_KEY, MASKED_ROWS, GATHERED, TURNED = 65e-9, 22.7e-9, 64, 0.89, 0.24


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
        self.heads, self.kv_heads, self.dim, self.gpu = heads, kv_heads, dim, pricing.gpu
        self.software = pricing.software
        self._of = {"": self._from_pages, "gathered": self._gathered, "masked": self._masked}[self.software.paged]
        self.parameters = pricing.attention(f"{kind}/{scenario.workload.kv}")
        self._shape_of: dict[int, KeyShape] = {}  # by rows of a request
        self.length_G = np.unique(np.geomspace(16, 1 << 20, 33).round())
        sizes = partial(Attention, batch=1, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=value_dim)
        self._prompt_G = np.array([float(pricing.seconds(sizes(sequence=length))) for length in self.length_G])

    def seconds(self, formed: Sequence[Formed]) -> FloatArray:
        """Seconds [D] of all layers for a step, as the software reads keys."""
        return self._of(formed)

    def _from_pages(self, formed: Sequence[Formed]) -> FloatArray:
        """By kernels that read keys where they lie."""
        requests_D = np.array([each.generated for each in formed])
        seconds_D = self.generating(np.array([each.keys for each in formed]), requests_D, formed[0].rows)
        for group, each in enumerate(formed):
            seconds_D[group] += sum(self.prompt(chunk.tokens, chunk.before) for chunk in each.chunks)
        return seconds_D

    def generating(self, keys_DK: IntArray, requests_D: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of all layers for generated tokens: keys seen in each kind of layer, each by `rows` queries."""
        columns = zip(self.layout.kinds, keys_DK.T, strict=True)
        return np.asarray(sum(kind.layers * self.one_layer(keys_D, requests_D, rows) for kind, keys_D in columns))

    def one_layer(self, keys_D: IntArray, requests_D: IntArray, rows: int) -> FloatArray:
        """Seconds [D] of one layer for generated tokens of so many requests that see so many keys together."""
        shape = self.shape
        if rows not in self._shape_of:
            several = replace(shape, key_flops=rows * shape.key_flops, query_bytes=rows * shape.query_bytes)
            self._shape_of[rows] = several
        mean_D = keys_D / np.maximum(requests_D, 1)
        return np.asarray(
            np.where(keys_D > 0, attention_seconds(self.parameters, self._shape_of[rows], requests_D, mean_D), 0.0),
            dtype=float,
        )

    def _gathered(self, formed: Sequence[Formed]) -> FloatArray:
        return np.array([self._gathered_group(each) for each in formed])

    def _gathered_group(self, each: Formed) -> float:
        """Seconds of all layers where keys are copied out of their pages first.

        Replayed, and beside prompts, a block for each head and request goes through its keys, two blocks to an SM.
        """
        requests, rows = each.generated, max(each.rows, 1)
        mean = each.keys[0] / max(requests, 1)
        alone = float(self.one_layer(np.array([each.keys[0]]), np.array([requests]), rows)[0])
        if requests and (self.software.graph_tokens > 0 or each.chunks or self.heads == self.kv_heads):
            alone = max(alone, mean * FLASH_KEY * max(1.0, requests * self.heads / (2 * self.gpu.sm_count)))
        read = 0 if not requests and not any(chunk.before for chunk in each.chunks) else self._keys(each)
        read = -(-read // self.software.fill_keys) * self.software.fill_keys
        moved = 4.0 * self.kv_heads * self.dim * 2.0 * read / (GATHERED * self.gpu.memory_bandwidth)
        prompts = sum(self.prompt(chunk.tokens, chunk.before) for chunk in each.chunks)
        return self.layout.kinds[0].layers * (alone + moved) + prompts

    def _masked(self, formed: Sequence[Formed]) -> FloatArray:
        return np.array([self._masked_group(each) for each in formed])

    def _masked_group(self, each: Formed) -> float:
        """Seconds of all layers where keys are gathered, copied for each head, and all rows see all of them."""
        keys = self._keys(each)
        tiles = self.heads * np.ceil(each.tokens / MASKED_ROWS)
        kernel = keys * MASKED_KEY * max(1.0, tiles / self.gpu.sm_count)
        bandwidth, size = self.gpu.memory_bandwidth, 2.0 * self.dim * keys
        moved = 4.0 * self.kv_heads * size / (GATHERED * bandwidth) + 2.0 * self.heads * size / (TURNED * bandwidth)
        return float(self.layout.kinds[0].layers * (kernel + moved))

    def _keys(self, each: Formed) -> int:
        return each.keys[0] + each.generated + sum(chunk.tokens + chunk.before for chunk in each.chunks)

    def prompt(self, tokens: int, before: int) -> float:
        """Seconds of all layers for a part of a prompt: as a causal square of as many pairs."""
        return sum(
            kind.layers
            * float(np.interp(np.sqrt(2.0 * kind.seen_by_part(tokens, before)), self.length_G, self._prompt_G))
            for kind in self.layout.kinds
        )
