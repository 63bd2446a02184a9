"""The casts of FP8 training as Triton kernels: block-scaled along rows, both ways, per tile, and back; with one scale.

Each program reads a tile of 128 x 128 once; 448 is the largest number of e4m3; scales are fp32, one for 1 x 128
numbers (or one a tile for weights).
Legend: R rows, W width.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

BLOCK = 128


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _tile(R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B = tl.program_id(0) * B + tl.arange(0, B)
    column_B = tl.program_id(1) * B + tl.arange(0, B)
    return row_B, column_B, row_B[:, None].to(tl.int64) * W + column_B[None, :]


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _quantise(x, out, scale, turned, turned_scale, R, W, MODE: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """MODE 0: along rows; 1: along rows and, transposed, along columns; 2: one scale for the tile."""
    row_B, column_B, place = _tile(R, W, B)
    value = tl.load(x + place).to(tl.float32)
    if MODE == 2:
        largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0) / 448.0 + 1e-12
        tl.store(out + place, (value / largest).to(tl.float8e4nv))
        tl.store(scale + tl.program_id(0) * (W // B) + tl.program_id(1), largest)
    else:
        largest_B = tl.max(tl.abs(value), axis=1) / 448.0 + 1e-12
        tl.store(out + place, (value / largest_B[:, None]).to(tl.float8e4nv))
        tl.store(scale + tl.program_id(1) * R + row_B, largest_B)
    if MODE == 1:
        tall_B = tl.max(tl.abs(value), axis=0) / 448.0 + 1e-12
        across = column_B[:, None].to(tl.int64) * R + row_B[None, :]
        tl.store(turned + across, tl.trans(value / tall_B[None, :]).to(tl.float8e4nv))
        tl.store(turned_scale + tl.program_id(0) * W + column_B, tall_B)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _turn(x, scale, out, out_scale, R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """FP8 scaled along rows to FP8 of the transpose, scaled along columns."""
    row_B, column_B, place = _tile(R, W, B)
    value = tl.load(x + place).to(tl.float32) * tl.load(scale + tl.program_id(1) * R + row_B)[:, None]
    tall_B = tl.max(tl.abs(value), axis=0) / 448.0 + 1e-12
    across = column_B[:, None].to(tl.int64) * R + row_B[None, :]
    tl.store(out + across, tl.trans(value / tall_B[None, :]).to(tl.float8e4nv))
    tl.store(out_scale + tl.program_id(0) * W + column_B, tall_B)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _largest(x, out, R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude of the whole matrix."""
    _, _, place = _tile(R, W, B)
    value = tl.load(x + place).to(tl.float32)
    tl.atomic_max(out, tl.max(tl.max(tl.abs(value), axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _scaled(x, scale, out, turned, R, W, BOTH: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """With one known scale of the whole matrix; BOTH: also transposed."""
    row_B, column_B, place = _tile(R, W, B)
    value = (tl.load(x + place).to(tl.float32) * tl.load(scale)).to(tl.float8e4nv)
    tl.store(out + place, value)
    if BOTH:
        across = column_B[:, None].to(tl.int64) * R + row_B[None, :]
        tl.store(turned + across, tl.trans(value))


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _back(x, scale, out, R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B, _, place = _tile(R, W, B)
    value = tl.load(x + place).to(tl.float32) * tl.load(scale + tl.program_id(1) * R + row_B)[:, None]
    tl.store(out + place, value.to(tl.bfloat16))


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _swiglu(x, out, scale, R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B, column_B, place = _tile(R, W, B)
    source = row_B[:, None].to(tl.int64) * (2 * W) + column_B[None, :]
    gate = tl.load(x + source).to(tl.float32)
    value = gate * tl.sigmoid(gate) * tl.load(x + source + W).to(tl.float32)
    largest_B = tl.max(tl.abs(value), axis=1) / 448.0 + 1e-12
    tl.store(out + place, (value / largest_B[:, None]).to(tl.float8e4nv))
    tl.store(scale + tl.program_id(1) * R + row_B, largest_B)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _swiglu_backward(gradient, x, out, scale, turned, turned_scale, R, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves' gradients, each in FP8 along rows and, transposed, along columns."""
    row_B, column_B, place = _tile(R, W, B)
    upper = tl.load(gradient + place).to(tl.float32)
    source = row_B[:, None].to(tl.int64) * (2 * W) + column_B[None, :]
    gate, value = tl.load(x + source).to(tl.float32), tl.load(x + source + W).to(tl.float32)
    open_gate = tl.sigmoid(gate)
    of_gate = upper * value * (open_gate * (1 + gate * (1 - open_gate)))
    of_value = upper * gate * open_gate
    for half in tl.static_range(2):
        found = of_gate if half == 0 else of_value
        largest_B = tl.max(tl.abs(found), axis=1) / 448.0 + 1e-12
        tl.store(out + source + half * W, (found / largest_B[:, None]).to(tl.float8e4nv))
        tl.store(scale + (tl.program_id(1) + half * (W // B)) * R + row_B, largest_B)
        tall_B = tl.max(tl.abs(found), axis=0) / 448.0 + 1e-12
        across = (column_B[:, None].to(tl.int64) + half * W) * R + row_B[None, :]
        tl.store(turned + across, tl.trans(found / tall_B[None, :]).to(tl.float8e4nv))
        tl.store(turned_scale + tl.program_id(0) * (2 * W) + half * W + column_B, tall_B)


def cast_call(kind: str, *, rows: int, width: int, device: str) -> Callable[[torch.Tensor], Any]:
    """The call of one cast of [rows, width], both multiples of 128; outputs are allocated anew by each call."""
    grid, options = (rows // BLOCK, width // BLOCK), {"B": BLOCK, "num_warps": 8}
    known_scale = torch.ones(width // BLOCK, rows, device=device)

    def fp8(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float8_e4m3fn, device=device)

    def scales(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=device)

    def quantise(mode: int) -> Callable[[torch.Tensor], Any]:
        def call(x: torch.Tensor) -> Any:
            out, scale = fp8(rows, width), scales(width // BLOCK, rows)
            turned, turned_scale = (fp8(width, rows), scales(rows // BLOCK, width)) if mode == 1 else (out, scale)
            _quantise[grid](x, out, scale, turned, turned_scale, rows, width, MODE=mode, **options)
            return out, turned

        return call

    def turn(x: torch.Tensor) -> Any:
        out, scale = fp8(width, rows), scales(rows // BLOCK, width)
        _turn[grid](x, known_scale, out, scale, rows, width, **options)
        return out

    def back(x: torch.Tensor) -> Any:
        out = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
        _back[grid](x, known_scale, out, rows, width, **options)
        return out

    def swiglu(x: torch.Tensor) -> Any:
        out, scale = fp8(rows, width), scales(width // BLOCK, rows)
        _swiglu[grid](x, out, scale, rows, width, **options)
        return out

    values = torch.randn(rows, 2 * width, dtype=torch.bfloat16, device=device) if "backward" in kind else None

    def swiglu_backward(gradient: torch.Tensor) -> Any:
        out, scale = fp8(rows, 2 * width), scales(2 * width // BLOCK, rows)
        turned, turned_scale = fp8(2 * width, rows), scales(rows // BLOCK, 2 * width)
        _swiglu_backward[grid](gradient, values, out, scale, turned, turned_scale, rows, width, **options)
        return out, turned

    one, most = torch.ones(1, device=device), torch.zeros(1, device=device)

    def largest(x: torch.Tensor) -> Any:
        _largest[grid](x, most, rows, width, **options)
        return most

    def scaled(both: bool) -> Callable[[torch.Tensor], Any]:
        def call(x: torch.Tensor) -> Any:
            out = fp8(rows, width)
            turned = fp8(width, rows) if both else out
            _scaled[grid](x, one, out, turned, rows, width, BOTH=both, **options)
            return out, turned

        return call

    calls = {
        "fp8_cast": quantise(0), "fp8_cast_both": quantise(1), "fp8_cast_tiles": quantise(2),
        "fp8_turn": turn, "fp8_widen": back, "fp8_swiglu": swiglu,
        "fp8_swiglu_backward": swiglu_backward,
        "largest": largest, "scaled_cast": scaled(False), "scaled_cast_both": scaled(True),
    }  # fmt: skip
    return calls[kind]
