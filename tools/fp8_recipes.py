"""How the GEMMs of a trainer in FP8 (tools/fp8_program.py) scale their operands: not at all, by tensor, by blocks.

bf16        torch's GEMMs, dense and grouped
per_tensor  one scale an operand, found in a pass of its own; both orders in another; torch's GEMMs (grouped ones
            take the same scale once a row)
blockwise   1 x 128 and 128 x 128, written by the kernel before where there is one of this program; dense GEMMs by
            torch, those of experts by DeepGEMM, whose gradients of weights are added to fp32 values

Legend: R rows, E experts; N and K: sides of a weight.
"""

from dataclasses import dataclass
from typing import Any

import fp8_kernels as casts
import fused_kernels as kernels
import torch
import torch.nn.functional as F
from fp8_kernels import BLOCK, Cast
from torch import Tensor

SLOTS = 4096  # largest magnitudes of a step
WIDE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Group:
    """Even rows of experts. ends_E: where each ends; ids_R: of each row."""

    experts: int
    each: int
    ends_E: Tensor
    ids_R: Tensor
    counts_E: Tensor


class Weight:
    """A weight with its states; `cast`: the copies that GEMMs read."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.master = value.float()
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.gradient: Tensor | None = None
        self.cast: Cast | None = None
        self.is_buffer = False  # of a gradient that GEMMs add to

    def step(self) -> None:
        """Adam; a gradient that is no buffer goes."""
        gradient = self.gradient
        assert gradient is not None
        casts.adam(self.value, gradient, self.master, self.first, self.second, clears=self.is_buffer)
        if not self.is_buffer:
            self.gradient = None


class Wide:
    """GEMMs in bf16; what the others share."""

    name = "bf16"
    gradients = "bf16"

    def begin(self) -> None:
        """A step begins."""

    def prepare(self, weight: Weight, *, grouped: bool) -> None:
        """Copies of a weight that GEMMs read, behind an update."""

    def operand(self, x: Tensor, group: Group | None) -> Any:
        """What GEMMs take of activations."""
        return x

    def product(self, x: Any, weight: Weight, group: Group | None) -> Tensor:
        if group is None:
            return x @ weight.value.T  # type: ignore[no-any-return]
        return torch._grouped_mm(x, weight.value.transpose(1, 2), offs=group.ends_E)

    def gradient(self, dy: Tensor, group: Group | None) -> Any:
        """What GEMMs take of gradients."""
        return dy

    def back(self, dy: Any, weight: Weight, group: Group | None) -> Tensor:
        """The gradient of the input."""
        if group is None:
            return dy @ weight.value  # type: ignore[no-any-return]
        return torch._grouped_mm(dy, weight.value, offs=group.ends_E)

    def weight_back(self, dy: Any, x: Any, weight: Weight, group: Group | None) -> None:
        """That of the weight."""
        weight.gradient = dy.T @ x if group is None else torch._grouped_mm(dy.T, x, offs=group.ends_E)

    def activated(self, h: Tensor, gates: Tensor | None, slots: Tensor | None, group: Group | None) -> Any:
        """silu(left) * right times the gate, as an operand."""
        return self.operand(kernels.gated(h, gates, slots), group)

    def activated_back(
        self, dout: Tensor, h: Tensor, gates: Tensor | None, slots: Tensor | None, group: Group | None
    ) -> tuple[Any, Tensor | None]:
        dh, dgates = kernels.gated_back(dout, h, gates, slots)
        return self.gradient(dh, group), dgates


class PerTensor(Wide):
    name = "per_tensor"

    def __init__(self) -> None:
        self.most = torch.zeros(SLOTS, device="cuda")
        self.used = 0

    def begin(self) -> None:
        self.most.zero_()
        self.used = 0

    def _cast(self, x: Tensor, experts: int = 0, each: int = 0) -> Cast:
        self.used += 1
        return casts.scaled_both(x, self.most[self.used - 1], experts=experts, each=each)

    def prepare(self, weight: Weight, *, grouped: bool) -> None:
        value, weight.cast = weight.value, None
        weight.cast = self._cast(value.flatten(0, -2), len(value) if grouped else 0, value.shape[-2])

    def operand(self, x: Tensor, group: Group | None) -> Cast:
        return self._cast(x, group.experts if group else 0)

    gradient = operand

    def product(self, x: Cast, weight: Weight, group: Group | None) -> Tensor:
        assert x.along is not None and weight.cast is not None and weight.cast.along is not None
        out = self._times(x.along, x.scale, weight.cast.along, weight.cast.scale, weight, group, fast=True)
        x.along = None  # the transpose is kept
        return out

    def back(self, dy: Cast, weight: Weight, group: Group | None) -> Tensor:
        assert dy.along is not None and weight.cast is not None
        turned, scale = weight.cast.turned, weight.cast.turned_scale
        return self._times(dy.along, dy.scale, turned, scale, weight, group, fast=group is not None)

    def _times(
        self, a: Tensor, scale_a: Tensor, b: Any, scale_b: Any, weight: Weight, group: Group | None, *, fast: bool
    ) -> Tensor:
        if group is None:
            return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=WIDE, use_fast_accum=fast)
        b = b.view(group.experts, -1, a.shape[1]).transpose(1, 2)
        scales = scale_a, scale_b.view(group.experts, -1)
        return torch._scaled_grouped_mm(a, b, *scales, offs=group.ends_E, out_dtype=WIDE, use_fast_accum=fast)

    def weight_back(self, dy: Cast, x: Cast, weight: Weight, group: Group | None) -> None:
        a, b = dy.turned, x.turned
        assert a is not None and b is not None
        if group is None:
            weight.gradient = torch._scaled_mm(a, b.t(), dy.scale, x.scale, out_dtype=WIDE, use_fast_accum=False)
            return
        weight.gradient = torch._scaled_grouped_mm(
            a, b.t(), dy.turned_scale, x.turned_scale, offs=group.ends_E, out_dtype=WIDE, use_fast_accum=False
        )


class Blockwise(Wide):
    name = "blockwise"
    gradients = "fp32"

    def __init__(self) -> None:
        import deep_gemm

        self.library = deep_gemm
        kinds: Any = F.ScalingType
        self.rows, self.tiles = kinds.BlockWise1x128, kinds.BlockWise128x128

    def prepare(self, weight: Weight, *, grouped: bool) -> None:
        weight.cast = None
        weight.cast = casts.tiles(weight.value, pad=not grouped)

    def operand(self, x: Tensor, group: Group | None) -> Cast:
        return casts.blocks(x, both=False)

    def gradient(self, dy: Tensor, group: Group | None) -> Cast:
        return casts.blocks(dy, both=True, each=group.each if group else 0)

    def product(self, x: Cast, weight: Weight, group: Group | None) -> Tensor:
        assert x.along is not None and weight.cast is not None
        return self._times(x.along, x.scale, weight.cast.along, weight.cast.scale, group)

    def back(self, dy: Cast, weight: Weight, group: Group | None) -> Tensor:
        assert dy.along is not None and weight.cast is not None
        return self._times(dy.along, dy.scale, weight.cast.turned, weight.cast.turned_scale, group)

    def _times(self, a: Tensor, scale_a: Tensor, b: Any, scale_b: Any, group: Group | None) -> Tensor:
        if group is None:
            scaled: Any = F.scaled_mm
            found: Tensor = scaled(
                a, b.t(), scale_a.t(), self.rows, scale_b.t(), self.tiles, output_dtype=WIDE, use_fast_accum=False
            )
            return found
        out = torch.empty(len(a), b.shape[1], dtype=WIDE, device=a.device)
        self.library.m_grouped_fp8_gemm_nt_contiguous(
            (a, scale_a.t()), (b, scale_b), out, group.ids_R, disable_ue8m0_cast=True, compiled_dims=""
        )
        return out

    def weight_back(self, dy: Cast, x: Cast, weight: Weight, group: Group | None) -> None:
        turned, scale = casts.turn_blocks(x, each=group.each if group else 0)
        assert dy.turned is not None and dy.turned_scale is not None
        if group is None:
            scaled: Any = F.scaled_mm
            weight.gradient = scaled(
                dy.turned, turned.t(), dy.turned_scale.t(), self.rows, scale.t(), self.rows,
                output_dtype=torch.float32, use_fast_accum=False,
            )  # fmt: skip
            return
        if weight.gradient is None:
            weight.gradient, weight.is_buffer = torch.zeros_like(weight.master), True
        self.library.k_grouped_fp8_gemm_nt_contiguous(
            (dy.turned.flatten(), dy.turned_scale.t()), (turned.flatten(), scale.t()), weight.gradient,
            [group.each] * group.experts, group.counts_E, c=weight.gradient, compiled_dims="",
        )  # fmt: skip

    def activated(self, h: Tensor, gates: Tensor | None, slots: Tensor | None, group: Group | None) -> Cast:
        return casts.swiglu(h, gates, slots)

    def activated_back(
        self, dout: Tensor, h: Tensor, gates: Tensor | None, slots: Tensor | None, group: Group | None
    ) -> tuple[Cast, Tensor | None]:
        return casts.swiglu_back(dout, h, gates, slots, each=group.each if group else 0)


RECIPES = {recipe.name: recipe for recipe in (Wide, PerTensor, Blockwise)}
assert BLOCK == 128
