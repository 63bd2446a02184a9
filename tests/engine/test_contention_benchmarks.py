"""How far shared links are from exact sharing of all flows, and its cost: pytest -m benchmark -s tests/engine."""

import time

import numpy as np
import pytest
import simpy

from moesim.engine.shared_links import SharedLinks
from moesim.network import Fabric, build_fabric, prepare_transfer, transfer_times
from moesim.scenario.cluster import Cluster, Pool
from moesim.scenario.cluster import Fabric as Section

pytestmark = pytest.mark.benchmark

FABRICS = {
    "rails, 4:1": ({"oversubscription": 4.0}, (np.arange(16), np.arange(16, 32))),
    "rails, 2:1": ({"oversubscription": 2.0}, (np.arange(16), np.arange(16, 32))),
    "leaf-spine, 4:1": (
        {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 4.0},
        (np.r_[0:4, 8:12], np.r_[4:8, 12:16]),
    ),
}
REPEATS = 8


def traffic(rng: np.random.Generator, ranks: int, evenness: float) -> np.ndarray:
    """Bytes with hot receivers; an evenness of 30 gives a busiest rank of about 1.3 times the mean, 3 one of 2.3."""
    popularity = rng.dirichlet(np.full(ranks, evenness)) * ranks
    return rng.gamma(3 * evenness, 1e6 / (3 * evenness), (ranks, ranks)) * popularity * (1 - np.eye(ranks))


def errors(fabric: Fabric, groups: tuple[np.ndarray, ...], rng: np.random.Generator, **how: float) -> list[list[float]]:
    """Per group: duration with shared links, and without any sharing, each relative to exact sharing of all flows."""
    all_bytes, all_starts = np.zeros((fabric.num_ranks,) * 2), np.zeros(fabric.num_ranks)
    prepared, alone = [], []
    for number, group in enumerate(groups):
        bytes_RR = traffic(rng, len(group), how["evenness"])
        transfer = prepare_transfer(fabric, bytes_RR, ranks=group, model="exact")
        start_R = (rng.random(len(group)) * how["spread"] + number * how["shift"]) * transfer.alone_R.max()
        all_bytes[np.ix_(group, group)], all_starts[group] = bytes_RR, start_R
        prepared.append((group, transfer, start_R))
        alone.append(transfer.finish(start_R))
    env = simpy.Environment()
    shared_links = SharedLinks(env, fabric.capacity_X[fabric.common_links_X])
    carried = [
        env.process(shared_links.carry(transfer.window(start_R), transfer.common_use(group), alone_R[None]))
        for (group, transfer, start_R), alone_R in zip(prepared, alone, strict=True)
    ]
    env.run()
    exact = transfer_times(fabric, all_bytes, start_R=all_starts)
    found = []
    for (group, _, start_R), process, alone_R in zip(prepared, carried, alone, strict=True):
        seconds = exact[np.ix_(group, group)].max() - start_R.min()
        found.append([(ends.max() - start_R.min()) / seconds - 1 for ends in (process.value, alone_R)])
    return found


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("evenness", [3.0, 30.0])
@pytest.mark.parametrize(("spread", "shift"), [(0.0, 0.0), (0.1, 0.2), (0.4, 0.3)])
def test_error_of_slow_downs(name: str, evenness: float, spread: float, shift: float) -> None:
    keys, groups = FABRICS[name]
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=4),), fabric=Section.model_validate(keys)))
    rng = np.random.default_rng(0)
    how = {"evenness": evenness, "spread": spread, "shift": shift}
    shared_links, none = np.array([pair for _ in range(REPEATS) for pair in errors(fabric, groups, rng, **how)]).T
    print(
        f"\n{name}, evenness {evenness:.0f}, starts spread over {spread:.0%}, groups {shift:.0%} apart: "
        f"shared links {shared_links.mean():+.1%} ({shared_links.min():+.1%} to {shared_links.max():+.1%}) "
        f"of exact, without sharing {none.mean():+.1%}"
    )
    assert abs(shared_links.mean()) < max(0.75 * abs(none.mean()), 0.05)


def test_cost_of_a_transfer() -> None:
    """Eight groups of 16 ranks on a fabric of 16 nodes: CPU time per transfer that goes through the shared links."""
    section = Section.model_validate({"oversubscription": 4.0})
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=16),), fabric=section))
    groups = [np.arange(first, first + 16) for first in range(0, 128, 16)]
    bytes_RR = np.full((16, 16), 1e6) * (1 - np.eye(16))
    env = simpy.Environment()
    shared_links = SharedLinks(env, fabric.capacity_X[fabric.common_links_X])
    rounds = 25

    def life(group: np.ndarray, offset: float):
        transfer = prepare_transfer(fabric, bytes_RR, ranks=group)
        use, start_R = transfer.common_use(group), np.full(16, offset)
        for _ in range(rounds):
            finish_SR = yield from shared_links.carry(transfer.window(start_R), use, transfer.finish(start_R)[None])
            start_R = finish_SR[0] + 1e-4

    for number, group in enumerate(groups):
        env.process(life(group, 1e-5 * number))
    start = time.process_time()
    env.run()
    each = (time.process_time() - start) / (rounds * len(groups))
    print(f"\nshared links, 8 groups at once: {each * 1e6:.0f} us of CPU per transfer")
    assert each < 5e-3
