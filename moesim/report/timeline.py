"""timeline.json.gz: spans of a run and its memory over the step as a Chrome trace in the dialect of torch.profiler.

A process per rank, a thread per stream. Transfers are kernels with NCCL's names, from the moment a rank joins them, as
a profiler sees them: tools that look for communication find it by those names, and what a rank waits inside is in the
arguments. Arrows lead from each dispatch to its combine. Counters show the memory of a rank and the imbalance of its
group's experts. Times are microseconds from the start of the step, to the nanosecond.

Legend: N spans, R ranks of a group.
"""

import gzip
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import Mesh
from moesim.report.categories import BACKWARD, WEIGHT
from moesim.results import Label, RunRecord, SpanTable, Stream
from moesim.results.spans import Collective, Part
from moesim.scenario import Scenario
from moesim.scenario.pools import specs_of_ranks
from moesim.scenario.stages import stages_of_ranks
from moesim.strict_json import json_text

FREES = BACKWARD, WEIGHT  # the passes behind which a micro-batch keeps nothing


def memory_events(record: RunRecord, pipeline_rank: int, place: int) -> Iterator[dict[str, Any]]:
    """Counter events of GiB by kind for the rank at `place` of expert group 0 of a pipeline rank.

    Activations of a micro-batch begin with its forward pass and end with its backward pass (the one for weights, where
    that is put off). Buffers and what lives inside one layer are not shown: see the table of the report.
    """
    table = record.pipeline_spans[pipeline_rank]
    kept_VBW, held = record.arrays["kept_bytes_PVBW"][pipeline_rank], record.arrays["held_bytes_P"][pipeline_rank]
    stages = stages_of_ranks(record.scenario.parallelism)[pipeline_rank]
    chunk_of_stage = {stage: chunk for chunk, stage in enumerate(stages)}
    changes: list[tuple[float, float]] = [(0.0, 0.0)]
    for action in table.actions:
        for name, micro_batch in zip(action.passes, action.micro_batches, strict=True):
            if name != "forward" and name not in FREES:
                continue
            rows_N = action.first + np.flatnonzero(table.micro_batch_N[action.first : action.last] == micro_batch)
            stage = _stage(record.scenario, max(table.labels[index].layer for index in table.label_N[rows_N]))
            kept = float(kept_VBW[chunk_of_stage[stage], micro_batch % kept_VBW.shape[1], place])
            if name == "forward":
                changes.append((float(table.start_NSR[rows_N, 0, place].min()), kept))
            else:
                changes.append((float(table.finish_NSR[rows_N, 0, place].max()), -kept))
    live = 0.0
    for when, change in sorted(changes):
        live += change
        args = {"states and reserved": round(held / 2**30, 3), "activations": round(max(live, 0.0) / 2**30, 3)}
        yield {"ph": "C", "name": "memory (GiB)", "pid": int(table.ranks_R[place]), "tid": 0,
               "ts": round(1e6 * when, 3), "args": args}  # fmt: skip


def _stage(scenario: Scenario, last_layer: int) -> int:
    """The stage of a pass by its last layer; prediction layers, and the head without layers, are on the last stage."""
    for stage, layers in enumerate(scenario.stage_layers):
        if last_layer in layers:
            return stage
    return 0 if last_layer < 0 and not scenario.stage_layers[0] else scenario.parallelism.num_stages - 1


Event = dict[str, Any]

MAX_EVENTS = 250_000  # about 5 MB as a file and 70 MB of JSON: what a browser still shows without delay
# CUDA stream numbers, in the manner of PyTorch: 7 is the default stream. The host has a thread of its own.
STREAM_IDS = {
    Stream.COMPUTE: 7,
    Stream.COMMUNICATION: 20,
    Stream.REDUCTION: 24,
    Stream.BACKGROUND: 25,
    Stream.PIPELINE: 28,
    Stream.HOST: 1,
}
STREAM_NAMES = {
    Stream.COMPUTE: "computation",
    Stream.COMMUNICATION: "dispatch, combine, shared layers",
    Stream.REDUCTION: "gradients and parameters",
    Stream.BACKGROUND: "gradients beside later passes",
    Stream.PIPELINE: "between stages",
    Stream.HOST: "waiting for the host",
}
COLLECTIVES = {  # kernel of NCCL, name that PyTorch gives the collective
    Collective.ALL_REDUCE: ("ncclDevKernel_AllReduce_Sum", "allreduce"),
    Collective.REDUCE_SCATTER: ("ncclDevKernel_ReduceScatter_Sum", "reduce_scatter"),
    Collective.ALL_GATHER: ("ncclDevKernel_AllGather", "allgather"),
    Collective.ALL_TO_ALL: ("ncclDevKernel_SendRecv", "all_to_allv"),
    Collective.SEND_RECEIVE: ("ncclDevKernel_SendRecv", "send"),
}


