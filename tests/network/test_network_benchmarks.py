"""Speeds and errors of the network models, printed: pytest -m benchmark -s tests/network."""

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from network_cases import make_fabric, rank_finish, skewed_bytes

from moesim.network import lower_bound, prepare_transfer, transfer_times

pytestmark = pytest.mark.benchmark


def cpu_seconds(work: Callable[[], object], *, repeat: int = 3) -> float:
    """The least CPU time of a few runs."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Loops compiled before anything is timed."""
    for model in ("exact", "fluid"):
        transfer_times(make_fabric(1), np.ones((8, 8)), model=model)
    prepare_transfer(make_fabric(8), np.ones((64, 64))).finish(np.arange(64.0))


@pytest.mark.parametrize(("ranks", "limit"), [(64, 0.3), (128, 4.0)])
def test_exact_speed(ranks: int, limit: float) -> None:
    fabric, bytes_RR = make_fabric(ranks // 8), skewed_bytes(np.random.default_rng(0), ranks)
    seconds = cpu_seconds(lambda: transfer_times(fabric, bytes_RR), repeat=2)
    print(f"\nexact, {ranks} ranks, skewed: {seconds:.3f} s of CPU (target {limit} s)")
    assert seconds < 4 * limit


@pytest.mark.parametrize(("ranks", "limit"), [(256, 1.5), (1024, 8.0), (2048, 20.0)])
def test_fluid_speed(ranks: int, limit: float) -> None:
    fabric, bytes_RR = make_fabric(ranks // 8), skewed_bytes(np.random.default_rng(0), ranks)
    tracemalloc.start()
    seconds = cpu_seconds(lambda: transfer_times(fabric, bytes_RR, model="fluid"), repeat=1)
    peak = tracemalloc.get_traced_memory()[1] + bytes_RR.nbytes
    tracemalloc.stop()
    print(
        f"\nfluid, {ranks} ranks, skewed: {seconds:.2f} s of CPU (target {limit} s), {peak / 2**20:.0f} MiB of arrays"
    )
    assert seconds < 4 * limit and peak < 2**30


@pytest.mark.parametrize("ranks", [64, 128])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_fluid_and_ports_errors(ranks: int, ratio: float) -> None:
    fabric = make_fabric(ranks // 8, preset="leaf_spine", oversubscription=ratio)
    bytes_RR = skewed_bytes(np.random.default_rng(1), ranks)
    exact, fluid, ports = (rank_finish(transfer_times(fabric, bytes_RR, model=m)) for m in ("exact", "fluid", "ports"))
    for name, finish_R in (("fluid", fluid), ("ports", ports)):
        rank_error, makespan = np.abs(finish_R / exact - 1).max(), finish_R.max() / exact.max() - 1
        print(f"\n{name}, {ranks} ranks, {ratio:.0f}:1: makespan {makespan:+.3%}, ranks {rank_error:.2%}")
    assert fluid.max() == pytest.approx(exact.max(), rel=0.005)
    np.testing.assert_allclose(fluid, exact, rtol=0.02)


@pytest.mark.parametrize(("ranks", "limit"), [(8, 40e-6), (64, 100e-6), (2048, 2.0)])
def test_ports_speed(ranks: int, limit: float) -> None:
    rng = np.random.default_rng(0)
    fabric, bytes_RR, start_R = make_fabric(ranks // 8), skewed_bytes(rng, ranks), rng.random(ranks) * 1e-5
    prepared = prepare_transfer(fabric, bytes_RR)
    prepare = cpu_seconds(lambda: prepare_transfer(fabric, bytes_RR), repeat=2)
    calls = 200 if ranks < 1000 else 1
    seconds = cpu_seconds(lambda: [prepared.finish(start_R) for _ in range(calls)], repeat=5) / calls
    print(f"\nports, {ranks} ranks: {seconds * 1e6:.0f} us (target {limit * 1e6:.0f} us), prepared in {prepare:.4f} s")
    assert seconds < 4 * limit


def test_lower_bound_speed() -> None:
    bytes_RR = skewed_bytes(np.random.default_rng(0), 2048)
    plain, tiers = make_fabric(256), make_fabric(256, oversubscription=2.0, pod_nodes=32)
    tiered = cpu_seconds(lambda: lower_bound(tiers, bytes_RR))
    print(f"\nlower bound at 2:1 in pods, 2048 ranks: {tiered * 1e3:.1f} ms (target 50 ms)")
    seconds = max(tiered, cpu_seconds(lambda: lower_bound(plain, bytes_RR)))
    print(f"lower bound, 2048 ranks: {seconds * 1e3:.1f} ms (target 50 ms)")
    assert seconds < 0.2


@pytest.mark.parametrize("straggler", [1.0, 1.5])
def test_reused_common_start_error(straggler: float) -> None:
    """A step of 8 transfers among 32 ranks whose starts spread over 40 % of a transfer."""
    fabric = make_fabric(4)
    rng = np.random.default_rng(4)
    matrices = [skewed_bytes(rng, 32) for _ in range(8)]
    work = rng.uniform(0.8, 1.2, (8, 32)) * np.mean([lower_bound(fabric, m) for m in matrices])
    work[:, 3] *= straggler
    steps = {}
    for name, model, per_rank in (
        ("exact", "exact", True),
        ("ports", "ports", True),
        ("solved", "fluid", True),
        ("reused", "fluid", False),
    ):
        clock_R = np.zeros(32)
        for bytes_RR, work_R in zip(matrices, work, strict=True):
            clock_R = prepare_transfer(fabric, bytes_RR, model=model, per_rank_starts=per_rank).finish(clock_R + work_R)
        steps[name] = clock_R.max()
    for name in ("ports", "solved", "reused"):
        print(f"\nstep time with {name}, straggler {straggler}: {steps[name] / steps['exact'] - 1:+.3%} of exact")
    assert steps["ports"] == pytest.approx(steps["exact"], rel=0.02)
    assert steps["solved"] == pytest.approx(steps["exact"], rel=0.005)
    assert steps["reused"] == pytest.approx(steps["exact"], rel=0.15)


def test_fluid_step_of_a_64_rank_group() -> None:
    """58 layers, forward and backward, distinct traffic in each: cold, and when the same matrices and starts return."""
    fabric = make_fabric(8)
    rng = np.random.default_rng(0)
    matrices = [skewed_bytes(rng, 64) for _ in range(58)]
    work = rng.uniform(0.9, 1.1, (4 * 58, 64)) * 1e-3
    kept = {}

    def step() -> None:
        clock_R = np.zeros(64)
        for number, work_R in enumerate(work):
            if number not in kept:
                layer = matrices[number % 58]
                kept[number] = prepare_transfer(fabric, layer if number % 2 else layer.T.copy(), model="fluid")
            clock_R = kept[number].finish(clock_R + work_R)

    cold, warm = cpu_seconds(step, repeat=1), cpu_seconds(step, repeat=1)
    print(f"\nfluid, 64 ranks, 58 layers: {cold:.1f} s cold (target 30 s), {warm:.2f} s again (target 5 s)")
    assert cold < 60 and warm < 5
