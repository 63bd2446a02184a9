"""Law: whatever `megatron_command` does not list as unsaid is the same in the scenario read from its command."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.flags.flag_table import READ
from moesim.flags.megatron import megatron_command, read_megatron
from moesim.flags.unread_flags import LEFT_OUT, harmless
from moesim.scenario import Mla, Scenario, load_scenario, load_scenario_text, model_names
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import parameters
from moesim.scenario.stages import stage_lengths
from moesim.shipped import folder, names

HARMLESS_SAID = {"--normalization", "--position-embedding-type", "--max-position-embeddings", "--ckpt-format"}


def layout(scenario: Scenario) -> dict[str, Any]:
    """What a step is laid out by, in one form: every key that flags can say, with what absent keys mean."""
    model, mesh, work, shape = scenario.model, scenario.parallelism, scenario.workload, scenario.router_shape()
    hidden = {"preset", "source", "left_out", "routing", "router_groups", "router_group_limit", "shared_experts",
              "shared_intermediate", "attention"}  # fmt: skip
    found = {f"model.{key}": value for key, value in model.model_dump(exclude=hidden).items()}
    local = found.pop("model.local") or {}
    found |= {f"model.local.{key}": local.get(key) for key in ("window", "layers", "chunked")}
    attention = model.attention.model_dump()
    if isinstance(model.attention, Mla):
        attention["value_head_dim"] = model.attention.value_head_dim or model.head_dim
    found |= {f"model.attention.{key}": value for key, value in attention.items()}
    found |= {"model.shared_width": model.shared_width, "groups": (shape.num_groups, shape.group_limit)}
    found |= {f"parallelism.{key}": value for key, value in mesh.model_dump(exclude={"stages", "schedule"}).items()}
    found |= {"parallelism.schedule": mesh.schedule.model_dump(), "parallelism.stages": stage_lengths(scenario)}
    found |= {f"workload.precision.{key}": value for key, value in work.precision.model_dump().items()}
    found["workload.precision.recipe"] = work.precision.scaling  # what an absent one means
    latent = isinstance(model.attention, Mla)
    parts = {part for part in work.recomputed_parts if latent or part != "mla_up_projection"}
    found |= {"workload.recompute": "full" if work.recompute == "full" else parts}
    found |= {f"workload.{key}": getattr(work, key) for key in ("sequence_length", "micro_batch", "global_batch")}
    found["workload.gradient_clipping"] = work.gradient_clipping
    found["workload.train_tokens"] = (
        None if work.train_tokens is None else round(work.train_tokens / work.sequence_length)
    )
    found |= {"capacity": scenario.capacity.model_dump(), "placement": scenario.placement.model_dump()}
    if mesh.expert > 1:
        found |= {f"dispatch.{key}": value for key, value in scenario.dispatch.model_dump().items()}
        sms = scenario.cluster.pools[0].spec.sm_count  # of which whole ones are said
        share = scenario.dispatch.sm_share
        found["dispatch.sm_share"] = None if share is None else round(share * sms)
        if model.shared_width:
            found["overlap.shared_experts"] = scenario.shared_beside
    reduced, beside = scenario.overlap.gradient_reduction, scenario.reduces_beside or mesh.zero.dense > 1
    found["overlap.gradient_reduction"] = beside if reduced is None else reduced
    found["overlap.parameter_gather"] = scenario.gathers_beside
    found["overlap.weight_gradients"] = scenario.overlap.weight_gradients
    switches = vars(scenario.implementation.switches)
    found |= {f"implementation.{name}": value for name, value in switches.items()}
    found["implementation.kind"] = scenario.implementation.kind
    if not model.experts:
        del found["implementation.router_dtype"]
    if mesh.tensor == 1:
        del found["implementation.sequence_parallel"]
    return found


def read_back(scenario: Scenario, place: Path) -> Scenario:
    place.write_text(megatron_command(scenario).text)
    gpu = scenario.cluster.pools[0].gpu_name
    return read_megatron(place, gpu=gpu).scenario


def differences(one: Scenario, other: Scenario) -> Iterator[str]:
    first, second = layout(one), layout(other)
    assert first.keys() == second.keys()
    return (key for key in first if first[key] != second[key])


def unexplained(scenario: Scenario, other: Scenario) -> list[str]:
    """Keys that differ and that the command does not list as unsaid, itself or the section around it."""
    unsaid = {entry.key for entry in megatron_command(scenario).unsaid}
    return [key for key in differences(scenario, other) if not any(key == u or key.startswith(f"{u}.") for u in unsaid)]


@pytest.mark.parametrize("name", names("scenario"))
def test_shipped_scenarios_come_back_from_their_flags(name: str, tmp_path: Path) -> None:
    scenario = load_scenario(folder() / f"{name}.yaml")
    other = read_back(scenario, tmp_path / "run.sh")
    assert unexplained(scenario, other) == []
    assert other.cluster.num_gpus == scenario.parallelism.world_size
    again = read_back(other, tmp_path / "again.sh")
    assert list(differences(other, again)) == []  # what Megatron-LM can say, it says exactly


@pytest.mark.parametrize("name", names("scenario"))
def test_no_unsaid_key_is_the_same_after_all(name: str, tmp_path: Path) -> None:
    """A key that is listed as unsaid really is different, or stands for what no layout has (routing, software)."""
    scenario = load_scenario(folder() / f"{name}.yaml")
    different = set(differences(scenario, read_back(scenario, tmp_path / "run.sh")))
    for entry in megatron_command(scenario).unsaid:
        if not entry.key.startswith(("routing", "implementation", "cluster.pools")):
            assert any(key == entry.key or key.startswith(f"{entry.key}.") for key in different), entry


@pytest.mark.parametrize("name", names("scenario"))
def test_every_flag_that_is_written_is_read(name: str) -> None:
    for flag in megatron_command(load_scenario(folder() / f"{name}.yaml")).flags:
        assert flag[0] in READ or (flag[0] in HARMLESS_SAID and harmless(flag[0])), flag
        assert flag[0] not in LEFT_OUT


OTHERS = {
    "layers in turn and a window": "model: {layers: 8, hidden: 512, heads: 8, kv_heads: 2, head_dim: 64, "
    "attention: {kind: gqa}, vocab: 1000, experts: 8, top_k: 2, expert_intermediate: 256, dense_at: [0, 2, 5], "
    "dense_intermediate: 1024, local: {window: 128, layers: [1, 3]}, shared_experts: 1, shared_intermediate: 300, "
    "shared_gate: true, tied_embeddings: true, attention_bias: qkv, attention_sinks: true, mtp_layers: 2, "
    "expert_hidden: 128, gated: false}",
    "a dense model with biases": "model: {layers: 8, hidden: 512, heads: 8, kv_heads: 8, head_dim: 64, vocab: 1001, "
    "dense_intermediate: 1024, attention_bias: all}",
    "a window in all layers": "model: {layers: 8, hidden: 512, heads: 8, kv_heads: 2, head_dim: 64, vocab: 1024, "
    "attention: {kind: local_global, window: 64, global_every: null}, dense_intermediate: 1024}",
    "chunks and global tokens": "model: {layers: 8, hidden: 512, heads: 8, kv_heads: 8, head_dim: 64, vocab: 1024, "
    "local: {window: 64, chunked: true, layers: [1]}, dense_intermediate: 1024, expert_bias: false}",
    "latent attention": "model: {preset: deepseek-v2-lite, attention: {value_head_dim: 64}}",
}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("pipeline", ["{data: 8}", "{data: 2, pipeline: 4}", "{data: 2, tensor: 2, pipeline: 2}"])
def test_other_models_come_back(model: str, pipeline: str, tmp_path: Path) -> None:
    routing = "" if "top_k" not in model and "preset" not in model else "routing: {kind: uniform}\n"
    text = (
        f"name: a\n{model}\n{routing}cluster: {{gpu: h100, nodes: 1}}\nparallelism: {pipeline}\n"
        "workload: {sequence_length: 1024, global_batch: 16, precision: {master: fp32, gradients: fp32}}"
    )
    scenario = load_scenario_text(text)
    assert unexplained(scenario, read_back(scenario, tmp_path / "run.sh")) == []


@pytest.mark.parametrize(
    "software",
    [
        "{kind: megatron, expert_gemms: each, permute: fused, gather_backward: fused, combine: fused}",
        "{kind: megatron, attention: unfused, router: fused, activation: unfused}",
        "{kind: megatron_local, permute: fused, gather_backward: fused, combine: fused, activation: unfused}",
        "{kind: megatron_local, expert_gemms: grouped, attention: fused, norm: fused}",
    ],
)
def test_kernels_of_megatron_come_back(software: str, tmp_path: Path) -> None:
    scenario = load_scenario(folder() / "mixtral-8x22b-128xh100.yaml", [f"implementation={software}"])
    assert unexplained(scenario, read_back(scenario, tmp_path / "run.sh")) == []


formats = st.sampled_from(["fp32", "bf16", "fp16", "fp8"])


@settings(max_examples=60)
@given(
    gemm=formats, weights=formats, gradients=formats, optimizer=formats, master=st.sampled_from(["none", "fp32"]),
    zero=st.integers(0, 3), expert_zero=st.integers(0, 3), tensor=st.sampled_from([1, 2]),
    schedule=st.sampled_from(["{kind: 1f1b}", "{kind: interleaved, virtual: 2}", "{kind: gpipe}", "{kind: zb_h1}",
                              "{kind: combined_1f1b, virtual: 2}"]),
    gather=st.booleans(), late=st.sampled_from(["true", "false"]),
    recompute=st.sampled_from(["none", "selective", "full", "[swiglu]", "[rms_norm, swiglu]"]),
    clip=st.sampled_from(["null", "1.0", "0.5"]), reduction=st.sampled_from(["null", "true", "false"]),
    shared=st.sampled_from(["null", "true", "false"]),
    dispatch=st.sampled_from(["{}", "{deduplicate: per_expert}", "{algorithm: low_latency, deduplicate: per_expert}",
                              "{algorithm: low_latency_nvlink, deduplicate: per_expert}",
                              "{algorithm: hierarchical, deduplicate: per_node, sm_share: 0.25}",
                              "{dtype: fp8, combine_dtype: fp8}"]),
    capacity=st.sampled_from(["{kind: none}", "{kind: expert, factor: 1.5}", "{kind: device, factor: 1.0}",
                              "{kind: expert, factor: 0.75, by: score, pad: true}"]),
)  # fmt: skip
def test_any_combination_comes_back_or_is_listed(tmp_path_factory: pytest.TempPathFactory, **chosen: Any) -> None:
    text = """
