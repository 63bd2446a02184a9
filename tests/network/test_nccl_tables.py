"""NCCL's calls inside one NVLink domain by kind of GPU: sizes that no constant was fitted to, and published rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network_cases import make_fabric

from moesim.network import Fabric, all_gather_seconds, all_reduce_seconds, prepare_dispatch, reduce_scatter_seconds
from moesim.network.nccl import KINDS
from moesim.strict_json import parse_json, unpacked

MEASURED: dict[str, Any] = parse_json(
    unpacked((Path(__file__).parents[1] / "data" / "nccl_tables.json.gz").read_bytes())
)
MIB = 2**20
# busbw in GB/s of 8 H200, torch's launch included (stas00/ml-engineering network/benchmarks, NCCL 2.27.7).
PUBLISHED = {
    2**15: 1.44, 2**16: 2.93, 2**17: 5.73, 2**18: 11.74, 2**19: 23.94, 2**20: 39.93, 2**21: 64.53, 2**22: 107.16,
    2**23: 155.53, 2**24: 219.89, 2**25: 275.84, 2**26: 346.51, 2**27: 401.93, 2**28: 436.15, 2**29: 450.29,
    2**30: 463.58, 2**31: 469.17, 2**32: 473.1, 2**33: 477.45, 2**34: 482.26,
}  # fmt: skip


def seconds(fabric: Fabric, call: str, ranks: int, size: float) -> float:
    """Without torch's launch."""
    if call == "all_to_all":
        others_RR = np.full((ranks, ranks), size / ranks) * (1 - np.eye(ranks))
        found = float(prepare_dispatch(fabric, [others_RR], token_bytes=1.0, ranks=np.arange(ranks)).alone_R.max())
    else:
        calls = {
            "all_reduce": all_reduce_seconds, "all_gather": all_gather_seconds, "reduce_scatter": reduce_scatter_seconds
        }  # fmt: skip
        found = calls[call](fabric, np.arange(ranks), size).seconds
    return found - fabric.parameters.launch_seconds


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sizes_in_no_fit_are_predicted(kind: str) -> None:
    fabric = make_fabric(1, gpu=kind)
    print()
    for call, by_count in MEASURED[kind].items():
        errors = [
            abs(math.log(seconds(fabric, call, int(ranks), float(size)) / found))
            for ranks, sizes in by_count.items()
            for size, found in list(sizes.items())[1::2]
        ]
        print(f"{kind:6} {call:15} {len(errors):3} sizes: median {np.median(errors):.1%}, worst {max(errors):.1%}")
        assert np.median(errors) < 0.10 and np.quantile(errors, 0.9) < 0.35


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_all_reduces(size: int) -> None:
    fabric = make_fabric(1, gpu="h200")
    found = all_reduce_seconds(fabric, None, float(size)).seconds
    assert 2 * 7 / 8 * size / found / 1e9 == pytest.approx(PUBLISHED[size], rel=0.12)


def test_blackwell_is_no_hopper_with_wider_links() -> None:
    """Its switch sums at a smaller share of the port, and its calls take longer to begin."""
    shares, small = {}, {}
    for kind, nvlink in (("h200", 450e9), ("b200", 900e9)):
        fabric = make_fabric(1, gpu=kind)
        shares[kind] = 2 * 7 / 8 * 2**34 / all_reduce_seconds(fabric, None, 2.0**34).seconds / nvlink
        small[kind] = all_reduce_seconds(fabric, None, 8192.0).seconds
    assert shares["b200"] < 0.92 * shares["h200"] and small["b200"] > 1.2 * small["h200"]


def test_the_wire_falls_with_peers_and_longer_rings_begin_later() -> None:
    """An exchange of two GPUs uses fewer channels than one of eight; a rack's ring has seventy-one hops."""
    for kind in ("h100", "b200"):
        fabric = make_fabric(1, gpu=kind)
        rates = [n * 2**29 * (1 - 1 / n) / n / seconds(fabric, "all_to_all", n, 2.0**29) for n in (2, 4, 8)]
        assert rates[0] < rates[1]
    rack = make_fabric(18, gpu="gb200", gpus_per_node=4)
    times = [all_gather_seconds(rack, np.arange(n), 8192.0).seconds for n in (4, 8, 16, 72)]
    assert times == sorted(times) and times[-1] > times[0] + 60e-6


def test_a_stated_share_and_measured_collectives_go_before_the_tables() -> None:
    stated = all_gather_seconds(make_fabric(1, nvlink_efficiency=0.9), None, 2.0**32)
    assert stated.seconds == pytest.approx(7 / 8 * 2**32 / (0.9 * 450e9), rel=0.02)
    assert "NCCL 2.29.2 on 8 H200" in all_gather_seconds(make_fabric(1), None, 2.0**32).source
    across = all_gather_seconds(make_fabric(2), None, 2.0**32).source
    assert not across.startswith("NCCL 2.29.2") and "what large messages lose: NCCL 2.29.2 on 8 H200" in across
    assert "NCCL 2.29.2 on 8 H100" in all_gather_seconds(make_fabric(1, gpu="h800"), None, 2.0**32).source
    assert "8 B200" in all_gather_seconds(make_fabric(18, gpu="gb300", gpus_per_node=4), None, 2.0**32).source.replace(
        "B300", "B200"
    )
