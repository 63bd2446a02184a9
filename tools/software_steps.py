"""Measured steps of Megatron-Core and torchtitan beside the lists of their kernels: the tables of docs/software.md.

    python tools/software_steps.py [--parts STEP]                 # from tests/data/software_steps.json.gz
    python tools/software_steps.py --record MEGATRON TORCHTITAN   # writes that file from what was measured

MEGATRON is the folder of `measure_megatron_steps.py`, TORCHTITAN those of `measure_library_steps.py`. Of a traced step
the file keeps the seconds and kernels of each part, as the order of its operations tells them (`traced_parts`).
"""

import argparse
import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured_data
from measured_data import listed_operations, print_head, print_row, summary

from moesim.kernels import kernel_model
from moesim.results.spans import Part
from moesim.run import simulate
from moesim.scenario import Scenario, scenario_from_mapping
from moesim.strict_json import parse_json

DATA = measured_data.DATA / "software_steps.json.gz"
# What a launch takes on the host of the measured machine with Megatron-Core's Python, over the profile's: with `expert`
# of moesim/program/host.py the only number that these steps gave, those that are not marked blind.
HOST_FACTOR = 5.5
OWN = {"attention": "fused", "expert_gemms": "grouped", "repeat_keys": False}  # kernels that replace Megatron's
NAMES = {"core_attn": "core_attention", "mlp": "dense_ffn"}  # words of recomputation
GROUPS = {
    Part.NORM: "norms", Part.RESIDUAL: "norms", Part.ROUTER: "rows", Part.PERMUTE: "rows", Part.COMBINE: "rows",
    Part.ROW_COUNTS: "rows", Part.ATTENTION: "attention", Part.EXPERTS: "experts",
    Part.SHARED_EXPERTS: "shared experts", Part.EMBEDDING: "embedding", Part.HEAD: "head", Part.LOSS: "loss",
    Part.GRADIENTS: "gradients", Part.OPTIMIZER: "optimizer",
}  # fmt: skip
BACKWARD = "autograd::engine::evaluate_function: "

Parts = dict[tuple[str, str], tuple[float, int]]


def scenario_of(program: str, case: Mapping[str, Any]) -> Scenario:
    """The case as a scenario: uniform routing, no memory lost to the allocator."""
    fields = _megatron(case) if program == "megatron" else _torchtitan(case)
    rest: dict[str, Any] = {
        "schema_version": 1,
        "name": case["name"],
        "routing": {"kind": "uniform"},
        "memory": {"check": "warn", "allocator_overhead": 0.0, "reserved": "0 GB"},
        "uncertainty": {"samples": 1},
    }
    return scenario_from_mapping(rest | fields)


def _megatron(case: Mapping[str, Any]) -> dict[str, Any]:
    size, ranks, batch = case["sizes"], case["ranks"], case["batch"]
    latent = {"kind": "mla", "q_lora_rank": size.get("q_rank"), "kv_lora_rank": size.get("kv_rank"),
              "rope_head_dim": 64, "value_head_dim": 128}  # fmt: skip
    model = {
        "layers": case["layers"], "hidden": size["hidden"], "heads": size["heads"], "kv_heads": size["kv_heads"],
        "head_dim": 128, "attention": latent if "q_rank" in size else {"kind": "gqa"}, "experts": size["experts"],
        "top_k": size["top_k"], "expert_intermediate": size["ffn"], "vocab": size["vocab"],
    }  # fmt: skip
    if "shared" in size:
        model |= {"shared_experts": 1, "shared_intermediate": size["shared"]}
    gathers = case["dispatcher"] == "allgather"
    dropout = {"dropout": True} if case["more"].get("attention_dropout") else {}
    return {
        "model": model,
        "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": ranks},
        "parallelism": {"data": ranks, "expert": case["expert"], "zero": {"dense": 1, "expert": 1}},
        "workload": {
            "sequence_length": case["sequence"],
            "micro_batch": batch,
            "global_batch": batch * case["micro_batches"] * ranks,
            "gradient_clipping": 1.0,
            "precision": {"gradients": "fp32", "master": "fp32"},
            "recompute": [NAMES.get(word, word) for word in case["recompute"]] or "none",
        },
        "dispatch": {"algorithm": "allgather", "deduplicate": "all_ranks"}
        if gathers
        else {"deduplicate": "per_expert"},
        "implementation": {"kind": "megatron_local", **(OWN if case["own"] else {}), **dropout},
        "overlap": {"gradient_reduction": bool(case["overlap"])},
        "compute": {"host_factor": HOST_FACTOR},
    }


