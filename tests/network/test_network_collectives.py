"""Collectives and dispatch implementations: volumes, what binds them, and what they refuse."""

from itertools import pairwise

import numpy as np
import pytest
from network_cases import make_fabric, star

from moesim.errors import UserError
from moesim.network import (
    NetworkParameters,
    all_gather_seconds,
    all_reduce_seconds,
    build_fabric,
    crowded,
    deepep_bytes,
    load_parameters,
    prepare_combine,
    prepare_dispatch,
    reduce_scatter_seconds,
    send_recv_seconds,
)
from moesim.network.collectives import _Hops, ring_use
from moesim.network.dispatch import _overhead
from moesim.network.parameters import Protocol
from moesim.scenario.cluster import Cluster, Pool
from moesim.scenario.dispatch import DISPATCH

GIB = 2.0**30


def test_ring_moves_its_volume_at_the_slowest_link() -> None:
    """2 (n-1)/n bytes over NVLink; across nodes all NICs of a node together carry the ring."""
    parameters = NetworkParameters()
    one = all_reduce_seconds(make_fabric(1), None, 16 * GIB, algorithm="ring").seconds
    assert one == pytest.approx(2 * 7 / 8 * 16 * GIB / (450e9 * parameters.nvlink_efficiency), rel=0.01)
    two = all_reduce_seconds(make_fabric(2), None, 16 * GIB, algorithm="ring").seconds
    nics = min(8 * 50e9 * parameters.nic_efficiency, 450e9 * parameters.nvlink_efficiency)
    assert two == pytest.approx(2 * 15 / 16 * 16 * GIB / nics, rel=0.01)
    lone = all_reduce_seconds(make_fabric(2), [0, 8], GIB, algorithm="ring").seconds
    assert lone == pytest.approx(GIB / (50e9 * parameters.nic_efficiency), rel=0.01)


def test_halves_of_a_ring_are_an_all_reduce() -> None:
    fabric = make_fabric(2)
    call = fabric.parameters.ring.call_seconds
    halves = reduce_scatter_seconds(fabric, None, GIB).seconds + all_gather_seconds(fabric, None, GIB).seconds
    assert halves - call == pytest.approx(all_reduce_seconds(fabric, None, GIB, algorithm="ring").seconds)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "nvls", "hierarchical", "auto"])
def test_more_bytes_take_longer(algorithm: str) -> None:
    fabric = make_fabric(1 if algorithm == "nvls" else 2)
    seconds = [all_reduce_seconds(fabric, None, 2.0**k, algorithm=algorithm).seconds for k in range(10, 34)]
    assert (np.diff(seconds) > 0).all()


def test_auto_is_the_fastest_that_the_ranks_allow() -> None:
    fabric = make_fabric(2)
    for ranks in (range(8), range(16), [0, 8], range(2)):
        for num_bytes in (2.0**12, 2.0**20, 2.0**32):
            auto = all_reduce_seconds(fabric, list(ranks), num_bytes)
            for algorithm in ("ring", "tree"):
                assert auto.seconds <= all_reduce_seconds(fabric, list(ranks), num_bytes, algorithm=algorithm).seconds
            assert auto.source
    assert all_reduce_seconds(fabric, list(range(8)), GIB).algorithm == "nvls"
    assert all_reduce_seconds(make_fabric(1, gpu="a100"), None, GIB).algorithm != "nvls"


def test_a_hierarchical_sum_is_two_halves_in_each_node_and_a_ring_of_shares_between_them() -> None:
    """Every rank has a NIC of its own, so that all rings between the nodes take as long as one alone."""
    for nodes in (2, 4):
        fabric, node, size = make_fabric(nodes), list(range(8)), 2.0**40
        inside = reduce_scatter_seconds(fabric, node, size).seconds + all_gather_seconds(fabric, node, size).seconds
        between = all_reduce_seconds(fabric, list(range(0, 8 * nodes, 8)), size / 8, algorithm="ring").seconds
        found = all_reduce_seconds(fabric, None, size, algorithm="hierarchical").seconds
        assert found == pytest.approx(inside + between, rel=1e-3)


def test_a_chunk_goes_round_by_all_hops_but_the_shortest_and_up_a_tree_by_its_levels() -> None:
    assert _Hops(between=10.0, inside=1.0, nodes=2, ranks=16).ring == 2 * 10 + 14 * 1 - 1
    assert _Hops(between=10.0, inside=1.0, nodes=4, ranks=4).ring == 3 * 10
    assert _Hops(between=10.0, inside=1.0, nodes=1, ranks=8).ring == 7
    assert _Hops(between=10.0, inside=1.0, nodes=4, ranks=32).tree == 2 * 10 + 7 * 1


