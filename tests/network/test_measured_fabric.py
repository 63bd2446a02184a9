"""Collectives measured between two H100 (tools/measure_fabric.py): every other row fits, the others are predicted."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network_cases import make_fabric

from moesim.kernels import load_profile
from moesim.network import (
    all_gather_seconds,
    all_reduce_seconds,
    build_fabric,
    prepare_dispatch,
    reduce_scatter_seconds,
    send_recv_seconds,
)
from moesim.network.calibration import measured_parameters
from moesim.network.fabric import Fabric
from moesim.scenario.cluster import Cluster, Pool
from moesim.scenario.dispatch import BYTES_PER_SM, DISPATCH, SM_SHARPNESS, nvlink_share_of_sms
from moesim.strict_json import parse_json, unpacked

FILE = Path(__file__).parents[1] / "data" / "fabric_h100.json.gz"
MEASURED: dict[str, Any] = parse_json(unpacked(FILE.read_bytes()))
BANDWIDTH = 450e9
MIB = 2**20
Row = dict[str, Any]


def rows_of(kind: str) -> list[Row]:
    return [as_profile(row) for row in MEASURED["alone"] if row["kind"] == kind]


def as_profile(row: Row) -> Row:
    """A row in the form of a profile's collectives."""
    found = {key: row[key] for key in ("kind", "bytes", "ranks")} | {"p50": row["seconds"]}
    if "sent" in row:
        found["bytes_matrix"] = [[0, row["sent"][0]], [row["sent"][1], 0]]
    return found


def exchanged(fabric: Fabric, row: Row) -> float:
    others_RR = np.array(row.get("bytes_matrix") or [[0, row["bytes"] / 2], [row["bytes"] / 2, 0]], dtype=float)
    return float(prepare_dispatch(fabric, [others_RR], token_bytes=1.0, ranks=np.arange(2)).alone_R.max())


SECONDS: dict[str, Any] = {
    "all_reduce": lambda f, row: all_reduce_seconds(f, np.arange(2), row["bytes"], algorithm="ring").seconds,
    "all_gather": lambda f, row: all_gather_seconds(f, np.arange(2), row["bytes"]).seconds,
    "reduce_scatter": lambda f, row: reduce_scatter_seconds(f, np.arange(2), row["bytes"]).seconds,
    "send_recv": lambda f, row: send_recv_seconds(f, 0, 1, row["bytes"]).seconds,
    "all_to_all": exchanged,
    "all_to_all_uneven": exchanged,
}


def two_gpus(rows: Iterable[Row]) -> Fabric:
    parameters = measured_parameters(list(rows), link_bandwidth=BANDWIDTH, source="every other row")
    return build_fabric(Cluster(pools=(Pool(gpu="h100", nodes=1, gpus_per_node=2),)), parameters=parameters)


def shown(name: str, errors: list[float]) -> None:
    print(f"{name:20} {len(errors):3} rows: median {np.median(errors):.1%}, worst {max(errors):.1%}")


def test_rows_in_no_fit_are_predicted() -> None:
    """Of 64 KiB to 1 GiB. Uneven splits, none of them in the fit, are worst: one way alone is a fifth faster."""
    print()
    half = [row for kind in SECONDS if kind != "all_to_all_uneven" for row in rows_of(kind)[::2]]
    fabric = two_gpus(half)
    for kind, seconds in SECONDS.items():
        rows = rows_of(kind) if kind == "all_to_all_uneven" else rows_of(kind)[1::2]
        errors = [abs(math.log(seconds(fabric, row) / row["p50"])) for row in rows]
        shown(kind, errors)
        assert np.median(errors) < (0.20 if kind == "all_to_all_uneven" else 0.12)


def test_what_shipped_constants_say_of_another_day() -> None:
    """The H100 profile, measured in another session, against all rows of this one."""
    parameters = measured_parameters(load_profile("h100").collectives, link_bandwidth=BANDWIDTH, source="profile")
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h100", nodes=1, gpus_per_node=2),)), parameters=parameters)
    print()
    for kind in sorted(SECONDS.keys() - {"all_to_all_uneven"}):
        errors = [abs(math.log(SECONDS[kind](fabric, row) / row["p50"])) for row in rows_of(kind)]
        shown(kind, errors)
        assert np.median(errors) < 0.12


