"""Triton kernels of a trainer in FP8 (tools/fp8_program.py): casts, the activation with its gate, rotary, Adam.

Every cast reads a tile of 128 x 128 once. Along rows: [R, W] as it lies; turned: its transpose, [W, R], or, where rows
belong to experts, one transpose [W, rows] an expert, behind each other. 448 is the largest number of e4m3.

Legend: R rows, W width, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn


@triton.jit
def _places(W, each, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows, columns, and where a tile lies along rows and in the transposes of `each` rows."""
    row_B = tl.program_id(0) * B + tl.arange(0, B)
    column_B = tl.program_id(1) * B + tl.arange(0, B)
    place = row_B[:, None].to(tl.int64) * W + column_B[None, :]
    begin = (tl.program_id(0) * B // each).to(tl.int64) * each
    across = begin * W + column_B[:, None].to(tl.int64) * each + (row_B[None, :] - begin)
    return row_B, column_B, place, across


@triton.jit
def _largest(x, out, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, place, _ = _places(W, 1 << 30, B)
    value = tl.load(x + place).to(tl.float32)
    tl.atomic_max(out, tl.max(tl.max(tl.abs(value), axis=1), axis=0))


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    x, most, out, turned, scale, row_scale, column_scale, R, W, each, experts,
    vectors: tl.constexpr, many: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row_B, column_B, place, across = _places(W, each, B)
    unit = tl.maximum(tl.load(most), 1e-12) / 448.0
    value = (tl.load(x + place).to(tl.float32) / unit).to(tl.float8e4nv)
    tl.store(out + place, value)
    tl.store(turned + across, tl.trans(value))
    if vectors:
        if tl.program_id(1) == 0:
            tl.store(row_scale + row_B, tl.zeros((B,), dtype=tl.float32) + unit)
        if tl.program_id(0) == 0:
            expert = tl.arange(0, many)
            inside = (expert < experts)[:, None] & (column_B < W)[None, :]
            tl.store(
                column_scale + expert[:, None] * W + column_B[None, :], tl.zeros((many, B), tl.float32) + unit, inside
            )
    elif tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale, unit)


class Cast:
    """One operand both ways, or along rows: values and scales; `turned` None where only along rows."""

    def __init__(self, along: Tensor | None, scale: Tensor, turned: Tensor | None, turned_scale: Tensor | None) -> None:
        self.along, self.scale, self.turned, self.turned_scale = along, scale, turned, turned_scale


def _empty(x: Tensor, *shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=x.device)


def scaled_both(x: Tensor, most: Tensor, *, experts: int = 0, each: int = 0) -> Cast:
    """One scale: the largest magnitude in a pass (into `most`, zero before), then FP8 and its transpose in another.

    `experts`: the scales as vectors, one a row and one a column and expert, as grouped GEMMs want them; `each`: rows
    of a transpose.
    """
    rows, width = x.shape
    grid, options = (rows // BLOCK, width // BLOCK), {"B": BLOCK, "num_warps": 8}
    _largest[grid](x, most, width, **options)
    out, turned = _empty(x, rows, width), _empty(x, width, rows)
    wide = torch.float32
    scale = _empty(x, 1, dtype=wide) if not experts else _empty(x, rows, dtype=wide)
    columns = _empty(x, experts * width, dtype=wide) if experts else scale
    _scaled[grid](
        x, most, out, turned, scale, scale, columns, rows, width, each or rows, experts,
        vectors=experts > 0, many=triton.next_power_of_2(max(experts, 1)), **options,
    )  # fmt: skip
    return Cast(out, scale, turned, columns)


@triton.jit
def _blocks(x, out, scale, turned, turned_scale, R, W, each, both: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B, column_B, place, across = _places(W, each, B)
    value = tl.load(x + place).to(tl.float32)
    long_B = tl.max(tl.abs(value), axis=1) / 448.0 + 1e-12
    tl.store(out + place, (value / long_B[:, None]).to(tl.float8e4nv))
    tl.store(scale + tl.program_id(1) * R + row_B, long_B)
    if both:
        tall_B = tl.max(tl.abs(value), axis=0) / 448.0 + 1e-12
        tl.store(turned + across, tl.trans((value / tall_B[None, :]).to(tl.float8e4nv)))
        tl.store(turned_scale + tl.program_id(0) * W + column_B, tall_B)


def blocks(x: Tensor, *, both: bool, each: int = 0) -> Cast:
    """Scales of 1 x 128 along rows, [W / 128, R], and, `both`, of the transpose along columns, [R / 128, W]."""
    rows, width = x.shape
    out, scale = _empty(x, rows, width), _empty(x, width // BLOCK, rows, dtype=torch.float32)
    turned = _empty(x, width, rows) if both else out
    turned_scale = _empty(x, rows // BLOCK, width, dtype=torch.float32) if both else scale
    grid = (rows // BLOCK, width // BLOCK)
    _blocks[grid](x, out, scale, turned, turned_scale, rows, width, each or rows, both=both, B=BLOCK, num_warps=8)
    return Cast(out, scale, turned if both else None, turned_scale if both else None)


@triton.jit
def _turn_blocks(x, scale, out, out_scale, R, W, each, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B, column_B, place, across = _places(W, each, B)
    value = tl.load(x + place).to(tl.float32) * tl.load(scale + tl.program_id(1) * R + row_B)[:, None]
    tall_B = tl.max(tl.abs(value), axis=0) / 448.0 + 1e-12
    tl.store(out + across, tl.trans((value / tall_B[None, :]).to(tl.float8e4nv)))
    tl.store(out_scale + tl.program_id(0) * W + column_B, tall_B)


def turn_blocks(cast: Cast, *, each: int = 0) -> tuple[Tensor, Tensor]:
    """The transpose of what is scaled along rows, scaled along columns."""
    assert cast.along is not None
    rows, width = cast.along.shape
    out, scale = _empty(cast.along, width, rows), _empty(cast.along, rows // BLOCK, width, dtype=torch.float32)
    grid = (rows // BLOCK, width // BLOCK)
    _turn_blocks[grid](cast.along, cast.scale, out, scale, rows, width, each or rows, B=BLOCK, num_warps=8)
    return out, scale


@triton.jit
def _tiles(x, out, scale, turned, turned_scale, W, each, long, tall, B: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, place, across = _places(W, each, B)
    value = tl.load(x + place).to(tl.float32)
    unit = tl.max(tl.max(tl.abs(value), axis=1), axis=0) / 448.0 + 1e-12
    value = (value / unit).to(tl.float8e4nv)
    tl.store(out + place, value)
    tl.store(turned + across, tl.trans(value))
    tl.store(scale + tl.program_id(0) * long + tl.program_id(1), unit)
    expert, block = tl.program_id(0) * B // each, tl.program_id(0) % (each // B)
    tl.store(turned_scale + (expert * (W // B) + tl.program_id(1)) * tall + block, unit)


def tiles(weight: Tensor, *, pad: bool) -> Cast:
    """A weight [N, K], or of each expert, both ways with scales of 128 x 128, in rows of a multiple of 4 with `pad`."""
    experts, n, k = (1, *weight.shape) if weight.ndim == 2 else weight.shape
    long, tall = (-(-side // BLOCK // 4) * 4 if pad else side // BLOCK for side in (k, n))
    out, turned = _empty(weight, *weight.shape), _empty(weight, *weight.shape[:-2], k, n)
    scale = _empty(weight, *weight.shape[:-2], n // BLOCK, long, dtype=torch.float32)
    turned_scale = _empty(weight, *weight.shape[:-2], k // BLOCK, tall, dtype=torch.float32)
    grid = (experts * n // BLOCK, k // BLOCK)
    _tiles[grid](weight, out, scale, turned, turned_scale, k, n, long, tall, B=BLOCK, num_warps=8)
    return Cast(out, scale, turned, turned_scale)


@triton.jit
def _swiglu(x, gates, slots, out, scale, R, W, gated: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row_B, column_B, place, _ = _places(W, 1 << 30, B)
    source = row_B[:, None].to(tl.int64) * (2 * W) + column_B[None, :]
    left = tl.load(x + source).to(tl.float32)
    value = left * tl.sigmoid(left) * tl.load(x + source + W).to(tl.float32)
    if gated:
        value *= tl.load(gates + tl.load(slots + row_B))[:, None]
    long_B = tl.max(tl.abs(value), axis=1) / 448.0 + 1e-12
    tl.store(out + place, (value / long_B[:, None]).to(tl.float8e4nv))
    tl.store(scale + tl.program_id(1) * R + row_B, long_B)


def swiglu(x: Tensor, gates: Tensor | None, slots_R: Tensor | None) -> Cast:
    """silu(left) * right times a row's gate, in FP8 with scales of 1 x 128."""
    rows, width = x.shape[0], x.shape[1] // 2
    out, scale = _empty(x, rows, width), _empty(x, width // BLOCK, rows, dtype=torch.float32)
    given = (x, x) if gates is None else (gates, slots_R)
    grid = (rows // BLOCK, width // BLOCK)
    _swiglu[grid](x, *given, out, scale, rows, width, gated=gates is not None, B=BLOCK, num_warps=8)
    return Cast(out, scale, None, None)


@triton.jit
def _swiglu_back(  # type: ignore[no-untyped-def]
    gradient,
    x,
    gates,
    slots,
    dgates,
    out,
    scale,
    turned,
    turned_scale,
    R,
    W,
    each,
    gated: tl.constexpr,
    B: tl.constexpr,
):
    row_B, column_B, place, _ = _places(W, each, B)
    back = tl.load(gradient + place).to(tl.float32)
    source = row_B[:, None].to(tl.int64) * (2 * W) + column_B[None, :]
    left, right = tl.load(x + source).to(tl.float32), tl.load(x + source + W).to(tl.float32)
    share = tl.sigmoid(left)
    if gated:
        slot_B = tl.load(slots + row_B)
        tl.atomic_add(dgates + slot_B, tl.sum(back * left * share * right, axis=1))
        back = back * tl.load(gates + slot_B)[:, None]
    of_left = back * right * (share * (1 + left * (1 - share)))
    of_right = back * left * share
    begin = (tl.program_id(0) * B // each).to(tl.int64) * each
    for half in tl.static_range(2):
        found = of_left if half == 0 else of_right
        long_B = tl.max(tl.abs(found), axis=1) / 448.0 + 1e-12
        tl.store(out + source + half * W, (found / long_B[:, None]).to(tl.float8e4nv))
        tl.store(scale + (tl.program_id(1) + half * (W // B)) * R + row_B, long_B)
        tall_B = tl.max(tl.abs(found), axis=0) / 448.0 + 1e-12
        across = begin * 2 * W + (column_B[:, None].to(tl.int64) + half * W) * each + (row_B[None, :] - begin)
        tl.store(turned + across, tl.trans((found / tall_B[None, :]).to(tl.float8e4nv)))
        tl.store(turned_scale + tl.program_id(0) * (2 * W) + half * W + column_B, tall_B)


def swiglu_back(
    dout: Tensor, x: Tensor, gates: Tensor | None, slots_R: Tensor | None, *, each: int = 0
) -> tuple[Cast, Tensor | None]:
    """Gradients of both halves in FP8 both ways, and of the gates."""
    rows, width = dout.shape
    out, scale = _empty(x, rows, 2 * width), _empty(x, 2 * width // BLOCK, rows, dtype=torch.float32)
    turned, turned_scale = _empty(x, 2 * width, rows), _empty(x, rows // BLOCK, 2 * width, dtype=torch.float32)
    dgates = torch.zeros_like(gates) if gates is not None else None
    given = (x, x, x) if gates is None else (gates, slots_R, dgates)
    grid = (rows // BLOCK, width // BLOCK)
    _swiglu_back[grid](
        dout, x, *given, out, scale, turned, turned_scale, rows, width, each or rows,
        gated=gates is not None, B=BLOCK, num_warps=8,
    )  # fmt: skip
    return Cast(out, scale, turned, turned_scale), dgates


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    source, out, length, batch, token, head, out_token, turned, begin, half: tl.constexpr, heads: tl.constexpr, sign
):
    number, width_H = tl.program_id(0).to(tl.int64), tl.program_id(1) * heads + tl.arange(0, heads)
    at = tl.arange(0, half)
    source += number // length * batch + number % length * token
    angle = (number % length).to(tl.float32) * tl.exp(at.to(tl.float32) * (-9.210340372 / half))
    known = (width_H < turned)[:, None]
    sine, cosine = sign * tl.sin(angle)[None, :], tl.cos(angle)[None, :]
    place = source + width_H[:, None] * head + at[None, :]
    low, high = tl.load(place, mask=known).to(tl.float32), tl.load(place + half, mask=known).to(tl.float32)
    to = out + number * out_token + (begin + width_H[:, None]) * 2 * half + at[None, :]
    tl.store(to, (low * cosine - high * sine).to(tl.bfloat16), mask=known)
    tl.store(to + half, (high * cosine + low * sine).to(tl.bfloat16), mask=known)


def rotate(qkv: Tensor, *, heads: int, length: int, width: int) -> None:
    """Rotary embedding of the first `heads` of each row, in place."""
    grid, row = (len(qkv), -(-heads // 8)), qkv.shape[1]
    _rotate[grid](qkv, qkv, length, length * row, row, width, row, heads, 0, width // 2, 8, 1.0, num_warps=4)


def joined_back(parts: list[Tensor], *, length: int) -> Tensor:
    """Gradients of queries, keys and values [B, S, heads, width] in one row a token, the first two turned back."""
    batch, sequence, _, width = parts[0].shape
    heads = [part.shape[2] for part in parts]
    out = torch.empty(batch * sequence, sum(heads) * width, dtype=parts[0].dtype, device=parts[0].device)
    begin = 0
    for number, (part, count) in enumerate(zip(parts, heads, strict=True)):
        assert part.stride(3) == 1
        grid = (batch * sequence, -(-count // 8))
        sizes = length, *part.stride()[:3], out.shape[1], count, begin
        if number < 2:
            _rotate[grid](part, out, *sizes, width // 2, 8, -1.0, num_warps=4)
        else:
            out.view(batch, sequence, -1, width)[:, :, begin : begin + count] = part
        begin += count
    return out


@triton.jit
def _adam(weight, gradient, master, first, second, count, rate, clears: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    back = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    one = 0.9 * tl.load(first + at, mask=inside, other=0.0) + 0.1 * back
    two = 0.95 * tl.load(second + at, mask=inside, other=0.0) + 0.05 * back * back
    value = tl.load(master + at, mask=inside, other=0.0)
    value -= rate * one / (tl.sqrt(two) + 1e-8)
    tl.store(master + at, value, mask=inside)
    tl.store(weight + at, value.to(tl.bfloat16), mask=inside)
    tl.store(first + at, one, mask=inside)
    tl.store(second + at, two, mask=inside)
    if clears:
        tl.store(gradient + at, tl.zeros((block,), tl.float32), mask=inside)


def adam(weight: Tensor, gradient: Tensor, master: Tensor, first: Tensor, second: Tensor, *, clears: bool) -> None:
    """One step of Adam of one tensor; `clears`: the gradient is zero behind it."""
    count = weight.numel()
    grid = (triton.cdiv(count, 2048),)
    _adam[grid](weight, gradient, master, first, second, count, 1e-5, clears=clears, block=2048, num_warps=8)
