"""The laws of fair sharing, and the three models against each other and against cases solved by hand."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import make_fabric, rank_finish, skewed_bytes, star

from moesim.errors import InternalError, UserError
from moesim.network import build_fabric, fair_loops, lower_bound, prepare_transfer, transfer_times
from moesim.network.contention import progress_rates
from moesim.network.flows import build_flows, make_demand
from moesim.scenario.cluster import Cluster, Link, Pool
from moesim.scenario.cluster import Fabric as Section

GB = 1e9
MODELS = ("exact", "fluid", "ports")


def matrix(ranks: int, **flows: float) -> np.ndarray:
    """Bytes in GB by names such as f01 = from 0 to 1."""
    bytes_RR = np.zeros((ranks, ranks))
    for name, gigabytes in flows.items():
        bytes_RR[int(name[1]), int(name[2])] = gigabytes * GB
    return bytes_RR


@pytest.mark.parametrize("model", MODELS)
def test_two_senders_share_a_receiver(model: str) -> None:
    """Both at 1/2 until the smaller ends at 2, then the other alone: 1 + 2 = 3."""
    finish_RR = transfer_times(star(3), matrix(3, f02=1, f12=2), model=model)
    assert finish_RR[0, 2] == pytest.approx(2.0) and finish_RR[1, 2] == pytest.approx(3.0)


@pytest.mark.parametrize("model", MODELS)
def test_late_sender_finds_a_shorter_queue(model: str) -> None:
    """Alone until 1 (1 of 2 GB left), both at 1/2 until 2 (late 0.5 sent of 0.5), alone to 2.5."""
    finish_RR = transfer_times(star(3), matrix(3, f02=2, f12=0.5), start_R=np.array([0.0, 1.0, 0.0]), model=model)
    assert finish_RR[1, 2] == pytest.approx(2.0) and finish_RR[0, 2] == pytest.approx(2.5)


def test_max_min_on_a_chain() -> None:
    """Links of 1 and 2 GB/s: two flows share the first at 1/2, so a third gets 1.5 of the second."""
    links = (
        Link(source="gpu0", target="a", bandwidth="9 GB/s"),
        Link(source="gpu1", target="a", bandwidth="9 GB/s"),
        Link(source="a", target="b", bandwidth="1 GB/s"),
        Link(source="gpu2", target="b", bandwidth="9 GB/s"),
        Link(source="b", target="c", bandwidth="2 GB/s"),
        Link(source="b", target="gpu3", bandwidth="9 GB/s"),
        Link(source="c", target="gpu4", bandwidth="9 GB/s"),
        Link(source="c", target="gpu5", bandwidth="9 GB/s"),
    )
    fabric = make_fabric(1, gpus_per_node=6, preset="custom", links=links)
    finish_RR = transfer_times(fabric, matrix(6, f03=0.5, f14=0.5, f25=1.5))
    assert finish_RR[0, 3] == finish_RR[1, 4] == finish_RR[2, 5] == pytest.approx(1.0)


@pytest.mark.parametrize("model", MODELS)
def test_one_sided_flows_do_not_wait_for_their_target(model: str) -> None:
    start_R = np.array([0.0, 5.0])
    one = transfer_times(star(2), matrix(2, f01=1), start_R=start_R, model=model, two_sided=False)
    two = transfer_times(star(2), matrix(2, f01=1), start_R=start_R, model=model)
    assert one[0, 1] == pytest.approx(1.0) and two[0, 1] == pytest.approx(6.0)


def test_synchronised_transfers_start_with_the_last_rank() -> None:
    prepared = prepare_transfer(star(3), matrix(3, f01=1, f12=1), synchronised=True)
    np.testing.assert_allclose(prepared.finish(np.array([0.0, 0.5, 7.0])), 8.0)


@pytest.mark.parametrize("model", MODELS)
def test_hot_receiver_delays_its_senders(model: str) -> None:
    """Each sender's small message to rank 7 is quick alone; behind a hot receiver all of them are late."""
    bytes_RR = np.zeros((8, 8))
    bytes_RR[:7, 7] = 1 * GB
    prepared = prepare_transfer(star(8), bytes_RR, model=model)
    np.testing.assert_allclose(prepared.finish(np.linspace(0, 1e-3, 8))[:7], 7.0, rtol=1e-2)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[object, np.ndarray, np.ndarray]:
    """A small fabric, traffic with gaps, and starts."""
    nodes = draw(st.integers(1, 3))
    keys: dict[str, object] = {"preset": draw(st.sampled_from(["rail_optimised", "leaf_spine"]))}
    keys["oversubscription"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
    keys["pod_nodes"] = draw(st.integers(1, 2))
    keys["pxn"] = draw(st.booleans())
    fabric = make_fabric(nodes, gpus_per_node=4, **keys)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bytes_RR = skewed_bytes(rng, fabric.num_ranks) * (rng.random((fabric.num_ranks,) * 2) < 0.7)
    return fabric, bytes_RR, rng.random(fabric.num_ranks) * draw(st.sampled_from([0.0, 1e-4]))


@settings(max_examples=40)
@given(transfers())
def test_rates_are_max_min_fair(case) -> None:
    """No link above capacity; each flow has a full link on which no flow gets more than it."""
    fabric, bytes_RR, _ = case
    flows = build_flows(fabric, make_demand(fabric, bytes_RR, ranks=None))
    num_flows, num_links = len(flows.source_F), len(fabric.links)
    rate_F, mark_F = np.zeros(num_flows), np.full(num_flows, -1, np.int32)
    on_FX = np.zeros((num_flows, num_links), bool)
    for hop in range(flows.path_FP.shape[1]):
        used = flows.path_FP[:, hop] >= 0
        on_FX[np.flatnonzero(used), flows.path_FP[used, hop]] = True
    link_Q, flow_Q = np.nonzero(on_FX.T)
    length_X = np.bincount(link_Q, minlength=num_links).astype(np.int32)
    first_X = np.concatenate([[0], np.cumsum(length_X)])
    fair_loops.fill(
        0, mark_F, rate_F, flows.path_FP, fabric.capacity_X.copy(), length_X.copy(), first_X, length_X.copy(),
        flow_Q.astype(np.int32), np.zeros(num_links, np.int32),
    )  # fmt: skip
    load_X = rate_F @ on_FX
    assert (load_X <= fabric.capacity_X * (1 + 1e-9)).all()
    most_X = np.where(on_FX, rate_F[:, None], 0.0).max(axis=0, initial=0.0)
    full_X = load_X >= fabric.capacity_X * (1 - 1e-9)
    assert (on_FX & full_X & (rate_F[:, None] >= most_X * (1 - 1e-9))).any(axis=1).all()


@settings(max_examples=25)
@given(transfers())
def test_bytes_are_conserved_and_bounded(case) -> None:
    """By any time a link has carried no more than its capacity allows, and all is over no sooner than the bound."""
    fabric, bytes_RR, _ = case
    finish_RR = transfer_times(fabric, bytes_RR)
    flows = build_flows(fabric, make_demand(fabric, bytes_RR, ranks=None))
    end_F = finish_RR[flows.source_F, flows.target_F] - flows.latency_F
    for link in np.unique(flows.path_FP[flows.path_FP >= 0]):
        on = (flows.path_FP == link).any(axis=1)
        order = np.argsort(end_F[on])
        carried = np.cumsum(flows.bytes_SF[0, on][order])
        assert (carried <= fabric.capacity_X[link] * end_F[on][order] * (1 + 1e-9)).all()
    assert lower_bound(fabric, bytes_RR) <= finish_RR.max() * (1 + 1e-9)


@settings(max_examples=15)
@given(transfers(), st.sampled_from(["exact", "ports"]))
def test_scaling_bandwidths_scales_times(case, model: str) -> None:
    _, bytes_RR, start_R = case
    nodes = len(bytes_RR) // 4
    latencies = {"nvlink_latency": "0 s", "nic_latency": "0 s", "leaf_latency": "0 s"}
    slow, fast = (
        make_fabric(nodes, gpus_per_node=4, nvlink=f"{100 * c} GB/s", nic=f"{25 * c} GB/s", **latencies) for c in (1, 4)
    )
    slow_RR = transfer_times(slow, bytes_RR, start_R=start_R, model=model)
    fast_RR = transfer_times(fast, bytes_RR, start_R=start_R / 4, model=model)
    np.testing.assert_allclose(fast_RR * 4, slow_RR, rtol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_relabelling_nodes_and_rails_permutes_times(model: str) -> None:
    fabric = make_fabric(3, gpus_per_node=4, oversubscription=2.0)
    rng = np.random.default_rng(5)
    bytes_RR, start_R = skewed_bytes(rng, 12), rng.random(12) * 1e-5
    order = (rng.permutation(3)[:, None] * 4 + rng.permutation(4)).ravel()
    plain = transfer_times(fabric, bytes_RR, start_R=start_R, model=model)
    moved = transfer_times(fabric, bytes_RR[np.ix_(order, order)], start_R=start_R[order], model=model)
    np.testing.assert_allclose(moved, plain[np.ix_(order, order)], rtol=1e-9)


FABRICS: tuple[dict[str, object], ...] = (
    {"preset": "leaf_spine", "pod_nodes": 1},
    {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 2.0},
    {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 4.0},
    {"pod_nodes": 2, "oversubscription": {"leaf": 2.0, "spine": 2.0}},
    {"preset": "multi_plane", "planes": 8, "oversubscription": 2.0},
    {"pxn": True, "pod_nodes": 1, "oversubscription": 2.0},
    {"nics_per_node": 4},
    {
        "degraded": [
            {"rail": 2, "factor": 0.5},
            {"node": 1, "factor": 0.3},
            {"link": ("leaf0.1", "spine0"), "factor": 0.2},
        ]
    },
    {"degraded": [{"link": ("nic3", "leaf0.3"), "factor": 0}, {"link": ("leaf0.1", "spine0"), "factor": 0}]},
)


@pytest.mark.parametrize("keys", FABRICS)
@pytest.mark.parametrize("skew", [False, True])
def test_fluid_is_close_to_exact(keys: dict[str, object], skew: bool) -> None:
    """Makespan within 0.5 %, each rank within 2 %; oversubscribed, degraded, with failed links or forwarding."""
    fabric = make_fabric(4, **keys)
    rng = np.random.default_rng(7)
    bytes_RR = skewed_bytes(rng, 32) if skew else rng.gamma(50.0, 2e4, (32, 32)) * (1 - np.eye(32))
    start_R = rng.random(32) * (1e-5 if skew else 0.0)
    exact, fluid = (rank_finish(transfer_times(fabric, bytes_RR, start_R=start_R, model=m)) for m in ("exact", "fluid"))
    assert fluid.max() == pytest.approx(exact.max(), rel=0.005)
    np.testing.assert_allclose(fluid, exact, rtol=0.02)
    assert lower_bound(fabric, bytes_RR) <= exact.max() * (1 + 1e-9)


def test_balanced_traffic_is_the_lower_bound() -> None:
    fabric = make_fabric(2, nic_latency="0 s", nvlink_latency="0 s", leaf_latency="0 s")
    bytes_RR = np.full((16, 16), 1e6)
    for model in MODELS:
        makespan = transfer_times(fabric, bytes_RR, model=model).max()
        assert makespan == pytest.approx(lower_bound(fabric, bytes_RR), rel=1e-9)


def test_nvlink_traffic_does_not_feel_the_network() -> None:
    fabric = make_fabric(2)
    rng = np.random.default_rng(3)
    bytes_RR = skewed_bytes(rng, 16)
    same = np.arange(16)[:, None] // 8 == np.arange(16) // 8
    both = transfer_times(fabric, bytes_RR)
    np.testing.assert_array_equal(transfer_times(fabric, np.where(same, bytes_RR, 0))[same], both[same])


def test_redundant_links_do_not_bind() -> None:
    """Leaving out links that others bound changes nothing."""
    import dataclasses

    pods = {"preset": "leaf_spine", "pod_nodes": 1}
    for nodes in (2, 3):
        for keys in ({}, {"oversubscription": 2.0}, {"pod_nodes": 1}, pods, {**pods, "oversubscription": 2.0}):
            fabric = make_fabric(nodes, gpus_per_node=4, **keys)
            assert fabric.redundant_X.any()
            if keys != {"pod_nodes": 1}:  # a leaf for each NIC: either is as much a bottleneck as the other
                assert fabric.core_can_block == ("oversubscription" in keys)
            whole = dataclasses.replace(fabric, redundant_X=np.zeros(len(fabric.links), bool))
            bytes_RR = skewed_bytes(np.random.default_rng(1), 4 * nodes)
            np.testing.assert_allclose(transfer_times(fabric, bytes_RR), transfer_times(whole, bytes_RR), rtol=1e-9)


def lockstep(fabric, matrices, *, model: str, work: np.ndarray, **keys: object) -> np.ndarray:
    """Step time of a small step: every rank computes, then all exchange, layer after layer."""
    clock_R = np.zeros(fabric.num_ranks)
    for bytes_RR, work_R in zip(matrices, work, strict=True):
        clock_R = prepare_transfer(fabric, bytes_RR, model=model, **keys).finish(clock_R + work_R)
    return clock_R


@pytest.mark.parametrize("straggler", [1.0, 1.5])
@pytest.mark.parametrize("nodes", [1, 4])
def test_ports_step_time_is_close_to_exact(nodes: int, straggler: float) -> None:
    """Within 2 % over a whole small step, with a straggler too; `fluid` within 0.5 %."""
    fabric = make_fabric(nodes)
    rng = np.random.default_rng(nodes)
    matrices = [skewed_bytes(rng, fabric.num_ranks) for _ in range(8)]
    work = rng.uniform(0.8, 1.2, (8, fabric.num_ranks)) * np.mean([lower_bound(fabric, m) for m in matrices])
    work[:, 3] *= straggler
    exact = lockstep(fabric, matrices, model="exact", work=work).max()
    assert lockstep(fabric, matrices, model="ports", work=work).max() == pytest.approx(exact, rel=0.02)
    assert lockstep(fabric, matrices, model="fluid", work=work).max() == pytest.approx(exact, rel=0.005)
    # The answer for a common start, reused where starts spread over 40 % of a transfer: up to 15 % long.
    reused = lockstep(fabric, matrices, model="fluid", work=work, per_rank_starts=False).max()
    assert exact * 0.995 <= reused <= exact * 1.15


def test_patterns_of_starts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second micro-batch finds the answer of the first, at another time and with starts off by round-off."""
    fabric = make_fabric(2, gpus_per_node=4)
    rng = np.random.default_rng(6)
    bytes_RR, start_R = skewed_bytes(rng, 8), rng.random(8) * 1e-5
    prepared = prepare_transfer(fabric, bytes_RR, model="exact")
    first_R = prepared.finish(start_R)
    np.testing.assert_allclose(first_R, rank_finish(transfer_times(fabric, bytes_RR, start_R=start_R)), rtol=2e-6)
    monkeypatch.setattr("moesim.network.fair.drain_components", None)
    np.testing.assert_allclose(prepared.finish(start_R + 0.5) - 0.5, first_R, atol=1e-12)


def test_samples_in_lockstep_equal_samples_alone() -> None:
    fabric = make_fabric(2, gpus_per_node=4)
    rng = np.random.default_rng(0)
    bytes_SRR = np.stack([skewed_bytes(rng, 8) for _ in range(3)])
    bytes_SRR[1, 2] = 0.0
    start_SR = rng.random((3, 8)) * 1e-5
    for model in MODELS:
        together = prepare_transfer(fabric, bytes_SRR, model=model)
        alone = [prepare_transfer(fabric, bytes_RR, model=model) for bytes_RR in bytes_SRR]
        np.testing.assert_allclose(
            together.finish(start_SR),
            [p.finish(s) for p, s in zip(alone, start_SR, strict=True)],
            rtol={"exact": 1e-5, "fluid": 2e-3, "ports": 1e-12}[model],  # starts are rounded to a share of a transfer
        )
        assert together.alone_R.shape == (3, 8)


def test_transfers_share_a_link_by_demand() -> None:
    fabric = star(4)
    flows = [prepare_transfer(fabric, matrix(4, **{flow: 1}), model="exact") for flow in ("f02", "f12", "f30")]
    demands_KX = np.stack([flow.traffic.link_bytes_X / flow.alone_R.max() for flow in flows])
    flows_KX = (demands_KX > 0).astype(float)
    np.testing.assert_allclose(progress_rates(fabric.capacity_X, demands_KX, flows_KX), [0.5, 0.5, 1.0])
    np.testing.assert_allclose(progress_rates(fabric.capacity_X, demands_KX[1:], flows_KX[1:]), 1.0)


def interpreted() -> ModuleType:
    """The filling loops as Python runs them where numba is missing."""
    numba = sys.modules.get("numba")
    sys.modules["numba"] = None  # type: ignore[assignment]
    try:
        spec = importlib.util.spec_from_file_location("interpreted_filling", fair_loops.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["numba"]
        if numba is not None:
            sys.modules["numba"] = numba
    return module


@pytest.mark.parametrize("model", ["exact", "fluid"])
def test_loops_give_the_same_with_and_without_numba(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = make_fabric(2, gpus_per_node=4, oversubscription=2.0)
    rng = np.random.default_rng(2)
    bytes_RR, start_R = skewed_bytes(rng, 8), rng.random(8) * 1e-5
    here = transfer_times(fabric, bytes_RR, start_R=start_R, model=model)
    monkeypatch.setattr("moesim.network.fair.drain_components", interpreted().drain_components)
    np.testing.assert_allclose(transfer_times(fabric, bytes_RR, start_R=start_R, model=model), here, rtol=1e-12)


def test_groups_are_subsets_of_the_cluster() -> None:
    """A group's times depend on where its ranks sit, not on the rest of the cluster."""
    large = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=4),), fabric=Section()))
    bytes_RR = skewed_bytes(np.random.default_rng(4), 8)
    ranks = np.arange(16, 24)
    np.testing.assert_allclose(
        transfer_times(large, bytes_RR, ranks=ranks), transfer_times(make_fabric(1), bytes_RR), rtol=1e-12
    )