def _torchtitan(case: Mapping[str, Any]) -> dict[str, Any]:
    size, ranks = case["sizes"], 2 if case["mode"] == "ep" else 1
    model = {
        "layers": case["layers"], "hidden": size["hidden_size"], "heads": size["num_attention_heads"],
        "kv_heads": size["num_attention_heads"], "head_dim": size["qk_nope_head_dim"],
        "attention": {"kind": "mla", "kv_lora_rank": size["kv_lora_rank"], "rope_head_dim": size["qk_rope_head_dim"],
                      "value_head_dim": size["v_head_dim"]},
        "dense_layers": 1, "dense_intermediate": size["intermediate_size"], "experts": size["n_routed_experts"],
        "top_k": size["num_experts_per_tok"], "expert_intermediate": size["moe_intermediate_size"],
        "shared_experts": size["n_shared_experts"], "vocab": size["vocab_size"],
    }  # fmt: skip
    loop = {"loss_chunks": 1, "gradient_norm": "free", "reduce_dtype": "bf16", "fresh_gradients": True}
    return {
        "model": model,
        "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": ranks},
        "parallelism": {"data": ranks, "expert": ranks, "zero": {"dense": 0, "expert": 0}},
        "workload": {
            "sequence_length": case["sequence"],
            "micro_batch": case["batch"],
            "global_batch": case["batch"] * ranks,
            "precision": {"optimizer": "bf16"},
        },
        "dispatch": {"deduplicate": "per_expert"},
        "implementation": {"kind": "torchtitan", "flat_gradients": ranks > 1, **loop},
        "overlap": {"gradient_reduction": False},
    }


def listed_parts(scenario: Scenario) -> Parts:
    """(phase, part) to seconds and operations of the list on the first rank; transfers are left out."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for phase, operation in listed_operations(scenario, kernel_model("h100")):
        assert operation.seconds_MSR is not None
        found[phase, GROUPS[operation.part]].append(float(operation.seconds_MSR.mean()))
    return {key: (sum(each), len(each)) for key, each in found.items()}


def _with_operations(path: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every kernel of a trace in the order of the GPU, with the operations that it was launched in, outermost first."""
    events = measured_data.read(path)["traceEvents"]
    launches = {e["args"]["correlation"]: e for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}  # fmt: skip
    operations: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" and event.get("ph") == "X":
            operations[event["tid"]].append(event)
    for each in operations.values():
        each.sort(key=lambda event: event["ts"])
    begins = {thread: [event["ts"] for event in each] for thread, each in operations.items()}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        launch = launches.get(kernel["args"].get("correlation"))
        around: list[dict[str, Any]] = []
        if launch and launch["tid"] in operations:
            last = bisect.bisect_right(begins[launch["tid"]], launch["ts"])
            before = operations[launch["tid"]][max(0, last - 4000) : last]
            around = [event for event in before if event["ts"] + event["dur"] >= launch["ts"]]
        yield kernel, around


def traced_parts(path: Path, *, layers: int, hidden: int) -> Parts:
    """(phase, part) to seconds and kernels of a traced step of Megatron-Core without recomputation.

    A part begins at the operation that only it has: norms over whole tokens, the gate, experts' GEMMs, sums of rows.
    """
    steps = [(kernel, around) for kernel, around in _with_operations(path) if around]
    last = max(i for i, (_, around) in enumerate(steps) if around[0]["name"].startswith(BACKWARD))
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    part, norms = "embedding", 0
    for index, (kernel, around) in enumerate(steps):
        names = " ".join(event["name"] for event in around)
        inner, whole = around[-1]["name"], f", {hidden}]" in str(around[-1]["args"].get("Input Dims", ""))
        counted = part
        if "c10d" in names or (kernel["cat"] == "gpu_memcpy" and "DtoH" in kernel["name"]):
            continue
        if index > last:
            found["optimizer", "optimizer"].append(kernel["dur"])
            continue
        if names.startswith(BACKWARD):
            part, counted = _backward_part(names, inner, part, whole=whole)
            found["backward", counted].append(kernel["dur"])
            continue
        if inner == "aten::fill_" and part == "embedding" and names.startswith("aten::zero_"):
            found["backward", "gradients"].append(kernel["dur"])
            continue
        if "rms_norm" in names and whole:
            norms += 1
            part, counted = ("attention" if norms % 2 else "shared experts"), "norms"
            part = "head" if norms > 2 * layers else part
        elif "Torch-Compiled Region: 0" in names:
            part, counted = "norms", "norms"
        elif "RouterGating" in names:
            part = counted = "rows"
        elif part == "rows" and ("LinearWithGrad" in names or "_grouped_mm" in names):
            part = counted = "experts"
        elif "scatter_add_" in names:
            part = counted = "rows"
        elif "CrossEntropy" in names:
            part = counted = "loss"
        elif inner == "aten::cat" and part in ("rows", "experts"):
            counted = "rows"
        elif inner == "aten::add" and part == "rows":
            counted = "shared experts"
        found["forward", counted].append(kernel["dur"])
    return {key: (1e-6 * sum(each), len(each)) for key, each in found.items()}


