"""Capacity and dropping: budgets hold, the protected stay, the lowest affinity goes first."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import shape_of
from torch import Tensor

from moesim.routing.balance import device_budget, expert_capacity, keep_mask, place_in_bin
from moesim.scenario.routing import Capacity, DeviceCapacity, ExpertCapacity, NoCapacity

SHAPE = shape_of("deepseek_v2")  # 16 experts, top-4, 4 devices
SEQUENCES, LENGTH = 10, 8
T = SEQUENCES * LENGTH


def skewed_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Ids [T, K] that favour low experts, one in ten of them -1, and affinities with some ties."""
    generator = torch.Generator().manual_seed(seed)
    weights_TE = torch.linspace(3, 0, 16).exp().expand(T, 16)
    ids_TK = torch.multinomial(weights_TE, 4, generator=generator)
    affinities_TK = torch.randint(0, 40, ids_TK.shape, generator=generator) / 40
    none_TK = torch.rand(ids_TK.shape, generator=generator) < 0.1
    return ids_TK.masked_fill(none_TK, -1), affinities_TK


def keep(capacity: Capacity, seed: int, protected_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids_TK, affinities_TK = skewed_rows(seed)
    sequence_T = torch.arange(SEQUENCES).repeat_interleave(LENGTH)
    kept_TK = keep_mask(capacity, ids_TK, affinities_TK, router=SHAPE, sequence_T=sequence_T, protected_S=protected_S)
    return ids_TK, affinities_TK, kept_TK


NONE_PROTECTED = torch.zeros(SEQUENCES, dtype=torch.bool)


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.7, 1.0, 1.25, 4.0]), st.sampled_from(["position", "score"]))
@settings(max_examples=25)
def test_expert_capacity_keeps_the_first_or_the_best(seed: int, factor: float, by: str) -> None:
    ids_TK, affinities_TK, kept_TK = keep(ExpertCapacity(kind="expert", factor=factor, by=by), seed, NONE_PROTECTED)
    capacity = math.ceil(factor * 4 * T / 16)
    assert expert_capacity(factor=factor, top_k=4, num_tokens=T, num_experts=16) == capacity
    assert not kept_TK[ids_TK < 0].any()
    ids, kept, affinities = (x_TK.flatten().tolist() for x_TK in (ids_TK, kept_TK, affinities_TK))
    for expert in range(16):
        rows = [row for row, chosen in enumerate(ids) if chosen == expert]
        if by == "score":
            rows.sort(key=lambda row: -affinities[row])  # stable: ties stay in token order
        assert {row for row in rows if kept[row]} == set(rows[:capacity])


@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.8, 1.0, 1.5]), st.integers(0, SEQUENCES))
@settings(max_examples=25)
def test_device_capacity_against_the_plain_rule(seed: int, factor: float, num_protected: int) -> None:
    protected_S = torch.arange(SEQUENCES) < num_protected
    ids_TK, affinities_TK, kept_TK = keep(DeviceCapacity(kind="device", factor=factor), seed, protected_S)
    budget = math.floor(factor * int((ids_TK >= 0).sum()) / 4)
    ids, kept, affinities = (x_TK.flatten().tolist() for x_TK in (ids_TK, kept_TK, affinities_TK))
    protected = protected_S.repeat_interleave(LENGTH * 4).tolist()
    for device in range(4):
        rows = [row for row, chosen in enumerate(ids) if chosen >= 0 and chosen // 4 == device]
        safe = [row for row in rows if protected[row]]
        others = sorted((row for row in rows if not protected[row]), key=lambda row: -affinities[row])
        kept_rows = {row for row in rows if kept[row]}
        assert kept_rows == {*safe, *others[: max(0, budget - len(safe))]}
        assert len(kept_rows) <= max(budget, len(safe))
    assert not kept_TK[ids_TK < 0].any()


def test_protected_rows_alone_may_exceed_the_budget() -> None:
    ids_TK, _, kept_TK = keep(DeviceCapacity(kind="device", factor=0.1), 0, ~NONE_PROTECTED)
    assert torch.equal(kept_TK, ids_TK >= 0)
    assert torch.bincount(ids_TK[kept_TK] // 4).max() > device_budget(
        factor=0.1, num_rows=(ids_TK >= 0).sum(), num_devices=4
    )


@pytest.mark.parametrize(
    "capacity", [NoCapacity(), ExpertCapacity(kind="expert", factor=16.0), DeviceCapacity(kind="device", factor=4.0)]
)
def test_enough_capacity_drops_nothing(capacity: Capacity) -> None:
    ids_TK, _, kept_TK = keep(capacity, 1, NONE_PROTECTED)
    assert torch.equal(kept_TK, ids_TK >= 0)


def test_places_count_the_rows_before() -> None:
    bins, priority = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([0.5, 1.0, 0.9, 0.5, 2.0])
    assert place_in_bin(bins, priority, num_bins=2).tolist() == [1, 1, 0, 2, 0]
