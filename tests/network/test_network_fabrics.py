"""Fabrics: every preset routes over links that are there, degradations bite where they should, mistakes are named."""

import itertools
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from network_cases import make_fabric, rank_finish, skewed_bytes

from moesim.errors import UserError
from moesim.network import Fabric, describe, lower_bound, prepare_dispatch, send_recv_seconds, transfer_times
from moesim.network import build_fabric as build
from moesim.network.contention import common_use, path_rates
from moesim.network.flows import build_flows, ladder_link_bytes, link_bytes, make_demand
from moesim.scenario.cluster import FABRICS, Cluster, FabricKind, Link, Pool
from moesim.scenario.cluster import Fabric as Section

PRESETS: list[dict[str, object]] = [
    {"preset": "rail_optimised"},
    {"preset": "rail_optimised", "pod_nodes": 2, "oversubscription": {"leaf": 2.0, "spine": 4.0}},
    {"preset": "rail_optimised", "pxn": True},
    {"preset": "leaf_spine", "pod_nodes": 2, "oversubscription": 3.0},
    {"preset": "multi_plane", "planes": 4},
    {"preset": "multi_plane", "planes": 2, "pod_nodes": 1},
    {"preset": "rail_optimised", "nics_per_node": 2, "pod_nodes": 2},
    {"preset": "rail_optimised", "nics_per_node": 2, "pxn": True},
    {"preset": "leaf_spine", "nics_per_node": 1, "pod_nodes": 2, "oversubscription": 2.0},
    {"preset": "multi_plane", "planes": 2, "nics_per_node": 2},
]


def all_pairs(fabric: Fabric) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.nonzero(~np.eye(fabric.num_ranks, dtype=bool))
    return source, target


def hops_of(fabric: Fabric, path: np.ndarray) -> list[str]:
    """Names of the nodes on a route; every link starts where the one before ended."""
    links = [fabric.links[link] for link in path[path >= 0]]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(links)), links
    return [links[0][0], *(target for _, target in links)]


@pytest.mark.parametrize("keys", PRESETS, ids=str)
@pytest.mark.parametrize("failed", [False, True])
def test_routes_lead_from_source_to_target(keys: dict[str, object], failed: bool) -> None:
    whole = make_fabric(4, gpus_per_node=4, **keys)
    port = next(link for link in whole.links if link[0] == f"nic{1 if 'nics_per_node' not in keys else 4}")
    broken = {"degraded": [{"link": port, "factor": 0.0}]} if failed and "nics_per_node" not in keys else {}
    fabric = make_fabric(4, gpus_per_node=4, **keys, **broken)
    source, target = all_pairs(fabric)
    for s, d, path in zip(source, target, fabric.routes(source, target), strict=True):
        nodes = hops_of(fabric, path)
        assert nodes[0] == f"gpu{s}" and nodes[-1] == f"gpu{d}"
        assert len(set(nodes)) == len(nodes)
        if fabric.node_of_rank_R[s] == fabric.node_of_rank_R[d]:
            assert len(nodes) == 3


def test_latency_adds_up_along_the_route() -> None:
    keys = {"nvlink_latency": "1 us", "nic_latency": "10 us", "leaf_latency": "100 us", "pod_nodes": 1}
    finish_RR = transfer_times(make_fabric(3, gpus_per_node=2, **keys), np.full((6, 6), 1e-6))
    assert finish_RR[0, 1] == pytest.approx(2e-6, rel=1e-3)
    assert finish_RR[0, 2] == pytest.approx(2 * 10e-6 + 4 * 100e-6, rel=1e-3)  # another pod: leaf, spine, core and back
    one_pod = make_fabric(3, gpus_per_node=2, **{**keys, "pod_nodes": 3})
    assert transfer_times(one_pod, np.full((6, 6), 1e-6))[0, 2] == pytest.approx(20e-6, rel=1e-3)  # one leaf
    assert transfer_times(one_pod, np.full((6, 6), 1e-6))[0, 3] == pytest.approx(220e-6, rel=1e-3)  # over the spine


