"""Exchanges between two GPUs by own kernels of few SMs, both ways at once: bytes/s of each direction.

    python tools/measure_few_sms.py OUT.json        # a machine with two GPUs that reach each other; 15 s

put: stores of rows into the other GPU's memory, in order; scatter: rows picked by an index, as a dispatch sends them;
tma: the same rows by the bulk copy engine, through shared memory; reduce: a row of the other GPU and one of the own are
added in fp32, as a combine that reads. `pairs`: two such kernels at once into one port, against each alone.
"""

import json
import sys
from functools import partial

import torch
import triton
import triton.language as tl

HIDDEN, ROWS = 7168, 16384  # bf16: 235 MB
SMS = (2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96)


@triton.jit
def scatter(source, target, index, rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.load(index + row).to(tl.int64)
        value = tl.load(source + place * HIDDEN + columns, mask=columns < HIDDEN)
        tl.store(target + row.to(tl.int64) * HIDDEN + columns, value, mask=columns < HIDDEN)


@triton.jit
def put(source, target, count, BLOCK: tl.constexpr):
    for begin in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place))


@triton.jit
def reduce(own, other, target, index, rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.load(index + row).to(tl.int64)
        far = tl.load(other + place * HIDDEN + columns, mask=columns < HIDDEN).to(tl.float32)
        near = tl.load(own + place * HIDDEN + columns, mask=columns < HIDDEN).to(tl.float32)
        tl.store(target + row.to(tl.int64) * HIDDEN + columns, (far + near).to(tl.bfloat16), mask=columns < HIDDEN)


@triton.jit
def tma(source, target, rows, HIDDEN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr):
    read = tl.make_tensor_descriptor(source, shape=[rows, HIDDEN], strides=[HIDDEN, 1], block_shape=[TALL, WIDE])
    write = tl.make_tensor_descriptor(target, shape=[rows, HIDDEN], strides=[HIDDEN, 1], block_shape=[TALL, WIDE])
    across: tl.constexpr = HIDDEN // WIDE
    tiles = (rows // TALL) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        top, left = (tile // across) * TALL, (tile % across) * WIDE
        write.store([top, left], read.load([top, left]))


def allocate(size, alignment, stream):
    return torch.empty(size, dtype=torch.int8, device=f"cuda:{torch.cuda.current_device()}")


triton.set_allocator(allocate)
DEVICES = range(2)
mine = [torch.randn(ROWS, HIDDEN, device=f"cuda:{g}").to(torch.bfloat16) for g in DEVICES]
theirs = [torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=f"cuda:{1 - g}") for g in DEVICES]
kept = [torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=f"cuda:{g}") for g in DEVICES]
second = [torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=f"cuda:{1 - g}") for g in DEVICES]
index = [torch.randperm(ROWS, device=f"cuda:{g}", dtype=torch.int32) for g in DEVICES]
for g in DEVICES:
    theirs[g][:8].copy_(mine[g][:8])
BYTES = mine[0].numel() * 2


def kernel(kind, sms, warps, g, target=theirs):
    to = target[g]
    if kind == "put":
        put[(sms,)](mine[g].view(torch.int64), to.view(torch.int64), BYTES // 8, BLOCK=4096, num_warps=warps)
    elif kind == "scatter":
        scatter[(sms,)](mine[g], to, index[g], ROWS, HIDDEN=HIDDEN, BLOCK=8192, num_warps=warps)
    elif kind == "reduce":
        reduce[(sms,)](mine[g], mine[1 - g], kept[g], index[g], ROWS, HIDDEN=HIDDEN, BLOCK=8192, num_warps=warps)
    elif kind == "tma":
        tma[(sms,)](mine[g], to, ROWS, HIDDEN=HIDDEN, TALL=16, WIDE=256, STAGES=6, num_warps=4)


def seconds(calls, *, both=True, repeats=5):
    """Medians over repeats of the slower GPU's seconds, of each of `calls` (each on a stream of its own)."""
    streams = [[torch.cuda.Stream(g) for _ in calls] for g in DEVICES]
    found = [[] for _ in calls]
    for _ in range(repeats):
        marks = {}
        for g in DEVICES if both else (0,):
            with torch.cuda.device(g):
                for n, call in enumerate(calls):
                    with torch.cuda.stream(streams[g][n]):
                        torch.cuda._sleep(600_000)
                        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        begin.record()
                        call(g)
                        end.record()
                        marks[g, n] = begin, end
        for g in DEVICES:
            torch.cuda.synchronize(g)
        for n in range(len(calls)):
            found[n].append(max(b.elapsed_time(e) / 1e3 for (_, m), (b, e) in marks.items() if m == n))
    return [sorted(each)[repeats // 2] for each in found]


out = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": [], "pairs": []}


def save():
    with open(sys.argv[1], "w") as file:
        json.dump(out, file)


for kind, warps in (("put", 16), ("scatter", 16), ("scatter", 32), ("tma", 4), ("reduce", 16), ("reduce", 32)):
    for both in (True, False):
        for sms in SMS:
            try:
                [spent] = seconds([partial(kernel, kind, sms, warps)], both=both)
            except Exception as error:
                print(kind, sms, repr(error)[:300], flush=True)
                break
            out["rows"].append({"kind": kind, "warps": warps, "both": both, "sms": sms, "rate": BYTES / spent})
            print(kind, warps, both, sms, f"{BYTES / spent / 1e9:.1f}", flush=True)
    save()
if any(row["kind"] == "tma" for row in out["rows"]):
    for g in DEVICES:
        theirs[g].zero_()
        torch.cuda.synchronize(1 - g)
        with torch.cuda.device(g):
            kernel("tma", 16, 4, g)
    for g in DEVICES:
        torch.cuda.synchronize(g)
    out["tma_right"] = [bool((theirs[g].cpu() == mine[g].cpu()).all()) for g in DEVICES]
    print(out["tma_right"], flush=True)
for first in (8, 16, 24, 32):
    for other in (2, 4, 8, 16, 24):
        for both in (True, False):
            a, b = partial(kernel, "put", first, 16), partial(kernel, "put", other, 16, target=second)
            alone = [seconds([call], both=both)[0] for call in (a, b)]
            together = seconds([a, b], both=both)
            out["pairs"].append({"first": first, "second": other, "both": both, "alone": alone, "together": together})
            print(first, other, both, [f"{spent * 1e3:.3f}" for spent in (*alone, *together)], flush=True)
save()
