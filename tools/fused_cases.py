"""Sizes at which a trainer of fused kernels was measured (tools/measure_fused_peaks.py)."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model and its micro-batch. recompute: as workload.recompute ("" for nothing)."""

    layers: int
    dense_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    dense_width: int
    shared_width: int
    vocab: int
    batch: int
    sequence: int
    recompute: str = ""
    loss_chunks: int = 1
    micro_batches: int = 1
    attention: str = "flash"
    gradients: str = "float32"
    master: bool = True
    states: str = "float32"
    ranks: int = 1  # that share the experts

    @property
    def tokens(self) -> int:
        """Of a micro-batch of one rank."""
        return self.batch * self.sequence

    @property
    def local_experts(self) -> int:
        """Of one rank."""
        return self.experts // self.ranks


OLMOE = Sizes(
    layers=2, dense_layers=0, hidden=2048, heads=16, kv_heads=16, head_dim=128, experts=64, top_k=8, expert_width=1024,
    dense_width=0, shared_width=0, vocab=50304, batch=4, sequence=4096,
)  # fmt: skip
QWEN3 = replace(OLMOE, heads=32, kv_heads=4, experts=128, expert_width=768, vocab=151936, layers=1, batch=2)
DEEPSEEK = replace(
    OLMOE, layers=3, dense_layers=1, top_k=6, expert_width=1408, dense_width=10944, shared_width=2816, vocab=102400
)
MIXTRAL = replace(
    OLMOE, hidden=4096, heads=32, kv_heads=8, experts=8, top_k=2, expert_width=7168, layers=1, vocab=32000, batch=2
)
NARROW = replace(
    OLMOE,
    hidden=1024,
    head_dim=64,
    experts=32,
    top_k=4,
    expert_width=512,
    vocab=32000,
    layers=8,
    batch=8,
    sequence=2048,
)
HEADS = replace(
    NARROW, heads=32, kv_heads=8, head_dim=128, experts=16, top_k=1, layers=6, vocab=16384, batch=2, sequence=8192
)
LLAMA = replace(
    OLMOE, layers=6, dense_layers=6, heads=32, kv_heads=8, head_dim=64, experts=0, top_k=0, expert_width=0,
    dense_width=8192, vocab=32000,
)  # fmt: skip
WORDS = replace(NARROW, layers=2, vocab=151936, batch=4, sequence=4096)
SLIM: dict[str, Any] = {"gradients": "bfloat16", "master": False, "states": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program of fused kernels; `blind`: kept out of every choice.

    A first run of those in `CASES` was looked at as a whole; those in `LAST` and `SPREAD` were sized afterwards.
    """

    name: str
    sizes: Sizes
    blind: bool = False


def _cases(**rows: Sizes) -> list[Case]:
    """Every second row is blind."""
    return [Case(name=name, sizes=sizes, blind=number % 2 > 0) for number, (name, sizes) in enumerate(rows.items())]


CASES = _cases(
    olmoe=OLMOE,
    olmoe_short=replace(OLMOE, batch=2, sequence=2048),
    olmoe_again=replace(OLMOE, recompute="full", batch=8),
    qwen3=QWEN3,
    qwen3_chunks=replace(QWEN3, loss_chunks=8, batch=4),
    olmoe_slim=replace(OLMOE, **SLIM, layers=4),
    deepseek=DEEPSEEK,
    deepseek_again=replace(DEEPSEEK, recompute="full", batch=8),
    mixtral=MIXTRAL,
    mixtral_long=replace(MIXTRAL, batch=1, sequence=16384, loss_chunks=4),
    deepseek_slim=replace(DEEPSEEK, **SLIM, batch=6),
    narrow=NARROW,
    narrow_again=replace(NARROW, recompute="full", layers=16, batch=16),
    heads=HEADS,
    heads_slim=replace(HEADS, **SLIM, layers=8),
    heads_again=replace(HEADS, recompute="full", layers=10, batch=6),
    llama=LLAMA,
    llama_again=replace(LLAMA, recompute="full", layers=8, dense_layers=8, batch=8),
    llama_twice=replace(LLAMA, micro_batches=2, layers=4, dense_layers=4),
    olmoe_twice=replace(OLMOE, micro_batches=2, batch=2),
    words=WORDS,
    words_chunks=replace(WORDS, loss_chunks=16, batch=8),
    olmoe_swiglu=replace(OLMOE, recompute="swiglu"),
    deepseek_swiglu=replace(DEEPSEEK, recompute="swiglu", batch=5),
    deepseek_moe=replace(DEEPSEEK, recompute="moe", batch=6),
    narrow_moe=replace(NARROW, recompute="moe", batch=16),
    heads_cudnn=replace(HEADS, attention="cudnn"),
    olmoe_cudnn=replace(OLMOE, attention="cudnn", batch=3),
)

# Measured when the rules that the others led to were written: in no choice.
QWEN2 = replace(
    OLMOE,
    hidden=3584,
    heads=28,
    kv_heads=4,
    top_k=8,
    expert_width=1280,
    shared_width=5120,
    layers=1,
    vocab=151936,
    batch=1,
)
GRANITE = replace(
    OLMOE,
    hidden=1536,
    heads=24,
    kv_heads=8,
    head_dim=64,
    experts=40,
    top_k=8,
    expert_width=512,
    layers=12,
    vocab=49155 // 8 * 8,
)
PHI = replace(OLMOE, hidden=4096, heads=32, kv_heads=8, experts=16, top_k=2, expert_width=6400, layers=1, vocab=32064)
GEMMA = replace(
    LLAMA, hidden=3072, heads=16, kv_heads=16, head_dim=256, dense_width=24576, layers=2, dense_layers=2, batch=2
)
LAST = [
    Case(name=name, sizes=sizes, blind=True)
    for name, sizes in {
        "qwen2": QWEN2,
        "qwen2_long": replace(QWEN2, sequence=16384, loss_chunks=8, recompute="moe"),
        "granite": GRANITE,
        "granite_again": replace(GRANITE, recompute="full", batch=12),
        "granite_twice": replace(GRANITE, micro_batches=3, **SLIM),
        "phi": PHI,
        "phi_swiglu": replace(PHI, recompute="swiglu", batch=6),
        "gemma": GEMMA,
        "gemma_again": replace(GEMMA, recompute="full", batch=6, loss_chunks=4),
        "gemma_cudnn": replace(GEMMA, attention="flash", batch=3, **SLIM),
        "deepseek_shared": replace(DEEPSEEK, recompute="swiglu", batch=3, dense_layers=0),
        "long_heads": replace(HEADS, sequence=32768, batch=1, kv_heads=32),
    }.items()
]
SPREAD = [
    Case(name=name, sizes=replace(sizes, ranks=2), blind=number % 2 > 0)
    for number, (name, sizes) in enumerate(
        {
            "ep_olmoe": OLMOE,
            "ep_qwen2": replace(QWEN2, sequence=8192),
            "ep_olmoe_again": replace(OLMOE, recompute="full", layers=4, batch=8),
            "ep_granite": replace(GRANITE, experts=48, batch=6),
            "ep_deepseek": replace(DEEPSEEK, loss_chunks=8, batch=6),
            "ep_phi": replace(PHI, layers=2, loss_chunks=4),
            "ep_qwen3": replace(QWEN3, loss_chunks=16, layers=2, batch=4),
            "ep_narrow_moe": replace(NARROW, recompute="moe", batch=12),
        }.items()
    )
]
