"""Measured steps in bf16 and in FP8 beside the list of `fused`: the tables of docs/software.md.

    python tools/fp8_steps.py                     # from tests/data/fp8_steps_h100.json.gz
    python tools/fp8_steps.py --parts NAME        # of one size, part by part
    python tools/fp8_steps.py --predict OUT.json  # of every size and recipe, without a measurement
    python tools/fp8_steps.py --record FOLDER     # writes that file from what tools/measure_fp8_steps.py measured

What was predicted before the first step was measured, and, of six sizes more, when corrections had been made, lies in
tests/data/fp8_predictions.json.
"""

import argparse
import gzip
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fp8_cases import LATER, RECIPES, SIZES

from moesim.engine import step_kernels
from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.parallel.memory.parameters import gemm_weights
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.program import build_program
from moesim.program.drawn_routing import draw_samples, obtain_trace
from moesim.run import simulate
from moesim.scenario import Scenario, scenario_from_mapping
from moesim.strict_json import json_text, parse_json

DATA = Path(__file__).parent.parent / "tests" / "data" / "fp8_steps_h100.json.gz"
PREDICTED = DATA.with_name("fp8_predictions.json")
HOSTS = {"graph": "free", "eager": "launches"}  # how steps were issued, as the switch `host`


def compiled_scenario(sizes: Mapping[str, Any], recipe: str) -> Scenario:
    """Of tools/fp8_compiled.py, by the list that is nearest to what torch.compile makes; torchao's as per_tensor."""
    own = scenario_of(sizes, "bf16" if recipe == "bf16" else "per_tensor", host="graph").model_dump(exclude_unset=True)
    own["workload"]["precision"] |= {"master": "none", "optimizer": "bf16"}
    own["implementation"] |= {"qkv": "separate", "ffn_inputs": "separate", "fresh_gradients": True}
    own["implementation"] |= {"optimizer": "fused"}
    return scenario_from_mapping(own)


def scenario_of(sizes: Mapping[str, Any], recipe: str, *, host: str) -> Scenario:
    """A size by a recipe as a scenario, with experts that get the same rows."""
    model = {
        "layers": sizes["layers"], "dense_layers": sizes["dense_layers"], "dense_intermediate": sizes["dense_width"],
        "hidden": sizes["hidden"], "heads": sizes["heads"], "kv_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"], "vocab": sizes["vocab"],
        "attention": {"kind": "gqa" if sizes["kv_heads"] < sizes["heads"] else "mha"},
    }  # fmt: skip
    routing: dict[str, Any] = {"kind": "uniform"}
    if sizes["experts"]:
        routing = {"kind": "stress", "pattern": "balanced"}
        model |= {"experts": sizes["experts"], "top_k": sizes["top_k"], "expert_intermediate": sizes["expert_width"]}
        if sizes["shared_width"]:
            model |= {"shared_experts": 1, "shared_intermediate": sizes["shared_width"]}
    blocks = recipe == "blockwise"
    precision: dict[str, Any] = {"weights": "bf16", "master": "fp32", "optimizer": "fp32"}
    precision |= {"gradients": "fp32" if blocks else "bf16"}
    if recipe != "bf16":
        precision |= {"gemm": "fp8", "recipe": recipe}
    return scenario_from_mapping(
        {
            "schema_version": 1,
            "name": "case",
            "model": model,
            "routing": routing,
            "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 1},
            "parallelism": {"data": 1, "expert": 1},
            "workload": {
                "sequence_length": sizes["sequence"],
                "micro_batch": sizes["batch"],
                "global_batch": sizes["batch"],
                "precision": precision,
            },
            "implementation": {
                "kind": "fused",
                "embedding": "torch",
                "host": HOSTS[host],
                "zeroed_gradients": blocks and sizes["experts"] > 0,  # those that DeepGEMM adds to
            },
            "memory": {"check": "warn", "allocator_overhead": 0.0, "reserved": "0 GB"},
            "uncertainty": {"samples": 1},
        }
    )


# Names of kernels that begin with, or hold, these words, in this order.
BEGINS = (
    ("casts", ("_largest", "_scaled", "_blocks", "_turn_blocks", "_tiles")), ("optimizer", ("_adam",)),
    ("activation", ("_gated", "_swiglu")), ("norms", ("_norm",)), ("rows", ("_gather", "_sum_rows")),
    ("router", ("_choose",)), ("loss", ("_loss",)), ("rotary", ("_rotate",)),
)  # fmt: skip
HOLDS = (
    ("attention", ("cudnn", "flash", "fmha")), ("experts", ("Group", "deep_gemm", "prepare_grouped")),
    ("FP8 GEMMs", ("nvjet_sm90_qq",)), ("bf16 GEMMs", ("nvjet", "cutlass::Kernel2", "splitK", "gemm")),
    ("rotary", ("direct_copy",)),
)  # fmt: skip


