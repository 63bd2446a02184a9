"""Every mistake in a scenario: one line with the place, the key, what is wrong and the remedy, and the exit code."""

import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.scenario import load_scenario, load_scenario_text, scenario_from_mapping

GOOD = """\
name: s
model: {preset: deepseek-moe-16b}
routing:
  kind: train
  router: {kind: deepseek_v2, device_limit: 3}
  steps: 5
cluster:
  gpu: h200
  nodes: 1
  fabric: {nic: 400 Gbps}
parallelism: {data: 8, expert: 8}
workload: {sequence_length: 4096, global_batch: 64}
"""
DENSE = GOOD.replace("deepseek-moe-16b", "llama2-7b").replace(", expert: 8", "")
POPULARITY = "\nrouting: {kind: popularity, counts: "


def edited(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def without(section):
    lines, keep = [], True
    for line in GOOD.splitlines():
        if not line.startswith(" "):
            keep = not line.startswith(f"{section}:")
        if keep:
            lines.append(line)
    return "\n".join(lines)


MISTAKES = {
    # text of the file: the whole or the start of the line
    "[1, 2]": "f.yaml:1:1: expected a mapping of sections, got a list; write name: ..., model: ...",
    "hello": "f.yaml:1:1: expected a mapping of sections, got the value 'hello'",
    "name: s\nname: t\n": 'f.yaml:2:1: duplicate key "name"; it is already at f.yaml:1:1',
    edited("expert: 8", "expart: 8"): 'f.yaml:11:24: parallelism.expart: unknown key; did you mean "expert"?',
    edited("gpu:", "gpuu:"): 'f.yaml:8:3: cluster.gpuu: unknown key; did you mean "gpu"?',
    edited("preset:", "present:"): 'f.yaml:2:9: model.present: unknown key; did you mean "preset"?',
    edited(
        "gpu:", "nics_per_node: 4\n  gpu:"
    ): "f.yaml:8:3: cluster.nics_per_node: unknown key; did you mean cluster.fabric.nics_per_node?",
    edited("workload: {", "workload: {xyzzy: 1, "): "f.yaml:12:12: workload.xyzzy: unknown key; known: kind, ",
    edited("nic: 400 Gbps", "nic: 400"): "f.yaml:10:17: cluster.fabric.nic: 400 has no unit; write a bandwidth such as",
    edited("400 Gbps", "400 GB"): 'f.yaml:10:17: cluster.fabric.nic: "400 GB" is not a bandwidth; write it as 400 Gbps',
    edited("400 Gbps", "-1 Gbps"): 'f.yaml:10:17: cluster.fabric.nic: "-1 Gbps" is negative; write it as 400 Gbps',
    edited("400 Gbps", "0 Gbps"): "f.yaml:10:17: cluster.fabric.nic: must be between 1 kB/s and 1000 PB/s, got 0 B/s",
    edited("steps: 5", 'steps: "5"'): 'f.yaml:6:10: routing.steps: "5" is text; write the number without quotes',
    edited("steps: 5", "steps: 5e0"): "f.yaml:6:10: routing.steps: expected a whole number, got 5.0; write 5",
    edited("steps: 5", "steps: 5.5"): "f.yaml:6:10: routing.steps: expected a whole number, got 5.5",
    edited("steps: 5", "steps: true"): "f.yaml:6:10: routing.steps: expected a whole number, got true",
    edited("steps: 5", "steps: -5"): "f.yaml:6:10: routing.steps: must be greater than 0, got -5",
    edited("steps: 5", "steps: .nan"): "f.yaml:6:10: .nan is not a finite number",
    edited("steps: 5", "steps: [5]"): "f.yaml:6:10: routing.steps: expected a whole number, got a list",
    edited("nic: 400 Gbps", "pxn: yes"): 'f.yaml:10:17: cluster.fabric.pxn: expected true or false, got the text "yes"',
    edited("name: s", "name: 5"): "f.yaml:1:7: name: expected text, got 5",
    edited("name: s", "name: a/b"): 'f.yaml:1:7: name: "a/b" may hold only letters, digits and . _ -',
    edited("name: s", "name: s\nschema_version: 2"): "f.yaml:2:17: schema_version: must be at most 1, got 2",
    edited("kind: train", "kind: trian"): 'f.yaml:4:9: routing.kind: "trian" is unknown; did you mean "train"?',
    edited("  kind: train\n", ""): "f.yaml:4:3: routing.kind: missing; one of train, trace, popularity, uniform",
    edited("kind: deepseek_v2", "kind: top"): 'f.yaml:5:18: routing.router.kind: "top" is unknown; known: switch, ',
    edited("gpu: h200", "gpu: h20x"): 'f.yaml:8:8: cluster.gpu: unknown GPU "h20x"; known: a100, h100',
    edited("  nodes: 1\n", ""): "f.yaml:8:3: cluster.nodes: missing; this key is required",
    edited("  nodes: 1\n", "  nodes: 1\n  pools: []\n"): "f.yaml:8:3: cluster.gpu: conflicts with cluster.pools",
    edited("deepseek-moe-16b", "deepseek-16b"): 'f.yaml:2:17: model.preset: unknown model "deepseek-16b"; known: deep',
    edited("{preset: deepseek-moe-16b}", "{hf_config: no.json}"): "f.yaml:2:20: model.hf_config: cannot read ",
    edited(
        "{preset: deepseek-moe-16b}", "deepseek-moe-16b"
    ): 'f.yaml:2:8: model: expected a mapping, got "deepseek-moe',
    edited("{preset: deepseek-moe-16b}", "[1]"): (
        "f.yaml:2:8: model: expected a mapping, got a list; its keys are preset, layers, hidden, heads, "
    ),
    edited("{kind: deepseek_v2, device_limit: 3}", "hash"): (
        'f.yaml:5:11: routing.router: expected a mapping, got "hash"; write {kind: hash}'
    ),
    edited("{kind: deepseek_v2, device_limit: 3}", "mine"): (
        'f.yaml:5:11: routing.router: expected a mapping, got "mine"; write {kind: ...}, one of switch, '
    ),
    without("workload"): "f.yaml:1:1: workload: missing; this key is required",
    edited(
        "expert: 8", "expert: 24"
    ): "f.yaml:11:32: parallelism.expert: 24 does not divide experts = 64; use 16 or 32",
    edited(
        "expert: 8", "expert: 16"
    ): "f.yaml:11:32: parallelism.expert: groups of 16 ranks do not fit into the 8 ranks",
    edited("data: 8", "data: 16"): "f.yaml:11:14: parallelism: 16 ranks (data 16 * context 1 * tensor 1 * pipeline 1) ",
    edited(
        "batch: 64", "batch: 60"
    ): "f.yaml:12:49: workload.global_batch: 60 sequences do not split into data * micro",
    edited("batch: 64", "batch: 4"): "f.yaml:12:49: workload.global_batch: 4 sequences do not split",
    edited(
        "expert: 8", "expert: 8, tensor: 3"
    ): "f.yaml:11:43: parallelism.tensor: 3 does not divide model.heads = 16; use",
    edited("expert: 8", "expert: 8, pipeline: 29"): "f.yaml:11:45: parallelism.pipeline: 29 stages for 28 layers",
    edited("limit: 3", "limit: 9"): "f.yaml:5:45: routing.router.device_limit: 9 is more than parallelism.expert = 8",
    edited("device_limit: 3", "device_limit: 3, groups: 8"): "f.yaml:5:45: routing.router.device_limit: conflicts with",
    edited("device_limit: 3", "groups: 8"): "f.yaml:5:39: routing.router.groups: needs group_limit beside it",
    edited("device_limit: 3", "groups: 24, group_limit: 3"): "f.yaml:5:39: routing.router.groups: 24 does not divide",
    edited("device_limit: 3", "groups: 32, group_limit: 2"): (
        "f.yaml:5:56: routing.router.group_limit: 2 groups of 2 experts hold fewer than top_k = 6; use at least 3"
    ),
    edited("kind: deepseek_v2, device_limit: 3", "kind: deepseek_v3, groups: 64, group_limit: 8"): (
        "f.yaml:5:39: routing.router.groups: deepseek_v3 scores a group by its two best experts"
    ),
    edited("kind: deepseek_v2, device_limit: 3", "kind: switch"): (
        "f.yaml:5:18: routing.router.kind: switch selects 1 expert, but top_k = 6; set model.top_k: 1"
    ),
    edited("kind: deepseek_v2, device_limit: 3", "kind: gshard"): (
        "f.yaml:5:18: routing.router.kind: gshard selects 2 experts, but top_k = 6; set model.top_k: 2"
    ),
    edited("kind: deepseek_v2, device_limit: 3", "kind: expert_choice")
    + "capacity: {kind: expert, factor: 1.0}\n": "f.yaml:13:18: capacity.kind: expert_choice fills its experts exactly",
    GOOD + "placement: {kind: explicit, slots: [[0, 1]]}\n": "f.yaml:13:36: placement.slots: 1 lists for parallelism",
    GOOD + "dispatch: {algorithm: hierarchical}\n": "f.yaml:13:11: dispatch.deduplicate: hierarchical sends one copy",
    GOOD
    + "dispatch: {deduplicate: per_node}\n": "f.yaml:13:11: dispatch.algorithm: direct has no fan-out inside a node",
    GOOD + "dispatch: {algorithm: low_latency}\n": "f.yaml:13:11: dispatch.deduplicate: low_latency sends per selected",
    GOOD + "dispatch: {combine_dtype: fp8}\n": "f.yaml:13:27: dispatch.combine_dtype: fp8 needs dispatch.dtype: fp8",
    GOOD + "network: {model: port}\n": 'f.yaml:13:18: network.model: "port" is not allowed; did you mean "ports"?',
    without("routing") + POPULARITY + "[1, 2]}": "f.yaml:9:37: routing.counts: 2 counts for experts = 64; give one per",
    without("routing") + POPULARITY + "[]}": "f.yaml:9:37: routing.counts: must not be empty",
    without("routing") + POPULARITY + "[1, x]}": 'f.yaml:9:41: routing.counts.1: expected a number, got "x"',
    without("routing") + POPULARITY + "[[1], [-1]]}": "f.yaml:9:44: routing.counts.1.0: must be at least 0, got -1",
    without("routing") + POPULARITY + f"{[1] * 5 + [0] * 59}}}": "f.yaml:9:37: routing.counts: 5 experts have a count",
    without("routing") + POPULARITY + f"{[1] * 63 + [0]}, router: {{kind: deepseek_v2, groups: 8, group_limit: 3}}}}": (
        "f.yaml:9:37: routing.counts: 63 of 64 counts are above 0; any choice of groups must hold top_k experts"
    ),
    without("routing") + "\nrouting: {kind: trace, file: no.npz}": 'f.yaml:9:30: routing.file: "no.npz" does not exist',
    DENSE: "f.yaml:4:3: routing: a model without experts has no router; leave routing out",
    GOOD.replace("deepseek-moe-16b", "llama2-7b"): "f.yaml:11:32: parallelism.expert: a model without experts has no",
    edited("moe-16b}", "moe-16b, kv_heads: 3}"): "f.yaml:2:45: model.kv_heads: 3 does not divide heads = 16",
    edited("moe-16b}", "moe-16b, kv_heads: 4}"): "f.yaml:2:45: model.kv_heads: mha needs kv_heads = heads = 16",
    edited("moe-16b}", "moe-16b, top_k: 65}"): "f.yaml:2:42: model.top_k: 65 is not between 1 and experts = 64",
    edited("gpu: h200", "gpu: a100").replace("workload: {", "workload: {precision: {gemm: fp8}, "): (
        "f.yaml:12:30: workload.precision.gemm: a100 has no fp8; it has bf16, fp16, fp32"
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=list(MISTAKES.values()))
def test_a_mistake_is_one_line_with_its_place_and_a_remedy(text, message):
    with pytest.raises(UserError) as error:
        load_scenario_text(text, source="f.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == (2 if "need more than" in str(error.value) else 1)


def test_the_scenario_behind_the_mistakes_is_good():
    assert load_scenario_text(GOOD).name == "s"


def test_more_ranks_than_gpus_is_infeasible():
    with pytest.raises(InfeasibleError, match=r"add nodes or lower parallelism\.data"):
        load_scenario_text(edited("data: 8", "data: 16"))


def test_fewer_ranks_than_gpus_leaves_some_idle():
    scenario = load_scenario_text(edited("nodes: 1", "nodes: 3"))
    assert scenario.idle_gpus == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the file is empty; a scenario needs name, model, routing, cluster and workload"),
        (b"# only a comment\n", ": the file is empty"),
        (b"name: s\nmodel: \xff\n", ":2:8: not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_a_file_that_is_no_scenario(tmp_path, content, message):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_scenario(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_scenario(path) == load_scenario_text(GOOD)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot read the scenario"):
        load_scenario(tmp_path / name)


def test_numbers_that_are_not_finite_are_refused_from_dicts_too():
    workload = {"sequence_length": 8, "global_batch": 1, "train_tokens": float("nan")}
    data = {"name": "s", "model": {"preset": "llama2-7b"}, "cluster": {"gpu": "h100", "nodes": 1}, "workload": workload}
    with pytest.raises(UserError, match=r"scenario: workload.train_tokens: nan is not a finite number"):
        scenario_from_mapping(data)


@pytest.mark.parametrize(("expert", "groups", "fits"), [(16, 8, True), (4, 8, True), (8, 8, True), (16, 32, True)])
def test_contiguous_keeps_groups_when_sizes_nest(expert, groups, fits):
    text = GOOD.replace("device_limit: 3", f"groups: {groups}, group_limit: {groups}").replace("nodes: 1", "nodes: 2")
    scenario = load_scenario_text(text, overrides=["parallelism.data=16", f"parallelism.expert={expert}"])
    assert (scenario.router_shape().num_groups == groups) is fits