def write_timeline(record: RunRecord, path: Path, *, ranks: Sequence[int] = ()) -> tuple[int, ...]:
    """Write the trace of `record` to `path` and return the ranks in it.

    `ranks` are global ranks of expert group 0 of any pipeline rank; without, those that `choose_ranks` takes. Raises
    UserError for a rank whose spans are not kept.
    """
    check_ranks(record.scenario, ranks)
    chosen = tuple(sorted(set(ranks))) or choose_ranks(record.pipeline_spans)
    head = json_text(_head(record, chosen))[:-1]
    with path.open("wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file, compresslevel=6) as packed:
        packed.write(f'{head}, "traceEvents": [\n'.encode())
        separator = ""
        for event in events(record, chosen):
            packed.write((separator + json_text(event, separators=(",", ":"))).encode())
            separator = ",\n"
        packed.write(b"\n]}\n")
    return chosen


def choose_ranks(tables: Sequence[SpanTable]) -> tuple[int, ...]:
    """Ranks for a trace of at most MAX_EVENTS spans (but one rank per table): of each table the busiest ones."""
    each = max(1, MAX_EVENTS // sum(len(table.label_N) for table in tables))
    chosen: list[int] = []
    for table in tables:
        rows_N = table.rows(Stream.COMPUTE)
        busy_R = (table.finish_NSR[rows_N, 0] - table.start_NSR[rows_N, 0]).sum(axis=0)
        chosen += table.ranks_R[np.argsort(-busy_R, kind="stable")[:each]].tolist()
    return tuple(sorted(chosen))


def check_ranks(scenario: Scenario, ranks: Sequence[int]) -> None:
    """Raises UserError for a rank whose spans a run of the scenario does not keep; call it before the run."""
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    groups = [mesh.rank_groups(stage)[0] for stage in range(scenario.parallelism.pipeline)]
    for rank in ranks:
        if not any(rank in ranks_R for ranks_R in groups):
            kept = ", ".join(f"{ranks_R.min()} to {ranks_R.max()}" for ranks_R in groups[:4])
            more = f" and {len(groups) - 4} more groups" if len(groups) > 4 else ""
            raise UserError(f"--timeline={rank}: no spans are kept of rank {rank}; choose among ranks {kept}{more}")


def _head(record: RunRecord, chosen: Sequence[int]) -> Event:
    scenario = record.scenario
    specs = specs_of_ranks(scenario.cluster, scenario.parallelism)
    devices = [
        {"id": rank, "name": gpu.name, "totalGlobalMem": gpu.memory_bytes, "numSms": gpu.sm_count}
        for rank, gpu in ((rank, specs[rank]) for rank in chosen)
    ]
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        "traceName": f"moesim {scenario.name}",
        "deviceProperties": devices,
        "distributedInfo": {"backend": "nccl", "rank": chosen[0], "world_size": scenario.parallelism.world_size},
        "moesim": {"sample": 0, "step_time_us": 1e6 * float(record.spans.step_S[0]), "ranks": list(chosen)},
    }


def events(record: RunRecord, chosen: Sequence[int]) -> Iterator[Event]:
    """All events of the chosen ranks, rank by rank."""
    correlation = 1
    for pipeline_rank, table in enumerate(record.pipeline_spans):
        places = [place for place, rank in enumerate(table.ranks_R) if int(rank) in set(chosen)]
        if places:
            yield from _imbalance(table, pid=int(table.ranks_R[places[0]]))
        for place in places:
            yield from _names(int(table.ranks_R[place]), pipeline_rank)
            yield from memory_events(record, pipeline_rank, place)
            spans = list(_spans(table, place, correlation))
            correlation += len(spans)
            yield from spans
            yield from _arrows(table, place, correlation)


def _names(rank: int, pipeline_rank: int) -> Iterator[Event]:
    def meta(what: str, tid: int, key: str, value: object) -> Event:
        return {"ph": "M", "name": what, "pid": rank, "tid": tid, "ts": 0, "args": {key: value}}

    yield meta("process_name", 0, "name", f"rank {rank} (pipeline rank {pipeline_rank})")
    yield meta("process_labels", 0, "labels", f"GPU {rank}")
    yield meta("process_sort_index", 0, "sort_index", rank)
    for stream, tid in STREAM_IDS.items():
        prefix = "" if stream is Stream.HOST else f"stream {tid}: "
        yield meta("thread_name", tid, "name", prefix + STREAM_NAMES[stream])
        yield meta("thread_sort_index", tid, "sort_index", tid)


def _kernel(label: Label) -> tuple[str, Mapping[str, str]]:
    """The name of a span in the trace, and the arguments that tell tools which collective it is."""
    if label.stream is Stream.PIPELINE:
        return f"ncclDevKernel_SendRecv({label.name} from pipeline rank {label.sender})", {"Collective name": "recv"}
    if label.collective is Collective.NONE:
        return label.name, {}
    kernel, collective = COLLECTIVES[label.collective]
    return f"{kernel}({label.name})", {"Collective name": collective}


def microseconds(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to the nanosecond, so that what follows without a gap does so in the file too."""
    return np.round(1e6 * seconds, 3)


def _spans(table: SpanTable, place: int, correlation: int) -> Iterator[Event]:
    rank = int(table.ranks_R[place])
    start_N = microseconds(table.start_NSR[:, 0, place])
    finish_N = microseconds(table.finish_NSR[:, 0, place])
    own_N = microseconds(table.own_NSR[:, 0, place].astype(np.float64))
    kernels = [_kernel(label) for label in table.labels]
    for row in np.flatnonzero(finish_N > start_N).tolist():
        label = table.labels[table.label_N[row]]
        name, known = kernels[table.label_N[row]]
        tid = STREAM_IDS[label.stream]
        args: Event = {"category": label.category, "layer": label.layer, "micro_batch": int(table.micro_batch_N[row])}
        duration = round(float(finish_N[row] - start_N[row]), 3)
        if label.stream is not Stream.HOST:
            args |= {"device": rank, "stream": tid, "correlation": correlation, **known}
            correlation += 1
        if label.stream not in (Stream.COMPUTE, Stream.HOST):
            args["waiting for peers (us)"] = max(0.0, round(duration - float(own_N[row]), 3))
        category = "cpu_op" if label.stream is Stream.HOST else "kernel"
        yield {"ph": "X", "cat": category, "name": name, "pid": rank, "tid": tid, "ts": float(start_N[row]),
               "dur": duration, "args": args}  # fmt: skip


def _arrows(table: SpanTable, place: int, first_id: int) -> Iterator[Event]:
    """From each dispatch (of tokens, or of gradients on their way back) to the combine that answers it."""
    rank, tid = int(table.ranks_R[place]), STREAM_IDS[Stream.COMMUNICATION]
    waiting: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
    common = {"cat": "dispatch_combine", "name": "dispatch to combine", "pid": rank, "tid": tid}
    number = first_id
    for row in table.rows(Stream.COMMUNICATION).tolist():
        label = table.labels[table.label_N[row]]
        key = (label.layer, int(table.micro_batch_N[row]))
        if label.category == "dispatch_exposed" and label.part is not Part.ROW_COUNTS:
            waiting[key].append(row)
        elif label.category == "combine_exposed" and waiting[key]:
            begin = microseconds(table.start_NSR[waiting[key].popleft(), 0, place])
            end = microseconds(table.start_NSR[row, 0, place])
            yield {"ph": "s", "id": number, "ts": float(begin), **common}
            yield {"ph": "f", "bp": "e", "id": number, "ts": float(end), **common}
            number += 1


def _imbalance(table: SpanTable, *, pid: int) -> Iterator[Event]:
    """Computing time of the experts of a layer, busiest rank / mean, when the busiest one is done."""
    categories = [label.category == "experts" for label in table.labels]
    rows_N = np.flatnonzero(np.array(categories, dtype=bool)[table.label_N])
    if not len(rows_N):
        return
    seconds_NR = table.finish_NSR[rows_N, 0] - table.start_NSR[rows_N, 0]
    layer_N = np.array([table.labels[index].layer for index in table.label_N[rows_N]])
    key_N = np.stack([layer_N, table.micro_batch_N[rows_N]])
    first_A = np.flatnonzero(np.r_[True, (np.diff(key_N) != 0).any(axis=0) | (np.diff(rows_N) > 1)])
    total_AR = np.add.reduceat(seconds_NR, first_A, axis=0)
    last_A = np.r_[first_A[1:], len(rows_N)] - 1
    when_A = microseconds(table.finish_NSR[rows_N[last_A], 0].max(axis=1))
    mean_A = total_AR.mean(axis=1)
    for when, ratio in zip(when_A, total_AR.max(axis=1) / np.where(mean_A > 0, mean_A, 1.0), strict=True):
        args = {"busiest / mean": round(float(ratio), 4)}
        yield {"ph": "C", "name": "expert time in the group", "pid": pid, "tid": 0, "ts": float(when), "args": args}
