"""Flags of torchtitan: every key is one of its configs', and the split of layers is its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.flags.to_torchtitan import split, torchtitan_command, weights_of_ends
from moesim.scenario import load_scenario, load_scenario_text
from moesim.scenario.stages import stage_lengths
from moesim.shipped import folder, names

# The keys of ParallelismConfig and TrainingConfig of torchtitan 0.3.0 (PyPI) that layouts have a say in.
KEYS = {
    "--module", "--config", "--training.local_batch_size", "--training.global_batch_size", "--training.seq_len",
    "--training.max_norm", "--training.steps", "--training.dtype", "--training.disable_cuda_graphs",
    *(f"--parallelism.{key}" for key in (
        "data_parallel_replicate_degree", "data_parallel_shard_degree", "fsdp_reshard_after_forward",
        "tensor_parallel_degree", "context_parallel_degree", "expert_parallel_degree", "pipeline_parallel_degree",
        "pipeline_parallel_schedule", "pipeline_parallel_microbatch_size", "pipeline_parallel_first_stage_less_layers",
        "pipeline_parallel_last_stage_less_layers", "pipeline_parallel_layers_per_stage")),
    *(f"activation-checkpoint:{policy}" for policy in ("full", "none", "selective")),
}  # fmt: skip


def flags(name: str) -> dict[str, str]:
    command = torchtitan_command(load_scenario(folder() / f"{name}.yaml"))
    return {flag[0]: flag[1] if len(flag) > 1 else "" for flag in command.flags}


@pytest.mark.parametrize("name", names("scenario"))
def test_the_flags_multiply_to_the_ranks_and_the_batch(name: str) -> None:
    scenario, said = load_scenario(folder() / f"{name}.yaml"), flags(name)
    assert set(said) <= KEYS
    degrees = [int(value) for key, value in said.items() if key.endswith("_degree") and "expert" not in key]
    product = 1
    for degree in degrees:
        product *= degree
    assert product == scenario.parallelism.world_size
    borrowed = int(said["--parallelism.expert_parallel_degree"])
    region = [
        int(said[f"--parallelism.{key}_degree"])
        for key in ("data_parallel_shard", "context_parallel", "tensor_parallel")
    ]
    assert (region[0] * region[1] * region[2]) % borrowed == 0  # experts borrow ranks from shards, context and tensor
    at_once = int(said["--training.local_batch_size"]) * scenario.parallelism.data
    assert scenario.workload.global_batch % at_once == 0
    assert list(said)[-1].startswith("activation-checkpoint:")  # a word of its own must be the last one


@given(
    layers=st.integers(4, 70), stages=st.sampled_from([2, 3, 4, 8, 16]), first=st.integers(0, 3), last=st.integers(0, 3)
)
def test_a_split_holds_all_layers_and_its_weights_are_found_again(
    layers: int, stages: int, first: int, last: int
) -> None:
    if max(first, last) > (layers + first + last) // stages:
        return
    lengths = split(layers, stages, first=first, last=last)
    assert sum(lengths) == layers and len(lengths) == stages and min(lengths) >= 0
    middle = lengths[1:-1]
    assert not middle or max(middle) - min(middle) <= 1
    found = weights_of_ends(lengths)
    assert found is not None and split(layers, stages, first=found[0], last=found[1]) == lengths


# What torchtitan 0.3.0 puts on each stage (_generate_llm_fqn_per_model_part), by its own code.
@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "built"),
    [(61, 8, 1, 1, (7, 8, 8, 8, 8, 8, 8, 6)), (32, 4, 1, 1, (8, 9, 8, 7)), (48, 4, 0, 0, (12, 12, 12, 12))],
)
def test_stages_are_those_that_torchtitan_builds(
    layers: int, stages: int, first: int, last: int, built: object
) -> None:
    assert split(layers, stages, first=first, last=last) == built


@pytest.mark.parametrize("name", names("scenario"))
def test_stages_come_out_as_simulated_or_are_listed(name: str) -> None:
    scenario = load_scenario(folder() / f"{name}.yaml")
    if scenario.parallelism.pipeline == 1:
        return
    command, said, lengths = torchtitan_command(scenario), flags(name), stage_lengths(scenario)
    ends = [int(said[f"--parallelism.pipeline_parallel_{end}_stage_less_layers"]) for end in ("first", "last")]
    built = split(sum(lengths), len(lengths), first=ends[0], last=ends[1])
    assert built == lengths or "parallelism.stages" in {entry.key for entry in command.unsaid}


def test_a_dense_model_has_no_router_to_leave_out() -> None:
    text = (
        "name: a\nmodel: {preset: deepseek-7b}\ncluster: {gpu: h100, nodes: 1}\nparallelism: {data: 8}\n"
        "workload: {sequence_length: 4096, global_batch: 8}"
    )
    assert "routing" not in {entry.key for entry in torchtitan_command(load_scenario_text(text)).unsaid}


def test_what_runs_beside_what_in_megatron_alone_is_listed() -> None:
    text = (
        "name: a\nmodel: {preset: deepseek-moe-16b}\nrouting: {kind: uniform}\ncluster: {gpu: h100, nodes: 1}\n"
        "parallelism: {data: 8, expert: 8, zero: {dense: 1, expert: 1}, schedule: {kind: combined_1f1b}}\n"
        "workload: {sequence_length: 4096, global_batch: 16}\noverlap: {parameter_gather: true, weight_gradients: true}"
    )
    unsaid = {entry.key for entry in torchtitan_command(load_scenario_text(text)).unsaid}
    assert unsaid >= {"overlap.parameter_gather", "overlap.weight_gradients", "parallelism.schedule"}
