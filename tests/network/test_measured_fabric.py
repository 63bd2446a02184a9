"""What two H100 measured between them: half of the profile's rows fit, the others and another day are predicted."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from moesim.network.calibration import fit_sms, measured_parameters
from moesim.network.fabric import Fabric
from moesim.network.flows import make_demand
from moesim.network.parameters import Protocol
from moesim.scenario.cluster import Cluster, Pool
from moesim.scenario.dispatch import BYTES_PER_SM, DISPATCH, SM_SHARPNESS, rate_of_both
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
    parameters = measured_parameters(list(rows), link_bandwidth=BANDWIDTH, source="rows")
    return build_fabric(Cluster(pools=(Pool(gpu="h100", nodes=1, gpus_per_node=2),)), parameters=parameters)


def shown(name: str, errors: list[float]) -> None:
    print(f"{name:44} {len(errors):3} rows: median {np.median(errors):.1%}, worst {max(errors):.1%}")


def errors_of(fabric: Fabric, kind: str, rows: Iterable[Row]) -> list[float]:
    return [abs(math.log(SECONDS[kind](fabric, row) / row["p50"])) for row in rows]


def test_rows_in_no_fit_are_predicted() -> None:
    """Sizes and splits between those that the profile's constants are fitted to, and all rows of another session."""
    mine = [row for row in load_profile("h100").collectives if "max_ctas" not in row]
    fabric = two_gpus(mine)
    print()
    for kind in SECONDS:
        held_out = errors_of(fabric, kind, [row for row in mine if row["kind"] == kind and row.get("held_out")])
        other_day = errors_of(fabric, kind, rows_of(kind))
        shown(f"{kind}, held out", held_out)
        shown(f"{kind}, another day", other_day)
        assert np.median(held_out) < 0.08 and np.median(other_day) < 0.08


def test_exchanges_that_go_mostly_one_way() -> None:
    """Each direction has a port of its own: sending alone is a third faster than sending and receiving as much."""
    fabric = two_gpus(load_profile("h100").collectives)
    print()
    for shares in ((1, 1), (3, 1), (7, 1), (1, 0)):
        rows = [row for row in rows_of("all_to_all_uneven") if row["bytes"] >= 32 * MIB and split(row, shares)]
        errors = errors_of(fabric, "all_to_all_uneven", rows)
        shown(f"{shares[0]} : {shares[1]}, another day, 32 MiB and more", errors)
        assert np.median(errors) < 0.10
    half, whole = (exchanged(fabric, uneven(256 * MIB, back)) for back in (256 * MIB, 0))
    assert 1.2 < half / whole < 1.5


def split(row: Row, shares: tuple[int, int]) -> bool:
    there, back = row["bytes_matrix"][0][1], row["bytes_matrix"][1][0]
    return abs(there / (there + back) - shares[0] / sum(shares)) < 0.01


def uneven(there: int, back: int) -> Row:
    return {"bytes": there, "bytes_matrix": [[0, there], [back, 0]]}


@settings(max_examples=60)
@given(
    sent=st.lists(st.floats(0.0, 1e9), min_size=16, max_size=16), efficiency=st.floats(0.5, 1.0),
    one_way=st.floats(1.0, 1.1),
)  # fmt: skip
def test_a_port_is_busy_as_long_as_its_law_says(sent: list[float], efficiency: float, one_way: float) -> None:
    """No rank's port has less to do than its busier way alone or both ways at their pace; the worst has just that."""
    sent_RR = np.array(sent).reshape(4, 4) * (1 - np.eye(4))
    fabric = make_fabric(1, gpu="h100", gpus_per_node=4)
    protocol = Protocol(efficiency=efficiency, one_way=one_way, source="made up")
    slowed_RR = make_demand(fabric, sent_RR, ranks=None).slowed(protocol).bytes_SRR[0]
    busier_R = np.maximum(sent_RR.sum(axis=1), sent_RR.sum(axis=0))
    law_R = np.maximum(busier_R / one_way, (sent_RR.sum(axis=1) + sent_RR.sum(axis=0)) / 2 / efficiency)
    busy_R = np.maximum(slowed_RR.sum(axis=1), slowed_RR.sum(axis=0))
    worst = law_R.argmax()
    assert busy_R[worst] == pytest.approx(law_R[worst])
    assert (slowed_RR >= sent_RR / one_way * (1 - 1e-12)).all()


