"""Network constants from measured collectives: made-up measurements are found again."""

from typing import Any

import numpy as np
import pytest

from moesim.kernels import load_profile
from moesim.network import all_reduce_seconds, build_fabric, prepare_dispatch
from moesim.network.calibration import fit_protocol, measured_parameters
from moesim.network.parameters import NetworkParameters
from moesim.scenario.cluster import Cluster, Pool

BANDWIDTH = 450e9
SIZES = [8192 * 4**power for power in range(9)]


def cluster() -> Cluster:
    return Cluster(pools=(Pool(gpu="h200", nodes=1, gpus_per_node=2),))


def measured(kind: str, seconds: Any) -> list[dict[str, Any]]:
    return [{"kind": kind, "bytes": size, "ranks": 2, "p50": seconds(size)} for size in SIZES]


def test_a_made_up_protocol_is_found_again() -> None:
    bytes_N = np.array(SIZES, dtype=float)
    wire_N = bytes_N / 300e9
    truth_N = 5e-6 + wire_N / 0.9 + 4e-5 * bytes_N / (bytes_N + 2.0**23)
    found = fit_protocol(bytes_N, truth_N, wire_N, source="made up")
    again_N = (
        found.call_seconds
        + wire_N / found.efficiency
        + found.transition_seconds * bytes_N / (bytes_N + found.transition_bytes)
    )
    assert again_N == pytest.approx(truth_N, rel=0.03)
    assert found.efficiency == pytest.approx(0.9, abs=0.03) and found.source == "made up"


def test_without_measurements_there_is_nothing_to_replace() -> None:
    assert measured_parameters([], link_bandwidth=BANDWIDTH, source="none") is None
    few = measured("all_to_all", lambda size: 1e-5)[:3]
    assert measured_parameters(few, link_bandwidth=BANDWIDTH, source="few") == NetworkParameters()


def test_slower_measurements_make_slower_collectives() -> None:
    steps = []
    for slower in (1.0, 2.0):
        rows = measured("all_reduce", lambda size, factor=slower: factor * (8e-6 + size / 300e9))
        parameters = measured_parameters(rows, link_bandwidth=BANDWIDTH, source="made up")
        fabric = build_fabric(cluster(), parameters=parameters)
        steps.append(all_reduce_seconds(fabric, np.arange(2), 1e9).seconds)
    assert 1.3 < steps[1] / steps[0] < 2.1


def test_the_shipped_collectives_are_reproduced() -> None:
    rows = load_profile("h200").collectives
    parameters = measured_parameters(rows, link_bandwidth=BANDWIDTH, source="profile h200")
    fabric = build_fabric(cluster(), parameters=parameters)
    errors = []
    for row in rows:
        if row["kind"] == "all_reduce":
            seconds = all_reduce_seconds(fabric, np.arange(2), row["bytes"]).seconds
        elif row["kind"] == "all_to_all":
            others_RR = np.full((2, 2), row["bytes"] / 2) * (1 - np.eye(2))
            prepared = prepare_dispatch(fabric, [others_RR], token_bytes=1.0, algorithm="direct", ranks=np.arange(2))
            seconds = float(prepared.alone_R.max())
        else:
            continue
        errors.append(abs(seconds / row["p50"] - 1))
    assert len(errors) >= 16 and np.median(errors) < 0.05 and max(errors) < 0.35
