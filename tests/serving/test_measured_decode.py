"""Decoding steps of plain torch on an H100 (tools/measure_decode.py), in no fit, beside the cost of a step."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.kernels import GroupedGemm, MemoryBound, load_profile
from moesim.serving import load_serving_text
from moesim.serving.batch import Formed
from moesim.serving.costs import StepCosts
from moesim.strict_json import parse_json, unpacked

FILE = Path(__file__).parents[1] / "data" / "decode_h100.json.gz"
LOAD = """schema_version: 1
name: decode
model: {preset: MODEL, layers: LAYERS, dense_layers: 0}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 1}
workload:
  kind: serving
  arrivals: {kind: poisson, rate: 1.0, input: {kind: fixed, tokens: 10}, output: {kind: fixed, tokens: 10}}
engine: {token_budget: 4096}
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return parse_json(unpacked(FILE.read_bytes()))


def test_steps_are_what_they_take_but_for_small_kernels(measured: dict[str, Any]) -> None:
    """All too fast: the layers measured are not fused, and each of their small kernels costs its microseconds."""
    print()
    for name, sizes in measured["models"].items():
        costs = StepCosts(load_serving_text(LOAD.replace("MODEL", name).replace("LAYERS", str(sizes["layers"]))))
        errors, missing = [], []
        for row in measured["steps"]:
            if row["model"] == name:
                batch = row["batch"]
                predicted = costs.step([Formed(batch, 1, (batch * row["keys"],), (), 0, 0)]).total
                errors.append(math.log(predicted / row["seconds"]))
                missing.append((row["seconds"] - predicted) / sizes["layers"])
        middle, worst = np.median(errors), min(errors)
        print(
            f"{name:17} {len(errors)} steps: median {math.expm1(middle):+.1%}, worst {math.expm1(worst):+.1%}", end=", "
        )
        print(f"missing per layer {np.median(missing) * 1e6:.0f} us in the median")
        assert -0.15 < middle < 0.0 and worst > -0.22 and max(errors) < 0.02
        assert max(missing) < 200e-6


def test_attention_to_stored_keys_is_bound_by_their_bytes(measured: dict[str, Any]) -> None:
    h100, errors = load_profile("h100"), []
    for row in measured["attention"]:
        size = 4 * row["batch"] * row["keys"] * row["kv_heads"] * row["head_dim"]
        if size > 32e6:
            errors.append(math.log(float(h100.seconds(MemoryBound("reduce", size)).seconds) / row["seconds"]))
    middle, worst = np.median(np.abs(errors)), max(map(abs, errors))
    print(f"\n{len(errors)} calls of 32 MB and more: median {middle:.1%}, worst {worst:.1%}")
    assert middle < 0.04 and worst < 0.13


def test_products_of_few_rows_are_known(measured: dict[str, Any]) -> None:
    h100, errors = load_profile("h100"), []
    for row in measured["grouped"]:
        kernel = GroupedGemm(rows_per_expert=np.array([row["rows_per_expert"]]), k=row["k"], n=row["n"])
        errors.append(math.log(float(np.ravel(h100.seconds(kernel).seconds)[0]) / row["seconds"]))
    print(
        f"\n{len(errors)} grouped products: median {np.median(np.abs(errors)):.1%}, worst {max(map(abs, errors)):.1%}"
    )
    assert np.median(np.abs(errors)) < 0.03 and max(map(abs, errors)) < 0.12
