"""Sizes at which a trainer was measured in bf16 and in FP8 (tools/measure_fp8_steps.py).

Every second size is blind: in no choice of the simulator. All were predicted before the first was measured.
"""

from dataclasses import dataclass, replace

from fused_cases import OLMOE, Sizes

RECIPES = ("bf16", "per_tensor", "blockwise")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program, which runs by every recipe."""

    name: str
    sizes: Sizes
    blind: bool


MIXTRAL = replace(
    OLMOE, hidden=4096, heads=32, kv_heads=8, experts=8, top_k=2, expert_width=7168, layers=2, vocab=32000, batch=2
)
SIZES = {
    "olmoe": replace(OLMOE, layers=3),
    "mixtral": MIXTRAL,
    "qwen3": replace(OLMOE, heads=32, kv_heads=4, experts=128, expert_width=768, vocab=151936, batch=2),
    "deepseek": replace(
        OLMOE, layers=3, dense_layers=1, top_k=6, expert_width=1408, dense_width=10752, shared_width=2816, vocab=102400
    ),
    "llama": replace(
        MIXTRAL, layers=4, dense_layers=4, experts=0, top_k=0, expert_width=0, dense_width=14336, vocab=32000
    ),
    "narrow": replace(
        OLMOE, layers=8, hidden=1024, head_dim=64, experts=32, top_k=4, expert_width=512, vocab=32000, batch=1,
        sequence=2048,
    ),
    "phi": replace(MIXTRAL, layers=1, experts=16, expert_width=6400, vocab=32064),
    "olmoe_long": replace(OLMOE, batch=1, sequence=16384),
    "v3": replace(
        OLMOE, layers=1, hidden=7168, heads=56, kv_heads=8, experts=16, top_k=4, expert_width=2048, shared_width=2048,
        vocab=32000, batch=2,
    ),
    "qwen2": replace(
        OLMOE, layers=1, hidden=3584, heads=28, kv_heads=4, expert_width=1280, shared_width=5120, vocab=32000, batch=2
    ),
    "olmoe_few": replace(OLMOE, layers=3, batch=1, sequence=2048),
    "llama_wide": replace(
        MIXTRAL, layers=1, dense_layers=1, hidden=8192, heads=64, experts=0, top_k=0, expert_width=0,
        dense_width=28672,
    ),
}  # fmt: skip
CASES = [Case(name=name, sizes=sizes, blind=number % 2 > 0) for number, (name, sizes) in enumerate(SIZES.items())]
# Sized, and predicted, when what the others had shown was corrected: all blind.
LATER = {
    "glm": replace(
        OLMOE, layers=1, hidden=5120, heads=40, kv_heads=8, experts=32, expert_width=1536, shared_width=1536,
        vocab=32000, batch=2,
    ),
    "granite": replace(
        OLMOE, layers=8, hidden=1536, heads=24, kv_heads=8, head_dim=64, experts=32, expert_width=512, vocab=49152
    ),
    "llama_thin": replace(SIZES["llama"], layers=8, dense_layers=8, hidden=2048, heads=16, dense_width=8192, batch=4),
    "deepseek_deep": replace(SIZES["deepseek"], layers=4, batch=2),
    "mixtral_wide": replace(MIXTRAL, layers=1, hidden=6144, heads=48, expert_width=8192),
    "llama_long": replace(SIZES["llama"], layers=3, dense_layers=3, batch=1, sequence=16384),
}  # fmt: skip
TINY = {
    "tiny": replace(
        OLMOE, layers=2, dense_layers=1, hidden=512, heads=4, kv_heads=2, experts=4, top_k=2, expert_width=256,
        dense_width=1024, shared_width=256, vocab=2048, batch=2, sequence=512,
    ),
}  # fmt: skip
LLAMA = SIZES["llama"]
# Of tools/fp8_compiled.py: dense, by torchao's recipes; all blind.
DENSE = {
    "dense_1024": replace(
        LLAMA, layers=12, dense_layers=12, hidden=1024, heads=8, kv_heads=8, dense_width=4096, batch=4
    ),
    "dense_2048": replace(
        LLAMA, layers=8, dense_layers=8, hidden=2048, heads=16, kv_heads=16, dense_width=8192, batch=4
    ),
    "dense_4096": LLAMA,
    "dense_5120": replace(LLAMA, layers=2, dense_layers=2, hidden=5120, heads=40, dense_width=17408),
    "dense_8192": SIZES["llama_wide"],
    "dense_few": replace(
        LLAMA, layers=6, dense_layers=6, hidden=2048, heads=16, dense_width=8192, batch=1, sequence=2048
    ),
}
TORCHAO = ("bf16", "tensorwise", "rowwise")
