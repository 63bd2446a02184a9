"""Groups that share links slow each other: the shared links against cases worked out by hand, and its laws."""

import numpy as np
import pytest
import simpy

from moesim.engine.shared_links import SharedLinks
from moesim.network import Fabric, build_fabric, prepare_transfer, transfer_times
from moesim.network.contention import opening, progress_rates
from moesim.scenario.cluster import Cluster, Link, Pool
from moesim.scenario.cluster import Fabric as Section

GB = 1e9
LEFT, RIGHT = np.array([0, 2]), np.array([1, 3])


def uplink(gigabytes: float = 1.0) -> Fabric:
    """GPUs 0 and 1 on one switch, 2 and 3 on another; fast links, but one uplink between the switches."""
    links = [Link(source=f"gpu{g}", target="ab"[g // 2], bandwidth="9 GB/s") for g in range(4)]
    links.append(Link(source="a", target="b", bandwidth=f"{gigabytes} GB/s"))
    pool = Pool(gpu="h200", nodes=1, gpus_per_node=4)
    return build_fabric(Cluster(pools=(pool,), fabric=Section(preset="custom", links=tuple(links))))


def carried(fabric: Fabric, transfers: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Ends of the ranks of transfers (ranks, bytes, starts) that go through one shared links."""
    env = simpy.Environment()
    shared_links = SharedLinks(env, fabric.capacity_X[fabric.common_links_X])
    ends: dict[int, np.ndarray] = {}

    def one(number: int, ranks_R: np.ndarray, bytes_RR: np.ndarray, start_R: np.ndarray):
        prepared = prepare_transfer(fabric, bytes_RR, ranks=ranks_R, model="exact")
        alone_SR = prepared.finish(start_R)[None]
        ends[number] = (
            yield from shared_links.carry(prepared.window(start_R), prepared.common_use(ranks_R), alone_SR)
        )[0]

    for number, transfer in enumerate(transfers):
        env.process(one(number, *transfer))
    env.run()
    return [ends[number] for number in range(len(transfers))]


def across(gigabytes: float) -> np.ndarray:
    """The first rank sends to the second."""
    return np.array([[0.0, gigabytes * GB], [0.0, 0.0]])


def test_two_equal_groups_over_one_uplink_take_twice_as_long() -> None:
    start_R = np.zeros(2)
    ends = carried(uplink(), [(LEFT, across(1), start_R), (RIGHT, across(1), start_R)])
    np.testing.assert_allclose(ends, 2.0)


def test_groups_that_follow_each_other_do_not_meet() -> None:
    ends = carried(uplink(), [(LEFT, across(1), np.zeros(2)), (RIGHT, across(1), np.full(2, 1.0))])
    np.testing.assert_array_equal(ends[0], 1.0)
    np.testing.assert_array_equal(ends[1], 2.0)


def test_a_transfer_without_bytes_passes_at_once() -> None:
    ends = carried(uplink(), [(LEFT, across(0), np.full(2, 0.3)), (RIGHT, across(1), np.zeros(2))])
    np.testing.assert_array_equal(ends[0], 0.3)
    np.testing.assert_allclose(ends[1], 1.0)


def test_half_an_overlap_is_paid_half() -> None:
    """Alone until 0.5, both at half speed until the first is done at 1.5, then the second alone until 2."""
    ends = carried(uplink(), [(LEFT, across(1), np.zeros(2)), (RIGHT, across(1), np.full(2, 0.5))])
    np.testing.assert_allclose(ends[0], 1.5)
    np.testing.assert_allclose(ends[1], 2.0)


def test_a_small_transfer_leaves_the_link_to_the_large_one() -> None:
    """Both at 1/2 until the small one is done at 1, then the large one has 1.5 of 2 left."""
    start_R = np.zeros(2)
    ends = carried(uplink(), [(LEFT, across(0.5), start_R), (RIGHT, across(2), start_R)])
    np.testing.assert_allclose(ends[0], 1.0)
    np.testing.assert_allclose(ends[1], 2.5)


def test_nobody_is_slowed_where_capacity_is_to_spare() -> None:
    start_R = np.zeros(2)
    fabric = uplink(18.0)
    ends = carried(fabric, [(LEFT, across(1), start_R), (RIGHT, across(1), start_R)])
    for end_R, ranks_R in zip(ends, (LEFT, RIGHT), strict=True):
        alone_R = prepare_transfer(fabric, across(1), ranks=ranks_R, model="exact").finish(start_R)
        np.testing.assert_array_equal(end_R, alone_R)


def test_a_straggler_absorbs_what_the_others_lose() -> None:
    """Most bytes move while one rank is still missing; that they take twice as long does not delay its own."""
    fabric = four_nodes()
    bytes_RR = np.full((16, 16), 1e6) * (1 - np.eye(16))
    start_R = np.zeros(16)
    start_R[3] = 1.0
    groups = np.arange(16), np.arange(16, 32)
    ends = carried(fabric, [(groups[0], bytes_RR, start_R), (groups[1], bytes_RR, np.zeros(16))])
    alone_R = prepare_transfer(fabric, bytes_RR, ranks=groups[0], model="exact").finish(start_R)
    assert ends[0].max() == alone_R.max()
    assert ends[1].max() > 1.8 * (alone_R.max() - 1.0)


def four_nodes(ratio: float = 4.0, **keys: object) -> Fabric:
    pool = Pool(gpu="h200", nodes=4, gpus_per_node=8)
    section = Section.model_validate({"preset": "rail_optimised", "oversubscription": ratio, **keys})
    return build_fabric(Cluster(pools=(pool,), fabric=section))


@pytest.mark.parametrize("keys", [{}, {"preset": "leaf_spine", "pod_nodes": 1}])
@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_equal_groups_are_close_to_exact_sharing_of_all_their_flows(ratio: float, keys: dict[str, object]) -> None:
    """Two groups with equal shares, both at once and shifted by part of a transfer: within 5 % of the whole."""
    fabric = four_nodes(ratio, **keys)
    groups = [np.r_[0:4, 8:12], np.r_[4:8, 12:16]] if keys else [np.arange(16), np.arange(16, 32)]
    ranks = len(groups[0])
    bytes_RR = np.full((ranks, ranks), 1e6) * (1 - np.eye(ranks))
    alone = prepare_transfer(fabric, bytes_RR, ranks=groups[0], model="exact").alone_R.max()
    for shift in (0.0, 0.5, 1.5):
        starts = [np.zeros(ranks), np.full(ranks, shift * alone)]
        ends = carried(fabric, [(g, bytes_RR, s) for g, s in zip(groups, starts, strict=True)])
        all_bytes, all_starts = np.zeros((fabric.num_ranks,) * 2), np.zeros(fabric.num_ranks)
        for group, start_R in zip(groups, starts, strict=True):
            all_bytes[np.ix_(group, group)] = bytes_RR
            all_starts[group] = start_R
        together = transfer_times(fabric, all_bytes, start_R=all_starts)
        for group, start_R, end_R in zip(groups, starts, ends, strict=True):
            exact = together[np.ix_(group, group)].max() - start_R[0]
            assert end_R.max() - start_R[0] == pytest.approx(exact, rel=0.05)
            assert ratio == 2.0 or shift > 0 or exact > 1.9 * alone


def test_no_link_carries_more_than_its_capacity_and_every_byte_arrives() -> None:
    """Integrated over time: what was open until any close could have passed the links by then."""
    rng = np.random.default_rng(0)
    fabric = four_nodes()
    capacity_C = fabric.capacity_X[fabric.common_links_X]
    transfers, uses = [], []
    for group in (np.arange(16), np.arange(16, 32), np.arange(8, 24)):
        bytes_RR = rng.gamma(3.0, 1e6, (16, 16)) * (1 - np.eye(16))
        start_R = np.full(16, rng.uniform(0, 3e-4))
        transfers.append((group, bytes_RR, start_R))
        uses.append(prepare_transfer(fabric, bytes_RR, ranks=group, model="exact").common_use(group).bytes_SX[0])
    ends = carried(fabric, transfers)
    opened = min(start_R[0] for _, _, start_R in transfers)
    closes = [end_R.max() for end_R in ends]
    for close in closes:
        done_C = sum(use_C for use_C, other in zip(uses, closes, strict=True) if other <= close)
        assert (done_C <= capacity_C * (close - opened) * (1 + 1e-9)).all()


def test_the_order_of_the_groups_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    fabric = four_nodes()
    groups = np.arange(16), np.arange(16, 32), np.arange(8, 24)
    transfers = [
        (group, rng.gamma(3.0, 1e6, (16, 16)) * (1 - np.eye(16)), rng.uniform(0, 3e-4, 16)) for group in groups
    ]
    ends = carried(fabric, transfers)
    turned = carried(fabric, transfers[::-1])[::-1]
    np.testing.assert_allclose(turned, ends, rtol=1e-9)


def test_rates_fill_links_and_slow_nobody_without_need() -> None:
    """Three transfers: the second is held by link 0, so that link 1 has more for the third."""
    capacity_X = np.array([1.0, 1.0])
    demands_KX = np.array([[0.9, 0.0], [0.9, 0.6], [0.0, 0.9]])
    rate_K = progress_rates(capacity_X, demands_KX, (demands_KX > 0).astype(float))
    load_X = rate_K @ demands_KX
    np.testing.assert_allclose(load_X[0], 1.0)
    assert (load_X <= capacity_X * (1 + 1e-12)).all()
    np.testing.assert_allclose(rate_K, [0.5 / 0.9, 0.5 / 0.9, (1 - 0.6 * 0.5 / 0.9) / 0.9])
    np.testing.assert_array_equal(progress_rates(capacity_X, demands_KX / 2, np.ones((3, 2))), 1.0)


def test_more_flows_get_more_of_a_link() -> None:
    rate_K = progress_rates(np.ones(1), np.array([[1.0], [1.0]]), np.array([[3.0], [1.0]]))
    np.testing.assert_allclose(rate_K, [0.75, 0.25])


def test_windows_lie_where_the_bytes_are() -> None:
    seconds_S = np.ones(1)

    def opens(start_R: list[float], *, two_sided: bool = True) -> float:
        return float(opening(np.array([start_R]), seconds_S, two_sided=two_sided)[0])

    assert opens([2.0] * 8) == pytest.approx(2.0)
    assert opens([0.0] * 15 + [10.0]) < 0.1  # a straggler: nearly everything has moved before
    assert opens([0.0] + [10.0] * 15) == pytest.approx(10.0)  # an early rank finds nobody
    assert opens([0.0] + [10.0] * 15, two_sided=False) > 9.9
    assert opening(np.array([[0.0, 3.0]]), seconds_S, two_sided=True, synchronised=True)[0] == 3.0
