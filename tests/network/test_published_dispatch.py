"""DeepEP's published dispatch and combine rows (README, H800, 400 Gb/s NICs), which its constants were calibrated on.

Normal kernels: GB/s of the documented byte count over 4096 tokens of 7168 values. Low-latency kernels: microseconds for
128 tokens to 8 experts each. Dispatch in fp8 with scales (7392 bytes), combine in bf16 (14336 bytes).
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from network_cases import make_fabric

from moesim.network import Fabric, deepep_bytes, prepare_combine, prepare_dispatch
from moesim.scenario.dispatch import DISPATCH, Kernels
from moesim.scenario.dispatch import LOW_LATENCY as LOW_LATENCY_NICS

FP8, BF16 = 7392.0, 14336.0
LOW_LATENCY = {8: (163, 318), 16: (173, 329), 32: (182, 350), 64: (186, 353), 128: (192, 369), 256: (194, 360)}


@pytest.mark.parametrize("num_stages", [1, 2])  # a run gives both, and nothing to fan out
@pytest.mark.parametrize(("dispatch", "published"), [(True, 153), (False, 158)])
def test_normal_kernels_inside_a_node(dispatch: bool, published: float, num_stages: int) -> None:
    """A token goes to 5.296 of 8 ranks, its own among them."""
    copies_RR = np.full((8, 8), 4096 * 5.296 / 8)
    own_R = copies_RR.diagonal().copy()
    prepare = prepare_dispatch if dispatch else prepare_combine
    prepared = prepare(
        make_fabric(1, gpu="h800"), [copies_RR * (1 - np.eye(8)), np.zeros((8, 8))][:num_stages],
        token_bytes=FP8 if dispatch else BF16,
        algorithm="hierarchical", own_copies_R=own_R,
    )  # fmt: skip
    counted = deepep_bytes(counted_copies=4096 * 5.296, hidden=7168, fp8=dispatch)
    assert counted / prepared.alone_R.max() == pytest.approx(published * 1e9, rel=0.06)


@pytest.mark.parametrize(("dispatch", "published"), [(True, 58), (False, 57)])
def test_normal_kernels_over_four_nodes(dispatch: bool, published: float) -> None:
    """A token goes to 3.621 of 4 nodes and, of 32 ranks with 8 experts each, to 32 (1 - C(248, 8) / C(256, 8))."""
    ranks = np.arange(32)
    node_R, rail_R = ranks // 8, ranks % 8
    missing = np.prod((248 - np.arange(8)) / (256 - np.arange(8)))
    to_rank, to_node = 4096 * (1 - missing), 4096 * 3.621 / 4
    same_node = node_R[:, None] == node_R
    relay = (rail_R[:, None] == rail_R) & ~same_node
    first_RR = np.where(same_node, to_rank, relay * to_node)
    fan_out_RR = np.where(same_node, 3 * to_rank, 0.0)
    stages = [matrix * (1 - np.eye(32)) for matrix in (first_RR, fan_out_RR)]
    prepare = prepare_dispatch if dispatch else prepare_combine
    prepared = prepare(
        make_fabric(4, gpu="h800"), stages, token_bytes=FP8 if dispatch else BF16, algorithm="hierarchical"
    )
    counted = deepep_bytes(counted_copies=4096 * 3.621, hidden=7168, fp8=dispatch)
    assert counted / prepared.alone_R.max() == pytest.approx(published * 1e9, rel=0.06)


@cache
def fabric_of(ranks: int) -> Fabric:
    return make_fabric(ranks // 8, gpu="h800")


def low_latency_errors(call: int, counts: tuple[int, ...]) -> np.ndarray:
    """|log| of predicted over published, of dispatches or combines."""
    prepare, size = ((prepare_dispatch, FP8), (prepare_combine, BF16))[call]
    errors = []
    for ranks in counts:
        copies = [np.full((ranks, ranks), 128 * 8 / ranks)]
        seconds = prepare(fabric_of(ranks), copies, token_bytes=size, algorithm="low_latency").alone_R.max()
        errors.append(abs(np.log(seconds / (LOW_LATENCY[ranks][call] * 1e-6))))
    return np.array(errors)


@pytest.mark.parametrize("call", [0, 1])
def test_nics_share_does_not_fall_with_nodes(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One share, fitted to every other number of nodes, meets the numbers between; so do the constants in use."""
    assert low_latency_errors(call, (16, 64, 256)).max() < 0.05
    across, found = LOW_LATENCY_NICS.across, {}
    assert across is not None
    for share in np.arange(0.82, 0.98, 0.02):
        kernels = Kernels(*(replace(kernel, nic_share=float(share)) for kernel in across[:2]))
        trial = replace(LOW_LATENCY_NICS, across=kernels)
        monkeypatch.setitem(DISPATCH, trial.name, trial)
        found[float(share)] = [low_latency_errors(call, counts) for counts in ((8, 32, 128), (16, 64, 256))]
    best = min(found, key=lambda share: found[share][0].sum())
    print(f"{('dispatch', 'combine')[call]}: {best:.2f} of a NIC, others {found[best][1].max():.1%} off at worst")
    assert found[best][1].max() < 0.05


@pytest.mark.parametrize("ranks", LOW_LATENCY)
def test_low_latency_kernels(ranks: int) -> None:
    copies = [np.full((ranks, ranks), 128 * 8 / ranks)]
    for prepare, size, published in zip(
        (prepare_dispatch, prepare_combine), (FP8, BF16), LOW_LATENCY[ranks], strict=True
    ):
        prepared = prepare(fabric_of(ranks), copies, token_bytes=size, algorithm="low_latency")
        assert prepared.alone_R.max() == pytest.approx(published * 1e-6, rel=0.06), prepare
