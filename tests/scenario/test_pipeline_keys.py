"""The keys of pipeline schedules, uneven stages, recomputation, clipping, overlap and memory."""

import pytest

from moesim.errors import UserError
from moesim.scenario import dump_scenario, load_scenario_text, require_supported
from moesim.scenario.check import nearest_divisors

TEXT = """\
name: s
model: {preset: deepseek-v2-lite}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 4}
parallelism: {data: 8, pipeline: 4, expert: 8}
workload: {sequence_length: 4096, global_batch: 64}
"""


def load(*overrides):
    return load_scenario_text(TEXT, overrides=overrides)


def test_defaults_are_plain_one_forward_one_backward():
    scenario = load()
    assert (scenario.parallelism.schedule.kind, scenario.parallelism.schedule.virtual) == ("1f1b", 1)
    assert scenario.workload.recompute == "none"
    assert scenario.workload.gradient_clipping is None
    by_software = dict.fromkeys(("shared_experts", "micro_batches", "gradient_reduction"))
    assert scenario.overlap.model_dump() == by_software | {"parameter_gather": False, "weight_gradients": False}
    assert 0 < scenario.memory.allocator_overhead < 1


def test_layers_are_spread_over_all_stages():
    assert [layer for layers in load().stage_layers for layer in layers] == list(range(27))


def test_stages_can_be_given():
    scenario = load("parallelism.stages=[0, 10, 10, 7]")
    assert scenario.stage_layers == (range(0), range(10), range(10, 20), range(20, 27))
    virtual = load("parallelism.schedule={kind: interleaved, virtual: 2}")
    assert len(virtual.stage_layers) == 8
    assert min(len(layers) for layers in virtual.stage_layers) >= 2


@pytest.mark.parametrize(
    ("recompute", "parts"),
    [
        ("none", set()),
        ("full", set()),
        ("selective", {"rms_norm", "swiglu", "mla_up_projection"}),
        ("[rms_norm, mla_up_projection]", {"rms_norm", "mla_up_projection"}),
    ],
)
def test_recomputation_by_word_or_by_list(recompute, parts):
    scenario = load(f"workload.recompute={recompute}")
    assert scenario.workload.recomputed_parts == parts
    assert load_scenario_text(dump_scenario(scenario)) == scenario


def test_everything_round_trips():
    scenario = load(
        "parallelism.schedule.kind=dualpipe",
        "parallelism.stages=[6, 7, 7, 7]",
        "workload.recompute=[swiglu]",
        "workload.gradient_clipping=1.0",
        "overlap={shared_experts: true, micro_batches: false, gradient_reduction: true}",
        "memory={reserved: 3 GiB, allocator_overhead: 0.1}",
    )
    assert scenario.memory.reserved == 3 * 2**30
    assert load_scenario_text(dump_scenario(scenario)) == scenario


MISTAKES = {
    "parallelism.schedule.kind=zb1p": '"zb1p" is not allowed; did you mean',
    "parallelism.schedule.kind=interleaved": "virtual: interleaved needs at least 2 stages per rank",
    "parallelism.schedule.virtual=2": "1f1b has no virtual stages; use kind: interleaved",
    "parallelism.stages=[9, 9, 9]": "3 numbers of layers for pipeline = 4 stages; give one per stage",
    "parallelism.stages=[9, 9, 9, 9]": "36 layers in all stages together, but model.layers = 27; make them add up",
    "parallelism.stages=[]": "must not be empty",
    "parallelism.stages=[28, -1, 0, 0]": "parallelism.stages.1: must be at least 0, got -1",
    "workload.recompute=some": '"some" is not allowed; known: none, selective, full',
    "workload.recompute=[norms]": 'workload.recompute.0: "norms" is not allowed; did you mean "rms_norm"?',
    "workload.gradient_clipping=0": "must be at least 1e-09, got 0",
    "overlap.shared=true": 'unknown key; did you mean "shared_experts"?',
    "memory.reserved=3": "3 has no unit; write an amount of bytes",
    "memory.allocator_overhead=2": "must be at most 1, got 2",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=list(MISTAKES))
def test_a_mistake_is_named(override, message):
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value)
    assert error.value.exit_code == 1


def test_interleaving_needs_rounds_of_micro_batches():
    schedule = "parallelism.schedule={kind: interleaved, virtual: 2}"
    with pytest.raises(UserError, match="rounds of pipeline = 4, got 6; use 32 or 64"):
        load(schedule, "workload.global_batch=48")
    assert load(schedule, "workload.global_batch=32").num_micro_batches == 4


def test_dualpipe_needs_enough_micro_batches_and_an_even_number_of_ranks():
    kind = "parallelism.schedule.kind=dualpipe"
    with pytest.raises(UserError, match=r"at least 2 \* pipeline = 8, got 6; use 64"):
        load(kind, "workload.global_batch=48")
    with pytest.raises(UserError, match=r"at least 2 \* pipeline = 8, got 9; use 80"):
        load(kind, "workload.global_batch=72")
    with pytest.raises(UserError, match="dualpipe needs an even number of ranks, got 3"):
        load(kind, "parallelism.pipeline=3")


def test_only_parts_that_the_model_has_are_computed_again():
    with pytest.raises(UserError, match=r"recompute\.1: mla_up_projection is a part of latent attention.*drop it"):
        load("model={preset: deepseek-moe-16b}", "workload.recompute=[rms_norm, mla_up_projection]")
    for model, part in (("llama2-7b", "moe"), ("mixtral-8x7b", "shared_experts"), ("mixtral-8x7b", "dense_ffn")):
        with pytest.raises(UserError, match=rf"recompute\.0: the model has no {part}: .* is 0; drop it"):
            load(f"model={{preset: {model}}}", "parallelism.expert=1", f"workload.recompute=[{part}]")
    assert load("model={preset: deepseek-moe-16b}", "workload.recompute=selective").workload.recompute == "selective"


@pytest.mark.parametrize(
    ("override", "software"),
    [
        ("workload.recompute=selective", "torch_eager"),
        ("overlap.shared_experts=true", "torch_eager"),
    ],
)
def test_what_the_simulation_cannot_run_is_refused_by_name(override, software):
    common = ("cluster.nodes=8", f"implementation.kind={software}")
    require_supported(load(*common))
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        require_supported(load(*common, override))


@pytest.mark.parametrize("size", [3, 65_521])
def test_a_remedy_for_the_longest_sequence_comes_at_once(size):
    with pytest.raises(UserError, match=r"does not divide workload\.sequence_length"):
        load(f"workload.sequence_length={2**24}", f"parallelism.context={size}")


def test_divisors_near_a_target():
    assert nearest_divisors(64, 24) == [16, 32]
    assert nearest_divisors(64, 24, multiple_of=32) == [32]
    assert nearest_divisors(64, 100) == [64]
    assert nearest_divisors(2 * (10**12 + 39), 10**9) == [1, 2 * (10**12 + 39)]


@pytest.mark.parametrize("part", ["dense", "expert"])
def test_dualpipe_cannot_shard_layer_by_layer(part):
    dualpipe = ("parallelism.schedule.kind=dualpipe", "workload.global_batch=128")
    require_supported(load(*dualpipe, f"parallelism.zero.{part}=1"))
    with pytest.raises(
        UserError, match=rf"zero\.{part}: 2 shards layer by layer, but dualpipe .*; use 0 or 1, or zb_h1"
    ):
        require_supported(load(*dualpipe, f"parallelism.zero.{part}=2"))