def test_pxn_stays_on_the_targets_rail() -> None:
    fabric = make_fabric(2, gpus_per_node=4, pxn=True)
    path = fabric.routes(np.array([0]), np.array([6]))[0]
    assert hops_of(fabric, path) == ["gpu0", "nvswitch0", "gpu2", "nic2", "leaf0.2", "nic6", "gpu6"]


def test_planes_meet_only_inside_a_node() -> None:
    fabric = make_fabric(2, gpus_per_node=4, preset="multi_plane", planes=4)
    assert "gpu2" in hops_of(fabric, fabric.routes(np.array([0]), np.array([6]))[0])
    network = fabric.graph.subgraph(
        [n for n, kind in fabric.graph.nodes(data="kind") if kind not in ("gpu", "nvswitch")]
    )
    assert nx.number_weakly_connected_components(network) == 4


def test_oversubscription_stretches_cross_rail_traffic_only() -> None:
    bytes_RR = np.zeros((16, 16))
    rail, cross = bytes_RR.copy(), bytes_RR.copy()
    rank = np.arange(8)
    rail[rank, rank + 8] = 1e8
    cross[rank, 8 + (rank + 1) % 8] = 1e8
    for ratio in (1.0, 2.0, 4.0):
        fabric = make_fabric(2, oversubscription=ratio)
        assert lower_bound(fabric, rail) == pytest.approx(lower_bound(make_fabric(2), rail))
        # A leaf with two NICs below carries one flow upwards: it binds from 4:1 on.
        assert lower_bound(fabric, cross) == pytest.approx(lower_bound(make_fabric(2), rail) * max(1.0, ratio / 2))


def test_nvl72_is_one_nvlink_domain_of_many_nodes() -> None:
    fabric = make_fabric(19, gpu="gb200", gpus_per_node=4, preset="nvl72")
    assert describe(fabric).switches["nvswitch"] == 2
    assert hops_of(fabric, fabric.routes(np.array([0]), np.array([71]))[0]) == ["gpu0", "nvswitch0", "gpu71"]
    assert "nic72" in hops_of(fabric, fabric.routes(np.array([0]), np.array([72]))[0])


def test_rack_gpus_come_in_racks_and_others_do_not_fit_one() -> None:
    assert make_fabric(18, gpu="gb200", gpus_per_node=4).kind.name == "nvl72"
    assert make_fabric(2).kind.name == "rail_optimised"
    assert make_fabric(2, gpu="gb200", gpus_per_node=4, preset="rail_optimised").kind.name == "rail_optimised"
    with pytest.raises(UserError, match=r"such a rack \(gb200, gb300\), not h100; use rail_optimised"):
        make_fabric(18, gpu="h100", gpus_per_node=4, preset="nvl72")


@pytest.mark.parametrize("racks", [1, 2])
@pytest.mark.parametrize("algorithm", ["direct", "hierarchical", "low_latency"])
def test_trays_of_4_and_one_node_of_72_are_the_same_rack(racks: int, algorithm: str) -> None:
    rng = np.random.default_rng(0)
    copies_RR = rng.integers(0, 9, (72 * racks, 72 * racks)).astype(float)
    np.fill_diagonal(copies_RR, 0.0)
    stages = [copies_RR, copies_RR] if algorithm == "hierarchical" and racks > 1 else [copies_RR]
    times = []
    for trays, gpus in ((18 * racks, 4), (racks, 72)):
        fabric = make_fabric(trays, gpu="gb200", gpus_per_node=gpus)
        prepared = prepare_dispatch(fabric, stages, token_bytes=7168.0, algorithm=algorithm)
        times.append(prepared.alone_R)
        sizes = Cluster(pools=(Pool(gpu="gb200", nodes=trays, gpus_per_node=gpus),)).domain_sizes
        assert sizes == (72,) * racks
    np.testing.assert_allclose(times[0], times[1], rtol=1e-12)


