"""The list of `implementation: transformers` beside what transformers' models record and measured: docs/software.md.

    python tools/listed_steps.py [--parts STEP]

For each of the 18 steps in tests/data/hf_steps.json.gz: FLOPs, bytes and operations of the list over those of the
recording, the seconds of both by the kernel models of an H100, and of the list over the measured step. No number of
the list comes from these steps.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure_hf_steps import CASES, Case
from measured_data import DATA, listed_operations, print_head, print_row, read, summary

from moesim.kernels import kernel_model
from moesim.kernels.estimate import Estimate
from moesim.kernels.families import Kernel, MemoryBound
from moesim.kernels.roofline import Roofline
from moesim.recorded.estimate import step_estimate
from moesim.recorded.pricing import launch_of
from moesim.recorded.step_file import RecordedOp, parsed_ops
from moesim.results.spans import Part
from moesim.run import simulate
from moesim.scenario import Scenario, gpu_spec, scenario_from_mapping

FILE = DATA / "hf_steps.json.gz"
MODEL_TYPES = {
    "Qwen3MoeConfig": "qwen3_moe",
    "MixtralConfig": "mixtral",
    "OlmoeConfig": "olmoe",
    "DeepseekV2Config": "deepseek_v2",
    "DeepseekV3Config": "deepseek_v3",
    "Glm4MoeConfig": "glm4_moe",
}
# What the modeling code of a family does otherwise than most of transformers.
OWN: Mapping[str, Mapping[str, str]] = {
    "qwen3_moe": {"gates": "bf16"},
    "olmoe": {"gates": "bf16"},
    "deepseek_v2": {"router_dtype": "fp32", "rotary": "complex"},
    "deepseek_v3": {"router_dtype": "fp32"},
    "glm4_moe": {"router_dtype": "fp32"},
}
# Kinds that stand for several of torch's operations: (operations, bytes over those that the kind counts).
TOGETHER = {
    "activation": (2, 10 / 6),
    "activation_backward": (4, 26 / 10),
    "cross_entropy_fp32": (2, 1.0),
    "cross_entropy_fp32_backward": (2, 2.0),
    "softmax_backward": (1, 1.0),
}
GROUPS = {
    Part.NORM: "norms and residual",
    Part.RESIDUAL: "norms and residual",
    Part.ATTENTION: "attention",
    Part.ROUTER: "router",
    Part.PERMUTE: "rows",
    Part.COMBINE: "rows",
    Part.EXPERTS: "experts",
    Part.SHARED_EXPERTS: "shared experts",
    Part.DENSE_FFN: "dense FFN",
    Part.EMBEDDING: "embedding",
    Part.HEAD: "head and loss",
    Part.LOSS: "head and loss",
}


@dataclass
class Work:
    """Operations, bytes of memory-bound kernels, and FLOPs of the others."""

    operations: float = 0
    moved: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.moved + other.moved, self.flops + other.flops)


def scenario_of(case: Case) -> Scenario:
    """The case as a scenario: its config.json read as any, one GPU, one micro-batch."""
    kind = MODEL_TYPES[case.family]
    config = {"model_type": kind, "num_hidden_layers": case.layers, **case.sizes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return scenario_from_mapping(
            {
                "schema_version": 1,
                "name": case.name,
                "model": {"hf_config": str(path), "mtp_layers": 0},
                "routing": {"kind": "uniform"},
                "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 1},
                "workload": {
                    "sequence_length": case.sequence,
                    "micro_batch": case.batch,
                    "global_batch": case.batch,
                    "precision": {"optimizer": "bf16"},
                },
                "implementation": {"kind": "transformers", **OWN.get(kind, {})},
                "memory": {"check": "warn"},
                "uncertainty": {"samples": 1},
            }
        )


class _Counting(Roofline):
    """Takes a second for each kernel, and names it by its number where others name a source."""

    def __init__(self) -> None:
        super().__init__(gpu_spec("h100"))
        self.kernels: list[Kernel] = []

    def seconds(self, kernel: Kernel) -> Estimate:
        self.kernels.append(kernel)
        return Estimate(1.0, str(len(self.kernels) - 1))


def listed(scenario: Scenario) -> dict[tuple[str, str], Work]:
    """The work of the list by (phase, part)."""
    model = _Counting()
    found: defaultdict[tuple[str, str], Work] = defaultdict(Work)
    for phase, operation in listed_operations(scenario, model):
        if phase == "optimizer":
            continue
        sorts = ".sort" in operation.label.name and "permute.sort" not in operation.label.name  # of a sum into rows
        kernel = None if sorts else model.kernels[int(operation.source)]
        times = round(float(operation.seconds_MSR.mean()))
        found[phase, GROUPS[operation.part]] += _work(kernel, scenario, times)
    return dict(found)


def _work(kernel: Kernel | None, scenario: Scenario, times: int) -> Work:
    if kernel is None:
        return Work()
    if not isinstance(kernel, MemoryBound):
        return Work(1, 0.0, float(np.mean(kernel.flops)))
    operations, factor = TOGETHER.get(kernel.kind, (1, 1.0))
    moved = float(np.mean(kernel.moved_bytes)) * factor
    if kernel.kind == "embedding_backward":
        moved += 2.0 * scenario.model.vocab * scenario.model.hidden  # the table, which the kind leaves out
    return Work(operations * times, moved * times)


def recorded(ops: list[RecordedOp]) -> Iterator[tuple[tuple[str, str], Work]]:
    """The work of a recording by (phase, part); of the backward pass, whose operations name no module, in all."""
    for op in ops:
        if op.phase == "optimizer":
            continue
        kernels = launch_of(op).kernels
        moved = sum(float(np.sum(k.moved_bytes)) for k in kernels if isinstance(k, MemoryBound))
        flops = sum(float(np.sum(k.flops)) for k in kernels if not isinstance(k, MemoryBound))
        part = _part(op.module) if op.phase == "forward" else ""
        yield (op.phase, part), Work(op.count, op.count * moved, op.count * flops)


def _part(module: str) -> str:
    layer = "model.layers.*"
    rest = module.removeprefix(layer).lstrip(".") if module.startswith(layer) else None
    if rest is None:
        return "embedding" if module.startswith(("model.embed", "model.rotary")) or module == "model" else (
            "norms and residual" if module == "model.norm" else "head and loss")  # fmt: skip
    if rest == "" or "layernorm" in rest or rest.endswith(("q_norm", "k_norm")):
        return "norms and residual"
    if rest.startswith("self_attn"):
        return "attention"
    if ".gate" in rest and "proj" not in rest and "experts" not in rest:
        return "router"
    if "shared" in rest:
        return "shared experts"
    if ".experts" in rest:
        return "experts"
    return "mlp"


@dataclass(frozen=True)
class Compared:
    """One step: ratios of the list over the recording, and seconds."""

    name: str
    blind: bool
    listed: dict[tuple[str, str], Work]
    recorded: dict[tuple[str, str], Work]
    listed_s: float
    priced_s: float
    measured_s: float

    def ratio(self, of: str, phase: str) -> float:
        """The list's operations, bytes (`moved`) or `flops` over the recording's, of a phase."""
        sums = [
            sum(getattr(w, of) for (p, _), w in each.items() if p == phase) for each in (self.listed, self.recorded)
        ]
        return sums[0] / sums[1]

    @property
    def error(self) -> float:
        """Of the list against the measured step."""
        return self.listed_s / self.measured_s - 1


def compared(names: set[str] | None = None, *, time: bool = True) -> list[Compared]:
    """Every step, or those of these names; without `time` nothing is priced."""
    cases = {case.name: case for case in CASES}
    kernels = kernel_model("h100")
    out = []
    for step in read(FILE)["steps"]:
        if names is not None and step["name"] not in names:
            continue
        ops, scenario = parsed_ops(step["ops"], where=step["name"]), scenario_of(cases[step["name"]])
        work: defaultdict[tuple[str, str], Work] = defaultdict(Work)
        for key, each in recorded(list(ops)):
            work[key] += each
        estimate = step_estimate(ops, kernels) if time else None
        out.append(
            Compared(
                name=step["name"],
                blind=step["blind"],
                listed=listed(scenario),
                recorded=dict(work),
                listed_s=simulate(scenario).result["step_time_s"] if time else 0.0,
                priced_s=estimate.kernels_s if estimate else 0.0,
                measured_s=step["measured"]["sustained_s"],
            )
        )
    return out


def main() -> None:
    """The table, or the parts of one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="STEP")
    chosen = parser.parse_args().parts
    if chosen:
        _print_parts(compared({chosen}, time=False)[0])
        return
    print_head("step", "FLOPs", "bytes forward", "backward", "operations", "list / recording, s", "list / measured")
    errors = []
    for step in compared():
        flops = [step.ratio("flops", phase) for phase in ("forward", "backward")]
        moved = [step.ratio("moved", phase) for phase in ("forward", "backward")]
        sums = [sum(work.operations for work in each.values()) for each in (step.listed, step.recorded)]
        over = [f"{each:.3f}" for each in moved] + [f"{sums[0] / sums[1]:.2f}", f"{step.listed_s / step.priced_s:.3f}"]
        print_row(step.name, f"{min(flops):.3f} to {max(flops):.3f}", *over, f"{step.error:+.1%}")
        errors.append(step.error)
    print(f"measured: {summary(errors)}")


def _print_parts(step: Compared) -> None:
    for which, each in (("listed", step.listed), ("recorded", step.recorded)):
        for (phase, part), work in sorted(each.items()):
            numbers = f"{work.operations:6.0f} {work.moved / 1e9:9.3f} GB {work.flops / 1e12:9.4f} TFLOP"
            print(f"{which:9}{phase:9}{part:20}{numbers}", flush=True)


if __name__ == "__main__":
    main()