def test_a_rank_posts_the_messages_that_it_sends() -> None:
    protocol = Protocol(call_seconds=100.0, message_seconds=1.0, transition_seconds=7.0, source="a test")
    copies_SRR = np.array([[[5.0, 3.0, 2.0], [0.0, 4.0, 0.0], [1.0, 0.0, 0.0]]])  # own ones are no messages
    (seconds_R,) = _overhead(protocol, [copies_SRR, copies_SRR], 1e15)
    assert seconds_R == pytest.approx([100 + 10 + 7, 100, 100 + 2 + 7])


def test_trees_win_small_messages_over_many_nodes() -> None:
    fabric = make_fabric(32)
    heads = list(range(0, 256, 8))
    assert all_reduce_seconds(fabric, heads, 1024.0).algorithm == "tree"
    assert all_reduce_seconds(fabric, heads, 8 * GIB).algorithm == "ring"


def test_collectives_refuse_what_ranks_cannot_run() -> None:
    fabric = make_fabric(2)
    with pytest.raises(UserError, match="NVSwitch"):
        all_reduce_seconds(fabric, None, GIB, algorithm="nvls")
    with pytest.raises(UserError, match="several nodes"):
        all_reduce_seconds(fabric, list(range(8)), GIB, algorithm="hierarchical")


def test_nothing_to_do_takes_no_time() -> None:
    fabric = make_fabric(1)
    assert all_reduce_seconds(fabric, [3], GIB).seconds == 0
    assert all_gather_seconds(fabric, None, 0.0).seconds == 0
    assert send_recv_seconds(fabric, 2, 2, GIB).seconds == 0


def test_one_message_runs_at_its_route() -> None:
    fabric = make_fabric(2)
    parameters = fabric.parameters
    assert send_recv_seconds(fabric, 0, 8, GIB).seconds == pytest.approx(
        GIB / (50e9 * parameters.nic_efficiency) + 2 * parameters.nic_latency + parameters.point_to_point.call_seconds
    )


