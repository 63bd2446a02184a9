"""Training steps of Hugging Face transformers' own models, measured on the GPU at hand, for docs/accuracy.md.

    python tools/measure_hf_steps.py --out FOLDER [--set dense] [--only PART_OF_A_NAME] [--seconds 470] [--list]
    python tools/measure_hf_steps.py --record FOLDER/steps.json [--set dense]      # without a GPU

Each case is a few layers of a published MoE architecture in bf16: forward, loss, backward, fused AdamW, eager; of
`--set dense` two sizes each of GPT-2 (dropout, a vocabulary of 50,257), Llama and OPT. Writes `steps.json` after every
case, `kernels.json` (the kernels of one profiled step of each case) and, for some, the profiler's trace
(`CASE.trace.json.gz`). A case that fails is recorded with its reason. Needs torch, transformers and, to measure, a GPU;
nothing of moesim. --record writes every measured step as `moesim import-step` records it, beside what was measured:
tests/data/hf_steps.json.gz, or dense_steps.json.gz.
"""

import argparse
import gc
import gzip
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from architectures import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3_LIKE,
    GLM_AIR,
    GLM_SMALL,
    MIXTRAL,
    MIXTRAL_SMALL,
    OLMOE,
    QWEN3,
    QWEN3_235,
    QWEN3_SMALL,
    dense_model,
    transformers_model,
)

