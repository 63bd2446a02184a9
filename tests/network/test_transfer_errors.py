"""Ranges of steps hold what transfers may be off: by rows that shaped no constant, by kind of evidence. `pytest -s`."""

import numpy as np
import pytest
import test_dispatch_tables as dispatch
import test_measured_fabric as two_gpus
import test_nccl_tables as nccl
from network_cases import make_fabric

from moesim.kernels import load_profile
from moesim.kernels.errors import known_error, transfers_of
from moesim.network import Fabric, all_gather_seconds, build_fabric, prepare_dispatch, send_recv_seconds
from moesim.network.parameters import Evidence, NetworkParameters
from moesim.scenario.cluster import Cluster, Pool

MIB = 2**20


def bare(kind: str) -> Fabric:
    """Links and constants without the library's tables."""
    parameters = NetworkParameters(by_gpu=False)
    return build_fabric(Cluster(pools=(Pool(gpu=kind, nodes=1, gpus_per_node=8),)), parameters=parameters)


def of_nccl(*, tables: bool, least: int) -> list[float]:
    """Every other size of the tables, with 4 and 8 GPUs."""
    found = []
    for kind, calls in nccl.MEASURED.items():
        fabric = make_fabric(1, gpu=kind) if tables else bare(kind)
        for call, by_count in calls.items():
            rows = [(int(n), float(b), s) for n, sizes in by_count.items() for b, s in list(sizes.items())[1::2]]
            chosen = [row for row in rows if row[0] >= 4 and row[1] >= least]
            found += [np.log(s / nccl.seconds(fabric, call, n, b)) for n, b, s in chosen]
    return found


def of_own_rows() -> list[float]:
    mine = [row for row in load_profile("h100").collectives if "max_ctas" not in row]
    fabric, found = two_gpus.two_gpus(mine), []
    for kind in two_gpus.SECONDS:
        rows = [row for row in mine if row["kind"] == kind and row.get("held_out")] + two_gpus.rows_of(kind)
        if kind != "all_to_all_uneven":  # of which some waited for something else: see test_measured_fabric
            found += two_gpus.errors_of(fabric, kind, [row for row in rows if row["bytes"] >= MIB])
    return found


def of_kernels() -> list[float]:
    def is_usual(row: dict) -> bool:
        if row["algorithm"] == "hierarchical":
            return row["tokens"] >= 2048 and row["topk"] >= 6 and row["nodes"] < 8
        return row["algorithm"] != "one_sided" or row["ranks"] > 2

    return [dispatch.error(row) for row in dispatch.ROWS if is_usual(row)]


@pytest.mark.parametrize("evidence", list(Evidence))
def test_ranges_hold_what_rows_in_no_fit_are_off(evidence: Evidence) -> None:
    errors = np.abs({
        Evidence.OWN: of_own_rows,
        Evidence.TABLES: lambda: of_nccl(tables=True, least=MIB),
        Evidence.KERNELS: of_kernels,
        Evidence.NONE: lambda: of_nccl(tables=False, least=32 * MIB),
    }[evidence]())  # fmt: skip
    known = known_error(("any",), "network", transfers_of(evidence))
    p50, p90 = np.quantile(errors, [0.5, 0.9])
    print(f"{known.family:40} {len(errors):4} rows: p50 {p50:.3f}, p90 {p90:.3f}; in ranges {known.p50}, {known.p90}")
    assert known.count == len(errors)
    assert known.p50 == pytest.approx(p50, abs=0.01) and known.p90 == pytest.approx(p90, abs=0.012)


def test_calls_across_nodes_and_what_nobody_measured_have_the_widest_range() -> None:
    two, one = make_fabric(2), make_fabric(1)
    copies_RR = np.ones((8, 8)) * (1 - np.eye(8))
    assert all_gather_seconds(one, None, 1e8).evidence is Evidence.TABLES
    assert all_gather_seconds(two, None, 1e8).evidence is Evidence.NONE
    assert send_recv_seconds(two, 0, 8, 1e8).evidence is Evidence.NONE
    for algorithm, evidence in (("direct", "TABLES"), ("hierarchical", "KERNELS"), ("hybrid_ep", "NONE")):
        stages = [copies_RR * 1000, copies_RR * 0][: 2 if algorithm != "direct" else 1]
        prepared = prepare_dispatch(one, stages, token_bytes=7168.0, algorithm=algorithm)
        assert prepared.evidence is Evidence[evidence], algorithm
    half, whole = (known_error(("any",), "network", transfers_of(each)).half_width for each in (Evidence.TABLES, ""))
    assert whole > 2 * half
