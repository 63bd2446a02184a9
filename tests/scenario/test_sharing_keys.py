"""What ranks share must divide, and the layouts of attention and experts must fold into each other."""

import pytest

from moesim.errors import UserError
from moesim.scenario import load_scenario_text, require_supported

TEXT = """\
name: s
model: {preset: mixtral-8x22b}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 4}
parallelism: {data: 4, tensor: 4, context: 2, expert: 8}
workload: {sequence_length: 4096, global_batch: 64}
"""


def load(*overrides):
    return load_scenario_text(TEXT, overrides=overrides)


def test_shared_layouts_are_accepted():
    scenario = load()
    require_supported(scenario)
    assert scenario.tokens_per_rank == 512
    require_supported(load("parallelism={data: 4, tensor: 8, expert: 2, expert_tensor: 4}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallelism.tensor=5"], "parallelism.tensor: 5 does not divide model.heads = 48; use 4 or 6"),
        (["parallelism.tensor=16"], "parallelism.tensor: 16 does not divide model.kv_heads = 8; use 8"),
        (
            ["parallelism={data: 32, expert: 1, expert_tensor: 32}", "model.expert_intermediate=16400"],
            "parallelism.expert_tensor: 32 does not divide model.expert_intermediate = 16400; use 25",
        ),
        (
            ["parallelism.context=3"],
            "context: 3 does not divide workload.sequence_length = 4096; use 2 or 4",
        ),
        (["workload.sequence_length=4100"], r"parallelism.tensor: 4 ranks \* 4 chunks = 16 does not divide workload"),
        (
            ["workload.sequence_length=4098"],
            r"parallelism.context: 2 \* context = 4 does not divide workload.*4098; use 1",
        ),
        (
            ["parallelism={data: 4, tensor: 6, expert: 4}", "model.kv_heads=48", "workload.sequence_length=6144"],
            r"expert: expert \* expert_tensor = 4 and context \* tensor = 6 ranks do not fit into each other;",
        ),
        (["model.attention={kind: local_global}"], "parallelism.context: a ring of whole sequences has no windows"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(overrides, message):
    with pytest.raises(UserError, match=message):
        load(*overrides)


def test_shared_experts_and_dense_layers_are_shared_too():
    common = ["model.preset=deepseek-v2-lite", "parallelism={data: 4, tensor: 8, expert: 8}"]
    load(*common)
    with pytest.raises(UserError, match=r"tensor: 8 does not divide model\.shared_experts \* expert.* = 2820"):
        load(*common, "model.expert_intermediate=1410")
    with pytest.raises(UserError, match=r"parallelism\.tensor: 8 does not divide model\.dense_intermediate = 10948"):
        load(*common, "model.dense_intermediate=10948")


POOLS = (
    "cluster={{pools: [{{name: a, gpu: h200, nodes: 2}}, {{name: b, gpu: {gpu}, nodes: 2, gpus_per_node: {size}}}]}}"
)


@pytest.mark.parametrize("change", [{"gpu": "h200", "size": 16}, {"gpu": "a100", "size": 8}])
def test_pools_are_accepted_whether_or_not_all_have_ranks(change):
    ranks = 32 if change["gpu"] == "h200" else 16
    layout = f"parallelism={{data: {ranks // 8}, tensor: 4, context: 2, expert: 8}}"
    require_supported(load(POOLS.format(**change), layout))