def blocks(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and bytes/s that each GPU sends, of 512 MiB. NCCL takes a power of two of blocks for sends."""
    rows = [row for row in MEASURED["blocks"] if row["kind"] == kind and row["bytes"] == 512 * MIB]
    taken = 2 ** np.ceil(np.log2([row["max_ctas"] for row in rows]))
    return taken, np.array([row["bytes"] / 2 / row["seconds"] for row in rows])


def law(sms: np.ndarray, per_sm: float, sharpness: float, port: float) -> np.ndarray:
    return np.asarray(((sms * per_sm) ** -sharpness + port**-sharpness) ** (-1 / sharpness))


def test_bandwidth_by_the_number_of_sms() -> None:
    """The two constants are the best for every other number of blocks; the numbers between are met."""
    sms, measured = blocks("all_to_all")
    fits = np.arange(len(sms)) % 2 == 0
    tried = [
        (float(np.square(np.log(law(sms, per_sm, sharpness, port) / measured)[fits]).sum()), per_sm, sharpness, port)
        for per_sm in np.arange(13e9, 16e9, 0.2e9)
        for sharpness in np.arange(2.0, 6.0, 0.25)
        for port in np.arange(250e9, 350e9, 2e9)
    ]
    _, per_sm, sharpness, port = min(tried)
    assert (per_sm, sharpness) == (pytest.approx(BYTES_PER_SM), pytest.approx(SM_SHARPNESS))
    errors = np.abs(np.log(law(sms, per_sm, sharpness, port) / measured))[~fits]
    print()
    shown("other blocks", errors.tolist())
    assert errors.max() < 0.03


@pytest.mark.parametrize(("sms", "published"), [(16, 246e9), (48, 554e9)])
def test_published_bandwidths_by_sms(sms: int, published: float) -> None:
    """Within a node of NVLink 5 (900 GB/s): in no fit."""
    assert 900e9 * nvlink_share_of_sms(0.817, sms=sms, nvlink=900e9) == pytest.approx(published, rel=0.08)


@pytest.mark.parametrize("algorithm", sorted(DISPATCH))
def test_more_sms_are_never_slower_and_a_stated_share_is_what_it_says(algorithm: str) -> None:
    copies_RR = np.full((8, 8), 4096.0) * (1 - np.eye(8))
    facts = DISPATCH[algorithm]

    def seconds(sms: float | None, **keys: object) -> float:
        fabric = make_fabric(1, gpu="h100", **keys)
        prepared = prepare_dispatch(fabric, [copies_RR], token_bytes=14336.0, algorithm=algorithm, sms=sms)
        return float(prepared.alone_R.max())

    times = [seconds(sms) for sms in (4, 8, 16, 32, 132)]
    assert times == sorted(times, reverse=True)
    bound = not (facts.gathers or facts.avoids_nvlink)
    assert (times[0] > 1.5 * times[-1]) == bound
    assert not facts.owns_sms or not bound or seconds(None) == pytest.approx(seconds(facts.sms or 1e6))
    assert seconds(4, nvlink_efficiency=0.5) == seconds(64, nvlink_efficiency=0.5)


def test_transfers_beside_gemms() -> None:
    """What all-to-alls beside kernels taught (profile h100) against all-to-alls and sends of this session."""
    contention = load_profile("h100").contention.of("gemm")
    print()
    for kind in ("all_to_all", "send_recv"):
        rows = [row for row in MEASURED["beside"] if row["kind"] == kind and row["bytes"] >= 32 * MIB]
        rows = [row for row in rows if row["max_ctas"] == 0]
        alone, beside = (np.array([row[f"transfer_{how}"] for row in rows]) for how in ("alone", "beside"))
        predicted = contention.wait + contention.transfer * alone
        shown(kind, np.abs(np.log(predicted / beside)).tolist())
        shown("as if it were alone", np.abs(np.log(alone / beside)).tolist())
        assert np.median(np.abs(np.log(predicted / beside))) < 0.35
