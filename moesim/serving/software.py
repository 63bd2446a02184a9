"""What serves: which kernels a layer is made of, whether steps are replayed as CUDA graphs, what the host adds.

First the small kernels of a layer and of the end of a step, as each software runs them, beside GEMMs and attention:
a kernel is (kind, rows, width), of the kinds of `moesim.serving.decode_kernels`. Then one entry per software.

Legend: T tokens of a rank; rows of experts are tokens times experts of a token.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.scenario import Mla, Model
from moesim.serving.decode_kernels import facts


class Small(NamedTuple):
    """A small kernel."""

    kind: str
    rows: float
    width: float


def num_launches(kernels: Iterable[Small]) -> int:
    """What the host launches for them: some kinds are several kernels."""
    return sum(int(facts()["small"]["kinds"][kernel.kind]["kernels"]) for kernel in kernels)


class Lists(NamedTuple):
    """What a software runs: around attention, in a dense network of a width, around the experts, and at the end.

    greedy: kinds that take the largest of the logits.
    """

    attention: Callable[[Model, int, float], list[Small]]
    network: Callable[[float, int], list[Small]]
    experts: Callable[[Model, float, float, int], list[Small]]
    greedy: tuple[str, ...]


def _widths(model: Model, tensor: int) -> tuple[int, int]:
    """Elements of all queries and of all keys that are rotated on a rank."""
    heads = model.heads // tensor
    if isinstance(model.attention, Mla):
        return heads * model.attention.rope_head_dim, model.attention.rope_head_dim
    return heads * model.head_dim, -(-model.kv_heads // tensor) * model.head_dim


def _fused_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm with residual, norms of latents, rotary of queries and keys, writing into the cache."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("mul", tokens, queries + keys)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)]
        if model.attention.q_lora_rank is not None:
            kernels += [Small("rms_norm", tokens, model.attention.q_lora_rank)]
    return [*kernels, Small("copy", tokens, 2 * keys)]


def _fused_network(tokens: float, width: int) -> list[Small]:
    return [Small("mul", tokens, width)]


def _fused_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm with residual, top-k in one kernel; what sorts, activates and sums belongs to the experts' own kernels."""
    del rows, width
    return [Small("rms_norm", tokens, model.hidden), Small("softmax", tokens, model.experts)]


def _torch_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm, residual, rotary of queries and keys in four kernels each, two copies into the cache."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("add", tokens, model.hidden)]
    for width in (queries, keys):
        kernels += [Small("mul", tokens, width)] * 2 + [Small("roll", tokens, width), Small("add", tokens, width)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)] * 2
    return kernels + [Small("copy", tokens, keys)] * 2


def _torch_network(tokens: float, width: int) -> list[Small]:
    return [Small("silu_mul", tokens, width), Small("add", tokens, width)]


def _torch_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm, residual; cast, softmax and top-k; sort, places, rows; activation; gates; rows back and their sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("add", tokens, model.hidden)]
    kernels += [Small("cast", tokens, model.experts), Small("softmax", tokens, model.experts)]
    kernels += [Small("topk", tokens, model.experts), Small("sort", each, model.experts)]
    kernels += [Small("searchsorted", each, model.experts), Small("divide", each, model.experts)]
    kernels += [Small("gather", rows, model.row_width), Small("silu_mul", rows, width)]
    kernels += [Small("mul", rows, 1), Small("cast", rows, 1), Small("mul", rows, model.row_width)]
    kernels += [Small("copy", rows, 1), Small("scatter", each, model.experts), Small("gather", rows, model.row_width)]
    return [*kernels, Small("sum_of_8", each, model.row_width)]


def _transformers_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norms in eight kernels, of queries and keys, too; rotary of both in five each, residual, writing into pages."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("norm_in_eight", tokens, width) for width in (model.hidden, queries, keys)]
    kernels += [Small("rotary_in_five", tokens, width) for width in (queries, keys)]
    kernels += [Small("add", tokens, model.hidden)] + [Small("copy", tokens, queries)] * 2
    return kernels + [Small("copy", tokens, keys)] * 6


