"""The calls that are timed for gemm, grouped_gemm and attention, in the layouts that training gives them.

Legend: m tokens, k and n the sides of the forward weight, E local experts, B batch, S sequence, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moesim.kernels.benchmarks.buffers import Pool, Rotation, keep_outputs
from moesim.kernels.benchmarks.later_shapes import Shape
from moesim.kernels.benchmarks.timing import Call
from moesim.kernels.families import kernel_of

Prepared = tuple[Call, dict[str, Any]]  # the call to time, and facts about it for the profile row


def _rotating(make: Callable[[], Any], compute: Callable[[Any], Any], *, bytes_per_call: float, beyond: float) -> Call:
    operands = Rotation(make, bytes_per_call=bytes_per_call, beyond=beyond)
    return keep_outputs(lambda index: compute(operands(index)), sets=len(operands))


def prepare_other_layout(row: Shape, pool: Pool, beyond: float) -> Prepared:
    """`of` with its weight stored the other way: [k, n] of a dense GEMM, [E, n, k] of experts."""
    of = row["of"]
    prepared = prepare_gemm if of["family"] == "gemm" else prepare_grouped_gemm
    return prepared(of, pool, beyond, other_layout=True)


def prepare_gemm(shape: Shape, pool: Pool, beyond: float, *, other_layout: bool = False) -> Prepared:
    """`F.linear` with weight [n, k], and the two GEMMs of its backward."""
    m, k, n = shape["m"], shape["k"], shape["n"]
    direction = shape["direction"]
    moved = float(kernel_of({"family": "gemm"} | shape).moved_bytes)
    if shape["dtype"] == "fp8":
        return _prepare_scaled(m, k, n, pool, beyond, moved), {}

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        if direction == "wgrad":
            return pool.take(m, n), pool.take(m, k)
        weight = pool.take(k, n).t() if other_layout else pool.take(n, k)
        return pool.take(m, k if direction == "forward" else n), weight

    def compute(operands: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        a, b = operands
        if direction == "forward":
            return F.linear(a, b)
        return a @ b if direction == "dgrad" else a.t() @ b

    return _rotating(make, compute, bytes_per_call=moved, beyond=beyond), {}


def _prepare_scaled(m: int, k: int, n: int, pool: Pool, beyond: float, moved: float) -> Call:
    """torch's scaled matmul: e4m3 operands, one scale each, bf16 out, fast accumulation as in training's forward."""
    fp8 = torch.float8_e4m3fn
    one = torch.ones((), device=pool.device)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return pool.take(m, k, dtype=fp8), pool.take(n, k, dtype=fp8).t()

    def compute(operands: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        a, b = operands
        out = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        assert isinstance(out, torch.Tensor)
        return out

    return _rotating(make, compute, bytes_per_call=moved, beyond=beyond)


def prepare_grouped_gemm(shape: Shape, pool: Pool, beyond: float, *, other_layout: bool = False) -> Prepared:
    """`grouped_mm` of rows sorted by expert with weights [E, k, n], and the two GEMMs of its backward."""
    rows_E, k, n = shape["rows_per_expert"], shape["k"], shape["n"]
    experts, rows, direction = len(rows_E), sum(rows_E), shape["direction"]
    offsets_E = torch.tensor(rows_E, device=pool.device).cumsum(0).to(torch.int32)
    moved = float(kernel_of({"family": "grouped_gemm"} | shape).moved_bytes)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        if direction == "wgrad":
            return pool.take(rows, k).t(), pool.take(rows, n)
        weights = pool.take(experts, n, k).transpose(-2, -1) if other_layout else pool.take(experts, k, n)
        if direction == "forward":
            return pool.take(rows, k), weights
        return pool.take(rows, n), weights.transpose(-2, -1)

    def compute(operands: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.grouped_mm(*operands, offs=offsets_E)

    return _rotating(make, compute, bytes_per_call=moved, beyond=beyond), {}


_BACKENDS = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


def prepare_attention(shape: Shape, pool: Pool, beyond: float) -> Prepared:
    """`scaled_dot_product_attention` on [B, S, H, D] tensors seen as [B, H, S, D], with torch's backend."""
    batch, sequence, heads, kv_heads = shape["batch"], shape["sequence"], shape["heads"], shape["kv_heads"]
    head_dim, value_dim, causal = shape["head_dim"], shape["value_dim"], shape["causal"]
    grouped = kv_heads != heads
    moved = float(kernel_of({"family": "attention"} | shape).moved_bytes)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def inputs() -> tuple[torch.Tensor, ...]:
        widths = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
        return tuple(
            pool.take(batch, sequence, count, width).transpose(1, 2).detach().requires_grad_()
            for count, width in widths
        )

    def make() -> tuple[Any, ...]:
        operands = inputs()
        if shape["direction"] == "forward":
            return operands
        out = attend(operands[0], operands[1], operands[2])
        return out, operands, pool.take(batch, sequence, heads, value_dim).transpose(1, 2)

    def compute(operands: tuple[Any, ...]) -> Any:
        if shape["direction"] == "forward":
            return attend(*operands).detach()
        out, leaves, gradient = operands
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    choose: Any = torch._fused_sdp_choice
    choice = choose(*inputs(), is_causal=causal, enable_gqa=grouped)
    call = _rotating(make, compute, bytes_per_call=moved, beyond=beyond)
    return call, {"backend": _BACKENDS.get(int(choice), str(choice))}