def measured_parts(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds by part of the kernels of a step (names, and microseconds) in their order; casts of weights apart."""
    found: defaultdict[str, float] = defaultdict(float)
    updated = False
    for name, microseconds in kernels:
        begun = next((part for part, words in BEGINS if name.startswith(words)), None)
        held = next((part for part, words in HOLDS if any(word in name for word in words)), "embedding")
        part = begun or held
        updated = updated or part == "optimizer"
        found["casts of weights" if part == "casts" and updated else part] += 1e-6 * microseconds
    return dict(found)


# Of names of operations, likewise.
LISTED = (
    ("casts of weights", ("weights.",)), ("optimizer", ("adamw", "gradients.zero")),
    ("norms", ("attention_norm", "ffn_norm", "final_norm")), ("rows", ("permute", "unpermute")),
    ("loss", ("cross_entropy",)), ("embedding", ("embedding",)), ("rotary", ("rotary",)),
    ("bf16 GEMMs", ("head", "router.gate")), ("router", ("router",)),
    ("FP8 GEMMs", ("qkv", "attention_out", "ffn", "shared")), ("attention", ("attention",)),
    ("experts", ("experts",)),
)  # fmt: skip


def listed_parts(scenario: Scenario) -> dict[str, float]:
    """Seconds by the same parts as the list has them, at the clock of the step."""
    samples, _ = draw_samples(scenario, obtain_trace(scenario))
    fabric = build_fabric(scenario.cluster)
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernel_model("h100"), samples=samples)
    group = build_program(scenario, fabric=fabric, kernels=kernels, samples=samples).groups[0]
    blocks = [run.block for task in group.tasks for run in task.runs] + [group.optimizer]
    found: defaultdict[str, float] = defaultdict(float)
    for operation in (operation for block in blocks for operation in block.operations):
        if operation.seconds_MSR is None:
            continue
        name = operation.label.name
        is_cast = any(f".{word}" in name for word in ("cast", "turn", "largest")) and not name.startswith("weights")
        by_name = next(part for part, words in LISTED if name.startswith(words))
        part = "casts" if is_cast else "activation" if "activation" in name else by_name
        wide = scenario.workload.precision.scaling is None and part == "FP8 GEMMs"
        found["bf16 GEMMs" if wide else part] += float(operation.seconds_MSR.mean())
    return dict(found)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One size by every recipe: seconds measured, predicted before any was measured (of a later size: before it was),
    and predicted now; and what else was measured of it.
    """

    name: str
    blind: bool
    later: bool
    measured_s: Mapping[str, float]
    before_s: Mapping[str, float]
    predicted_s: Mapping[str, float]
    row: Mapping[str, Any]

    def error(self, recipe: str, *, before: bool = False) -> float:
        """Of the predicted seconds."""
        return (self.before_s if before else self.predicted_s)[recipe] / self.measured_s[recipe] - 1

    def ratio_error(self, recipe: str, *, before: bool = False) -> float:
        """Of the predicted seconds over those in bf16."""
        return (1 + self.error(recipe, before=before)) / (1 + self.error("bf16", before=before)) - 1


def compared(names: Sequence[str] | None = None) -> Iterator[Compared]:
    """Every size, or those of these names."""
    before = parse_json(PREDICTED.read_bytes())
    rows: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for step in measured()["steps"]:
        rows[step["name"]][step["recipe"]] = step
    known = {(row["name"], row["recipe"]): row["graph"] for row in (*before["steps"], *before["later"])}
    for name, row in rows.items():
        if names is not None and name not in names:
            continue
        sizes = row["bf16"]["sizes"]
        now = {recipe: simulate(scenario_of(sizes, recipe, host="graph")).result["step_time_s"] for recipe in row}
        yield Compared(
            name=name,
            blind=row["bf16"]["blind"],
            later=row["bf16"]["later"],
            measured_s={recipe: step["graph"]["step_s"] for recipe, step in row.items()},
            before_s={recipe: known[name, recipe] for recipe in row},
            predicted_s=now,
            row=row,
        )


def predicted_peak(sizes: Mapping[str, Any], recipe: str) -> float:
    """Bytes of a step whose gradients go behind the optimizer, and which keeps bf16 weights beside those in FP8."""
    given = scenario_of(sizes, recipe, host="graph").model_dump(exclude_unset=True)
    given["implementation"]["fresh_gradients"] = True
    scenario = scenario_from_mapping(given)
    kept = 2.0 * sum(gemm_weights(scenario, 0)) if recipe != "bf16" else 0.0
    return float(memory_report(scenario, even_rows(scenario)).peak_bytes) + kept


def measured() -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = parse_json(gzip.decompress(DATA.read_bytes()))
    return found


def record(folder: Path) -> None:
    """Write the file of all that was measured."""
    peaks = {(row["name"], row["recipe"]): row["peak"] for row in _rows(folder / "peaks.json")}
    steps = []
    for file, later in (("fp8-steps.json", False), ("later-fp8-steps.json", True)):
        for row in _rows(folder / file):
            parts = measured_parts(row.pop("kernels"))
            peak = peaks.get((row["name"], row["recipe"]), row["peak"])
            steps.append(row | {"later": later, "peak": peak, "parts": parts})
    dense = [row for file in sorted(folder.glob("compiled-*.json")) for row in _rows(file)]
    for row in dense:
        row.pop("kernels")
    machine = parse_json((folder / "fp8-steps.json").read_bytes())["machine"]
    libraries = {"deep_gemm": "sgl-deep-gemm 0.1.5", "torchao": "0.18.0"}
    text = json_text({"machine": machine | libraries, "steps": steps, "compiled": dense})
    DATA.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in parse_json(path.read_bytes())["steps"] if "error" not in row]


