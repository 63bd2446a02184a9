"""What kernels of serving take: those of training as they run in a row, small kernels, narrower weights; attention.

Attention's core is that of generated tokens by its own kernels, of prompts by those of training.

Legend: G points of a table, D data groups, K kinds of layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Attention, Gemm, GroupedGemm, Kernel, KernelModel, MemoryBound, compute_model, memory_bytes
from moesim.kernels.estimate import SOURCES
from moesim.kernels.tabulated import TabulatedModel
from moesim.scenario import BYTES_PER_ELEMENT, Mla
from moesim.serving.batch import Formed
from moesim.serving.decode_kernels import (
    Fitted,
    KeyShape,
    attention_of,
    attention_seconds,
    batched_seconds,
    facts,
    fitted_of,
    fused_experts_seconds,
    grouped_shape,
    latent_shape,
    small_on,
)
from moesim.serving.memory import KV_BYTES, SCALES, WEIGHT_BYTES, KeyLayout, key_layout
from moesim.serving.schema import ServingScenario
from moesim.serving.software import LISTS, Lists, ServingSoftware, Small, serving_software

# Beyond what was measured in the L2, a small kernel takes what its kind takes in memory.
IN_MEMORY = {
    "rms_norm": "rms_norm", "add": "elementwise", "mul": "elementwise", "copy": "copy", "cast": "cast", "roll": "copy",
    "silu_mul": "activation", "gather": "permute", "sum_of_8": "unpermute", "softmax": "softmax", "topk": "topk",
    "sort": "sort", "cast_wide": "cast", "softmax_wide": "softmax", "argmax_wide": "reduce", "greedy": "reduce",
    "drawn": "softmax", "top_50": "softmax", "norm_in_eight": "rms_norm", "rotary_in_five": "elementwise",
}  # fmt: skip
LARGE = 4e6  # elements
LEAST_SHARE = 0.5  # of a product launched alone that it takes in a row of kernels at least


class Pricing:
    """Seconds of kernels on a scenario's GPU under its software, with a note of the sources that they rest on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.load, self.gpu = scenario.workload, scenario.cluster.main_pool.spec
        self.software: ServingSoftware = serving_software()[scenario.engine.software]
        self.lists: Lists = LISTS[self.software.kernels]
        self.kernels: KernelModel = compute_model(self.gpu, scenario.compute)
        # Tables were measured in a row already; a profile's kernels were launched alone.
        self._gaps = dict.fromkeys(facts()["gap"], 0.0) if isinstance(self.kernels, TabulatedModel) else facts()["gap"]
        self._sources: set[str] = set()

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Sources of kernel durations, the firmest first."""
        return tuple(source for source in SOURCES if source in self._sources)

    def note(self, sources: Iterable[str]) -> None:
        """Durations that were found before rest on these."""
        self._sources.update(sources)

    @contextmanager
    def noting(self) -> Iterator[set[str]]:
        """The sources of what is asked for meanwhile."""
        before, self._sources = self._sources, set()
        try:
            yield self._sources
        finally:
            before |= self._sources
            self._sources = before

    def seconds(self, kernel: Kernel) -> Any:
        """Of a kernel: a float, or an array in the shape of its sizes."""
        estimate = self.kernels.seconds(kernel)
        self._sources.add(estimate.source)
        gap = self._gaps["gemm"] if isinstance(kernel, Gemm) else self._gaps["grouped"]
        if isinstance(kernel, Gemm | GroupedGemm):
            return np.maximum(estimate.seconds - gap, LEAST_SHARE * np.asarray(estimate.seconds))
        return estimate.seconds

    def attention(self, kind: str) -> tuple[float, ...]:
        """Parameters of the attention of generated tokens, of a kind as `moesim.serving.decode_kernels` has them."""
        fitted: Fitted = attention_of(self.gpu, stack=self.software.stack, kind=kind)
        self._sources.add(fitted.source)
        return fitted.parameters

    def gemm(self, m: float, k: int, n: int, *, wide: bool = False) -> float:
        """Seconds of a product whose weights are stored in workload.weights (bf16 where `wide`)."""
        if wide:
            return float(self.seconds(Gemm(m=m, k=k, n=n)))
        seconds = float(self.seconds(Gemm(m=m, k=k, n=n, dtype=self.load.gemm)))
        seconds -= self.spared(k * n, floor=seconds)
        return seconds + (self.small([Small("cast", m, k)]) if self.load.gemm == "fp8" else 0.0)

    def batched(self, batch: int, tokens: float, k: int, n: int) -> float:
        """Seconds of a product for each of a batch: queries into latents, and outputs out of them, head by head."""
        fitted = fitted_of("batched", self.gpu, self.load.gemm, "bf16", rates={1: "memory", 2: "peak"})
        self._sources.add(fitted.source)
        size = BYTES_PER_ELEMENT[self.load.gemm]
        return float(batched_seconds(fitted.parameters, batch, tokens, k, n, size=size))

    def experts(self, rows_RE: NDArray[np.int64], *, hidden: int, width: int, matrices: int) -> NDArray[np.float64]:
        """Seconds [R] of the routed experts of every rank: of an engine's kernels, or of torch's two products."""
        if self.software.stack == "engines":
            kind = "int4" if self.load.weights == "int4" else self.load.gemm
            fitted = fitted_of("experts", self.gpu, kind, "bf16", rates={2: "memory", 3: "memory", 4: "peak"})
            self._sources.add(fitted.source)
            size = WEIGHT_BYTES[self.load.weights] + SCALES[self.load.weights]
            sizes = {"hidden": hidden, "width": width, "matrices": matrices}
            return fused_experts_seconds(fitted.parameters, fitted.entry["block"], rows_RE, size=size, **sizes)
        seconds_R = np.zeros(len(rows_RE))
        for k, n in ((hidden, (matrices - 1) * width), (width, hidden)):
            found_R = np.asarray(self.seconds(GroupedGemm(rows_per_expert=rows_RE, k=k, n=n, dtype=self.load.gemm)))
            active_R = np.count_nonzero(rows_RE, axis=1)
            spared_R = [self.spared(a * k * n, floor=s) for a, s in zip(active_R, found_R, strict=True)]
            seconds_R += found_R - np.array(spared_R)
        return seconds_R

    def spared(self, weights: float, *, floor: float) -> float:
        """Seconds that narrower weights spare the memory: at most 0.8 of a product's, which still computes."""
        stored = WEIGHT_BYTES[self.load.weights] + SCALES[self.load.weights]
        spared = weights * (BYTES_PER_ELEMENT[self.load.gemm] - stored)
        return min(max(0.0, spared) / self.gpu.memory_bandwidth, 0.8 * floor)

    def small(self, kernels: Iterable[Small]) -> float:
        """Seconds of small kernels in a row."""
        return sum(self._small(kernel) for kernel in kernels)

    def _small(self, kernel: Small) -> float:
        kind, rows, width = kernel
        seconds = small_on(self.gpu, kind, rows, width)
        self._sources.add("scaled")
        if rows * width <= LARGE or kind not in IN_MEMORY:
            return seconds
        name = IN_MEMORY[kind]
        return max(seconds, float(self.seconds(MemoryBound(name, memory_bytes(name, rows=rows, width=width)))))


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