def blocks(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and bytes/s that each GPU sends, of 512 MiB. NCCL takes a power of two of blocks for sends."""
    rows = [row for row in MEASURED["blocks"] if row["kind"] == kind and row["bytes"] == 512 * MIB]
    taken = 2 ** np.ceil(np.log2([row["max_ctas"] for row in rows]))
    return taken, np.array([row["bytes"] / 2 / row["seconds"] for row in rows])


def law(sms: np.ndarray, per_sm: float, sharpness: float, port: float) -> np.ndarray:
    return np.asarray(((sms * per_sm) ** -sharpness + port**-sharpness) ** (-1 / sharpness))


def test_bandwidth_by_the_number_of_sms() -> None:
    """The two constants of every GPU are those of every other number of blocks, in the profile and on another day."""
    sms, measured = blocks("all_to_all")
    per_sm, sharpness, port = fit_sms(sms[::2], measured[::2], link_bandwidth=BANDWIDTH)
    assert per_sm == pytest.approx(BYTES_PER_SM, rel=0.02) and sharpness == pytest.approx(SM_SHARPNESS, abs=0.5)
    errors = np.abs(np.log(law(sms, per_sm, sharpness, port) / measured))[1::2]
    print()
    shown("other blocks", errors.tolist())
    assert errors.max() < 0.03
    own = two_gpus(load_profile("h100").collectives).parameters
    assert own.bytes_per_sm == pytest.approx(BYTES_PER_SM, rel=0.02) and own.sm_sharpness == SM_SHARPNESS
    assert own.sm_source == "rows"


@pytest.mark.parametrize(("sms", "published"), [(16, 246e9), (48, 554e9)])
def test_published_bandwidths_by_sms(sms: int, published: float) -> None:
    """Within a node of NVLink 5 (900 GB/s): in no fit."""
    assert rate_of_both(0.817 * 900e9, sms * BYTES_PER_SM) == pytest.approx(published, rel=0.08)


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


FEW_SMS: dict[str, Any] = parse_json((FILE.parent / "few_sms_h100.json").read_bytes())


@pytest.mark.parametrize(("kind", "warps", "combine"), [("tma", 4, False), ("reduce", 32, True)])
def test_few_sms_of_stores_and_of_sums(kind, warps, combine):
    """4 and 8 SMs fit what one of them moves, of rows by the bulk copy engine and of rows read and summed.

    All other numbers of SMs are in no fit, nor are these of the port's share. Where 12 to 24 SMs copy the port gives
    more and then less than that: 338 GB/s of 12 and 308 of 16.
    """
    facts = DISPATCH["hybrid_ep"]
    rows = [row for row in FEW_SMS["rows"] if (row["kind"], row["warps"], row["both"]) == (kind, warps, True)]
    kernel, share = facts.kernels.combine if combine else facts.kernels.dispatch, facts.nvlink_share
    per_sm = kernel.bytes_per_sm
    assert per_sm is not None and share is not None
    fitted = [row["rate"] / row["sms"] for row in rows if row["sms"] in (4, 8)]
    assert per_sm == pytest.approx(np.mean(fitted), rel=0.01)
    apart = [row for row in rows if row["sms"] not in (4, 8)]
    found = [rate_of_both(share * BANDWIDTH, row["sms"] * per_sm) / row["rate"] - 1 for row in apart]
    print(kind, {row["sms"]: f"{error:+.1%}" for row, error in zip(apart, found, strict=True)})
    assert len(apart) == 10
    assert np.median(np.abs(found)) < 0.05
    assert np.abs(found).max() < 0.11


def test_two_kernels_share_a_port_and_leave_none_of_it_idle():
    """Copies of few SMs beside copies of many, into one port: together they take what all their bytes take."""
    for row in FEW_SMS["pairs"]:
        least = max(FEW_SMS_BYTES * 2 / (0.82 * BANDWIDTH), *row["alone"])
        assert least <= max(row["together"]) < 1.37 * least
    many = {row["second"]: row for row in FEW_SMS["pairs"] if row["both"] and row["first"] == 24}
    lost = {second: row["together"][0] / row["alone"][0] - 1 for second, row in many.items() if second <= 4}
    print("24 SMs lose beside", {second: f"{loss:.0%}" for second, loss in lost.items()})
    assert 0.05 < lost[2] < lost[4] < 0.3


FEW_SMS_BYTES = 7168 * 16384 * 2
