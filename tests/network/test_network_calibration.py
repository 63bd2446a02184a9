"""The calibrated constants against the published measurements that they were fitted to."""

import numpy as np
import pytest

from moesim.network import all_reduce_seconds, build_fabric, prepare_combine, prepare_dispatch
from moesim.scenario.cluster import Cluster, Fabric, Pool

TOLERANCE = 0.06
MIB = 2.0**20

# 8x H200 on one NVSwitch, torch 2.9.1, NCCL 2.27.7 (stas00/ml-engineering network/benchmarks): MiB, busbw GB/s.
ALL_REDUCE_H200 = [
    (2, 64.53), (4, 107.16), (8, 155.53), (16, 219.89), (32, 275.84), (64, 346.51), (128, 401.93), (256, 436.15),
    (512, 450.29), (1024, 463.58), (2048, 469.17), (4096, 473.1), (8192, 477.45), (16384, 482.26),
]  # fmt: skip
RING_BUSBW_H200 = 367.61  # the largest size with NVLS off

# DeepEP on H800, normal kernels: ranks, mean copies per token that are counted, dispatch (fp8) us, combine (bf16) us.
DEEPEP_NORMAL = [(8, 5.296, 1048, 1968), (32, 3.621, 1890, 3730)]
# DeepEP on H800, low-latency kernels, 128 tokens, top-8: ranks, dispatch us, combine us.
DEEPEP_LOW_LATENCY = [
    (8, 163, 318), (16, 173, 329), (32, 182, 350), (64, 186, 353), (128, 192, 369), (256, 194, 360),
]  # fmt: skip
FP8_TOKEN, BF16_TOKEN = 7168 + 7168 / 128 * 4, 7168 * 2.0


def cluster(gpu: str, nodes: int) -> Cluster:
    return Cluster(pools=(Pool(gpu=gpu, nodes=nodes),), fabric=Fabric(preset="rail_optimised"))


@pytest.mark.parametrize(("size_mib", "busbw"), ALL_REDUCE_H200)
def test_all_reduce_curve_of_eight_h200(size_mib: int, busbw: float) -> None:
    num_bytes = size_mib * MIB
    estimate = all_reduce_seconds(build_fabric(cluster("h200", 1)), None, num_bytes)
    assert estimate.algorithm == "nvls"
    assert num_bytes / estimate.seconds * 2 * 7 / 8 / 1e9 == pytest.approx(busbw, rel=TOLERANCE)


def test_ring_all_reduce_without_nvls() -> None:
    estimate = all_reduce_seconds(build_fabric(cluster("h200", 1)), None, 16 * 1024 * MIB, algorithm="ring")
    assert 16 * 1024 * MIB / estimate.seconds * 2 * 7 / 8 / 1e9 == pytest.approx(RING_BUSBW_H200, rel=TOLERANCE)


def even_stages(ranks: int, counted: float) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Copies of 4096 tokens a rank spread evenly: over ranks of one node, or over nodes with a fan-out of 7 ranks."""
    if ranks == 8:
        copies_RR = np.full((8, 8), counted * 4096 / 8)
        return [copies_RR * (1 - np.eye(8))], np.diagonal(copies_RR)
    rank = np.arange(ranks)
    node = rank // 8
    same_node = node[:, None] == node
    same_rail = rank[:, None] % 8 == rank % 8
    # Distinct ranks per token do not matter here (the NICs are the bottleneck); 8 rows over 4 of 4 nodes touch about 7.
    per_rank = 7.0 * 4096 / ranks
    first = np.where(same_node, per_rank, np.where(same_rail, counted * 4096 / (ranks // 8), 0.0))
    fan_out = np.where(same_node, per_rank * (ranks // 8 - 1), 0.0)
    return [first * (1 - np.eye(ranks)), fan_out * (1 - np.eye(ranks))], None


@pytest.mark.parametrize(("ranks", "counted", "dispatch_us", "combine_us"), DEEPEP_NORMAL)
def test_deepep_normal_kernels(ranks: int, counted: float, dispatch_us: float, combine_us: float) -> None:
    fabric = build_fabric(cluster("h800", ranks // 8))
    stages, own_R = even_stages(ranks, counted)
    for prepare, token_bytes, measured_us in (
        (prepare_dispatch, FP8_TOKEN, dispatch_us),
        (prepare_combine, BF16_TOKEN, combine_us),
    ):
        prepared = prepare(fabric, stages, token_bytes=token_bytes, algorithm="hierarchical", own_copies_R=own_R)
        assert prepared.alone_R.max() * 1e6 == pytest.approx(measured_us, rel=TOLERANCE)


@pytest.mark.parametrize(("ranks", "dispatch_us", "combine_us"), DEEPEP_LOW_LATENCY)
def test_deepep_low_latency_kernels(ranks: int, dispatch_us: float, combine_us: float) -> None:
    fabric = build_fabric(cluster("h800", ranks // 8))
    stages = [np.full((ranks, ranks), 128 * 8 / ranks)]
    for prepare, token_bytes, measured_us in (
        (prepare_dispatch, FP8_TOKEN, dispatch_us),
        (prepare_combine, BF16_TOKEN, combine_us),
    ):
        prepared = prepare(fabric, stages, token_bytes=token_bytes, algorithm="low_latency")
        assert prepared.alone_R.max() * 1e6 == pytest.approx(measured_us, rel=TOLERANCE)
