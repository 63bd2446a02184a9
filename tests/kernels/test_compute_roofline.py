"""Laws of the roofline: monotone, vectorised, FLOPs conserved between directions."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.kernels import (
    MEMORY_KINDS,
    SOURCES,
    Attention,
    Estimate,
    Gemm,
    GroupedGemm,
    MemoryBound,
    Roofline,
    kernel_model,
    memory_bytes,
    total,
    weakest,
)
from moesim.kernels.families import GEMM_DIRECTIONS
from moesim.scenario import gpu_spec

sizes = st.integers(1, 20_000)
ATTENTION = {"heads": 16, "kv_heads": 4, "head_dim": 128, "value_dim": 128}


@pytest.fixture(scope="module")
def roofline() -> Roofline:
    return Roofline(gpu_spec("h200"))


@settings(max_examples=40)
@given(m=sizes, k=sizes, n=sizes, factor=st.integers(1, 5))
def test_gemm_never_gets_faster_with_size_and_never_beats_the_datasheet(m: int, k: int, n: int, factor: int) -> None:
    spec = gpu_spec("h200")
    roofline = Roofline(spec)
    small = roofline.seconds(Gemm(m=m, k=k, n=n))
    for larger in ({"m": m * factor}, {"k": k * factor}, {"n": n * factor}):
        assert roofline.seconds(Gemm(**({"m": m, "k": k, "n": n} | larger))).seconds >= small.seconds
    assert small.seconds >= 2.0 * m * k * n / spec.peak_flops["bf16"]
    assert small.seconds >= roofline.host.kernel_floor
    assert small.source == "roofline"


@settings(max_examples=30)
@given(rows=st.lists(st.lists(st.integers(0, 500), min_size=4, max_size=4), min_size=1, max_size=5))
def test_vectors_equal_scalar_calls(rows: list[list[int]]) -> None:
    roofline = Roofline(gpu_spec("h200"))
    together = roofline.seconds(GroupedGemm(rows_per_expert=rows, k=512, n=768))
    alone = [roofline.seconds(GroupedGemm(rows_per_expert=row, k=512, n=768)).seconds for row in rows]
    assert np.array_equal(together.seconds, alone)
    m = np.array([1, 77, 4096])
    gemms = [roofline.seconds(Gemm(m=int(value), k=512, n=768)).seconds for value in m]
    assert np.array_equal(roofline.seconds(Gemm(m=m, k=512, n=768)).seconds, gemms)
    moved = np.array([1e3, 1e9])
    copies = [roofline.seconds(MemoryBound(kind="copy", bytes=float(value))).seconds for value in moved]
    assert np.array_equal(roofline.seconds(MemoryBound(kind="copy", bytes=moved)).seconds, copies)
    lengths = np.array([512, 4096])
    shapes = [roofline.seconds(Attention(batch=2, sequence=int(value), **ATTENTION)).seconds for value in lengths]
    assert np.array_equal(roofline.seconds(Attention(batch=2, sequence=lengths, **ATTENTION)).seconds, shapes)


def test_backward_of_a_gemm_has_twice_the_flops_of_its_forward() -> None:
    whole = [Gemm(300, 512, 768, direction=direction).flops for direction in GEMM_DIRECTIONS]
    in_two = [GroupedGemm([100, 200], 512, 768, direction=direction).flops for direction in GEMM_DIRECTIONS]
    for forward, dgrad, wgrad in (whole, in_two):
        assert dgrad + wgrad == 2 * forward


def test_causal_attention_is_half_and_backward_two_and_a_half_times() -> None:
    full = Attention(batch=2, sequence=1024, **ATTENTION, causal=False)
    assert replace(full, causal=True).flops == full.flops / 2
    assert replace(full, direction="backward").flops == full.flops * 2.5


@pytest.mark.parametrize("direction", ["forward", "dgrad"])
def test_empty_experts_move_no_bytes(direction: Literal["forward", "dgrad"]) -> None:
    few, more = (GroupedGemm(rows, 512, 768, direction=direction) for rows in ([100, 50], [100, 0, 0, 50]))
    assert few.moved_bytes == more.moved_bytes


def test_wgrad_writes_the_gradient_of_every_expert() -> None:
    few, more = (GroupedGemm(rows, 512, 768, direction="wgrad") for rows in ([100, 50], [100, 0, 0, 50]))
    assert more.moved_bytes - few.moved_bytes == 2 * 2 * 512 * 768


def test_fp8_is_refused_by_a_gpu_without_it() -> None:
    with pytest.raises(UserError, match="fp8"):
        kernel_model("a100", "roofline").seconds(Gemm(m=64, k=64, n=64, dtype="fp8"))


def test_unknown_memory_kind_is_refused(roofline: Roofline) -> None:
    with pytest.raises(UserError, match="rms_norm"):
        roofline.seconds(MemoryBound(kind="rmsnorm", bytes=1e6))
    with pytest.raises(UserError, match="rms_norm"):
        memory_bytes("rmsnorm", rows=1)


def test_memory_bytes_are_additive_in_rows() -> None:
    for kind in MEMORY_KINDS:
        parts = memory_bytes(kind, rows=[3, 5], width=64)
        assert parts.sum() == memory_bytes(kind, rows=8, width=64)


def test_totals_carry_the_weakest_source() -> None:
    assert weakest(*SOURCES) == SOURCES[-1]
    both = total(Estimate(1.0, "measured"), Estimate(np.array([1.0, 2.0]), "extrapolated"))
    assert both.source == "extrapolated"
    assert np.array_equal(both.seconds, [2.0, 3.0])