def test_in_a_rack_no_message_takes_a_nic() -> None:
    """Neither those of low_latency, which avoid NVLink on a node of eight."""
    copies_RR = 1.0 - np.eye(8)
    for gpu, nodes, slower in (("gb200", 2, False), ("h200", 2, True)):
        times = [
            prepare_dispatch(
                make_fabric(nodes, gpu=gpu, gpus_per_node=4, nic=nic), [copies_RR * 1000], token_bytes=7168.0,
                algorithm="low_latency",
            ).alone_R.max()
            for nic in ("400 Gbps", "40 Gbps")
        ]  # fmt: skip
        assert (times[1] > 2 * times[0]) == slower


def test_pools_follow_each_other_in_rank_order() -> None:
    pools = (Pool(name="a", gpu="h800", nodes=1), Pool(name="b", gpu="h200", nodes=2, gpus_per_node=4))
    fabric = build(Cluster(pools=pools, fabric=Section()))
    assert fabric.gpus == ("h800",) * 8 + ("h200",) * 8
    np.testing.assert_array_equal(fabric.node_of_rank_R, [0] * 8 + [1] * 4 + [2] * 4)
    assert transfer_times(fabric, np.full((16, 16), 1e6)).max() > 0


@pytest.mark.parametrize(
    ("change", "slow"),
    [
        ({"node": 1, "factor": 0.25}, set(range(4, 8))),
        ({"rail": 2, "factor": 0.25}, {2, 6}),
        ({"link": ["leaf0.3", "nic7"], "factor": 0.25}, {7}),
    ],
)
def test_degraded_parts_slow_who_uses_them(change: dict[str, object], slow: set[int]) -> None:
    """Each rank sends to its twin on the other node only: times quadruple there and nowhere else."""
    bytes_RR = np.zeros((8, 8))
    rank = np.arange(8)
    bytes_RR[rank, (rank + 4) % 8] = 1e9
    whole = transfer_times(make_fabric(2, gpus_per_node=4), bytes_RR)
    worse = transfer_times(make_fabric(2, gpus_per_node=4, degraded=[change]), bytes_RR)
    for s in range(8):
        d = (s + 4) % 8
        hit = d in slow if "link" in change else bool({s, d} & slow)
        assert worse[s, d] / whole[s, d] == pytest.approx(4.0 if hit else 1.0, rel=1e-3)


def test_failed_nic_is_gone_around_and_costs_time() -> None:
    bytes_RR = np.random.default_rng(0).uniform(0.9e6, 1.1e6, (8, 8))
    whole = make_fabric(2, gpus_per_node=4)
    broken = make_fabric(2, gpus_per_node=4, degraded=[{"link": ["nic0", "leaf0.0"], "factor": 0.0}])
    detour = hops_of(broken, broken.routes(np.array([0]), np.array([4]))[0])
    assert detour[:2] == ["gpu0", "nvswitch0"] and detour[-1] == "gpu4"
    assert lower_bound(broken, bytes_RR) > lower_bound(whole, bytes_RR)
    for model in ("exact", "fluid", "ports"):
        assert transfer_times(broken, bytes_RR, model=model).max() > lower_bound(broken, bytes_RR)
    exact, ports = (rank_finish(transfer_times(broken, bytes_RR, model=m)).max() for m in ("exact", "ports"))
    assert ports == pytest.approx(exact, rel=0.05)