def _transformers_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm, residual; softmax, top-k and its sum; sort and counts; rows, masks, activation, gates; rows back, sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("norm_in_eight", tokens, model.hidden), Small("add", tokens, model.hidden)]
    kernels += [Small("softmax", tokens, model.experts), Small("topk", tokens, model.experts)]
    kernels += [Small("sum_of_8", tokens, 1), Small("mul", tokens, 1), Small("cast", tokens, 1)]
    kernels += [Small("sort", each, model.experts)] + [Small("mul", rows, 1)] * 6 + [Small("copy", rows, 1)] * 5
    kernels += [Small("gather", rows, model.row_width), Small("mul", rows, model.row_width)]
    kernels += [Small("mul", rows, 2 * width), Small("silu_mul", rows, width)]
    kernels += [Small("mul", rows, model.row_width)] * 2 + [Small("gather", rows, model.row_width)]
    return [*kernels, Small("sum_of_8", each, model.row_width)]


def _compiled_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm with residual; rotary, the split of queries, keys and values, and the cache are three kernels."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("copy", tokens, queries), Small("copy", tokens, keys)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)] * 2
    return [*kernels, Small("copy", tokens, queries)]


def _compiled_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm with residual; softmax, top-k, sort; rows, activation; places, and rows back with their gates and sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("softmax", tokens, model.experts)]
    kernels += [Small("topk", tokens, model.experts), Small("sort", each, model.experts)]
    kernels += [Small("searchsorted", each, model.experts), Small("copy", rows, model.row_width)]
    kernels += [Small("mul", rows, width), Small("copy", rows, 1), Small("copy", rows, 1)]
    return [*kernels, Small("scatter", each, model.experts), Small("sum_of_8", each, model.row_width)]


_FLOAT = ("cast_wide", "softmax_wide", "argmax_wide")
LISTS: Mapping[str, Lists] = {
    "fused": Lists(_fused_attention, _fused_network, _fused_experts, ("greedy",)),
    "compiled": Lists(_compiled_attention, _fused_network, _compiled_experts, _FLOAT),
    "torch": Lists(_torch_attention, _torch_network, _torch_experts, _FLOAT),
    "transformers": Lists(_transformers_attention, _torch_network, _transformers_experts, _FLOAT),
}


