"""timeline.json.gz, read back by a small reader of its own that knows nothing but the format."""

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.report import facts, timeline
from moesim.report.timeline import STREAM_IDS, write_timeline
from moesim.results import RunRecord, Stream, overlapped_transfer
from moesim.run import simulate

Intervals = list[tuple[float, float]]
PIPELINE = {
    "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 4},
    "parallelism": {"data": 2, "pipeline": 2, "expert": 2},
    "workload": {"sequence_length": 1024, "micro_batch": 1, "global_batch": 8},
}


class Reader:
    """What a trace tool makes of a file: kernels by process, told apart by name alone."""

    def __init__(self, path: Path) -> None:
        self.trace = json.loads(gzip.decompress(path.read_bytes()))
        self.events: list[dict[str, Any]] = self.trace["traceEvents"]
        self.slices = [event for event in self.events if event["ph"] == "X"]
        self.kernels = [event for event in self.slices if "stream" in event["args"]]

    def intervals(self, rank: int, *, communication: bool) -> Intervals:
        """Disjoint stretches of time in which a rank has such a kernel."""
        found = sorted(
            (kernel["ts"], kernel["ts"] + kernel["dur"])
            for kernel in self.kernels
            if kernel["pid"] == rank and kernel["name"].startswith("nccl") == communication
        )
        joined: Intervals = []
        for begin, end in found:
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((begin, end))
        return joined

    def overlap(self, rank: int) -> tuple[float, float]:
        """Seconds of communication that computation covers, and seconds of communication."""
        moving, computing = (self.intervals(rank, communication=kind) for kind in (True, False))
        covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in moving for c, d in computing)
        return 1e-6 * covered, 1e-6 * sum(b - a for a, b in moving)


def read_timeline(record: RunRecord, folder: Path, **more: Any) -> Reader:
    write_timeline(record, folder / "timeline.json.gz", **more)
    return Reader(folder / "timeline.json.gz")


def test_the_overlap_that_a_trace_tool_reads_is_ours(small, tmp_path) -> None:
    record = simulate(small())
    reader = read_timeline(record, tmp_path)
    hidden_R = sum(overlapped_transfer(record.spans).values())[0]
    rows_N = np.concatenate([record.spans.rows(stream) for stream in (Stream.COMMUNICATION, Stream.REDUCTION)])
    transfer_R = (record.spans.finish_NSR[rows_N] - record.spans.start_NSR[rows_N]).sum(axis=0)[0]
    assert hidden_R.min() > 0.05 * transfer_R.max(), "shared experts run behind dispatch and combine"
    for place, rank in enumerate(record.spans.ranks_R.tolist()):
        covered, moving = reader.overlap(rank)
        assert covered == pytest.approx(hidden_R[place], rel=1e-4)
        assert covered / moving == pytest.approx(hidden_R[place] / transfer_R[place], rel=1e-4)
    shown = facts.hidden(record.spans)
    assert shown.value == facts.percent(hidden_R.sum() / transfer_R.sum())


