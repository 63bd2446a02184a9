"""Steps of a trainer in bf16 and in FP8, measured on a GPU: docs/software.md.

    python tools/measure_fp8_steps.py --out FOLDER --check                  # gradients of every recipe beside bf16's
    python tools/measure_fp8_steps.py --prepare PART --parts PARTS          # compiles DeepGEMM's kernels, in parallel
    python tools/measure_fp8_steps.py --out FOLDER [--seconds 300] [--only NAME] [--compiled]

The program is that of tools/fp8_program.py, or, `--compiled`, of tools/fp8_compiled.py. Of each size and recipe: steps
issued by the host one by one (eager) and the whole step in a CUDA graph, each in a row for a second and more; the
allocator's peak of an eager step; the kernels of one replay in their order. Needs torch, triton, a GPU of Hopper,
DeepGEMM for blockwise and torchao for compiled ones, and nothing of moesim.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent))
from fp8_cases import CASES, DENSE, LATER, SIZES, TINY, TORCHAO
from fp8_cases import RECIPES as NAMES
from fp8_compiled import CompiledTrainer
from fp8_program import Trainer
from fp8_recipes import RECIPES, Blockwise, Weight
from fused_cases import Sizes

AHEAD = 3  # steps that the host may be ahead


def steps(run: Any, *, seconds: float) -> dict[str, float]:
    """Of steps in a row: the median of the later half, the spread, how many."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    count = max(12, int(seconds / ((time.perf_counter() - begin) / 2)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        run()
        mark.record()
        if number >= AHEAD:
            marks[number - AHEAD].synchronize()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) / 1e3 for first, second in pairwise(marks)]
    return {"step_s": statistics.median(times[count // 2 :]), "spread_s": statistics.stdev(times[2:]), "steps": count}


def kernels_of(run: Any) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel, copy and fill of one run, in the order of the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = [event for event in profiler.profiler.kineto_results.events() if "CUDA" in str(event.device_type())]
    found = [event for event in found if event.duration_ns() > 0 and "#" not in event.name()]  # no annotations
    found.sort(key=lambda event: event.start_ns())
    return [(event.name()[:200], event.duration_ns() / 1e3) for event in found]


def compiled(sizes: Sizes, recipe: str) -> dict[str, Any]:
    """One size by one recipe of torchao, issued by the host."""
    torch.manual_seed(0)
    trainer = CompiledTrainer(sizes, recipe)
    for _ in range(3):
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"loss": float(trainer.step()), "peak": torch.cuda.max_memory_allocated()}
    found |= {"parameters": sum(weight.numel() for weight in trainer.parameters)}
    return found | {"eager": steps(trainer.step, seconds=1.2), "kernels": kernels_of(trainer.step)}


def measured(sizes: Sizes, recipe: str, *, only_peak: bool = False) -> dict[str, Any]:
    """One size by one recipe."""
    torch.manual_seed(0)
    trainer = Trainer(sizes, RECIPES[recipe]())
    trainer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = float(trainer.step())
    found: dict[str, Any] = {"loss": loss, "peak": torch.cuda.max_memory_allocated()}
    found |= {"parameters": sum(weight.value.numel() for weight in trainer.weights.values())}
    if only_peak:
        return found
    found["eager"] = steps(trainer.step, seconds=0.8)
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            trainer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trainer.step()
        found["graph"] = steps(graph.replay, seconds=1.2)
        found["kernels"] = kernels_of(graph.replay)
    except Exception as error:  # what a graph cannot hold is a finding
        traceback.print_exc()
        found["graph"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        torch.cuda.synchronize()
        found["kernels"] = kernels_of(trainer.step)
    return found


def check() -> None:
    """Losses and gradients of every recipe beside bf16's, from the same weights."""
    known: dict[str, torch.Tensor] = {}
    step = Weight.step
    for recipe in RECIPES.values():
        torch.manual_seed(0)
        found: dict[str, torch.Tensor] = {}
        trainer = Trainer(TINY["tiny"], recipe())
        names = {id(weight): name for name, weight in trainer.weights.items()}

        def keep(weight: Weight, names: Any = names, found: Any = found) -> None:
            assert weight.gradient is not None
            found[names[id(weight)]] = weight.gradient.float().flatten().clone()
            step(weight)

        Weight.step = keep  # type: ignore[method-assign]
        loss = float(trainer.step())
        Weight.step = step  # type: ignore[method-assign]
        known = known or found
        print(recipe.name, "loss", round(loss, 4), flush=True)
        for name, gradient in found.items():
            cosine = float(torch.nn.functional.cosine_similarity(gradient, known[name], dim=0))
            print(
                f"  {name:14s} cosine {cosine:.4f} size {float(gradient.norm() / known[name].norm()):.3f}", flush=True
            )


def prepare(part: int, parts: int) -> None:
    """Run the grouped GEMMs of every PARTS-th size once, so that DeepGEMM compiles their kernels."""
    recipe = Blockwise()
    for sizes in [sizes for sizes in (*SIZES.values(), *LATER.values()) if sizes.experts][part::parts]:
        each = sizes.tokens * sizes.top_k // sizes.experts
        ids = torch.arange(sizes.experts, dtype=torch.int32, device="cuda")
        for k, n in ((sizes.hidden, 2 * sizes.expert_width), (sizes.expert_width, sizes.hidden)):
            from fp8_recipes import Group

            group = Group(experts=sizes.experts, each=each, ends_E=(ids + 1) * each,
                          ids_R=ids.repeat_interleave(each), counts_E=torch.full_like(ids, each))  # fmt: skip
            weight = Weight(torch.zeros(sizes.experts, n, k, dtype=torch.bfloat16, device="cuda"))
            recipe.prepare(weight, grouped=True)
            x = torch.zeros(each * sizes.experts, k, dtype=torch.bfloat16, device="cuda")
            operand = recipe.operand(x, group)
            gradient = recipe.gradient(recipe.product(operand, weight, group), group)
            recipe.back(gradient, weight, group)
            recipe.weight_back(gradient, operand, weight, group)
            torch.cuda.synchronize()
            del weight, x, operand, gradient
            torch.cuda.empty_cache()


def main() -> None:
    """Measure the sizes in turn until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--prepare", type=int)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="", help="names that are left out")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--later", action="store_true")
    parser.add_argument("--peaks", action="store_true", help="nothing but the peaks of memory")
    parser.add_argument("--quiet", action="store_true", help="print no times, so that predictions can be made blind")
    args = parser.parse_args()
    if args.check:
        check()
        return
    if args.prepare is not None:
        prepare(args.prepare, args.parts)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    begin, done = time.perf_counter(), []
    cases = [(case.name, case.sizes, case.blind) for case in CASES]
    cases = [(name, sizes, True) for name, sizes in LATER.items()] if args.later else cases
    cases = [(name, sizes, True) for name, sizes in DENSE.items()] if args.compiled else cases
    cases = [(name, sizes, False) for name, sizes in TINY.items()] if args.tiny else cases
    way, file = (compiled, "compiled-steps.json") if args.compiled else (measured, "fp8-steps.json")
    file = f"later-{file}" if args.later else file
    if args.peaks:
        way, file = partial(measured, only_peak=True), "peaks.json"
    for name, sizes, blind in [case for case in cases if args.only in case[0] and case[0] not in args.skip.split(",")]:
        for recipe in TORCHAO if args.compiled else NAMES:
            if time.perf_counter() - begin > args.seconds:
                print(f"{name} {recipe}: no time left", flush=True)
                continue
            started = time.perf_counter()
            try:
                found = way(sizes, recipe)
            except Exception as error:  # the next one may well run
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            done.append({"name": name, "recipe": recipe, "blind": blind, "sizes": asdict(sizes), **found})
            times = {how: found[how] for how in ("eager", "graph") if how in found}
            shown = found.get("error") or ("measured" if args.quiet else times)
            print(f"{name} {recipe}: {shown} ({time.perf_counter() - started:.0f} s)", flush=True)
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
            (args.out / file).write_text(json.dumps({"machine": machine, "steps": done}))
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
