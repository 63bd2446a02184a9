"""What DeepEP's and TensorRT-LLM's kernels cost beside the links, from the tables of aiconfigurator-core.

    pip install -e '.[tables]' && python tools/fit_dispatch.py

Prints the constants of `moesim.scenario.dispatch`: every other row shapes them. Of the others those of common layouts
are written to tests/data/dispatch_tables.json.gz, for tests/network/test_dispatch_tables.py. Rows are routed evenly, as
in the programs that measured: 8 of 256 experts, of DeepEP's normal kernels between nodes in at most 4 nodes.

Legend: N rows, T tokens.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from math import lgamma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moesim.network.parameters import NetworkParameters
from moesim.scenario.catalogue import gpu_spec
from moesim.scenario.cluster import NIC_BANDWIDTH
from moesim.scenario.dispatch import DISPATCH, rate_of_both

Rows = NDArray[Any]
SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "b300": "b300_sxm"} | {
    name: name for name in ("gb200", "gb300")
}
GROUPS = (("h100", "h200"), ("b200", "b300"), ("gb200", "gb300"))
BOARDS, SPREAD = "0.5.12", "0.5.6.post2"  # SGLang's versions: one node by SMs and layout, and up to 8 nodes
CALLS = ("dispatch", "combine")
FIELDS = [
    ("algorithm", "U20"), ("kind", "U6"), ("nodes", "i4"), ("ranks", "i4"), ("call", "i4"), ("sms", "i4"),
    ("row_bytes", "f8"), ("topk", "i4"), ("to_rank", "f8"), ("to_node", "f8"), ("tokens", "i8"), ("seconds", "f8"),
]  # fmt: skip
HOP = 2 * NetworkParameters().nvlink_latency
OVER_SPINE = 3.7e-6
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read, fit, print and write what shaped nothing."""
    folder = next(Path(p) / "aiconfigurator_core" for p in sys.path if (Path(p) / "aiconfigurator_core").is_dir())
    found = [tuple(row) for row in (*_deepep(folder / "systems/data"), *_one_sided(folder / "systems/data"))]
    rows_N = np.array(found, dtype=FIELDS)
    rows_N = np.sort(rows_N, order=[name for name, _ in FIELDS])
    fitted_N, apart_N = rows_N[::2], rows_N[1::2]
    for call in (0, 1):
        for kinds in GROUPS:
            of_N = fitted_N[(fitted_N["call"] == call) & np.isin(fitted_N["kind"], kinds) & (fitted_N["topk"] >= 6)]
            _print_normal(of_N[(of_N["algorithm"] == "hierarchical") & (of_N["nodes"] == 1)], kinds)
            _print_low_latency(of_N[(of_N["algorithm"] == "low_latency_nvlink") & (of_N["nodes"] == 1)], kinds)
        of_N = fitted_N[(fitted_N["call"] == call) & (fitted_N["nodes"] > 1)]
        _print_normal_across(of_N[(of_N["algorithm"] == "hierarchical") & (of_N["nodes"] < 8)])
        _print_low_latency_across(of_N[of_N["algorithm"] == "low_latency_nvlink"])
        _print_one_sided(fitted_N[(fitted_N["call"] == call) & (fitted_N["algorithm"] == "one_sided")])
    common_N = (apart_N["nodes"] > 1) | ~np.isin(apart_N["row_bytes"], [2 * h for h in (2688, 3072, 6144)])
    common_N &= np.isin(apart_N["topk"], [2, 6, 8]) & np.isin(apart_N["sms"], [0, 8, 16, 20, 24])
    kept = [[_short(value) for value in row.tolist()] for row in apart_N[common_N]]
    data = {"fields": [name for name, _ in FIELDS], "rows": kept}
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 9, mtime=0)
    (ROOT / "tests/data/dispatch_tables.json.gz").write_bytes(packed)
    print(f"{len(kept)} rows written, {len(packed)} bytes")


def _deepep(data: Path) -> Iterator[list[Any]]:
    for kind, system in SYSTEMS.items():
        for version in (BOARDS, SPREAD):
            for name, algorithm in (("ll", "low_latency_nvlink"), ("normal", "hierarchical")):
                path = data / system / "comm/sglang" / version / f"wideep_deepep_{name}_perf.parquet"
                if (version == SPREAD and kind != "h200") or not path.exists():  # the H100's are the same rows
                    continue
                for row in pyarrow.parquet.read_table(path).to_pylist():
                    if version == BOARDS or row["node_num"] > 1:
                        yield from _both_ways(kind, algorithm, row)