def test_a_fabric_from_links_and_from_its_node_link_file(tmp_path: Path) -> None:
    links = tuple(Link(source=f"gpu{g}", target="hub", bandwidth="10 GB/s", latency="2 us") for g in range(3))
    listed = make_fabric(1, gpus_per_node=3, preset="custom", links=links)
    graph = nx.DiGraph()
    for link in links:
        for ends in ((link.source, link.target), (link.target, link.source)):
            graph.add_edge(*ends, bandwidth="10 GB/s", latency="2 us")
    path = tmp_path / "fabric.json"
    path.write_text(json.dumps(nx.node_link_data(graph, edges="links")))
    from_file = make_fabric(1, gpus_per_node=3, preset="custom", file=str(path))
    bytes_RR = np.array([[0, 1e6, 2e6], [3e6, 0, 0], [0, 5e6, 0]])
    np.testing.assert_allclose(transfer_times(from_file, bytes_RR), transfer_times(listed, bytes_RR))
    assert transfer_times(listed, bytes_RR)[1, 0] == pytest.approx(3e6 / 10e9 + 4e-6)


def test_equal_custom_paths_are_spread_over() -> None:
    links = [Link(source="gpu0", target="a", bandwidth="1 GB/s"), Link(source="gpu0", target="b", bandwidth="1 GB/s")]
    links += [Link(source=s, target=f"gpu{g}", bandwidth="1 GB/s") for s in "ab" for g in (1, 2)]
    fabric = make_fabric(1, gpus_per_node=3, preset="custom", links=links)
    path_FP = fabric.routes(np.array([0, 0]), np.array([1, 2]))
    assert {hops_of(fabric, path)[1] for path in path_FP} == {"a", "b"}


def test_describe_measures_bisection_and_oversubscription() -> None:
    facts = describe(make_fabric(4, pod_nodes=2, oversubscription={"leaf": 2.0, "spine": 4.0}))
    assert facts.num_gpus == 32 and facts.num_nodes == 4
    assert facts.switches == {"nvswitch": 4, "leaf": 16, "spine": 2, "core": 1}
    assert facts.oversubscription == pytest.approx({"leaf": 2.0, "spine": 4.0})
    # 16 NICs of 50 GB/s in each pod, divided by 2 at the leaves and by 4 at the spine.
    assert facts.bisection == pytest.approx(16 * 50e9 / 8)
    assert describe(make_fabric(4)).bisection == pytest.approx(16 * 50e9)
    assert describe(make_fabric(1, preset="nvlink_node")).bisection == pytest.approx(4 * 450e9)
    assert sum(group.count for group in facts.links) == 2 * (32 + 32 + 32 + 16 + 2)  # NVLink, GPU-NIC, NIC, leaf, spine


