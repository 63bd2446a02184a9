"""Every number has bounds, and what is beyond them is one line that comes at once."""

import tracemalloc
from itertools import chain

import pytest

from moesim.errors import LONGEST_LINE, ConflictError, InternalError, UserError, one_line
from moesim.planner.plan import Plan, plan_from_mapping
from moesim.scenario import json_schema, load_scenario_text

SMALL = """\
name: u
model:
  {layers: 3, hidden: 256, heads: 4, kv_heads: 4, head_dim: 64, dense_layers: 1, dense_intermediate: 512, experts: 16,
   top_k: 4, shared_experts: 1, expert_intermediate: 128, vocab: 1000}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 8}
parallelism: {data: 8, expert: 8}
workload: {sequence_length: 256, micro_batch: 1, global_batch: 16}
uncertainty: {samples: 2, bank: 2}
"""
SCHEMAS = {"scenario": json_schema(), "plan": Plan.model_json_schema()}


def sections(schema):
    return {"the file": schema, **schema["$defs"]}.items()


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_key_is_described(schema):
    keys = [(name, key, value) for name, section in sections(schema) for key, value in section["properties"].items()]
    assert len(keys) > 100
    assert not [(name, key) for name, key, value in keys if len(value.get("description", "").split()) < 2]


def numbers(schema):
    """Every schema of a number below `schema`, with the path to it."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield schema
        for key, child in schema.items():
            if key not in ("$defs", "default"):
                yield from numbers(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from numbers(child)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_number_has_bounds(schema):
    found = list(chain.from_iterable(
        ((name, key, number) for number in numbers(value))
        for name, section in sections(schema)
        for key, value in section["properties"].items()
    ))  # fmt: skip
    assert len(found) > 50
    unbounded = {
        (name, key)
        for name, key, number in found
        if not {"minimum", "exclusiveMinimum"} & number.keys() or not {"maximum", "exclusiveMaximum"} & number.keys()
    }
    assert unbounded == {("the file", "seed"), ("PopularityRouting", "counts")}


BEYOND = {
    "cluster.nodes=1000000000": "must be at most 65,536, got 1000000000",
    "cluster.nodes=20000": "160,000 GPUs; at most 65,536 are simulated: name fewer nodes",
    "model.layers=1000000": "must be at most 1,000, got 1000000",
    "uncertainty.samples=1000000000": "must be at most 1,000, got 1000000000",
    "workload.global_batch=8000000000": "must be at most 1,048,576, got 8000000000",
    "model.mtp_layers=1000000": "must be at most 64, got 1000000",
    "model.experts=100000000": "must be at most 32,767, got 100000000",
    "model.experts=40000": "must be at most 32,767, got 40000",
    "capacity={kind: device, factor: 1e300}": "must be at most 100000, got 1e+300",
    "capacity={kind: expert, factor: 1e300, pad: true}": "must be at most 100000, got 1e+300",
    "capacity={kind: expert, factor: 1e-9}": "must be at least 0.001, got 1e-09",
    "cluster.price_per_gpu_hour=1e308": "must be at most 1e+06, got 1e+308",
    "routing={kind: popularity, counts: [1e308, 1]}": "must be 0 (never chosen), or between 1e-12 and 1e+12",
    "cluster.fabric.nic_efficiency=0": "must be at least 0.001, got 0",
    "cluster.fabric.nvlink_efficiency=1.5": "must be at most 1, got 1.5",
    "cluster.fabric.nic=1e-320 B/s": "must be between 1 kB/s and 1000 PB/s, got ",
    "cluster.fabric.nic_latency=1e9 s": "must be between 0 s and 1 s, got 1e+09 s",
    "cluster.fabric.degraded=[{node: 0, factor: 1e-300}]": "must be 0 (failed), or between 0.001 and 1, got 1e-300",
    "memory.reserved=1e300 B": "must be between 0 B and 1 PB, got 1e+300 B",
}


@pytest.mark.parametrize(("override", "message"), BEYOND.items(), ids=BEYOND)
def test_a_number_beyond_its_bounds_is_one_line(override, message):
    with pytest.raises(UserError) as error:
        load_scenario_text(SMALL, overrides=[override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.layers=900", "workload.global_batch=1000000"], "workload.global_batch"),
        (["uncertainty.samples=1000", "workload.global_batch=100000"], "uncertainty.samples"),
        (["workload.sequence_length=16777216", "workload.micro_batch=1"], "workload.micro_batch"),
        (["workload.sequence_length=1", "model.experts=32760"], "model.experts"),
        (["cluster.nodes=256", "parallelism={data: 2048, expert: 2048}", "model.experts=2048", "network.model=exact",
          "workload.global_batch=2048"], "parallelism.expert"),
        (["routing={kind: train, router: {kind: topk_softmax}, thin: {hidden: 16384, expert_intermediate: 16384}}"],
         "routing.thin.hidden"),
    ],
)  # fmt: skip
def test_numbers_that_are_too_much_together_are_refused_at_once(overrides, key):
    tracemalloc.start()
    try:
        with pytest.raises(ConflictError, match=rf"{key}: [0-9,]+ .*; at most [0-9,]+ are simulated: "):
            load_scenario_text(SMALL, overrides=overrides)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_a_plan_is_bounded_like_a_scenario():
    plan = {"name": "p", "model": {"preset": "llama2-7b"}, "goal": {"tokens": 1e300, "gpus": []}, "workload": {}}
    with pytest.raises(UserError, match=r"^plan: goal.tokens: must be at most 1e\+18, got 1e\+300$"):
        plan_from_mapping(plan)


def test_a_long_message_keeps_its_ends():
    error = UserError("a.yaml:1:1: name: " + LONGEST_LINE * "x" + "; use a short one")
    assert len(str(error)) == LONGEST_LINE
    assert str(error).startswith("a.yaml:1:1: name: xxx")
    assert str(error).endswith("xxx; use a short one")


def test_a_message_stays_one_line():
    assert str(UserError("a\nb\x00\u202ec")) == r"a\nb\x00\u202ec"
    assert one_line("ä 漢") == "ä 漢"


def test_a_mistake_of_the_program_asks_for_a_report():
    assert str(InternalError("x: y")) == (
        "x: y. This is a mistake of moesim, no result is written; please report it with the scenario"
    )
    assert str(InternalError(str(InternalError("x: y")))) == str(InternalError("x: y"))