def stages(nodes: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Copies of random tokens per rank and, deduplicated, per node: the two stages, and the counts behind them."""
    ranks = nodes * 4
    chosen_TR = rng.random((200 * ranks, ranks)) < 0.4  # the ranks that each token goes to
    source_T = np.repeat(np.arange(ranks), 200)
    node = np.arange(ranks) // 4
    rank_copies = np.stack([chosen_TR[source_T == r].sum(axis=0) for r in range(ranks)])
    to_node_TM = np.stack([chosen_TR[:, node == m].any(axis=1) for m in range(nodes)], axis=1)
    node_copies = np.stack([to_node_TM[source_T == r].sum(axis=0) for r in range(ranks)])
    first, fan_out = np.zeros((2, ranks, ranks))
    for r in range(ranks):
        for m in range(nodes):
            relay, members = m * 4 + r % 4, np.flatnonzero(node == m)
            if m == node[r]:
                first[r, members] += rank_copies[r, members]
            else:
                first[r, relay] += node_copies[r, m]
                fan_out[relay, members] += rank_copies[r, members]
    off = 1 - np.eye(ranks)
    return [first * off, fan_out * off], rank_copies, node_copies


def test_hierarchical_sends_one_copy_per_node_over_the_network() -> None:
    fabric = make_fabric(3, gpus_per_node=4)
    two, rank_copies, node_copies = stages(3, np.random.default_rng(0))
    far_RM = (np.arange(12) // 4)[:, None] != np.arange(3)
    same_RR = (np.arange(12) // 4)[:, None] == np.arange(12) // 4
    both = prepare_dispatch(fabric, two, token_bytes=100.0, algorithm="hierarchical")
    assert both.traffic.inter_node_bytes == pytest.approx(100 * node_copies[far_RM].sum())
    direct = prepare_dispatch(fabric, [rank_copies], token_bytes=100.0)
    assert direct.traffic.inter_node_bytes == pytest.approx(100 * rank_copies[~same_RR].sum())
    assert both.traffic.inter_node_bytes < direct.traffic.inter_node_bytes
    back = prepare_combine(fabric, two, token_bytes=100.0, algorithm="hierarchical")
    assert back.traffic.inter_node_bytes == pytest.approx(both.traffic.inter_node_bytes)
    assert back.traffic.intra_node_bytes == pytest.approx(both.traffic.intra_node_bytes)


def test_fan_out_waits_for_the_network() -> None:
    """One token's way: rank 0 to the relay 4 on the other node, from there to rank 6; 6 is done after 4 has it."""
    fabric = make_fabric(2, gpus_per_node=4)
    first, fan_out = np.zeros((2, 8, 8))
    first[0, 4], fan_out[4, 6] = 1e4, 1.0
    prepared = prepare_dispatch(fabric, [first, fan_out], token_bytes=1e4, algorithm="hierarchical")
    assert prepared.alone_R[6] == pytest.approx(prepared.alone_R[4])
    assert prepared.alone_R[1] < prepared.alone_R[6] / 2


@pytest.mark.parametrize("model", ["ports", "fluid", "exact"])
def test_every_algorithm_runs_with_every_model(model: str) -> None:
    fabric = make_fabric(3, gpus_per_node=4)
    two, rank_copies, _ = stages(3, np.random.default_rng(1))
    start_R = np.random.default_rng(2).random(12) * 1e-6
    for algorithm, copies in (("direct", [rank_copies]), ("low_latency", [rank_copies]), ("hierarchical", two)):
        prepared = prepare_dispatch(fabric, copies, token_bytes=7392.0, algorithm=algorithm, model=model)
        reference = prepare_dispatch(fabric, copies, token_bytes=7392.0, algorithm=algorithm, model="exact")
        np.testing.assert_allclose(prepared.finish(start_R), reference.finish(start_R), rtol=0.03)
        assert algorithm in prepared.source and prepared.sm_share == 0.0


@pytest.mark.parametrize("call", [all_reduce_seconds, all_gather_seconds, reduce_scatter_seconds])
def test_calls_across_nodes_begin_later_with_every_node_and_lose_what_a_node_loses(call) -> None:
    """Few hops of a ring are NICs'; no bandwidth rises with nodes, and every size takes longer than a smaller one."""
    sizes = 2.0 ** np.arange(10, 34)
    fabrics = {nodes: make_fabric(nodes) for nodes in (2, 4, 16, 64)}
    seconds = {
        nodes: np.array([call(fabric, None, size).seconds for size in sizes]) for nodes, fabric in fabrics.items()
    }
    for fewer, more in pairwise(seconds):
        assert (seconds[fewer] < seconds[more]).all()
    for found in seconds.values():
        assert (np.diff(found) > 0).all()
    rails = [call(fabrics[16], np.arange(0, 128, 8), 1024.0).seconds, call(fabrics[16], None, 1024.0).seconds]
    hop = 2 * fabrics[16].parameters.nic_latency
    assert rails[1] - rails[0] < 0.5 * 2 * 112 * hop, "the hops of 112 ranks more are not NICs'"


@pytest.mark.parametrize("model", ["ports", "fluid", "exact"])
def test_stages_share_the_port_that_both_use(model: str) -> None:
    """1 GB to one rank and, at the same time, 1 GB forwarded to another, out of one port of 1 GB/s."""
    first, fan_out = np.zeros((2, 3, 3))
    first[0, 1] = fan_out[0, 2] = 1.0
    for prepare in (prepare_dispatch, prepare_combine):
        prepared = prepare(star(3), [first, fan_out], token_bytes=1e9, algorithm="hierarchical", model=model)
        assert prepared.alone_R[0] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("algorithm", [name for name, facts in DISPATCH.items() if not facts.gathers])
@pytest.mark.parametrize("model", ["ports", "fluid", "exact"])
def test_every_algorithm_runs_over_links_of_ones_own(algorithm: str, model: str) -> None:
    """A star: the busiest port has three quarters of the rows, at its rate or less; rows that stay take no link."""
    copies_RR = np.full((4, 4), 100.0)
    stages = [copies_RR * (1 - np.eye(4)), np.zeros((4, 4))][: 2 if DISPATCH[algorithm].fans_out else 1]
    for prepare in (prepare_dispatch, prepare_combine):
        seconds = prepare(
            star(4), stages, token_bytes=1e7, algorithm=algorithm, own_copies_R=copies_RR.diagonal(), model=model
        ).alone_R.max()  # fmt: skip
        assert 3.0 <= seconds < 3.2


def test_low_latency_goes_over_nics_inside_a_node_too() -> None:
    fabric = make_fabric(1)
    copies = [np.full((8, 8), 128.0)]
    slow, fast = (prepare_dispatch(fabric, copies, token_bytes=7392.0, algorithm=a) for a in ("low_latency", "direct"))
    tier_X = np.array(fabric.tier_X)
    assert slow.traffic.link_bytes_X[tier_X == "nvlink"].sum() == 0
    assert fast.traffic.link_bytes_X[tier_X != "nvlink"].sum() == 0
    header = DISPATCH["low_latency"].header_bytes
    assert slow.traffic.intra_node_bytes == pytest.approx(8 * 7 * 128 * (7392 + header))


def test_low_latency_messages_do_not_wait_for_their_receivers() -> None:
    fabric = make_fabric(1)
    copies = np.zeros((8, 8))
    copies[0, 1] = 100.0
    start_R = np.zeros(8)
    start_R[1] = 1.0
    done = {
        a: prepare_dispatch(fabric, [copies], token_bytes=1e4, algorithm=a).finish(start_R)
        for a in ("direct", "low_latency")
    }
    assert done["low_latency"][0] < 1e-2 < 1.0 < done["direct"][0]


def test_deduplication_and_algorithm_must_fit() -> None:
    fabric = make_fabric(2, gpus_per_node=4)
    two, rank_copies, _ = stages(2, np.random.default_rng(0))
    with pytest.raises(UserError, match="per_node needs algorithm: hierarchical"):
        prepare_dispatch(fabric, two, token_bytes=1.0)
    with pytest.raises(UserError, match="needs deduplicate: per_node"):
        prepare_dispatch(fabric, [rank_copies], token_bytes=1.0, algorithm="hierarchical")


def test_deepep_accounting_of_the_published_example() -> None:
    """EP8: 5.296 ranks per token, 4096 tokens of 7168 values: 160.4 MB in fp8, 311.0 MB in bf16."""
    assert deepep_bytes(counted_copies=5.296 * 4096, hidden=7168, fp8=True) == pytest.approx(160.4e6, rel=1e-3)
    assert deepep_bytes(counted_copies=5.296 * 4096, hidden=7168, fp8=False) == pytest.approx(311.0e6, rel=1e-3)


def test_parameters_can_be_replaced_by_measured_ones() -> None:
    measured = load_parameters({"ring": {"call_seconds": 1e-3}, "nic_efficiency": 0.5}, source="two H200, NCCL 2.29")
    cluster = Cluster(pools=(Pool(gpu="h200", nodes=2),))
    fabric = build_fabric(cluster, parameters=measured)
    estimate = all_reduce_seconds(fabric, [0, 8], GIB, algorithm="ring")
    assert estimate.source.startswith("two H200, NCCL 2.29; links between nodes: ")
    assert estimate.seconds == pytest.approx(1e-3 + GIB / 25e9, rel=0.01)


@pytest.mark.parametrize(
    "values", [{"rings": {}}, {"ring": {"speed": 1.0}}, {"ring": {"call_seconds": -1}}, {"ring": 3.0}]
)
def test_wrong_parameters_are_named(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"profile\.yaml: .*network parameter"):
        load_parameters(values, source="profile.yaml")


def test_rings_that_run_at_once_share_the_links_that_they_meet_on() -> None:
    """Eight pairs of ranks, one pair a rail, through the same uplink at 4:1: each at a quarter of a NIC."""
    fabric = make_fabric(2, preset="leaf_spine", pod_nodes=1, oversubscription=4.0)
    pairs = [np.array([rail, rail + 8]) for rail in range(8)]
    alone = reduce_scatter_seconds(fabric, pairs[0], 1e9).seconds
    together = reduce_scatter_seconds(crowded(fabric, pairs), pairs[0], 1e9).seconds
    assert together == pytest.approx(4 * alone, rel=0.01)
    use = ring_use(fabric, pairs, together)
    capacity_C = fabric.capacity_X[fabric.common_links_X]
    np.testing.assert_allclose(use.bytes_SX[0].max(), capacity_C.max() * together, rtol=0.01)
    one_leaf_a_rail = make_fabric(2, oversubscription=4.0)
    assert crowded(one_leaf_a_rail, pairs).capacity_X is one_leaf_a_rail.capacity_X


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_bytes_that_are_none_are_refused(wrong: float) -> None:
    fabric = make_fabric(1)
    for call in (all_reduce_seconds, all_gather_seconds, reduce_scatter_seconds):
        with pytest.raises(UserError, match="must be a finite number that is not negative"):
            call(fabric, None, wrong)
    with pytest.raises(UserError, match="must be a finite number"):
        send_recv_seconds(fabric, 0, 1, wrong)


def test_ranks_that_are_not_there_are_named() -> None:
    fabric = make_fabric(1)
    with pytest.raises(UserError, match="use some of 0 to 7"):
        send_recv_seconds(fabric, 0, 8, 1e6)
    with pytest.raises(UserError, match="use some of 0 to 7"):
        all_reduce_seconds(fabric, [-1, 2], 1e6)


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(UserError, match='"star" is unknown; use auto, ring'):
        all_reduce_seconds(make_fabric(1), None, 1e6, algorithm="star")
