"""Decoding on an H100, measured, beside the cost of a step and of its kernels.

Both files are from tools/measure_decode.py. `decode_h100` (--set steps) is in no fit. Of `decode_kernels_h100` two
thirds of the kernels made `moesim/serving/decode_kernels.json`; whole steps gave the eager host's seconds of a launch
alone, and of those the third that is kept out counts here.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.kernels import Gemm, GroupedGemm
from moesim.scenario import gpu_names, gpu_spec
from moesim.serving import load_serving_text
from moesim.serving.batch import Formed
from moesim.serving.costs import StepCosts
from moesim.serving.decode_kernels import (
    attention_of,
    attention_seconds,
    facts,
    fitted_of,
    fused_experts_seconds,
    grouped_shape,
    small_on,
)
from moesim.serving.pricing import Pricing
from moesim.serving.schema import Engine, ServingScenario
from moesim.serving.software import serving_software
from moesim.strict_json import parse_json, unpacked

DATA = Path(__file__).parents[1] / "data"
LOAD = """schema_version: 1
name: decode
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 1}
workload:
  kind: serving
  arrivals: {kind: poisson, rate: 1.0, input: {kind: fixed, tokens: 10}, output: {kind: fixed, tokens: 10}}
"""
Rows = list[dict[str, Any]]


def read(name: str) -> dict[str, Any]:
    return parse_json(unpacked((DATA / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def earlier() -> dict[str, Any]:
    return read("decode_h100")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return read("decode_kernels_h100")


def scenario(sizes: dict[str, int], software: str) -> ServingScenario:
    model = {
        "layers": sizes["layers"], "hidden": sizes["hidden"], "heads": sizes["heads"], "kv_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"], "experts": sizes["experts"], "top_k": sizes["top_k"], "vocab": sizes["vocab"],
        "expert_intermediate": sizes["width"], "attention": {"kind": "gqa"},
    }  # fmt: skip
    if sizes["shared"]:
        model |= {"shared_experts": 2, "shared_intermediate": sizes["shared"] // 2}
    text = LOAD + f"model: {model}\nengine: {{token_budget: 4096, software: {software}}}\n"
    return load_serving_text(text.replace("'", ""))


def errors(data: dict[str, Any], rows: Rows, software: str, *, key: str = "seconds") -> list[float]:
    """log of predicted over measured, and a line for each model."""
    found = []
    for name, sizes in data["models"].items():
        costs = StepCosts(scenario(sizes, software))
        own = []
        for row in rows:
            if row["model"] == name:
                batch = row["batch"]
                cost = costs.step([Formed(batch, 1, (batch * row["keys"],), (), 0, 0)])
                # graphs were timed on the GPU: what the host adds between steps is no part of them
                own.append(math.log((cost.total if key != "seconds" else cost.total - cost.host) / row[key]))
        worst = max(own, key=abs, default=0.0)
        print(f"{software:14} {name:17} {len(own)} steps: median {np.median(own):+.1%}, worst {worst:+.1%}")
        found += own
    return found


def test_steps_of_plain_layers_as_graphs(earlier: dict[str, Any], measured: dict[str, Any]) -> None:
    print()
    for data in (earlier, measured):
        off = np.array(errors(data, data["steps"], "torch_graphs"))
        print(f"{len(off)} steps: |median| {np.median(np.abs(off)):.1%}, p90 {np.quantile(np.abs(off), 0.9):.1%}")
        assert np.median(np.abs(off)) < 0.06 and np.abs(off).max() < 0.2


def test_steps_that_are_compiled(measured: dict[str, Any]) -> None:
    print()
    off = np.array(errors(measured, measured["compiled"], "torch_compiled"))
    assert np.median(np.abs(off)) < 0.08 and np.abs(off).max() < 0.2


def test_steps_that_the_host_launches(measured: dict[str, Any]) -> None:
    print()
    rows = [row for row in measured["steps"] if row["kept_out"]]
    off = np.array(errors(measured, rows, "torch_eager", key="eager_seconds"))
    assert np.median(np.abs(off)) < 0.15 and np.abs(off).max() < 0.4


def test_attention_to_stored_keys(earlier: dict[str, Any], measured: dict[str, Any]) -> None:
    fitted = attention_of(gpu_spec("h100"), stack="torch", kind="grouped/bf16")
    for rows in (earlier["attention"], [row for row in measured["attention"] if row["kept_out"]]):
        off = []
        for row in rows:
            shape = grouped_shape(row["heads"], row["kv_heads"], row["head_dim"], size=2.0)
            seconds = attention_seconds(fitted.parameters, shape, row["batch"], row["keys"])
            off.append(abs(math.log(seconds / row["seconds"])))
        print(f"\n{len(off)} calls: median {np.median(off):.1%}, worst {max(off):.1%}")
        assert np.median(off) < 0.05 and max(off) < 0.35


def test_gemms_of_few_rows(earlier: dict[str, Any], measured: dict[str, Any]) -> None:
    """As they take in a row of kernels."""
    pricing = Pricing(scenario(next(iter(measured["models"].values())), "fused"))
    for data in (earlier, {key: [row for row in measured[key] if row["kept_out"]] for key in ("gemm", "grouped")}):
        off: dict[str, list[float]] = {"gemm": [], "grouped": []}
        for row in data["gemm"]:
            seconds = pricing.seconds(Gemm(m=row["m"], k=row["k"], n=row["n"]))
            off["gemm"] += [abs(math.log(seconds / row["seconds"]))] if row["m"] <= 128 else []
        for row in data["grouped"]:
            kernel = GroupedGemm(rows_per_expert=np.array([row["rows_per_expert"]]), k=row["k"], n=row["n"])
            off["grouped"].append(abs(math.log(float(np.ravel(pricing.seconds(kernel))[0]) / row["seconds"])))
        for family, limits in (("gemm", (0.05, 0.2)), ("grouped", (0.03, 0.2))):
            print(f"\n{family} {len(off[family])}: median {np.median(off[family]):.1%}, worst {max(off[family]):.1%}")
            assert np.median(off[family]) < limits[0] and max(off[family]) < limits[1]


def test_small_kernels(measured: dict[str, Any]) -> None:
    h100 = gpu_spec("h100")
    narrow = [row for row in measured["small"] if row["kept_out"] and row["width"] < 30_000]
    rows = [row for row in narrow if not (row["kind"] in ("softmax", "argmax") and row["width"] > 512)]
    off = [abs(math.log(small_on(h100, row["kind"], row["rows"], row["width"]) / row["seconds"])) for row in rows]
    print(f"\n{len(off)} small kernels: median {np.median(off):.1%}, p90 {np.quantile(off, 0.9):.1%}")
    assert np.median(off) < 0.05 and np.quantile(off, 0.9) < 0.2


def test_more_keys_and_more_requests_never_take_less() -> None:
    """Every GPU and every kind, over what an engine asks for."""
    for stack, gpus in facts()["attention"].items():
        for gpu, kinds in gpus.items():
            for kind in kinds:
                parameters = attention_of(gpu_spec(gpu), stack=stack, kind=kind).parameters
                shape = grouped_shape(32, 8, 128, size=2.0)
                keys, requests = np.geomspace(1, 1e6, 60), np.arange(1, 300)
                assert np.all(np.diff(attention_seconds(parameters, shape, 8, keys)) > 0)
                assert np.all(np.diff(attention_seconds(parameters, shape, requests, 1000.0)) > 0)
                reads = 8 * 1e6 * shape.key_bytes / gpu_spec(gpu).memory_bandwidth
                assert attention_seconds(parameters, shape, 8, 1e6) > 0.85 * reads  # no faster than the memory


def test_more_rows_and_more_experts_never_take_less_than_their_weights_do() -> None:
    sizes = {"hidden": 4096, "width": 1536, "matrices": 3}
    for gpu, kinds in facts()["experts"].items():
        for kind, entry in kinds.items():
            size = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}[kind]
            rows_RE = np.outer([1, 2, 15, 16, 17, 64, 500, 4000], np.ones(32, dtype=np.int64))
            spread_RE = np.tril(np.ones((32, 32), dtype=np.int64))
            for each_RE in (rows_RE, spread_RE):
                seconds_R = fused_experts_seconds(entry["parameters"], entry["block"], each_RE, size=size, **sizes)
                assert np.all(np.diff(seconds_R) > 0)
                weights_R = np.count_nonzero(each_RE, axis=1) * 3 * 4096 * 1536 * size
                assert np.all(seconds_R > 0.85 * weights_R / gpu_spec(gpu).memory_bandwidth)


def test_no_kernel_is_faster_than_its_gpu() -> None:
    """Every GPU of the catalogue, with kernels of its own or scaled: bandwidths and rates below the data sheet."""
    for name in gpu_names():
        gpu = gpu_spec(name)
        for kind in ("grouped/bf16", "grouped/fp8", "latent/bf16", "latent/fp8"):
            peak = gpu.peak_flops["fp8" if "fp8" in kind and "fp8" in gpu.peak_flops else "bf16"]
            floor, *_, bandwidth, rate = attention_of(gpu, stack="engines", kind=kind).parameters
            assert 1e-6 < floor < 5e-5 and bandwidth <= gpu.memory_bandwidth and rate <= peak
        for kind in ("bf16", "fp8", "int4"):
            peak = gpu.peak_flops["fp8" if kind == "fp8" and "fp8" in gpu.peak_flops else "bf16"]
            rates = {2: "memory", 3: "memory", 4: "peak"}
            *_, rows, weights, rate = fitted_of("experts", gpu, kind, "bf16", rates=rates).parameters
            assert max(rows, weights) <= gpu.memory_bandwidth and rate <= peak
            floor, bandwidth, rate = fitted_of("batched", gpu, kind, "bf16", rates={1: "memory", 2: "peak"}).parameters
            assert 1e-6 < floor < 5e-5 and bandwidth <= gpu.memory_bandwidth and rate <= peak


def test_every_software_can_be_named() -> None:
    named = Engine.model_json_schema()["properties"]["software"]["enum"]
    assert list(serving_software()) == named or sorted(serving_software()) == sorted(named)