@pytest.mark.parametrize(
    ("nodes", "keys", "words"),
    [
        (2, {"preset": "nvlink_node"}, "rail_optimised"),
        (2, {"preset": "multi_plane"}, "planes >= 2"),
        (2, {"planes": 2}, "multi_plane"),
        (1, {"preset": "custom"}, "links or file"),
        (1, {"preset": "custom", "file": "no/such.json"}, "cannot read"),
        (1, {"preset": "custom", "links": [{"source": "gpu0", "target": "x", "bandwidth": "1 GB/s"}]}, "gpu1"),
        (2, {"oversubscription": {"spine": 2.0}}, "pod_nodes"),
        (2, {"degraded": [{"link": ["gpu0", "nowhere"], "factor": 0.5}]}, "no link gpu0 -> nowhere"),
        (2, {"degraded": [{"node": 7, "factor": 0.5}]}, "no node 7"),
        (2, {"degraded": [{"rail": 9, "factor": 0.5}]}, "no rail 9"),
        (2, {"degraded": [{"factor": 0.5}]}, "exactly one"),
        (2, {"nics_per_node": 3}, "nics_per_node = 3 does not divide gpus_per_node = 8; use one of 1, 2, 4, 8"),
        (1, {"preset": "nvlink_node", "nics_per_node": 4}, "needs a preset with NICs"),
        (2, {"preset": "multi_plane", "planes": 8, "nics_per_node": 4}, "divide nics_per_node = 4"),
        (
            1,
            {
                "preset": "custom",
                "links": [
                    {"source": "gpu0", "target": "x", "bandwidth": "1 GB/s"},
                    {"source": "x", "target": "gpu0", "bandwidth": "2 GB/s"},
                ],
            },
            "x -> gpu0 is given twice",
        ),
        (
            1,
            {"preset": "custom", "links": [{"source": "gpu0", "target": "gpu0", "bandwidth": "1 GB/s"}]},
            "leads nowhere",
        ),
    ],
)
def test_mistakes_are_named(nodes: int, keys: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make_fabric(nodes, **keys)
    assert "\n" not in str(error.value)


def test_no_way_around_is_an_error() -> None:
    fabric = make_fabric(2, degraded=[{"node": 0, "factor": 0.0}])
    with pytest.raises(UserError, match="no path from gpu0 to gpu1"):
        transfer_times(fabric, np.full((16, 16), 1.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("{}", "links"),
        ('{"links": [{"source": "a"}]}', "bandwidth"),
        (
            '{"links": [{"source": "a", "target": "b", "bandwidth": "1e-320 B/s"}]}',
            "must be between 1 kB/s and 1000 PB/s",
        ),
        ('{"links": [{"source": "a", "target": "b", "bandwidth": "1 GB/s", "latency": "1e9 s"}]}', "0 s and 1 s"),
    ],
)
def test_broken_fabric_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "fabric.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        make_fabric(1, preset="custom", file=str(path))


@pytest.mark.parametrize("keys", PRESETS, ids=str)
def test_sums_over_the_matrix_are_the_sums_over_routes(keys: dict[str, object]) -> None:
    fabric = make_fabric(4, gpus_per_node=4, **keys)
    demand = make_demand(fabric, skewed_bytes(np.random.default_rng(8), 10), ranks=np.arange(3, 13))
    loads_X = ladder_link_bytes(fabric, demand)
    forwards = bool(keys.get("pxn")) or keys["preset"] == "multi_plane"
    assert (loads_X is None) == forwards
    routed_X = link_bytes(fabric, build_flows(fabric, demand))
    assert routed_X.sum() > 0
    if loads_X is not None:
        np.testing.assert_allclose(loads_X, routed_X)


def test_gpus_that_share_a_nic_share_its_bandwidth() -> None:
    """Both of a NIC send: as long as with NICs of half the bandwidth each. One of them alone: as with its own NIC."""
    shared, own, half = (
        make_fabric(2, nic=nic, **keys)
        for nic, keys in (("400 Gbps", {"nics_per_node": 4}), ("400 Gbps", {}), ("200 Gbps", {}))
    )
    bytes_RR = np.zeros((16, 16))
    bytes_RR[np.arange(8), np.arange(8) + 8] = 1e9
    alone_RR = bytes_RR * (np.arange(16) % 2 == 0)[:, None]
    for model in ("exact", "fluid", "ports"):
        both = transfer_times(shared, bytes_RR, model=model).max()
        assert both == pytest.approx(transfer_times(half, bytes_RR, model=model).max(), rel=1e-4)
        one = transfer_times(shared, alone_RR, model=model).max()
        assert one == pytest.approx(transfer_times(own, alone_RR, model=model).max(), rel=1e-4)
    assert describe(shared).bisection == describe(half).bisection == describe(own).bisection / 2
    assert shared.core_can_block and len(shared.common_links_X) == 2 * 8


def test_one_nic_for_each_gpu_is_the_default() -> None:
    plain, named = make_fabric(2), make_fabric(2, nics_per_node=8)
    assert plain.links == named.links and not named.core_can_block
    np.testing.assert_array_equal(plain.capacity_X, named.capacity_X)


def test_a_rail_of_shared_nics_degrades_both_gpus() -> None:
    fabric = make_fabric(2, nics_per_node=4, degraded=[{"rail": 3, "factor": 0.5}])
    slow = {link for link, bandwidth in zip(fabric.links, fabric.bandwidth_X, strict=True) if bandwidth == 25e9}
    assert slow == {edge for edge in fabric.links if set(edge) & {"nic2", "nic10"}}


def test_domains_follow_a_changed_copy_of_the_cluster() -> None:
    """A copy of a section takes along what was kept in it, so that nothing derived may be kept there."""
    pool = Pool(gpu="gb200", nodes=18, gpus_per_node=4)
    cluster = Cluster(pools=(pool,))
    assert cluster.domain_sizes == (72,)
    assert cluster.model_copy(update={"pools": (pool.model_copy(update={"nodes": 2}),)}).domain_sizes == (8,)


def test_a_kind_of_fabric_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks, each with one leaf for a pod of two nodes: named in a scenario, routed and described."""
    kind = FabricKind(
        name="twins", about="two networks of leaves and a spine", has_planes=True, rails=2, one_spine=True, pod_nodes=2
    )
    monkeypatch.setitem(FABRICS, kind.name, kind)
    fabric = make_fabric(4, preset="twins", planes=2)
    assert describe(fabric).switches == {"nvswitch": 4, "leaf": 4, "spine": 2}
    assert "leaf1.1" in hops_of(fabric, fabric.routes(np.array([1]), np.array([17]))[0])
    with pytest.raises(UserError, match="planes = 2 needs preset multi_plane or twins, not leaf_spine"):
        make_fabric(2, preset="leaf_spine", planes=2)


def two_spines(**keys: object) -> Fabric:
    """Two leaves of two GPUs, 4 GB/s each, with 1 GB/s to each of two spines."""
    links = [Link(source=f"gpu{g}", target=f"leaf{g // 2}", bandwidth="4 GB/s") for g in range(4)]
    links += [Link(source=f"leaf{n}", target=s, bandwidth="1 GB/s") for n in (0, 1) for s in ("a", "b")]
    return make_fabric(2, gpus_per_node=2, preset="custom", links=links, **keys)


@pytest.mark.parametrize("model", ["exact", "fluid"])
def test_a_message_can_take_all_equal_routes(model: str) -> None:
    """Alone twice as fast as over one of them; two between the same leaves share what both had."""
    one, all_of_them = two_spines(), two_spines(multipath=True)
    bytes_RR = np.zeros((4, 4))
    bytes_RR[0, 2] = 1e9
    assert transfer_times(one, bytes_RR, model=model)[0, 2] == pytest.approx(1.0, rel=0.01)
    assert transfer_times(all_of_them, bytes_RR, model=model)[0, 2] == pytest.approx(0.5, rel=0.01)
    assert lower_bound(all_of_them, bytes_RR) == pytest.approx(0.5)
    assert path_rates(all_of_them, np.array([0, 0]), np.array([2, 1])) == pytest.approx([2e9, 4e9])
    assert send_recv_seconds(all_of_them, 0, 2, 1e9).seconds < 0.52 * send_recv_seconds(one, 0, 2, 1e9).seconds
    bytes_RR[1, 3] = 1e9
    assert transfer_times(all_of_them, bytes_RR, model=model).max() == pytest.approx(1.0, rel=0.01)
    use = common_use(all_of_them, np.array([0]), np.array([2]), np.array([[1e9]]))
    assert sorted(use.bytes_SX[0][use.bytes_SX[0] > 0]) == pytest.approx([0.5e9] * 2)  # up; down follows


def test_multipath_has_nothing_to_choose_in_a_preset_and_ports_cannot_see_it() -> None:
    with pytest.raises(UserError, match="multipath needs preset custom, not leaf_spine"):
        make_fabric(2, preset="leaf_spine", multipath=True)
    many = [Link(source="gpu0", target=f"s{n}", bandwidth="1 GB/s") for n in range(65)]
    many += [Link(source=f"s{n}", target="gpu1", bandwidth="1 GB/s") for n in range(65)]
    with pytest.raises(UserError, match="more than 64 equal routes from gpu0 to gpu1"):
        lower_bound(make_fabric(1, gpus_per_node=2, preset="custom", links=many, multipath=True), np.ones((2, 2)))
