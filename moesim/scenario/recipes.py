"""How products of operands of a byte or less are scaled: one table, read by checks, memory, kernels and flags.

per_tensor  one scale an operand, found in a pass of its own (TransformerEngine's current scaling)
blockwise   1 x 128 activations and gradients, 128 x 128 weights (DeepSeek-V3, arXiv 2412.19437 section 3.3)
mxfp8       one exponent for 32 values (OCP microscaling), applied by the tensor cores
nvfp4       4 bits with one FP8 scale for 16 values, applied by the tensor cores
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The facts of one recipe.

    gemm: the format of workload.precision.gemm that it belongs to; kernels: what kernel models call its products; peak:
    what a GPU must have a peak of; value_bytes: bytes of an element with its share of the scales.
    fuses: the kernel before a product writes its input scaled; searches: a cast comes behind a pass that finds the
    largest magnitude of the whole operand; turns: the copy kept for the weight's gradient is turned then, else it was
    made with the first one; both_kind: memory-bound kind of the cast both ways. megatron: word of its --fp8-recipe.
    """

    name: str
    gemm: str
    kernels: str
    peak: str
    value_bytes: float
    fuses: bool
    searches: bool
    turns: bool
    both_kind: str
    megatron: str


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="per_tensor", gemm="fp8", kernels="fp8", peak="fp8", value_bytes=1.0, fuses=False, searches=True,
            turns=False, both_kind="scaled_cast_both", megatron="tensorwise",
        ),
        Recipe(
            name="blockwise", gemm="fp8", kernels="fp8_block", peak="fp8", value_bytes=1.0 + 4 / 128, fuses=True,
            searches=False, turns=True, both_kind="fp8_cast_both", megatron="blockwise",
        ),
        Recipe(
            name="mxfp8", gemm="fp8", kernels="mxfp8", peak="mxfp8", value_bytes=1.0 + 1 / 32, fuses=False,
            searches=False, turns=False, both_kind="fp8_cast_both", megatron="mxfp8",
        ),
        Recipe(
            name="nvfp4", gemm="fp4", kernels="nvfp4", peak="fp4", value_bytes=0.5 + 1 / 16, fuses=False, searches=True,
            turns=False, both_kind="fp8_cast_both", megatron="nvfp4",
        ),
    )
})  # fmt: skip
RECIPE_OF_KERNELS = {recipe.kernels: recipe for recipe in RECIPES.values()}
DEFAULT = {"fp8": "blockwise", "fp4": "nvfp4"}  # by the format of the products
