"""Network constants from measured collectives: made-up measurements are found again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.kernels import load_profile
from moesim.network import (
    all_gather_seconds,
    all_reduce_seconds,
    build_fabric,
    prepare_dispatch,
    reduce_scatter_seconds,
    send_recv_seconds,
)
from moesim.network.calibration import fit_protocol, fit_sms, measured_parameters
from moesim.network.parameters import NetworkParameters
from moesim.scenario.cluster import Cluster, Pool

BANDWIDTH = 450e9
MIB = 2**20
SECONDS: dict[str, Any] = {
    "all_reduce": lambda fabric, size: all_reduce_seconds(fabric, np.arange(2), size, algorithm="ring").seconds,
    "all_gather": lambda fabric, size: all_gather_seconds(fabric, np.arange(2), size).seconds,
    "reduce_scatter": lambda fabric, size: reduce_scatter_seconds(fabric, np.arange(2), size).seconds,
    "send_recv": lambda fabric, size: send_recv_seconds(fabric, 0, 1, size).seconds,
}
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


def of_kind(profile: str, kind: str) -> list[dict[str, Any]]:
    """Calls with the library's own number of blocks, as if all were for fits."""
    rows = [row for row in load_profile(profile).collectives if row["kind"] == kind and "max_ctas" not in row]
    return sorted(({**row, "held_out": 0} for row in rows), key=lambda row: row["bytes"])


@pytest.mark.parametrize("profile", ["h100", "h200"])
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("first", [0, 1])
def test_rows_that_were_held_out_of_the_fit_are_predicted(profile: str, kind: str, first: int) -> None:
    rows = of_kind(profile, kind)
    used, held_out = rows[first::2], rows[1 - first :: 2]
    fabric = build_fabric(cluster(), parameters=measured_parameters(used, link_bandwidth=BANDWIDTH, source="half"))
    for row in held_out:
        error = SECONDS[kind](fabric, row["bytes"]) / row["p50"] - 1
        assert abs(error) < (0.11 if row["bytes"] >= 32 * MIB else 0.14), (row["bytes"], error)


@pytest.mark.parametrize("profile", ["h100", "h200"])
@pytest.mark.parametrize("kind", sorted(SECONDS))
def test_large_calls_of_each_kind_take_what_was_measured_for_that_kind(profile: str, kind: str) -> None:
    rows = load_profile(profile).collectives
    fabric = build_fabric(cluster(), parameters=measured_parameters(rows, link_bandwidth=BANDWIDTH, source=profile))
    large = [row for row in of_kind(profile, kind) if row["bytes"] >= 64 * MIB]
    errors = [SECONDS[kind](fabric, row["bytes"]) / row["p50"] - 1 for row in large]
    assert len(errors) >= 3 and max(map(abs, errors)) < 0.06, errors


def test_a_kind_without_rows_of_its_own_keeps_its_constants() -> None:
    parameters = measured_parameters(
        measured("all_gather", lambda size: 8e-6 + size / 200e9), link_bandwidth=BANDWIDTH, source="gathers"
    )
    assert parameters is not None and parameters == replace(NetworkParameters(), own=parameters.own, launch_seconds=0.0)
    (own,) = parameters.own
    assert (own.call, own.ranks, own.protocol.source) == ("all_gather", 2, "gathers")


def test_measured_calls_hold_for_as_many_ranks_of_one_domain_and_no_others() -> None:
    """In a world of sixteen, a pair of a node takes what two GPUs took; four ranks, or a pair across nodes, do not."""
    rows = [row for kind in SECONDS for row in measured(kind, lambda size: 1e-3 + size / 1e9)]
    parameters = measured_parameters(rows, link_bandwidth=BANDWIDTH, source="slow", world=16, kind="h200")
    assert parameters is not None and parameters.launch_seconds > 0
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=2, gpus_per_node=8),)), parameters=parameters)
    for ranks, slow in ((np.arange(2), True), (np.arange(4), False), (np.array([0, 8]), False)):
        for call in (all_reduce_seconds, all_gather_seconds, reduce_scatter_seconds):
            assert (call(fabric, ranks, 1e6).seconds > 1.5e-3) == slow
            assert (call(fabric, ranks, 1e6).source.startswith("slow;")) == slow
    assert send_recv_seconds(fabric, 0, 5, 1e6).seconds > 1.5e-3 > send_recv_seconds(fabric, 0, 8, 1e6).seconds


def test_a_rings_rows_do_not_tell_what_a_switch_sums() -> None:
    """All-reduces measured with NVLS off are no all-reduces of eight H200, but those of eight A100."""
    rows = [row | {"ranks": 8, "nvls": 0} for row in measured("all_reduce", lambda size: 1e-3 + size / 1e9)]
    for kind, found in (("h200", ()), ("a100", ("all_reduce",))):
        parameters = measured_parameters(rows, link_bandwidth=BANDWIDTH, source="ring", kind=kind)
        assert parameters is not None and tuple(own.call for own in parameters.own) == found
    assert measured_parameters(
        [row | {"nvls": 1} for row in rows], link_bandwidth=BANDWIDTH, source="", kind="h200"
    ).own


def test_what_sms_move_is_found_again() -> None:
    sms_N = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    truth_N = ((20e9 * sms_N) ** -3.0 + 330e9**-3.0) ** (-1 / 3.0)
    per_sm, sharpness, port = fit_sms(sms_N, truth_N, link_bandwidth=BANDWIDTH)
    assert (per_sm, sharpness, port) == pytest.approx((20e9, 3.0, 330e9), rel=0.02)