def _print_parts(name: str) -> None:
    for step in (step for step in measured()["steps"] if step["name"] == name):
        own = listed_parts(scenario_of(step["sizes"], step["recipe"], host="graph"))
        print(f"{name}, {step['recipe']}: {1e3 * step['graph']['step_s']:.1f} ms in a row\n")
        print("| part | measured, ms | listed, ms |\n|---|---|---|")
        for part in sorted(own.keys() | step["parts"].keys()):
            print(f"| {part} | {1e3 * step['parts'].get(part, 0.0):.2f} | {1e3 * own.get(part, 0.0):.2f} |")
        print(f"| all | {1e3 * sum(step['parts'].values()):.1f} | {1e3 * sum(own.values()):.1f} |\n")


def _print_table(found: list[Compared]) -> None:
    print("| step | in no choice | bf16, ms | predicted | per_tensor, ms | predicted | over bf16 | predicted ", end="")
    print("| blockwise, ms | predicted | over bf16 | predicted |\n" + "|---" * 12 + "|")
    for each in found:
        cells = [each.name, "later" if each.later else "yes" if each.blind else ""]
        for recipe in RECIPES:
            cells += [f"{1e3 * each.measured_s[recipe]:.1f}", f"{each.error(recipe):+.1%}"]
            if recipe != "bf16":
                cells += [f"{each.measured_s[recipe] / each.measured_s['bf16']:.3f}"]
                cells += [f"{each.predicted_s[recipe] / each.predicted_s['bf16']:.3f}"]
        print("| " + " | ".join(cells) + " |")
    groups = {
        "before any was measured": ([each for each in found if not each.later], True),
        "now, seen": ([each for each in found if not each.blind], False),
        "now, in no choice": ([each for each in found if each.blind and not each.later], False),
        "later, before they were measured": ([each for each in found if each.later], True),
    }
    print()
    for label, (chosen, before) in groups.items():
        for recipe in RECIPES:
            steps = [abs(each.error(recipe, before=before)) for each in chosen]
            ratios = [abs(each.ratio_error(recipe, before=before)) for each in chosen]
            over = "" if recipe == "bf16" else f"; over bf16 {np.median(ratios):.1%}, worst {max(ratios):.1%}"
            print(f"{label}, {recipe}: {len(steps)} steps, median {np.median(steps):.1%}, worst {max(steps):.1%}{over}")


def _print_others(found: list[Compared]) -> None:
    """Steps issued by the host, peaks, and what torch compiles."""
    print("\n| step | recipe | issued by the host, over its graph | memory | predicted |\n|---|---|---|---|---|")
    for each in found:
        for recipe, step in each.row.items():
            peak = predicted_peak(step["sizes"], recipe) / step["peak"] - 1
            slower = step["eager"]["step_s"] / step["graph"]["step_s"] - 1
            print(f"| {each.name} | {recipe} | {slower:+.1%} | {step['peak'] / 1e9:.1f} GB | {peak:+.1%} |")
    known = {(row["name"], row["recipe"]): row["eager"] for row in parse_json(PREDICTED.read_bytes())["compiled"]}
    print("\n| compiled | recipe | measured, ms | over bf16 | predicted before | now |\n|---|---|---|---|---|---|")
    wide: dict[str, float] = {}
    for row in measured()["compiled"]:
        name, recipe, seconds = row["name"], row["recipe"], row["eager"]["step_s"]
        wide |= {name: seconds} if recipe == "bf16" else {}
        before = known[name, "bf16" if recipe == "bf16" else "tensorwise"]
        now = simulate(compiled_scenario(row["sizes"], recipe)).result["step_time_s"]
        errors = f"{before / seconds - 1:+.1%} | {now / seconds - 1:+.1%}"
        print(f"| {name} | {recipe} | {1e3 * seconds:.1f} | {seconds / wide[name]:.3f} | {errors} |")


def _predict(out: Path) -> None:
    rows = []
    for name, sizes in (SIZES | LATER).items():
        for recipe in RECIPES:
            row: dict[str, Any] = {"name": name, "recipe": recipe}
            for host in HOSTS:
                result = simulate(scenario_of(asdict(sizes), recipe, host=host)).result
                row |= {host: result["step_time_s"], "peak": result["memory"]["peak_bytes"]}
            rows.append(row)
    out.write_text(json_text({"steps": rows}))


def main() -> None:
    """The tables, the parts of one size, predictions, or the file written anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", metavar="NAME")
    parser.add_argument("--predict", type=Path)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    if given.record:
        record(given.record)
    if given.predict:
        _predict(given.predict)
    elif given.parts:
        _print_parts(given.parts)
    else:
        found = list(compared())
        _print_table(found)
        _print_others(found)


if __name__ == "__main__":
    main()