def end_kernels(model: Model, tensor: int, tokens: float, kinds: tuple[str, ...]) -> list[Small]:
    """The last norm, and what makes tokens of logits."""
    return [Small("rms_norm", tokens, model.hidden), *(Small(kind, tokens, model.vocab // tensor) for kind in kinds)]


@dataclass(frozen=True, kw_only=True)
class ServingSoftware:
    """The facts of one software.

    kernels: the list of small kernels of a layer. stack: whose kernels read stored keys and compute routed experts;
    those of engines have a kernel of their own for small all-reduces, too. graph_tokens: steps of at most so many
    tokens are replayed as CUDA graphs; in longer ones, and without graphs, the host launches every kernel, which shows
    where the GPU is faster. launch: seconds of such a launch. step: seconds of a step in which the GPU waits: the
    replay, and reading the tokens back. paged: "gathered", the keys of a step are copied out of their pages before
    attention; "masked", and all rows of a step see all its keys, under a mask; empty: kernels that read pages.
    graph_sizes: what rows of a replayed step are filled up to, as pairs: up to so many rows to a multiple of so many;
    routes_filling: whether the rows that fill up are routed and are given logits like others. fill_keys: a multiple
    that keys are filled up to. request, listed_key: seconds of the host in a step for each request and for each key
    that it lists. plan: seconds of the host for a size of attention not met before, which every step has. hides_host:
    whether it prepares a step beside the one before it. separate_heads: whether queries, keys and values are three
    GEMMs. masks_rows: whether results of experts are masked in new tensors and take their gates in fp32, which a
    step has to have room for.
    """

    name: str
    about: str
    listed: str
    checked: str
    kernels: Literal["fused", "compiled", "torch", "transformers"]
    stack: Literal["engines", "torch"]
    graph_tokens: int
    launch: float
    step: float
    paged: Literal["", "gathered", "masked"] = ""
    graph_sizes: tuple[tuple[int, int], ...] = ()
    routes_filling: bool = False
    fill_keys: int = 1
    request: float = 0.0
    listed_key: float = 0.0
    plan: float = 0.0
    hides_host: bool = False
    separate_heads: bool = False
    masks_rows: bool = False

    def filled(self, rows_D: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [D] that are computed for steps of so many; those larger than all graphs are not filled up."""
        most_N, multiple_N = self._sizes
        multiple_D = multiple_N[np.searchsorted(most_N, rows_D)]
        return np.asarray(-(-rows_D // multiple_D) * multiple_D)

    @cached_property
    def _sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of graph_sizes, smallest first, the most rows, and what they are a multiple of; behind them any number."""
        most = [most for most, _ in self.graph_sizes]
        multiple = [multiple for _, multiple in self.graph_sizes]
        return np.array(most, dtype=np.int64), np.array([*multiple, 1], dtype=np.int64)


# Rows that vLLM 0.33 captures graphs of (vllm/config/vllm.py): 1, 2, 4, each 8th up to 256, each 16th up to 512.
CAPTURED = ((2, 1), (4, 2), (8, 4), (256, 8), (512, 16))
# Seconds of vLLM 0.33's schedulers in a step, and for each request in it: that which schedules ahead, and that which
# waits for the tokens (tests/data/vllm_scheduler.json, measured on an AMD EPYC by tools/measure_scheduler.py).
AHEAD, WAITING = (44e-6, 19.5e-6), (39e-6, 17.1e-6)


@cache
def serving_software() -> Mapping[str, ServingSoftware]:
    """All of them by name."""
    host = facts()["host"]
    wait = host["replay"] + host["readback"]
    fused = ServingSoftware(
        name="fused",
        about="an engine with fused kernels, CUDA graphs of decoding steps, attention kernels of its own, and a "
        "host that schedules a step beside the one before it",
        listed="drawn up as serving engines fuse their layers: norms with residuals, rotary, cache, activation, "
        "top-k and sums over experts are one kernel each",
        checked="no measured step; its kernels and its scheduler by themselves",
        kernels="fused",
        stack="engines",
        graph_tokens=512,
        graph_sizes=CAPTURED,
        launch=host["launch"],
        step=wait + AHEAD[0],
        request=AHEAD[1],
        hides_host=True,
    )
    about = "the same engine, whose host schedules while the GPU waits"
    sync = replace(fused, name="fused_sync", about=about, step=wait + WAITING[0], request=WAITING[1], hides_host=False)
    graphs = ServingSoftware(
        name="torch_graphs",
        about="plain torch layers, captured as CUDA graphs",
        listed="kernel by kernel from the layers of tools/measure_decode.py",
        checked="decoding steps on one H100 (pytest -s tests/serving)",
        kernels="torch",
        stack="torch",
        graph_tokens=1 << 30,
        launch=host["eager_launch"],
        step=wait,
    )
    compiled = replace(
        graphs,
        name="torch_compiled",
        about="the same layers compiled by torch.compile, captured as CUDA graphs",
        listed="kernel by kernel from compiled layers of tools/measure_decode.py",
        kernels="compiled",
    )
    about = "plain torch layers, launched kernel by kernel from Python"
    eager = replace(graphs, name="torch_eager", about=about, graph_tokens=0, step=host["readback"])
    entries = (fused, sync, graphs, compiled, eager, *_transformers(host["eager_launch"]))
    return {entry.name: entry for entry in entries}


# The host of transformers' continuous batching, from runs of Qwen3's layers on one H100
# (tests/data/engine_h100.json.gz: "one", "burst-16" and "steady"): of a step, of each key that it lists, of each
# request's mask, of the inputs and the replay of a graph, of a plan that cuDNN makes for attention of a new size.
STEP, LISTED_KEY, MASK, SUBMIT, PLAN = 0.85e-3, 0.14e-6, 11.5e-6, 1.35e-3, 45e-3


def _transformers(launch: float) -> tuple[ServingSoftware, ...]:
    """Continuous batching of transformers 5.17, on one GPU."""
    plain = ServingSoftware(
        name="transformers",
        about="continuous batching of transformers 5.17 with its paged|sdpa attention, launched kernel by kernel",
        listed="from its source, and profiles of Qwen3's and OLMoE's layers on one H100 (tools/measure_engine.py)",
        checked="streams of requests on one H100 (pytest -s tests/serving/test_measured_engine.py)",
        masks_rows=True,
        kernels="transformers",
        stack="torch",
        graph_tokens=0,
        launch=launch,
        step=STEP,
        paged="masked",
        request=MASK,
        listed_key=LISTED_KEY,
        plan=PLAN,
        separate_heads=True,
    )
    about = "the same with FlashAttention 2 over gathered keys"
    flash = replace(plain, name="transformers_flash", about=about, paged="gathered", request=0.0, plan=0.0)
    graphs = replace(
        flash,
        name="transformers_graphs",
        about=f"{about}, replayed as CUDA graphs",
        graph_tokens=1 << 30,
        step=STEP + SUBMIT,
        graph_sizes=((1 << 30, 64),),
        routes_filling=True,
        fill_keys=16_384,
    )
    hidden = f"{about}, replayed as CUDA graphs, the host beside the GPU"
    return plain, flash, graphs, replace(graphs, name="transformers_async", about=hidden, hides_host=True)
