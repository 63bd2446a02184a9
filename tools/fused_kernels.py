"""Triton kernels of a trainer of the kind of `implementation: fused`: one for each step between GEMMs.

Legend: T tokens, R rows (token and expert), H width, N columns. Every kernel writes what it returns, and nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6
THETA = 10_000.0


@triton.jit
def _norm(x, branch, weight, total, y, root, width, has_branch: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if has_branch:
        value += tl.load(branch + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * width + at, value.to(tl.bfloat16), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + 1e-6)
    tl.store(root + row, scale)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (value * scale * gain).to(tl.bfloat16), mask=inside)


def norm(x: Tensor, branch: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the residual stream (x itself without a branch), its norm, and 1 / root mean square."""
    tokens, width = x.shape
    total = x if branch is None else torch.empty_like(x)
    y, root = torch.empty_like(x), torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _norm[(tokens,)](x, x if branch is None else branch, weight, total, y, root, width, branch is not None, block)
    return total, y, root


@triton.jit
def _norm_back(dy, dtotal, x, weight, root, dx, dweight, rows, width, has_total: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, block)
    inside = at < width
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    gathered = tl.zeros((block,), dtype=tl.float32)
    step = tl.num_programs(0)
    for number in range((rows + step - 1) // step):
        row = number * step + tl.program_id(0).to(tl.int64)
        known = inside & (row < rows)
        value = tl.load(x + row * width + at, mask=known, other=0.0).to(tl.float32)
        scale = tl.load(root + row, mask=row < rows, other=0.0)
        back = tl.load(dy + row * width + at, mask=known, other=0.0).to(tl.float32)
        gathered += back * value * scale
        weighted = back * gain
        mean = tl.sum(weighted * value, 0) / width
        out = scale * (weighted - value * scale * scale * mean)
        if has_total:
            out += tl.load(dtotal + row * width + at, mask=known, other=0.0).to(tl.float32)
        tl.store(dx + row * width + at, out.to(tl.bfloat16), mask=known)
    tl.atomic_add(dweight + at, gathered, mask=inside)


def norm_back(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, root: Tensor, dweight: Tensor) -> Tensor:
    """The gradient of the residual stream; that of the weight is added to `dweight`, in fp32."""
    tokens, width = x.shape
    dx = torch.empty_like(x)
    given = dy if dtotal is None else dtotal
    block = triton.next_power_of_2(width)
    _norm_back[(min(tokens, 264),)](dy, given, x, weight, root, dx, dweight, tokens, width, dtotal is not None, block)
    return dx


@triton.jit
def _turn(qkv, length, row_width, turned, half: tl.constexpr, sign):  # type: ignore[no-untyped-def]
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, half)
    angle = (token % length).to(tl.float32) * tl.exp(at.to(tl.float32) * (-9.210340372 / half))
    sine, cosine = sign * tl.sin(angle), tl.cos(angle)
    place = qkv + token * row_width + head * 2 * half + at
    low, high = tl.load(place).to(tl.float32), tl.load(place + half).to(tl.float32)
    tl.store(place, (low * cosine - high * sine).to(tl.bfloat16))
    tl.store(place + half, (high * cosine + low * sine).to(tl.bfloat16))


