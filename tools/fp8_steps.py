"""Measured steps in bf16 and in FP8 beside the list of `fused`: the tables of docs/software.md.

python tools/fp8_steps.py [--parts NAME RECIPE]   # from tests/data/fp8_steps_h100.json.gz
python tools/fp8_steps.py --predict OUT.json      # of every size and recipe, without a measurement
python tools/fp8_steps.py --record FOLDER         # writes that file from what tools/measure_fp8_steps.py measured
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.scenario import Scenario, scenario_from_mapping

DATA = Path(__file__).parent.parent / "tests" / "data" / "fp8_steps_h100.json.gz"
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