name: a
model: {{layers: 12, hidden: 1024, heads: 8, kv_heads: 8, head_dim: 128, experts: 8, top_k: 2, vocab: 1024,
         expert_intermediate: 256, shared_experts: 1}}
routing: {{kind: uniform}}
capacity: {capacity}
cluster: {{gpu: h100, nodes: 4}}
parallelism: {{data: 8, tensor: {tensor}, pipeline: 2, expert: 8, schedule: {schedule},
               zero: {{dense: {zero}, expert: {expert_zero}}}}}
workload: {{sequence_length: 1024, global_batch: 32, recompute: {recompute}, gradient_clipping: {clip},
  precision: {{gemm: {gemm}, weights: {weights}, gradients: {gradients}, optimizer: {optimizer}, master: {master}}}}}
dispatch: {dispatch}
overlap: {{gradient_reduction: {reduction}, shared_experts: {shared}, parameter_gather: {gather},
          weight_gradients: {late}}}
""".format(**chosen | {"gather": str(chosen["gather"] and max(chosen["zero"], chosen["expert_zero"]) == 1).lower()})
    scenario = load_scenario_text(text)
    assert unexplained(scenario, read_back(scenario, tmp_path_factory.mktemp("flags") / "run.sh")) == []


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_catalogue_comes_back(name: str, tmp_path: Path) -> None:
    model = model_preset(name)
    routing = "routing: {kind: uniform}\n" if model.get("experts") else ""
    text = (
        f"name: a\nmodel: {{preset: {name}}}\n{routing}cluster: {{gpu: h200, nodes: 1}}\n"
        "parallelism: {data: 4, pipeline: 2, zero: {dense: 1, expert: 1}}\n"
        "workload: {sequence_length: 8192, global_batch: 16, precision: {master: fp32, gradients: fp32}}"
    )
    scenario = load_scenario_text(text)
    other = read_back(scenario, tmp_path / "run.sh")
    assert unexplained(scenario, other) == []
    assert parameters(other.model).total == pytest.approx(parameters(scenario.model).total, rel=1e-3)


def test_both_ways_in_python(tmp_path: Path) -> None:
    scenario = moesim.load_scenario("mixtral-8x22b-tp-folding")
    told = moesim.command_line(scenario, "megatron")
    (tmp_path / "run.sh").write_text(told["command"])
    other = moesim.from_megatron(tmp_path / "run.sh", routing="uniform", overrides={"uncertainty.samples": 1})
    assert unexplained(scenario, other) == [] and other.uncertainty.samples == 1
    with pytest.raises(moesim.UserError, match="use one of megatron, torchtitan"):
        moesim.command_line(scenario, "nemo")