WARM_UP, LEAST_STEPS = 4, 20
DATA = Path(__file__).parent.parent / "tests" / "data"
KEPT = ("sustained_s", "kernel_s", "kernels", "parameters")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of `family` (a configuration class of transformers) and the tokens of one step; experts: "" if dense."""

    name: str
    family: str
    layers: int
    batch: int
    sequence: int
    sizes: dict[str, Any]
    experts: str = "grouped_mm"
    traced: bool = False
    blind: bool = False  # kept out of every choice of the simulator


def _case(name: str, family: str, sizes: dict[str, Any], layers: int, batch: int, sequence: int, **more: Any) -> Case:
    return Case(name=name, family=family, sizes=sizes, layers=layers, batch=batch, sequence=sequence, **more)


CASES = (
    _case("qwen3-30b-4k", "Qwen3MoeConfig", QWEN3, 4, 1, 4096),
    _case("qwen3-30b-16k", "Qwen3MoeConfig", QWEN3, 4, 4, 4096, traced=True),
    _case("qwen3-30b-long", "Qwen3MoeConfig", QWEN3, 3, 1, 16384, blind=True),
    _case("qwen3-small-8k", "Qwen3MoeConfig", QWEN3_SMALL, 6, 4, 2048),
    _case("qwen3-small-32k", "Qwen3MoeConfig", QWEN3_SMALL, 4, 8, 4096, blind=True),
    _case("qwen3-235b-8k", "Qwen3MoeConfig", QWEN3_235, 1, 2, 4096, blind=True),
    _case("mixtral-8k", "MixtralConfig", MIXTRAL, 2, 2, 4096, traced=True),
    _case("mixtral-small-8k", "MixtralConfig", MIXTRAL_SMALL, 6, 4, 2048),
    _case("mixtral-small-16k", "MixtralConfig", MIXTRAL_SMALL, 4, 4, 4096, blind=True),
    _case("olmoe-8k", "OlmoeConfig", OLMOE, 6, 2, 4096),
    _case("olmoe-16k", "OlmoeConfig", OLMOE, 4, 8, 2048, blind=True),
    _case("olmoe-2k", "OlmoeConfig", OLMOE, 6, 1, 2048),
    _case("deepseek-v2-lite-8k", "DeepseekV2Config", DEEPSEEK_V2_LITE, 4, 2, 4096, traced=True),
    _case("deepseek-v2-lite-16k", "DeepseekV2Config", DEEPSEEK_V2_LITE, 3, 8, 2048, blind=True),
    _case("deepseek-v3-like-8k", "DeepseekV3Config", DEEPSEEK_V3_LIKE, 4, 2, 4096),
    _case("deepseek-v3-like-16k", "DeepseekV3Config", DEEPSEEK_V3_LIKE, 3, 4, 4096),
    _case("glm-air-8k", "Glm4MoeConfig", GLM_AIR, 2, 2, 4096, traced=True),
    _case("glm-small-16k", "Glm4MoeConfig", GLM_SMALL, 5, 4, 4096, blind=True),
)


def _dense(name: str, family: str, sizes: dict[str, Any], batch: int, sequence: int) -> Case:
    return _case(name, family, sizes, 0, batch, sequence, experts="", traced=True)  # the sizes say how many layers


def _gpt2(width: int, heads: int, layers: int, length: int) -> dict[str, Any]:
    return {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": length, "vocab_size": 50257}


def _llama(width: int, inner: int, heads: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8}
    return sizes | {"num_hidden_layers": layers, "vocab_size": 128256, "max_position_embeddings": 8192}


def _opt(width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width, "num_attention_heads": 32}
    return sizes | {"num_hidden_layers": layers, "vocab_size": 50272, "max_position_embeddings": 4096}


DENSE_CASES = (
    _dense("gpt2-a", "GPT2Config", _gpt2(1600, 25, 12, 1024), 8, 1024),
    _dense("gpt2-b", "GPT2Config", _gpt2(2048, 16, 8, 2048), 8, 2048),
    _dense("llama-a", "LlamaConfig", _llama(2048, 8192, 32, 8), 2, 4096),
    _dense("llama-b", "LlamaConfig", _llama(4096, 14336, 32, 4), 1, 8192),
    _dense("opt-a", "OPTConfig", _opt(2048, 12), 4, 2048),
    _dense("opt-b", "OPTConfig", _opt(4096, 4), 4, 4096),
)
SETS = {"moe": (CASES, DATA / "hf_steps.json.gz"), "dense": (DENSE_CASES, DATA / "dense_steps.json.gz")}


def build(case: Case, device: str) -> tuple[torch.nn.Module, Any, torch.optim.Optimizer]:
    """The module, a closure that gives the loss, and the optimizer."""
    torch.manual_seed(0)
    with torch.device(device):
        sizes = {"layers": case.layers, "length": case.sequence, "experts": case.experts}
        model = (
            transformers_model(case.family, case.sizes, **sizes)  # type: ignore[arg-type]
            if case.experts
            else dense_model(case.family, case.sizes)
        )
        tokens = torch.randint(case.sizes["vocab_size"], (case.batch, case.sequence))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, optimizer


def train_step(loss_of: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One optimizer step; the loss stays on the device."""
    loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def expert_counts(model: torch.nn.Module, loss_of: Any) -> dict[str, list[int]]:
    """Rows of every expert by the path of its module, from one forward pass."""
    counts: dict[str, list[int]] = {}
    handles = []
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):

            def count(module: torch.nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                chosen = next(value for value in (*args, *kwargs.values()) if not value.is_floating_point())
                experts = next(iter(module.parameters())).shape[0]
                counts[path] = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()

            handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    with torch.no_grad():
        loss_of()
    for handle in handles:
        handle.remove()
    return counts


@dataclass
class Times:
    """Seconds of consecutive steps by CUDA events, and by the wall clock on the host without waiting."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


def timed(loss_of: Any, optimizer: torch.optim.Optimizer, *, least: int, seconds: float) -> Times:
    """Steps one behind the other for `seconds`, at least `least`."""
    times, begin = Times(), time.perf_counter()
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    while len(times.host_s) < least or time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        train_step(loss_of, optimizer)
        times.host_s.append(time.perf_counter() - started)
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if len(marks) > 3:
            marks[-3].synchronize()  # two steps ahead at most, so that `seconds` is kept
    torch.cuda.synchronize()
    times.device_s = [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]
    return times


def host_only_seconds(loss_of: Any, optimizer: torch.optim.Optimizer) -> float:
    """Host time of one step's launches while the device is busy with a long kernel of sleep."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(1.5e9))
        started = time.perf_counter()
        train_step(loss_of, optimizer)
        best = min(best, time.perf_counter() - started)
    torch.cuda.synchronize()
    return best


def profile_step(case: Case, loss_of: Any, optimizer: torch.optim.Optimizer, out: Path) -> list[dict[str, Any]]:
    """The kernels of one step by (kernel, operation); a traced case writes its trace, too."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True, with_modules=True) as profiler:
        train_step(loss_of, optimizer)
        torch.cuda.synchronize()
    plain = out / f"{case.name}.trace.json"
    profiler.export_chrome_trace(str(plain))
    text = plain.read_bytes()
    if case.traced:
        (out / f"{case.name}.trace.json.gz").write_bytes(gzip.compress(text, 6))
    plain.unlink()
    return kernel_rows(json.loads(text)["traceEvents"])


def kernel_rows(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels summed by (kernel, innermost operation, its input dimensions and types)."""
    ops: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {}):
            ops[event["args"]["External id"]] = event
    sums: dict[tuple[str, str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy"):
            op = ops.get(event.get("args", {}).get("External id"), {})
            args = op.get("args", {})
            dims, types = json.dumps(args.get("Input Dims", [])), json.dumps(args.get("Input type", []))
            entry = sums[event["name"], op.get("name", ""), dims[:600], types[:300]]
            entry[0] += 1
            entry[1] += event["dur"] / 1e6
    rows = [
        {"kernel": kernel, "op": op, "dims": dims, "types": types, "calls": calls, "seconds": seconds}
        for (kernel, op, dims, types), (calls, seconds) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def measure(case: Case, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is measured of one case, and its kernels."""
    torch.cuda.reset_peak_memory_stats()
    model, loss_of, optimizer = build(case, "cuda")
    for _ in range(WARM_UP):
        train_step(loss_of, optimizer)
    counts = expert_counts(model, loss_of)
    timed(loss_of, optimizer, least=2, seconds=0.3)
    times = timed(loss_of, optimizer, least=LEAST_STEPS, seconds=3.0)
    after = expert_counts(model, loss_of)
    result = {
        "step_s": statistics.median(times.device_s[:LEAST_STEPS]),
        "sustained_s": statistics.median(times.device_s[len(times.device_s) // 2 :]),
        "steps_s": times.device_s,
        "host_wall_s": statistics.median(times.host_s),
        "max_memory_allocated": torch.cuda.max_memory_allocated(),
        "max_memory_reserved": torch.cuda.max_memory_reserved(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_counts": counts,
        "expert_counts_after": after,
        "host_only_s": host_only_seconds(loss_of, optimizer),
    }
    rows = profile_step(case, loss_of, optimizer, out)
    result |= {"kernels": sum(row["calls"] for row in rows), "kernel_s": sum(row["seconds"] for row in rows)}
    return result, rows


def machine() -> dict[str, Any]:
    """Software and device."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
    }


def record(steps: Path, cases: tuple[Case, ...], out: Path) -> None:
    """Every case that was measured, recorded on the meta device."""
    from moesim.importing.recording import record_step

    found = json.loads(steps.read_text())
    measured = {row["case"]["name"]: row for row in found["steps"] if "sustained_s" in row}
    rows = []
    for case in (case for case in cases if case.name in measured):
        with torch.device("meta"):
            model, loss_of, _ = build(case, "meta")
            ops = record_step(model, loss_of)
        kept = {key: measured[case.name][key] for key in KEPT}
        rows.append({"name": case.name, "blind": case.blind, "measured": kept, "ops": [op.as_json() for op in ops]})
        print(f"{case.name}: {sum(op.count for op in ops)} operations")
    content = {"machine": found["machine"], "steps": rows}
    out.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def main() -> int:
    """Measure the cases in turn until the time is up, or record them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--record", type=Path, metavar="STEPS.json")
    parser.add_argument("--set", choices=SETS, default="moe")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    cases, data = SETS[args.set]
    if args.list:
        print(*(json.dumps(asdict(case)) for case in cases), sep="\n")
        return 0
    if args.record:
        record(args.record, cases, data)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    begin, done, kernels = time.perf_counter(), [], {}
    for case in cases:
        if args.only not in case.name:
            continue
        if time.perf_counter() - begin > args.seconds - 25:
            print(f"{case.name}: no time left", file=sys.stderr)
            continue
        started = time.perf_counter()
        try:
            result, kernels[case.name] = measure(case, args.out)
            print(f"{case.name}: {result['step_s'] * 1e3:.1f} ms", end=" ", file=sys.stderr)
        except Exception as error:  # the next case may well run
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{case.name}: {result['error'][:300]}", end=" ", file=sys.stderr)
        result["took_s"] = time.perf_counter() - started
        print(f"({result['took_s']:.0f} s)", file=sys.stderr, flush=True)
        done.append({"case": asdict(case), **result})
        (args.out / "steps.json").write_text(json.dumps({"machine": machine(), "steps": done}))
        (args.out / "kernels.json").write_text(json.dumps(kernels))
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