def _backward_part(names: str, inner: str, part: str, *, whole: bool) -> tuple[str, str]:
    """The part of the backward pass that begins or goes on, and what this kernel counts to."""
    if "AccumulateGrad" in names.split(" ")[1]:
        return part, "gradients"
    if "FusedRmsNormBackward" in names and whole:
        return "norms", "norms"
    if "RouterGating" in names:
        return "shared experts", "rows"
    if "_CopyToModel" in names:
        return part, "shared experts"
    begins = {
        "CrossEntropy": "loss",
        "ScatterAddBackward": "rows",
        "IndexSelectBackward": "rows",
        "EmbeddingB": "embedding",
    }
    for name, begun in begins.items():
        if name in names:
            return begun, begun
    if "LinearWithGrad" in names or "GroupedMm" in names:
        behind = {"loss": "head", "rows": "experts", "norms": "attention"}
        part = behind.get(part, part)
    if inner == "aten::cat" and part in ("experts", "rows"):
        return part, "rows"
    return part, part


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One step: seconds and bytes measured and predicted."""

    program: str
    name: str
    blind: bool
    measured_s: float
    predicted_s: float
    measured_bytes: float
    predicted_bytes: float

    @property
    def error(self) -> float:
        """Of the predicted seconds."""
        return self.predicted_s / self.measured_s - 1


def compared(names: set[str] | None = None) -> Iterator[Compared]:
    """Every step, or those of these names."""
    for program, each in measured_data.read(DATA)["programs"].items():
        for step in each["steps"]:
            case = step["case"]
            if names is not None and case["name"] not in names:
                continue
            result = simulate(scenario_of(program, case)).result
            yield Compared(
                program=program,
                name=case["name"],
                blind=case["blind"],
                measured_s=step["seconds"],
                predicted_s=result["step_time_s"],
                measured_bytes=step["memory"],
                predicted_bytes=result["memory"]["peak_bytes"],
            )


def record(megatron: Path, torchtitan: list[Path]) -> None:
    """Write the file of all that was measured."""
    programs: dict[str, Any] = {
        "megatron": {"version": "megatron-core 0.19.2, torch 2.11, without Transformer Engine", "steps": []},
        "torchtitan": {"version": "torchtitan 0.2.2, torch 2.11", "steps": []},
    }
    for program, folders in (("megatron", [megatron]), ("torchtitan", torchtitan)):
        for file in (file for folder in folders for file in sorted(folder.glob("steps-*.json"))):
            for row in parse_json(file.read_bytes())["steps"]:
                seconds = row.get("step_s", row.get("sustained_s"))
                if seconds is None:
                    continue
                step = {"case": row["case"], "seconds": seconds, "spread_s": row["spread_s"], "memory": row["memory"]}
                trace = file.parent / f"{row['case']['name']}.trace.json.gz"
                if program == "megatron" and trace.exists() and not row["case"]["recompute"]:
                    sizes = {"layers": row["case"]["layers"], "hidden": row["case"]["sizes"]["hidden"]}
                    parts = traced_parts(trace, **sizes)
                    step["parts"] = [[*key, seconds, count] for key, (seconds, count) in sorted(parts.items())]
                programs[program]["steps"].append(step)
    measured_data.write(DATA, {"gpu": "NVIDIA H100 80GB HBM3", "programs": programs})


def _print_parts(name: str) -> None:
    steps = measured_data.read(DATA)["programs"]["megatron"]["steps"]
    step = next(step for step in steps if step["case"]["name"] == name and "parts" in step)
    traced = {(phase, part): (seconds, count) for phase, part, seconds, count in step["parts"]}
    listed = listed_parts(scenario_of("megatron", step["case"]))
    print_head("phase", "part", "traced, ms", "kernels", "listed, ms", "operations")
    for phase, part in sorted(traced.keys() | listed.keys()):
        (seconds, count), (own, operations) = (each.get((phase, part), (0.0, 0)) for each in (traced, listed))
        print_row(phase, part, f"{1e3 * seconds:.2f}", f"{count}", f"{1e3 * own:.2f}", f"{operations}")
    sums = [sum(seconds for seconds, _ in each.values()) for each in (traced, listed)]
    print_row("all", "", f"{1e3 * sums[0]:.1f}", "", f"{1e3 * sums[1]:.1f}", "")


def main() -> None:
    """The table, the parts of one step, or the file written anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="STEP")
    parser.add_argument("--record", nargs="+", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if given.record:
        record(given.record[0], given.record[1:])
    if given.parts:
        _print_parts(given.parts)
        return
    found = list(compared())
    print_head("program", "step", "in no choice", "measured, ms", "predicted", "memory, measured / predicted")
    for each in found:
        memory = f"{each.measured_bytes / 1e9:.1f} / {each.predicted_bytes / 1e9:.1f} GB"
        seconds = f"{1e3 * each.measured_s:.1f}", f"{each.error:+.1%}"
        print_row(each.program, each.name, "yes" if each.blind else "", *seconds, memory)
    for program in dict.fromkeys(each.program for each in found):
        for blind in (False, True):
            errors = [each.error for each in found if (each.program, each.blind) == (program, blind)]
            which = "in no choice" if blind else "seen"
            print(f"{program}, {which}: {len(errors)} steps, {summary(errors)}")


if __name__ == "__main__":
    main()