def turn(qkv: Tensor, *, heads: int, length: int, width: int, back: bool = False) -> None:
    """Rotary embedding of the first `heads` of each row, in place; `back`: of gradients."""
    _turn[(len(qkv), heads)](qkv, length, qkv.shape[1], heads, width // 2, -1.0 if back else 1.0)


@triton.jit
def _gather(x, source, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    token = tl.load(source + row)
    tl.store(out + row * width + at, tl.load(x + token * width + at, mask=inside), mask=inside)


def gather(x: Tensor, source_R: Tensor) -> Tensor:
    """Row r of the result is row source[r] of x."""
    rows, width = len(source_R), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    _gather[(rows, triton.cdiv(width, 1024))](x, source_R, out, width, 1024)
    return out


@triton.jit
def _sum_rows(rows, places, first, second, out, width, each: tl.constexpr, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    value = tl.zeros((block,), dtype=tl.float32)
    for number in range(each):
        row = tl.load(places + token * each + number)
        value += tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if adds > 0:
        value += tl.load(first + token * width + at, mask=inside, other=0.0).to(tl.float32)
    if adds > 1:
        value += tl.load(second + token * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, value.to(tl.bfloat16), mask=inside)


def sum_rows(rows: Tensor, places_TK: Tensor, *added: Tensor) -> Tensor:
    """The sum of a token's rows, and of up to two tensors of tokens."""
    tokens, each = places_TK.shape
    width = rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    given = [*added, rows, rows]
    _sum_rows[(tokens, triton.cdiv(width, 1024))](
        rows, places_TK, given[0], given[1], out, width, each, len(added), 1024
    )
    return out


@triton.jit
def _gated(inputs, gates, slots, out, width, gated: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    left = tl.load(inputs + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(inputs + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    value = left / (1.0 + tl.exp(-left)) * right
    if gated:
        value *= tl.load(gates + tl.load(slots + row))
    tl.store(out + row * width + at, value.to(tl.bfloat16), mask=inside)


def gated(inputs: Tensor, gates: Tensor | None, slots_R: Tensor | None) -> Tensor:
    """silu(left) * right, times the gate of a row's slot where there are gates."""
    rows, width = inputs.shape[0], inputs.shape[1] // 2
    out = torch.empty(rows, width, dtype=inputs.dtype, device=inputs.device)
    known = gates is not None
    _gated[(rows, triton.cdiv(width, 1024))](
        inputs, gates if known else inputs, slots_R if known else inputs, out, width, known, 1024
    )
    return out


@triton.jit
def _gated_back(dout, inputs, gates, slots, dinputs, dgates, width, gated: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    slot = row
    gate = 1.0
    if gated:
        slot = tl.load(slots + row)
        gate = tl.load(gates + slot)
    total = tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, width, block):
        at = begin + tl.arange(0, block)
        inside = at < width
        left = tl.load(inputs + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(inputs + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
        back = tl.load(dout + row * width + at, mask=inside, other=0.0).to(tl.float32)
        share = 1.0 / (1.0 + tl.exp(-left))
        total += back * left * share * right
        back = back * gate
        tl.store(dinputs + row * 2 * width + width + at, (back * left * share).to(tl.bfloat16), mask=inside)
        slope = share * (1.0 + left * (1.0 - share))
        tl.store(dinputs + row * 2 * width + at, (back * right * slope).to(tl.bfloat16), mask=inside)
    if gated:
        tl.store(dgates + slot, tl.sum(total, 0))


def gated_back(
    dout: Tensor, inputs: Tensor, gates: Tensor | None, slots_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the inputs and of the gates."""
    dinputs, known = torch.empty_like(inputs), gates is not None
    dgates = torch.empty_like(gates) if gates is not None else None
    _gated_back[(len(inputs),)](
        dout, inputs, gates if known else inputs, slots_R if known else inputs, dinputs,
        dgates if known else inputs, inputs.shape[1] // 2, known, 1024,
    )  # fmt: skip
    return dinputs, dgates


@triton.jit
def _choose(logits, ids, shares, gates, experts, each: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < experts
    value = tl.load(logits + token * experts + at, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    value = value / tl.sum(value, 0)
    tl.store(shares + token * experts + at, value, mask=inside)
    for number in range(each):
        chosen = tl.load(ids + token * each + number)
        tl.store(gates + token * each + number, tl.sum(tl.where(at == chosen, value, 0.0), 0))


def choose(logits: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over experts in fp32, and the shares of the chosen ones."""
    tokens, experts = logits.shape
    shares = torch.empty(tokens, experts, dtype=torch.float32, device=logits.device)
    gates = torch.empty(ids_TK.shape, dtype=torch.float32, device=logits.device)
    _choose[(tokens,)](logits, ids_TK, shares, gates, experts, ids_TK.shape[1], triton.next_power_of_2(experts))
    return shares, gates


@triton.jit
def _choose_back(dgates, ids, shares, dlogits, experts, each: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < experts
    share = tl.load(shares + token * experts + at, mask=inside, other=0.0)
    back = tl.zeros((block,), dtype=tl.float32)
    for number in range(each):
        chosen = tl.load(ids + token * each + number)
        back += tl.where(at == chosen, tl.load(dgates + token * each + number), 0.0)
    out = share * (back - tl.sum(share * back, 0))
    tl.store(dlogits + token * experts + at, out.to(tl.bfloat16), mask=inside)


def choose_back(dgates: Tensor, ids_TK: Tensor, shares: Tensor) -> Tensor:
    """The gradient of the logits."""
    tokens, experts = shares.shape
    dlogits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=shares.device)
    block = triton.next_power_of_2(experts)
    _choose_back[(tokens,)](dgates, ids_TK, shares, dlogits, experts, ids_TK.shape[1], block)
    return dlogits


@triton.jit
def _loss(logits, labels, losses, columns, scale, writes: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    highest, sums = tl.full((block,), -1e30, dtype=tl.float32), tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, columns, block):
        at = begin + tl.arange(0, block)
        value = tl.load(logits + row * columns + at, mask=at < columns, other=-1e30).to(tl.float32)
        higher = tl.maximum(highest, value)
        sums = sums * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    most = tl.max(highest, 0)
    total = tl.sum(sums * tl.exp(highest - most), 0)
    own = tl.load(logits + row * columns + label).to(tl.float32)
    if writes:
        for begin in range(0, columns, block):
            at = begin + tl.arange(0, block)
            inside = at < columns
            value = tl.load(logits + row * columns + at, mask=inside, other=float("-inf")).to(tl.float32)
            back = (tl.exp(value - most) / total - tl.where(at == label, 1.0, 0.0)) * scale
            tl.store(logits + row * columns + at, back.to(tl.bfloat16), mask=inside)
    else:
        tl.store(losses + row, most + tl.log(total) - own)


def losses_of(logits: Tensor, labels_T: Tensor) -> Tensor:
    """Cross entropy of every row, in fp32."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _loss[(len(logits),)](logits, labels_T, losses, logits.shape[1], 1.0, False, 4096)
    return losses


def loss_back(logits: Tensor, labels_T: Tensor, scale: float) -> None:
    """The gradient of the logits in their place."""
    _loss[(len(logits),)](logits, labels_T, logits, logits.shape[1], scale, True, 4096)


@triton.jit
def _weight_gradient(  # type: ignore[no-untyped-def]
    out, left, right, begins, columns, inner, tall: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr
):
    expert = tl.program_id(2)
    row, column = tl.program_id(0) * tall + tl.arange(0, tall), tl.program_id(1) * wide + tl.arange(0, wide)
    begin, end = tl.load(begins + expert).to(tl.int64), tl.load(begins + expert + 1).to(tl.int64)
    rows, cols = (row < columns)[:, None], (column < inner)[None, :]
    total = tl.zeros((tall, wide), dtype=tl.float32)
    for at in range(begin, end, deep):
        depth = at + tl.arange(0, deep)
        known = depth < end
        one = tl.load(left + depth[None, :] * columns + row[:, None], mask=known[None, :] & rows, other=0.0)
        two = tl.load(right + depth[:, None] * inner + column[None, :], mask=known[:, None] & cols, other=0.0)
        total = tl.dot(one, two, total)
    place = out + expert.to(tl.int64) * columns * inner + row[:, None].to(tl.int64) * inner + column[None, :]
    total += tl.load(place, mask=rows & cols, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=rows & cols)


def add_weight_gradient(out: Tensor, dy: Tensor, x: Tensor, begins_E: Tensor) -> None:
    """Adds dy.T @ x of each expert's rows to `out` [experts, columns of dy, columns of x] inside of the GEMM."""
    columns, inner, experts = dy.shape[1], x.shape[1], len(begins_E) - 1
    grid = (triton.cdiv(columns, 128), triton.cdiv(inner, 128), experts)
    _weight_gradient[grid](out, dy, x, begins_E, columns, inner, 128, 128, 32, num_warps=8, num_stages=3)


@triton.jit
def _add_rows(out, ids, rows, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    value = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_add(out + tl.load(ids + row) * width + at, value, mask=inside)


def add_rows(out: Tensor, ids_T: Tensor, rows: Tensor) -> None:
    """Adds each row to row ids[t] of `out`, in fp32."""
    width = rows.shape[1]
    _add_rows[(len(rows), triton.cdiv(width, 1024))](out, ids_T, rows, width, 1024)


@triton.jit
def _adam(weight, gradient, master, first, second, count, rate, wide: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    back = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    one = 0.9 * tl.load(first + at, mask=inside, other=0.0).to(tl.float32) + 0.1 * back
    two = 0.95 * tl.load(second + at, mask=inside, other=0.0).to(tl.float32) + 0.05 * back * back
    value = tl.load((master if wide else weight) + at, mask=inside, other=0.0).to(tl.float32)
    value -= rate * one / (tl.sqrt(two) + 1e-8)
    if wide:
        tl.store(master + at, value, mask=inside)
    tl.store(weight + at, value.to(tl.bfloat16), mask=inside)
    tl.store(first + at, one.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, two.to(second.dtype.element_ty), mask=inside)
    tl.store(gradient + at, (back * 0.0).to(gradient.dtype.element_ty), mask=inside)


def adam(weight: Tensor, gradient: Tensor, master: Tensor | None, first: Tensor, second: Tensor) -> None:
    """One step of Adam in one kernel over flat tensors; gradients are zero behind it."""
    given = weight if master is None else master
    count = weight.numel()
    _adam[(triton.cdiv(count, 4096),)](weight, gradient, given, first, second, count, 1e-5, master is not None, 4096)
