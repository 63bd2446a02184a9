"""Peaks of memory of a trainer of fused kernels, measured on GPUs with and without CUDA graphs: docs/memory.md.

    python tools/measure_fused_peaks.py --out FOLDER [--half 0 | 1] [--seconds 200] [--list]
    torchrun --nproc-per-node 2 tools/measure_fused_peaks.py --out FOLDER --spread       # experts on two ranks
    torchrun --nproc-per-node 2 tools/measure_fused_peaks.py --out FOLDER --libraries

The program is that of tools/fused_program.py. Of each case: bytes held between steps, the allocator's peak at each
moment of a step, what it reserved, and what the device has in use beyond that; the same with the whole step captured in
a CUDA graph, whose pool nothing else can use. `--libraries`: what communicators by number and by what they are used
for, buffers that other ranks see, and the backward pass of attention take. Every second case is kept out of every
choice of the simulator. Needs torch, triton and a GPU, and nothing of moesim.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

sys.path.append(str(Path(__file__).parent))
from fused_cases import CASES, LAST, SPREAD, Case
from fused_program import BACKENDS, Trainer
from fused_rows import MOMENTS


def tiny(case: Case) -> Case:
    """The same at sizes that a dry run on a CPU does."""
    sizes = case.sizes
    small: dict[str, Any] = {
        "layers": min(sizes.layers, 2), "dense_layers": min(sizes.dense_layers, 1 + (not sizes.experts)), "hidden": 32,
        "heads": 4, "kv_heads": 2, "head_dim": 16, "experts": min(sizes.experts, 4), "top_k": min(sizes.top_k, 2),
        "expert_width": 16, "dense_width": 32, "shared_width": min(sizes.shared_width, 16), "vocab": 64, "batch": 1,
        "sequence": 16, "attention": "math", "loss_chunks": min(sizes.loss_chunks, 2),
    }  # fmt: skip
    return replace(case, sizes=replace(sizes, **small))


def beside() -> int:
    """Bytes of the device in use that the allocator does not hold."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measured(case: Case) -> dict[str, Any]:
    """Bytes of one case, by moments and as a whole."""
    torch._C._cuda_clearCublasWorkspaces()  # those of the stream of an earlier graph
    trainer = Trainer(case.sizes, "cuda")
    trainer.step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    MOMENTS.clear()
    begun = time.perf_counter()
    loss = trainer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    MOMENTS["end"] = torch.cuda.max_memory_allocated()
    found: dict[str, Any] = {
        "held": torch.cuda.memory_allocated(), "peak": max(MOMENTS.values()), "moments": dict(MOMENTS),
        "reserved": torch.cuda.max_memory_reserved(), "beside": beside(), "loss": float(loss), "seconds": seconds,
        "parameters": trainer.buffers.weights.numel(),
    }  # fmt: skip
    try:
        found["graph"] = captured(trainer) if case.sizes.ranks == 1 else {"error": "not tried"}
    except Exception as error:  # what a graph cannot hold is a finding
        found["graph"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def captured(trainer: Trainer) -> dict[str, int]:
    """Of the whole step in one graph."""
    gc.collect()
    torch.cuda.empty_cache()
    before = {"held": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "beside": beside()}
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trainer.step()
    found = {"peak": torch.cuda.max_memory_allocated(), "allocated": torch.cuda.memory_allocated()}
    graph.replay()
    torch.cuda.synchronize()
    found |= {"reserved": torch.cuda.memory_reserved(), "beside": beside()}
    graph.replay()
    torch.cuda.synchronize()
    return found | {f"{name}_before": size for name, size in before.items()}


def attention_bytes() -> list[dict[str, Any]]:
    """What the backward pass of attention makes beside its gradients, by backend."""
    found = []
    for name, heads, kv_heads, width, batch, length in (
        ("flash", 16, 16, 128, 2, 4096), ("flash", 32, 4, 128, 2, 4096), ("flash", 32, 8, 64, 4, 2048),
        ("cudnn", 16, 16, 128, 2, 4096), ("cudnn", 32, 4, 128, 2, 4096), ("cudnn", 32, 8, 64, 4, 2048),
    ):  # fmt: skip
        q, k, v = (
            torch.randn(batch, length, count, width, device="cuda", dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )
        try:
            with sdpa_kernel(BACKENDS[name]):
                for _ in range(2):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads < heads)
                    back = torch.ones_like(out)
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                    grads = torch.autograd.grad(out, (q, k, v), back)
                    torch.cuda.synchronize()
                    peak = torch.cuda.max_memory_allocated() - held
                    del grads, out, back
            sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": width, "tokens": batch * length}
            found.append({"backend": name, **sizes, "peak": peak, "gradients": 2 * (q.numel() + 2 * k.numel())})
        except Exception as error:
            found.append({"backend": name, "heads": heads, "kv_heads": kv_heads, "error": str(error)[:200]})
    return found


def libraries(out: Path) -> None:
    """What a process takes of the device beside its tensors, step by step, on every rank."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    found: list[tuple[str, int]] = []

    def note(name: str) -> None:
        found.append((name, beside()))
        print(rank, name, found[-1][1], flush=True)

    block = torch.zeros(64 << 20, dtype=torch.bfloat16, device="cuda")
    halves, other = block.chunk(2), torch.zeros_like(block)
    note("context")
    wide = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    (wide @ wide).sum().item()
    note("gemms")
    attention = attention_bytes()
    note("attention")
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))

    def p2p(group: Any) -> None:
        ops = [dist.P2POp(dist.isend, block, 1 - rank, group), dist.P2POp(dist.irecv, other, 1 - rank, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    uses: dict[str, Any] = {
        "all_reduce": lambda group: dist.all_reduce(block, group=group),
        "all_gather": lambda group: dist.all_gather_into_tensor(block, halves[rank].clone(), group=group),
        "reduce_scatter": lambda group: dist.reduce_scatter_tensor(halves[rank], other, group=group),
        "all_to_all": lambda group: dist.all_to_all_single(other, block, group=group),
        "p2p": p2p,
    }
    note("process group")
    for name, use in uses.items():
        use(None)
        note(f"first communicator, {name}")
    for name in ("all_reduce", "all_reduce", "all_reduce", "all_to_all", "all_to_all", "p2p", "p2p", "all_gather"):
        group = dist.new_group([0, 1])
        note("new group")
        uses[name](group)
        note(f"one more communicator, {name}")
        if name == "all_gather":
            uses["reduce_scatter"](group)
            note("the same, reduce_scatter")
    symmetric = []
    try:
        import torch.distributed._symmetric_memory as shared

        for size in (64 << 20, 512 << 20, 336 << 20):
            buffer = shared.empty(size, dtype=torch.uint8, device=torch.device("cuda", rank))
            note(f"symmetric buffer of {size >> 20} MiB")
            shared.rendezvous(buffer, dist.group.WORLD)
            note(f"symmetric buffer of {size >> 20} MiB, seen by all")
            symmetric.append(buffer)
    except Exception as error:
        print(f"symmetric memory: {error}", flush=True)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    result = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "nccl": nccl, "found": found,
              "attention": attention}  # fmt: skip
    (out / f"fused-libraries-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure a half of the cases, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--half", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--libraries", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.libraries:
        libraries(given.out)
        return
    if given.spread:
        rank = int(os.environ["LOCAL_RANK"])
        if not given.dry:
            torch.cuda.set_device(rank)
        dist.init_process_group("gloo" if given.dry else "nccl")
        run(given, SPREAD, f"spread-{rank}")
        dist.destroy_process_group()
        return
    chosen = [case for number, case in enumerate([*CASES, *LAST]) if given.half in (None, number // 2 % 2)]
    run(given, chosen, str(given.half if given.half is not None else "all"))


def run(given: argparse.Namespace, chosen: list[Case], label: str) -> None:
    """Measure cases, and write what is known after each."""
    begun, steps = time.perf_counter(), []
    for case in chosen:
        if given.list or given.dry:
            size = Trainer(tiny(case).sizes, "cpu").step() if given.dry else ""
            print(case.name, "blind" if case.blind else "", size, flush=True)
            continue
        if time.perf_counter() - begun > given.seconds:
            print("out of time before", case.name, flush=True)
            break
        try:
            steps.append({"case": asdict(case), **measured(case)})
            print(case.name, steps[-1]["peak"], steps[-1]["graph"], round(steps[-1]["seconds"], 3), flush=True)
        except Exception as error:
            traceback.print_exc()
            steps.append({"case": asdict(case), "error": str(error)[:300]})
        gc.collect()
        torch.cuda.empty_cache()
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        (given.out / f"fused-peaks-{label}.json").write_text(json.dumps({"machine": machine, "steps": steps}))


if __name__ == "__main__":
    main()
