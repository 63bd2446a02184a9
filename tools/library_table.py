"""Steps of transformers and torchtitan on one and two H100s beside what recordings of their first sizes predict.

    python tools/library_table.py        # the tables of docs/imported-steps.md, from tests/data/library_steps.json.gz
    python tools/library_table.py --record STEPS.json... [--without STEP...] [--onto FILE] [--out FILE]

One GPU, DistributedDataParallel and fully_shard by `moesim.recorded`, expert parallelism by a scenario whose
`implementation` is the recorded step. STEPS.json: what tools/measure_library_steps.py writes. --record records each
program at its first size (a step of a program that has none itself), prints the measured steps that are not kept out
beside what that predicts, and writes such a file.
"""

import argparse
import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import moesim
from moesim.kernels import KernelModel, kernel_model
from moesim.program.scenario_fabric import node_fabric
from moesim.recorded.estimate import step_estimate
from moesim.recorded.scaling import scaled_ops
from moesim.recorded.sizes import MatchedOp, StepSizes, matched, sizes_of
from moesim.recorded.spread import WRAPPERS, Ranks
from moesim.recorded.step_file import RecordedOp, parsed_ops, save_step
from moesim.strict_json import parse_json

DATA = Path(__file__).parent.parent / "tests" / "data" / "library_steps.json.gz"
EP, GPU = "ep", "h100"
VERSIONS = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11", "transformers": "5.17", "torchtitan": "0.2.2"}
PLANS = {"hf-ep": "ep"}  # that of transformers; torchtitan's expert parallelism is a scenario
EP_SCENARIO: dict[str, Any] = {
    "routing": {"kind": "uniform"},
    "capacity": {"kind": "none"},
    "cluster": {"gpu": GPU, "nodes": 1, "gpus_per_node": 2, "fabric": {"preset": "rail_optimised", "nic": "400 Gbps"}},
    "parallelism": {"data": 2, "expert": 2, "pipeline": 1, "tensor": 1},
    "dispatch": {"algorithm": "direct", "deduplicate": "per_expert", "dtype": "bf16", "combine_dtype": "bf16"},
    "uncertainty.samples": 2,
}
PRECISION = {"gemm": "bf16", "weights": "bf16", "gradients": "bf16", "master": "none", "optimizer": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A recorded program: how it is spread, its operations at its first size, and that size."""

    mode: str
    ops: tuple[RecordedOp, ...]
    sizes: StepSizes

    @cached_property
    def matched(self) -> list[MatchedOp]:
        """The operations with their symbols."""
        return matched(self.ops, self.sizes)

    @classmethod
    def of(cls, found: Any) -> "Program":
        """From the file."""
        ops = parsed_ops(found["ops"], where="program")
        return cls(mode=found["mode"], ops=tuple(ops), sizes=sizes_of(ops, where="program"))


@cache
def _kernels() -> KernelModel:
    return kernel_model(GPU)


@cache
def pair(mode: str) -> Ranks:
    """Two GPUs of one node, by a wrapper."""
    return Ranks(wrapper=mode, fabric=node_fabric(_kernels(), gpu=GPU, ranks=2), ranks=(0, 1))


def predicted_s(program: Program, step: Any, *, corrections: Any = None) -> float:
    """Seconds of a step of the program at another size."""
    if program.mode == EP:
        return by_scenario(program, step, ranks=EP_SCENARIO["parallelism"])
    moe_layers = step["layers"] - program.sizes.dense_layers
    size = {"sequences": step["sequences"], "sequence_length": step["tokens"], "moe_layers": moe_layers}
    ops = scaled_ops(program.matched, program.sizes, replace(program.sizes, **size))
    wrapper = PLANS.get(program.mode, program.mode)
    ranks = pair(wrapper) if wrapper in WRAPPERS else None
    return step_estimate(ops, _kernels(), ranks=ranks, corrections=corrections).step_s


def by_scenario(program: Program, step: Any, *, ranks: Any) -> float:
    """The same by a scenario of two GPUs, of a program of DeepSeek-V2-Lite's sizes."""
    workload = {"kind": "training", "sequence_length": step["tokens"], "micro_batch": step["sequences"]}
    workload |= {"global_batch": 2 * step["sequences"], "precision": PRECISION}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        save_step(file, program.ops, source="library_table")
        changes = EP_SCENARIO | {
            "model": {"preset": "deepseek-v2-lite", "layers": step["layers"]},
            "workload": workload,
            "parallelism": ranks,
            "implementation": {"kind": "imported", "file": str(file)},
        }
        return float(moesim.simulate(moesim.load_scenario("quickstart", changes)).result["step_time_s"])


@cache
def programs() -> dict[str, Any]:
    """Of the file, by name."""
    found: dict[str, Any] = parse_json(gzip.decompress(DATA.read_bytes()))["programs"]
    return found


def group_of(name: str, mode: str) -> tuple[str, str]:
    """Software and how it is spread; programs of small models, whose host is the bound, apart."""
    software = "torchtitan" if "titan" in name else "transformers"
    return software, "small models, host-bound" if "small-" in name and "glm-small" not in name else mode


def recorded(case: Any) -> list[RecordedOp]:
    """The operations of a case on one GPU."""
    import torch
    from measure_library_steps import closure, module

    from moesim.importing.recording import record_step

    with torch.device("meta"):
        model = module(case, "meta")
        return record_step(model, closure(case, model, "meta"))


def program(first: Any, cases: Sequence[Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The operations of a program's first size, and the measured steps of all its sizes."""
    ops, steps = recorded(first), []
    for case in cases:
        if _program(case) != _program(first) or case.name not in seconds:
            continue
        steps.append(
            {
                "name": case.name,
                "layers": case.layers,
                "sequences": case.batch,
                "tokens": case.sequence,
                "blind": case.blind,
                "first": case.traced,
                "sustained_s": seconds[case.name],
            }
        )
    return {"mode": first.mode, "ops": [operation.as_json() for operation in ops], "steps": steps}


def _program(case: Any) -> str:
    return case.name if "small-" in case.name and case.name.split("-")[-1] not in "abcde" else case.name[:-2]


def record(files: Sequence[Path], *, without: Sequence[str], onto: Path | None, out: Path | None) -> None:
    """Record, compare, write. without: steps that ran with other kernels than is recorded; onto: a file whose other
    programs are kept.
    """
    from measure_library_steps import SETS

    rows = [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    seconds = {row["case"]["name"]: row["sustained_s"] for row in rows if "sustained_s" in row}
    seconds = {name: took for name, took in seconds.items() if name not in without}
    cases = [*chain(*SETS.values())]
    firsts: dict[str, Any] = {}
    for case in cases:
        if case.name in seconds:
            firsts.setdefault(_program(case), case)
    found = {name: program(first, cases, seconds) for name, first in firsts.items()}
    for each in found.values():
        for step in each["steps"]:
            predicted, measured = predicted_s(Program.of(each), step), step["sustained_s"]
            if not step["blind"]:
                times = f"{1e3 * measured:.1f} ms, {1e3 * predicted:.1f}"
                print(f"{step['name']}: {times}, {predicted / measured - 1:+.1%}")
    if onto is not None:
        found = json.loads(gzip.decompress(onto.read_bytes()))["programs"] | found
    if out is not None:
        out.write_bytes(gzip.compress(json.dumps(VERSIONS | {"programs": found}).encode(), mtime=0))


def main() -> None:
    """Record, or print a row for each step, and a line for each group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", metavar="STEPS.json", type=Path, nargs="+")
    parser.add_argument("--without", nargs="*", default=[], help="steps that ran with other kernels than is recorded")
    parser.add_argument("--onto", type=Path, help="a file whose other programs are kept")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.record:
        record(given.record, without=given.without, onto=given.onto, out=given.out)
        return
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    print("| step | on | layers | sequences x tokens | kept out | measured, ms | predicted, ms | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in programs().items():
        program = Program.of(found)
        for step in found["steps"]:
            error = predicted_s(program, step) / step["sustained_s"] - 1
            kept = "yes" if step["blind"] else "first" if step["first"] else ""
            kind = {"yes": "kept out of every choice", "first": "first size, whose trace gave prices"}.get(kept, "seen")
            groups[(*group_of(name, program.mode), kind)].append(abs(error))
            size = f"{step['layers']} | {step['sequences']} x {step['tokens']}"
            print(
                f"| {step['name']} | {program.mode} | {size} | {kept} "
                f"| {1e3 * step['sustained_s']:.1f} | {1e3 * step['sustained_s'] * (1 + error):.1f} | {error:+.1%} |"
            )
    print("\n| software | on | steps | which | median | worst |\n|---|---|---|---|---|---|")
    for (software, mode, kind), errors in sorted(groups.items()):
        print(f"| {software} | {mode} | {len(errors)} | {kind} | {np.median(errors):.1%} | {max(errors):.1%} |")


if __name__ == "__main__":
    main()
