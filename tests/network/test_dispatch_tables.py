"""Dispatch and combine of DeepEP and TensorRT-LLM on six kinds of GPU: rows of tables that shaped no constant.

tools/fit_dispatch.py writes them. `pytest -s` prints the errors; positive: predicted too slow.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network_cases import make_fabric

from moesim.network import Fabric, prepare_combine, prepare_dispatch
from moesim.strict_json import parse_json, unpacked

_FILE: Any = parse_json(unpacked((Path(__file__).parents[1] / "data" / "dispatch_tables.json.gz").read_bytes()))
ROWS: list[dict[str, Any]] = [dict(zip(_FILE["fields"], row, strict=True)) for row in _FILE["rows"]]
BOARD = {"gb200": 4, "gb300": 4}


@cache
def fabric_of(kind: str, nodes: int) -> Fabric:
    return make_fabric(nodes, gpu=kind, gpus_per_node=BOARD.get(kind, 8))


def stages_of(row: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Copies from rank to rank, even, and those that stay."""
    ranks, nodes, to_rank = row["ranks"], row["nodes"], row["tokens"] * row["to_rank"]
    others_RR = 1 - np.eye(ranks)
    if row["algorithm"] != "hierarchical":
        return [to_rank * others_RR], None
    if nodes == 1:
        return [to_rank * others_RR, 0 * others_RR], np.full(ranks, to_rank)
    node_R, rail_R = np.divmod(np.arange(ranks), ranks // nodes)
    same_RR = node_R[:, None] == node_R
    relay_RR = (rail_R[:, None] == rail_R) & ~same_RR
    first_RR = np.where(same_RR, to_rank, relay_RR * row["tokens"] * row["to_node"])
    return [first_RR * others_RR, same_RR * others_RR * (nodes - 1) * to_rank], None


def error(row: dict[str, Any]) -> float:
    stages, own_R = stages_of(row)
    rack = row["algorithm"] == "one_sided"
    prepared = (prepare_combine if row["call"] else prepare_dispatch)(
        fabric_of(row["kind"], 18 if rack else row["nodes"]), stages, token_bytes=row["row_bytes"],
        algorithm=row["algorithm"], own_copies_R=own_R, sms=row["sms"] or None,
        ranks=np.arange(row["ranks"]),
    )  # fmt: skip
    return float(np.log(prepared.alone_R.max() / row["seconds"]))


def check(cases: list[dict[str, Any]], name: str, *, median: float, most: float) -> None:
    """The errors of all cases by call: their median, and at the 90th percentile."""
    by_call: dict[int, list[float]] = defaultdict(list)
    for row in cases:
        by_call[row["call"]].append(error(row))
    for call, found in sorted(by_call.items()):
        errors = np.abs(found)
        middle, large, worst = np.median(errors), np.quantile(errors, 0.9), errors.max()
        way = ("dispatch", "combine")[call]
        print(
            f"{name:44} {way:8} {len(errors):4} rows: median {middle:.1%}, 90 % {large:.1%}, worst {worst:.0%}, "
            f"signed {np.median(found):+.1%}"
        )
        assert middle < median and large < most, (name, way)


@pytest.mark.parametrize("kind", ["h100", "h200", "b200", "b300", "gb200", "gb300"])
def test_normal_kernels_inside_a_node(kind: str) -> None:
    """By 8 to 24 SMs, of layouts with 6 and 8 experts a token: from 2,048 tokens on, and less; then with 2 experts."""
    rows = [row for row in ROWS if (row["algorithm"], row["kind"], row["nodes"]) == ("hierarchical", kind, 1)]
    many = [row for row in rows if row["topk"] >= 6]
    check([row for row in many if row["tokens"] >= 2048][::2], f"normal {kind}, large", median=0.10, most=0.22)
    check([row for row in many[::4] if row["tokens"] < 2048], f"normal {kind}, small", median=0.17, most=0.35)
    check([row for row in rows if row["topk"] == 2][::4], f"normal {kind}, 2 experts", median=0.25, most=0.6)


def test_normal_kernels_over_nodes() -> None:
    """Of 2 and 4 nodes; those of 8 moved less than half of their NICs' bytes and waited (4 of 6 ms a call)."""
    for nodes in (2, 4):
        rows = [row for row in ROWS if (row["algorithm"], row["nodes"]) == ("hierarchical", nodes)]
        check([row for row in rows if row["tokens"] >= 1024], f"normal, {nodes} nodes, large", median=0.13, most=0.20)
        check([row for row in rows if row["tokens"] < 1024], f"normal, {nodes} nodes, small", median=0.12, most=0.35)


@pytest.mark.parametrize("kind", ["h100", "h200", "b200", "b300", "gb200", "gb300"])
def test_low_latency_kernels_over_nvlink(kind: str) -> None:
    rows = [row for row in ROWS if (row["algorithm"], row["kind"], row["nodes"]) == ("low_latency_nvlink", kind, 1)]
    check([row for row in rows if row["topk"] >= 6], f"low latency {kind}", median=0.13, most=0.30)


def test_low_latency_kernels_over_nodes() -> None:
    for nodes in (2, 4, 8):
        rows = [row for row in ROWS if (row["algorithm"], row["nodes"]) == ("low_latency_nvlink", nodes)]
        check(rows, f"low latency, {nodes} nodes", median=0.05, most=0.10)


def test_one_sided_stores_among_racks() -> None:
    """Of two GPUs large dispatches read no faster than half of what more of them do, and are apart."""
    rows = [row for row in ROWS if row["algorithm"] == "one_sided"]
    check([row for row in rows if row["ranks"] > 2], "one sided, 4 to 32 GB200", median=0.06, most=0.14)
    check(
        [row for row in rows if row["ranks"] == 2 and row["tokens"] < 2048], "one sided, 2 GB200", median=0.08, most=0.3
    )