def _both_ways(kind: str, algorithm: str, row: dict[str, Any]) -> Iterator[list[Any]]:
    nodes, experts, topk = row["node_num"], row["num_experts"], row["num_topk"]
    ranks = nodes * (4 if kind.startswith("gb") else 8)
    if experts % ranks or topk > experts:
        return
    low_latency = algorithm != "hierarchical"
    to_rank, to_node = (topk / ranks, 0.0) if low_latency else _reached(experts, topk, ranks, nodes)
    for call, way in enumerate(CALLS):
        micros = row[f"{way}_avg_t_us"] if low_latency else row[f"{way}_transmit_us"] + row[f"{way}_notify_us"]
        if micros and micros > 0:
            size = row["hidden_size"] * (2 if call else 1 + 4 / 128)
            sms = 0 if low_latency else row[f"{way}_sms"]
            what = [algorithm, kind, nodes, ranks, call, sms, size, topk, to_rank, to_node]
            yield [*what, row["num_token"], micros * 1e-6]


def _reached(experts: int, topk: int, ranks: int, nodes: int) -> tuple[float, float]:
    """Shares of the tokens that a rank and a node get."""
    if nodes == 1:
        return _hit(experts, topk, experts // ranks), 1.0
    rng, tokens = np.random.default_rng(0), 4000
    score_TE = np.abs(rng.standard_normal((tokens, experts))) + 1
    of_node_TJ = score_TE.reshape(tokens, nodes, -1).max(axis=2)
    worst_TJ = np.argsort(-of_node_TJ, axis=1)[:, 4:]
    masked_TJE = score_TE.reshape(tokens, nodes, -1)
    np.put_along_axis(masked_TJE, worst_TJ[:, :, None], 0.0, axis=1)
    chosen_TK = np.argsort(-masked_TJE.reshape(tokens, -1), axis=1)[:, :topk]
    hit_TR = np.zeros((tokens, ranks), dtype=bool)
    np.put_along_axis(hit_TR, chosen_TK // (experts // ranks), True, axis=1)
    return float(hit_TR.mean()), float(hit_TR.reshape(tokens, nodes, -1).any(axis=2).mean())


def _hit(experts: int, topk: int, held: int) -> float:
    """Share of the tokens of which at least one of `topk` different experts is among `held`."""
    if experts - held < topk:
        return 1.0
    ways = lgamma(experts - held + 1) - lgamma(experts - held - topk + 1) - lgamma(experts + 1)
    return 1 - float(np.exp(ways + lgamma(experts - topk + 1)))


def _one_sided(data: Path) -> Iterator[list[Any]]:
    """TensorRT-LLM's of GB200s; balanced: a token's experts are on different ranks. Dispatch in NVFP4 with scales."""
    path = data / "gb200/comm/trtllm/1.3.0rc10/trtllm_alltoall_perf.parquet"
    for row in pyarrow.parquet.read_table(path).to_pylist():
        way = row["op_name"].removeprefix("alltoall_")
        if row["kernel_source"] == "NVLinkOneSided" and way in CALLS:
            ranks, topk, hidden = row["moe_ep_size"], row["topk"], row["hidden_size"]
            size = 2 * hidden if way == "combine" else hidden * (0.5 + 1 / 16) + 8 * topk
            to_rank = min(topk, ranks) / ranks
            what = ["one_sided", "gb200", 1, ranks, CALLS.index(way), 0, size, topk, to_rank, 0.0]
            yield [*what, row["num_tokens"], row["latency"] * 1e-3]


def _fit(of: Callable[[Any], Any], first: list[float], rows_N: Rows) -> list[float]:
    def off(values: Any) -> Any:
        return np.log(of(values) / rows_N["seconds"])

    found = least_squares(off, first, loss="soft_l1", f_scale=0.1, bounds=(0, 2000))
    return [float(f"{value:.3g}") for value in found.x]


def _port(rows_N: Rows) -> Any:
    return np.array([gpu_spec(kind).nvlink_bandwidth for kind in rows_N["kind"].tolist()])


def _print_normal(rows_N: Rows, kinds: tuple[str, ...]) -> None:
    facts = DISPATCH["hierarchical"]
    assert facts.sharpness is not None and facts.nvlink_share is not None
    call = float(np.median(rows_N["seconds"][rows_N["tokens"] <= 8]))
    large_N = rows_N[rows_N["tokens"] >= 2048]
    moved_N = large_N["tokens"] * large_N["to_rank"] * large_N["ranks"] * large_N["row_bytes"]

    def of(values: Any) -> Any:
        share, pace, row = values if kinds == GROUPS[0] else (facts.nvlink_share, *values)
        of_sm = 1 / (1 / (pace * 1e9) + row * 1e-6 / large_N["row_bytes"])
        return call + moved_N / rate_of_both(share * _port(large_N), large_N["sms"] * of_sm, sharpness=facts.sharpness)

    found = _fit(of, [0.75, 19, 0.1] if kinds == GROUPS[0] else [19, 0.1], large_N)
    names = "share of the port, GB/s of an SM, us of a row" if kinds == GROUPS[0] else "GB/s of an SM, us of a row"
    print(f"normal, {CALLS[rows_N['call'][0]]}, {kinds}: call {call - HOP:.3g} s; {names}: {found}")


def _print_low_latency(rows_N: Rows, kinds: tuple[str, ...]) -> None:
    facts = DISPATCH["low_latency_nvlink"]
    sharpness, moved_N = facts.sharpness, _messages(rows_N) * (rows_N["ranks"] - 1) / rows_N["ranks"]

    def of(values: Any) -> Any:
        return values[0] * 1e-6 + moved_N / rate_of_both(
            facts.nvlink_share * _port(rows_N), values[1] * 1e9, sharpness=sharpness
        )

    call, rate = _fit(of, [12, 300], rows_N)
    print(f"low latency, {CALLS[rows_N['call'][0]]}, {kinds}: call {call - HOP * 1e6:.3g} us, GB/s {rate}")


def _messages(rows_N: Rows) -> Any:
    return rows_N["tokens"] * rows_N["topk"] * (rows_N["row_bytes"] + np.where(rows_N["call"] == 0, 16, 0))


def _print_low_latency_across(rows_N: Rows) -> None:
    sent_N = _messages(rows_N) * (rows_N["nodes"] - 1) / rows_N["nodes"]

    def of(values: Any) -> Any:
        call, more, share = values
        return (call + more * np.log2(rows_N["nodes"])) * 1e-6 + sent_N / (share * NIC_BANDWIDTH)

    call, more, share = _fit(of, [20, 1, 0.87], rows_N)
    call -= OVER_SPINE * 1e6
    print(f"low latency over nodes, {CALLS[rows_N['call'][0]]}: call {call:.3g} us, doubling {more}, of a NIC {share}")


def _print_normal_across(rows_N: Rows) -> None:
    facts = DISPATCH["hierarchical"]
    nodes_N, each_N = rows_N["nodes"], rows_N["tokens"] * rows_N["row_bytes"]
    fanned_N, sent_N = (
        (rows_N["ranks"] - nodes_N) * rows_N["to_rank"] * each_N,
        (nodes_N - 1) * rows_N["to_node"] * each_N,
    )

    def of(values: Any) -> Any:
        call, more, pace, share = values
        rate_N = rate_of_both(facts.nvlink_share * _port(rows_N), rows_N["sms"] * pace * 1e9, sharpness=facts.sharpness)
        wires_N = np.maximum(fanned_N / rate_N, sent_N / (share * NIC_BANDWIDTH))
        return (call + more * np.log2(nodes_N)) * 1e-6 + wires_N

    names = "call and doubling in us, GB/s of an SM, share of a NIC"
    print(f"normal over nodes, {CALLS[rows_N['call'][0]]}: {names}: {_fit(of, [50, 10, 9, 0.9], rows_N)}")


def _print_one_sided(rows_N: Rows) -> None:
    sent_N = rows_N["to_rank"] * (rows_N["ranks"] - 1) * rows_N["tokens"] * rows_N["row_bytes"]

    def of(values: Any) -> Any:
        call, more, share = values
        return (call + more * np.log2(rows_N["ranks"])) * 1e-6 + sent_N / (share * _port(rows_N))

    call, more, share = _fit(of, [12, 2, 0.7], rows_N)
    call -= HOP * 1e6
    print(f"one sided, {CALLS[rows_N['call'][0]]}: call {call:.3g} us, doubling {more}, share of the port {share}")


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
