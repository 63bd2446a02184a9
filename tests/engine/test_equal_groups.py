"""Groups that do the same at the same times are simulated once: nothing in the outcome changes, not by a bit."""

from dataclasses import fields

import numpy as np
import pytest

from moesim.engine.samples import _simulate_program
from moesim.kernels import kernel_model
from moesim.program import build_program
from moesim.program.drawn_routing import draw_samples, obtain_trace
from moesim.program.scenario_fabric import scenario_fabric
from moesim.results.outcome import Outcome
from moesim.scenario import load_scenario_text

pytestmark = pytest.mark.usefixtures("few_tokens")

HEAD = """schema_version: 1
name: equal
cluster: {{gpu: h100, nodes: {nodes}, gpus_per_node: 4{fabric}}}
uncertainty: {{samples: 1}}
"""
DENSE = """
model: {layers: 2, dense_layers: 2, hidden: 1024, heads: 8, kv_heads: 8, head_dim: 128, experts: 0,
  dense_intermediate: 2816, vocab: 32000, attention: {kind: gqa}}
parallelism: {data: 4, tensor: 2, pipeline: 2, zero: {dense: 1}}
workload: {sequence_length: 1024, micro_batch: 1, global_batch: 16, gradient_clipping: 1.0}
"""
MOE = """
model: {preset: deepseek-moe-16b, layers: 3}
routing: {kind: uniform}
parallelism: {data: 8, expert: 4, pipeline: 2}
workload: {sequence_length: 1024, micro_batch: 1, global_batch: 16}
"""


def outcomes(text: str) -> tuple[list[Outcome], list[int]]:
    """With every group for itself, and with equal groups; and how many groups each has."""
    scenario = load_scenario_text(text, source="f.yaml")
    trace = obtain_trace(scenario)
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    samples = draw_samples(scenario, trace)[0] if trace else []
    fabric = scenario_fabric(scenario, kernels)
    programs = [
        build_program(scenario, fabric=fabric, kernels=kernels, samples=samples, equal_groups=equal_groups)
        for equal_groups in (False, True)
    ]  # fmt: skip
    return [_simulate_program(program, first=True) for program in programs], [len(p.groups) for p in programs]


def assert_equal(first: Outcome, second: Outcome) -> None:
    for field in fields(Outcome):
        values = getattr(first, field.name), getattr(second, field.name)
        if isinstance(values[0], np.ndarray):
            np.testing.assert_array_equal(*values, err_msg=field.name)
        elif field.name not in ("spans", "waits"):  # of equal groups one stands for all in both
            assert values[0] == values[1], field.name
    for one, other in zip(first.spans, second.spans, strict=True):
        np.testing.assert_array_equal(one.finish_NSR, other.finish_NSR)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (HEAD.format(nodes=4, fabric="") + DENSE, [8, 2]),
        # A slow NIC of the third node leaves the groups on it a class of their own.
        (HEAD.format(nodes=4, fabric=", fabric: {degraded: [{node: 1, factor: 0.5}]}") + DENSE, None),
        (HEAD.format(nodes=4, fabric="") + MOE, None),
    ],
    ids=["dense", "degraded", "moe"],
)
def test_equal_groups_change_nothing(text: str, groups: list[int] | None) -> None:
    (whole, folded), counts = outcomes(text)
    assert_equal(whole, folded)
    assert groups is None or counts == groups
    assert counts[1] <= counts[0]


def test_groups_that_share_links_are_simulated_one_by_one() -> None:
    fabric = ", fabric: {preset: leaf_spine, pod_nodes: 1, oversubscription: 4.0}"
    _, counts = outcomes(HEAD.format(nodes=4, fabric=fabric) + DENSE)
    assert counts[0] == counts[1]