@pytest.mark.parametrize("model", ["exact", "fluid"])
def test_flows_that_never_begin_are_a_mistake_of_the_program(model: str) -> None:
    with pytest.raises(InternalError, match="do not come to their ends"):
        prepare_transfer(star(3), matrix(3, f01=1, f12=1), model=model).finish(np.array([0.0, np.nan, 0.0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "foo"}, 'model: "foo" is unknown; use ports, fluid, exact'),
        ({"bytes_RR": matrix(3, f01=float("nan"))}, r"bytes\[0, 1\]: nan must be a finite number"),
        ({"bytes_RR": matrix(3, f12=-1)}, r"bytes\[1, 2\]: -1000000000.0 must be .* not negative"),
        ({"bytes_RR": matrix(3, f12=float("inf"))}, r"bytes\[1, 2\]: inf"),
        ({"bytes_RR": np.zeros((2, 2))}, r"shape \(2, 2\) does not fit 3 ranks"),
        ({"ranks": [0, 1, 7]}, "some of 0 to 2"),
        ({"ranks": [0, 1, 1]}, "ranks: 1 is there twice"),
        ({"ranks": [0.0, 1.5, 2.0]}, "some of 0 to 2"),
        ({"start_R": np.array([0.0, np.nan, 0.0])}, "finite number of seconds for each of 3 ranks"),
        ({"start_R": np.zeros(2)}, "each of 3 ranks"),
        ({"start_R": ["x"] * 3}, "start_R: needs an array of real numbers"),
        ({"bytes_RR": [["a"]]}, "bytes: needs an array of real numbers"),
        ({"bytes_RR": [[1.0], [1.0, 2.0]]}, "bytes: needs an array of real numbers"),
        ({"bytes_RR": matrix(3, f01=1) * 1j}, "bytes: needs an array of real numbers"),
        ({"bytes_RR": np.zeros((2, 3, 3))}, "one matrix"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_mistakes_in_a_call_are_named(model: str, change: dict[str, object], words: str) -> None:
    arguments = {"bytes_RR": matrix(3, f01=1), "model": model} | change
    with pytest.raises(UserError, match=words) as error:
        transfer_times(star(3), **arguments)
    assert "\n" not in str(error.value)
