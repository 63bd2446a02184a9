"""The laws of traffic, for random selections on random layouts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.parallel import ExpertPlacement, GroupLayout, LayerTraffic, token_bytes
from moesim.parallel.counts import count_blocks
from moesim.parallel.placement import place_experts
from moesim.parallel.traffic import held_copies, stage_copies, tier_copies
from moesim.scenario import Contiguous

KINDS = ("per_expert", "per_rank", "per_node")


def make_layout(num_ranks: int, gpus_per_node: int, first: int = 0) -> GroupLayout:
    ranks = np.arange(first, first + num_ranks)
    return GroupLayout(ranks // gpus_per_node - first // gpus_per_node, ranks % gpus_per_node)


def traffic_of(ids_RTK: NDArray[np.int16], placement: ExpertPlacement, layout: GroupLayout) -> LayerTraffic:
    counts = count_blocks(ids_RTK, rank_of_expert_E=placement.rank_of_expert_E, node_of_rank_D=layout.node_of_rank_R)
    none_B = np.zeros(1, dtype=np.int64)
    return LayerTraffic.of(
        rows_BRE=counts.rows_SE[None],
        rank_copies_BRD=counts.rank_copies_SD[None],
        node_copies_BRJ=counts.node_copies_SJ[None],
        layout=layout,
        routed_rows_B=np.array([(ids_RTK >= 0).sum()]),
        dropped_rows_B=none_B,
        padded_rows_B=none_B,
    )


def random_ids(seed: int, *, ranks: int, experts: int, top_k: int, tokens: int = 30) -> NDArray[np.int16]:
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(ranks, tokens, experts)) + rng.normal(size=experts)
    ids = np.argsort(-keys, axis=-1)[..., :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < 0.1] = -1
    return ids


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.int16], ExpertPlacement, GroupLayout]:
    gpus = draw(st.sampled_from([1, 2, 3, 4]))
    ranks = draw(st.integers(1, 10))
    experts = ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(6, experts)))
    layout = make_layout(ranks, gpus, draw(st.integers(0, gpus - 1)))
    ids = random_ids(draw(st.integers(0, 9999)), ranks=ranks, experts=experts, top_k=top_k)
    return ids, place_experts(Contiguous(), num_experts=experts, num_ranks=ranks), layout


@settings(max_examples=40)
@given(cases())
def test_counts_against_sets(case: tuple[NDArray[np.int16], ExpertPlacement, GroupLayout]) -> None:
    ids_RTK, placement, layout = case
    traffic = traffic_of(*case)
    counted = traffic.rows_BRE[0], traffic.rank_copies_BRD[0], traffic.node_copies_BRJ[0]
    rows, ranks, nodes = map(np.zeros_like, counted)
    for source, tokens in enumerate(ids_RTK.tolist()):
        for token in tokens:
            experts = [expert for expert in token if expert >= 0]
            reached = {int(placement.rank_of_expert_E[expert]) for expert in experts}
            for expert in experts:
                rows[source, expert] += 1
            for rank in reached:
                ranks[source, rank] += 1
            for node in {int(layout.node_of_rank_R[rank]) for rank in reached}:
                nodes[source, node] += 1
    for found, expected in zip(counted, (rows, ranks, nodes), strict=True):
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=40)
@given(cases())
def test_laws_of_deduplication(case: tuple[NDArray[np.int16], ExpertPlacement, GroupLayout]) -> None:
    ids_RTK, placement, layout = case
    traffic = traffic_of(*case)
    tokens, top_k = ids_RTK.shape[1:]
    tiers = {kind: tier_copies(traffic, placement, kind) for kind in KINDS}
    assert (traffic.rank_copies_BRD.sum(axis=2) <= tokens * min(top_k, layout.num_ranks)).all()
    assert tiers["per_node"].inter_node <= tiers["per_rank"].inter_node <= tiers["per_expert"].inter_node
    assert tiers["per_rank"].intra_node <= tiers["per_expert"].intra_node
    for kind in KINDS:
        stages = stage_copies(traffic, placement, kind)
        assert len(stages) == (2 if kind == "per_node" else 1)
        for copies_BRD in stages:
            assert not np.diag(copies_BRD[0]).any()
            assert (copies_BRD >= 0).all()
        assert sum(stages).sum() == pytest.approx(sum(tiers[kind]))


@settings(max_examples=30)
@given(cases())
def test_two_stages_deliver_every_copy(case: tuple[NDArray[np.int16], ExpertPlacement, GroupLayout]) -> None:
    """Each rank holds the copies it needs: sent straight, fanned out to it, or its own as the relay."""
    _, placement, layout = case
    traffic = traffic_of(*case)
    (first_RD,), (fan_out_RD,) = stage_copies(traffic, placement, "per_node")
    remote_RD = np.where(layout.same_node_RD, 0, traffic.rank_copies_BRD[0])
    for rank in range(layout.num_ranks):
        relayed_here = layout.relay_RJ[:, layout.node_of_rank_R[rank]] == rank
        kept_by_relay = remote_RD[relayed_here, rank].sum()
        assert fan_out_RD[:, rank].sum() + kept_by_relay == remote_RD[:, rank].sum()
    own_node_RJ = np.equal.outer(layout.node_of_rank_R, np.arange(layout.num_nodes))
    network_copies = np.where(own_node_RJ, 0, traffic.node_copies_BRJ[0]).sum()
    assert first_RD[~layout.same_node_RD].sum() == network_copies
    assert not fan_out_RD[~layout.same_node_RD].any()


def limited_ids(*, groups: int, limit: int, experts: int, top_k: int, ranks: int) -> NDArray[np.int16]:
    rng = np.random.default_rng(5)
    keys = rng.random((ranks, 200, groups, experts // groups))
    best = np.argsort(-keys.max(axis=-1), axis=-1)[..., :limit]
    masked = np.full_like(keys, -1.0)
    np.put_along_axis(masked, best[..., None], np.take_along_axis(keys, best[..., None], axis=2), axis=2)
    return np.argsort(-masked.reshape(ranks, 200, experts), axis=-1)[..., :top_k].astype(np.int16)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_copies_saturate_at_the_group_limit(limit: int) -> None:
    """Groups are ranks: at most M copies per token to ranks. Groups are nodes: at most M copies over the network."""
    placement, layout = place_experts(Contiguous(), num_experts=64, num_ranks=8), make_layout(8, 2)
    by_rank = traffic_of(limited_ids(groups=8, limit=limit, experts=64, top_k=6, ranks=8), placement, layout)
    assert (by_rank.rank_copies_BRD.sum(axis=2) <= 200 * limit).all()
    by_node = traffic_of(limited_ids(groups=4, limit=limit, experts=64, top_k=6, ranks=8), placement, layout)
    network_RD = np.where(layout.same_node_RD, 0, stage_copies(by_node, placement, "per_node")[0][0])
    assert (network_RD.sum(axis=1) <= 200 * limit).all()
    assert (by_node.node_copies_BRJ.sum(axis=2) <= 200 * limit).all()


def test_more_than_64_ranks_need_several_words() -> None:
    placement, layout = place_experts(Contiguous(), num_experts=260, num_ranks=130), make_layout(130, 1)
    ids = random_ids(3, ranks=130, experts=260, top_k=5, tokens=4)
    traffic = traffic_of(ids, placement, layout)
    expected = sum(len({expert // 2 for expert in token if expert >= 0}) for token in ids.reshape(-1, 5).tolist())
    assert traffic.rank_copies_BRD.sum() == traffic.node_copies_BRJ.sum() == expected


def test_rows_per_slot_follow_the_placement() -> None:
    placement = ExpertPlacement(np.array([[2, -1], [0, 1]]))
    ids = np.array([[[0], [2]], [[2], [1]]], dtype=np.int16)
    traffic = traffic_of(ids, placement, make_layout(2, 2))
    assert traffic.slot_rows_BDP(placement).tolist() == [[[2, 0], [1, 1]]]
    assert held_copies(traffic, placement, "per_expert").tolist() == [[[1, 1], [1, 1]]]


@settings(max_examples=30)
@given(cases())
def test_the_counterfactual_keeps_totals_and_has_no_imbalance(
    case: tuple[NDArray[np.int16], ExpertPlacement, GroupLayout],
) -> None:
    _, placement, layout = case
    traffic = traffic_of(*case)
    even = traffic.balanced(placement)
    sizes = np.bincount(layout.node_of_rank_R)
    for kind in ("per_expert", "per_rank"):
        ((before,), (after,)) = (stage_copies(t, placement, kind)[0] for t in (traffic, even))
        assert after.sum() == pytest.approx(before.sum())
        np.testing.assert_allclose(after.sum(axis=0), after.sum() / layout.num_ranks)
        np.testing.assert_allclose(after.sum(axis=1), after.sum() / layout.num_ranks)
        if len(set(sizes.tolist())) == 1:
            before_tiers, after_tiers = (tier_copies(t, placement, kind) for t in (traffic, even))
            np.testing.assert_allclose(after_tiers, before_tiers)
    np.testing.assert_allclose(even.rows_BRE.sum(axis=1), traffic.rows_BRE.sum() / placement.num_experts)
    np.testing.assert_allclose(np.trace(even.rank_copies_BRD[0]), np.trace(traffic.rank_copies_BRD[0]))
    assert even.node_copies_BRJ.sum() == pytest.approx(traffic.node_copies_BRJ.sum())


def test_padding_fills_every_expert() -> None:
    placement, layout = place_experts(Contiguous(), num_experts=8, num_ranks=4), make_layout(4, 2)
    traffic = traffic_of(random_ids(0, ranks=4, experts=8, top_k=2), placement, layout)
    capacity = int(traffic.rows_BRE.max()) + 1
    padded = traffic.pad(capacity, placement)
    assert (padded.rows_BRE == capacity).all()
    (empty,) = padded.padded_rows_B
    assert empty == 4 * 8 * capacity - traffic.rows_BRE.sum()
    assert padded.rank_copies_BRD.sum() == traffic.rank_copies_BRD.sum() + empty
    assert padded.node_copies_BRJ.sum() == traffic.node_copies_BRJ.sum() + empty
    tiers = [tier_copies(padded, placement, kind).inter_node for kind in KINDS]
    assert tiers[2] <= tiers[1] <= tiers[0]


def test_bytes_of_a_token() -> None:
    assert token_bytes(7168, "bf16") == 14336
    assert token_bytes(7168, "fp8") == 7168 + 4 * 56
    assert token_bytes(100, "fp8") == 104


def test_deepep_accounting_counts_the_own_node() -> None:
    """facts: alltoall_h800, deepep_normal_implied_time: 3.621 nodes per token at 4 groups, 32 ranks, top-8 of 256."""
    placement, layout = place_experts(Contiguous(), num_experts=256, num_ranks=32), make_layout(32, 8)
    rng = np.random.default_rng(0)
    ids = np.argsort(-np.abs(rng.normal(size=(32, 300, 256))), axis=-1)[..., :8].astype(np.int16)
    traffic = traffic_of(ids, placement, layout)
    assert traffic.node_copies_BRJ.sum() / (32 * 300) == pytest.approx(3.621, abs=0.02)
