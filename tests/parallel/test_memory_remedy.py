"""What does not fit is refused with its cause and with a change that really makes it fit."""

import re

import numpy as np
import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.parallel import TrafficSampler
from moesim.parallel.memory.remedy import check_memory, layout_changes, more_gpus, nearest_change, training_changes
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows, no_rows, routed_rows
from moesim.scenario import dump_scenario, load_scenario_text
from moesim.trace.synthetic import uniform_trace

pytestmark = pytest.mark.usefixtures("few_tokens")

ONE_NODE = """\
name: s
model: {preset: deepseek-moe-16b}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 1}
parallelism: {data: 8, expert: 8}
workload: {sequence_length: 4096, global_batch: 64}
memory: {reserved: 1 GB, allocator_overhead: 0.0}
"""
TIGHT = ("cluster.gpu=h100", "workload.global_batch=512")  # on 80 GB less fits
PADDED = (*TIGHT, "capacity={kind: expert, factor: 16384, pad: true}", "parallelism.zero={dense: 1, expert: 1}")


def load(*overrides):
    return load_scenario_text(ONE_NODE, overrides=overrides)


def drawn_rows(scenario):
    """The rows of one sample of uniform routing, dropped and padded as the scenario says."""
    if not scenario.model.experts:
        return even_rows(scenario)
    length = scenario.workload.sequence_length
    trace = uniform_trace(scenario.router_shape(), num_layers=1, num_sequences=16, sequence_length=length, seed=1)
    return routed_rows(scenario, [TrafficSampler(scenario, trace).draw(np.random.default_rng(0))])


def test_what_fits_is_reported_and_what_does_not_is_refused_with_a_change_that_fits():
    assert check_memory(load(), even_rows).fits_share == 1.0
    large = load("workload.micro_batch=8")
    with pytest.raises(InfeasibleError) as error:
        check_memory(large, even_rows)
    message = str(error.value)
    assert error.value.exit_code == 2
    assert message.startswith("workload.micro_batch: pipeline rank 0 needs at least ")
    assert "largest part is activations.experts" in message
    assert "set workload.micro_batch: 4, which needs" in message
    assert "\n" not in message
    smaller = load("workload.micro_batch=4")
    assert memory_report(smaller, even_rows(smaller)).fits_share == 1.0


@pytest.mark.parametrize(
    ("overrides", "first_key"),
    [
        (("cluster.gpu=h100", "cluster.nodes=2", "parallelism.data=16", "parallelism.expert=1"), "parallelism"),
        (("cluster.gpu=h100", "workload.sequence_length=32768"), "workload.recompute"),
        (("cluster.gpu=h100", "workload.micro_batch=8", "parallelism.expert=2"), "workload.micro_batch"),
        (
            (
                "model.preset=llama2-7b",
                "parallelism={data: 8, zero: {dense: 3, expert: 3}}",
                "workload.sequence_length=524288",
                "workload.recompute=full",
            ),
            "parallelism.tensor",
        ),
        # One key alone, wherever it is:
        (PADDED, "capacity.pad"),
        ((*TIGHT, "parallelism={data: 2, expert: 2, pipeline: 4, schedule: {kind: gpipe}}"), "parallelism.schedule"),
        (
            (
                "dispatch.deduplicate=per_expert",
                "model.top_k=32",
                "workload.recompute=full",
                "parallelism={data: 8, expert: 8, zero: {dense: 3, expert: 3}}",
                "memory.reserved=120.5 GB",
            ),
            "dispatch.deduplicate",
        ),
        (
            (
                "parallelism={data: 1, pipeline: 2, stages: [4, 24]}",
                "cluster.gpus_per_node=2",
                "workload={sequence_length: 4096, global_batch: 4, recompute: full}",
                "memory.reserved=4 GB",
            ),
            "parallelism.stages",
        ),
        (
            (
                "cluster.gpus_per_node=1",
                "parallelism={data: 1, expert: 1}",
                "workload={sequence_length: 4096, global_batch: 8, recompute: full}",
                "model.layers=24",
            ),
            "workload.precision.optimizer",
        ),
        (
            (
                "cluster.gpus_per_node=1",
                "parallelism={data: 1, expert: 1}",
                "workload={sequence_length: 4096, global_batch: 8, recompute: full, precision: {optimizer: bf16}}",
                "cluster.gpu=h100",
            ),
            "cluster.pools.0.nodes",
        ),
    ],
)
def test_every_suggestion_really_fits(overrides, first_key):
    scenario = load(*overrides)
    assert memory_report(scenario, drawn_rows(scenario)).fits_share == 0.0
    found = nearest_change(scenario, drawn_rows)
    assert found is not None
    change, promised = found
    assert change.overrides[0].startswith(first_key), change
    changed = load(*overrides, *change.overrides)
    again = memory_report(changed, drawn_rows(changed))
    assert again.fits_share == 1.0
    assert again.peak_bytes == promised.peak_bytes


def test_padding_is_named_as_the_cause():
    scenario = load(*PADDED)
    with pytest.raises(InfeasibleError) as error:
        check_memory(scenario, drawn_rows)
    message = str(error.value)
    assert message.startswith("capacity.pad: pipeline rank 0 needs at least ")
    # An expert takes all tokens of a rank, of which 6 in 64 are its own: 90.6 % of the rows are empty.
    assert re.search(r"and 91% of the rows are padding; set capacity\.pad: false, which needs", message)


def test_a_smaller_factor_is_tried_after_what_leaves_the_training_alone():
    scenario = load("capacity={kind: device, factor: 2.0}", "workload.precision.optimizer=fp32")
    assert not {change.keys for change in layout_changes(scenario)} & {
        change.keys for change in training_changes(scenario)
    }
    factors = [change.overrides for change in training_changes(scenario) if "capacity.factor" in change.keys]
    assert factors == [("capacity.factor=1.5",), ("capacity.factor=1.25",), ("capacity.factor=1",)]


def test_every_change_is_one():
    scenario = load(*PADDED, "placement={kind: round_robin}", "dispatch.deduplicate=per_expert")
    text = dump_scenario(scenario)
    for change in (*layout_changes(scenario), *training_changes(scenario), *more_gpus(scenario)):
        try:
            changed = load_scenario_text(text, overrides=change.overrides)
        except UserError:
            continue  # some meshes do not divide the model: the search skips them
        assert changed != scenario, change


def test_without_rows_memory_is_least():
    scenario = load()
    least, even = memory_report(scenario, no_rows(scenario)), memory_report(scenario, even_rows(scenario))
    assert least.held_P.max() < least.peak_bytes < even.peak_bytes


def test_a_model_that_no_change_fits_is_told_so():
    with pytest.raises(InfeasibleError, match=r"no one or two changes make it fit, nor does any layout on"):
        check_memory(load("model.preset=deepseek-v3"), even_rows)


def test_what_does_not_fit_is_simulated_where_the_scenario_says_so():
    large = load("workload.micro_batch=8", "memory.check=warn")
    assert check_memory(large, even_rows).fits_share == 0.0