def test_what_a_viewer_needs_is_there(small, tmp_path) -> None:
    record = simulate(small(PIPELINE))
    reader = read_timeline(record, tmp_path)
    ranks = {event["pid"] for event in reader.slices}
    assert ranks == {0, 1, 2, 3} == set(reader.trace["moesim"]["ranks"])
    assert {event["pid"] for event in reader.events if event["name"] == "process_name"} == ranks
    assert len({event["args"]["correlation"] for event in reader.kernels}) == len(reader.kernels)
    names = {event["name"] for event in reader.kernels}
    assert {"ncclDevKernel_SendRecv(dispatch)", "ncclDevKernel_SendRecv(combine.backward)"} <= names
    assert any(name.startswith("ncclDevKernel_AllReduce") for name in names)
    assert any(name.startswith("ncclDevKernel_SendRecv(activation from") for name in names)
    by_track = defaultdict(list)
    for event in reader.slices:
        by_track[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for track in by_track.values():
        assert track == sorted(track)
        for (begin, length), (following, _) in pairwise(track):
            assert length > 0
            assert begin + length <= following + 1e-6, "slices of one track do not overlap"
    last = max(event["ts"] + event["dur"] for event in reader.slices)
    assert last == pytest.approx(1e6 * float(record.spans.step_S[0]), abs=0.01)


def test_arrows_lead_from_every_dispatch_to_a_later_combine(small, tmp_path) -> None:
    reader = read_timeline(simulate(small(PIPELINE)), tmp_path)
    slices = {(event["pid"], event["tid"], event["ts"]): event for event in reader.slices}
    ends: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for event in reader.events:
        if event["ph"] in "sf":
            ends[event["id"]][event["ph"]] = slices[event["pid"], event["tid"], event["ts"]]
    dispatches = [event for event in reader.kernels if event["args"]["category"] == "dispatch_exposed"]
    assert len(ends) == len(dispatches) > 0
    for both in ends.values():
        start, end = both["s"]["args"], both["f"]["args"]
        assert (start["category"], end["category"]) == ("dispatch_exposed", "combine_exposed")
        assert (start["layer"], start["micro_batch"]) == (end["layer"], end["micro_batch"])
        assert both["s"]["ts"] < both["f"]["ts"]


def test_counters_follow_micro_batches_and_loads(small, tmp_path) -> None:
    record = simulate(small(PIPELINE))
    reader = read_timeline(record, tmp_path)
    counters = defaultdict(list)
    for event in reader.events:
        if event["ph"] == "C":
            counters[event["name"], event["pid"]].append(event["args"])
    kept_PVBW, held_P = record.arrays["kept_bytes_PVBW"], record.arrays["held_bytes_P"]
    for rank in range(4):
        series = counters["memory (GiB)", rank]
        live = [args["activations"] for args in series]
        assert live[0] == live[-1] == 0.0
        # 1F1B: the first pipeline rank holds two micro-batches at once, the last one holds one
        most = sum(sorted(kept_PVBW[rank // 2, 0, :, rank % 2])[-(2 - rank // 2) :]) / 2**30
        assert 0.5 * most < max(live) <= most + 1e-3
        assert series[0]["states and reserved"] == pytest.approx(held_P[rank // 2] / 2**30, abs=1e-3)
    ratios = [args["busiest / mean"] for args in counters["expert time in the group", 0]]
    assert len(ratios) > 4
    assert 1.0 <= min(ratios) <= max(ratios) <= 2.0
    assert max(ratios) > 1.01


def test_a_large_trace_keeps_the_busiest_ranks(small, tmp_path, monkeypatch) -> None:
    record = simulate(small())
    spans = record.spans
    rows_N = spans.rows(Stream.COMPUTE)
    busy_R = (spans.finish_NSR[rows_N, 0] - spans.start_NSR[rows_N, 0]).sum(axis=0)
    monkeypatch.setattr(timeline, "MAX_EVENTS", 2 * len(spans.label_N))
    kept = read_timeline(record, tmp_path).trace["moesim"]["ranks"]
    assert len(kept) == 2
    assert int(busy_R.argmax()) in kept


def test_one_rank_can_be_asked_for_and_a_rank_without_spans_is_refused(small, tmp_path) -> None:
    record = simulate(small())
    assert {event["pid"] for event in read_timeline(record, tmp_path, ranks=(2,)).slices} == {2}
    with pytest.raises(UserError, match="--timeline=7"):
        write_timeline(record, tmp_path / "x.json.gz", ranks=(7,))


def test_the_same_run_gives_the_same_bytes(small, tmp_path) -> None:
    record = simulate(small())
    write_timeline(record, tmp_path / "a.gz")
    write_timeline(record, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_streams_have_numbers_of_their_own() -> None:
    assert set(STREAM_IDS) == set(Stream)
    assert len(set(STREAM_IDS.values())) == len(Stream)


def test_collectives_inside_layers_are_named_as_their_kernels(small, tmp_path):
    layout = {"data": 2, "context": 2, "tensor": 2, "expert": 4, "zero": {"dense": 3, "expert": 2}}
    changes = {"cluster.nodes": 2, "parallelism": layout, "uncertainty": {"samples": 1}, "model.mtp_layers": 1}
    reader = read_timeline(simulate(small(changes)), tmp_path)
    names = {kernel["name"] for kernel in reader.kernels}
    for name in (
        "ncclDevKernel_AllGather(qkv.gather)",
        "ncclDevKernel_AllGather(mtp.join.whole)",
        "ncclDevKernel_ReduceScatter_Sum(attention_out.scatter)",
        "ncclDevKernel_AllReduce_Sum(cross_entropy.max)",
        "ncclDevKernel_SendRecv(attention.ring)",
        "ncclDevKernel_AllGather(all_gather.dense)",
        "ncclDevKernel_ReduceScatter_Sum(reduce_scatter.expert)",
    ):
        assert name in names
    covered, moving = reader.overlap(0)
    assert 0 < covered < moving
