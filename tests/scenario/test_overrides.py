from pathlib import Path

import pytest

from moesim.errors import UserError
from moesim.scenario import check_scenario, load_scenario, require_supported

QUICKSTART = Path(__file__).parents[2] / "scenarios" / "quickstart.yaml"


def quickstart(*overrides):
    return load_scenario(QUICKSTART, overrides)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("routing.steps=50", lambda s: s.routing.steps, 50),
        ("workload.train_tokens=1e9", lambda s: s.workload.train_tokens, 1e9),
        ("name=on", lambda s: s.name, "on"),
        ("cluster.nodes=2", lambda s: s.cluster.pools[0].nodes, 2),
        ("cluster.pools.0.nodes=2", lambda s: s.cluster.pools[0].nodes, 2),
        ("cluster.gpu={like: h200, name: mine, memory: 96 GB}", lambda s: s.cluster.pools[0].spec.memory_bytes, 96e9),
        ("cluster.name=big", lambda s: s.cluster.pools[0].name, "big"),
        ("cluster.fabric.nic=200 Gbps", lambda s: s.cluster.fabric.nic, 25e9),
        ("cluster={gpu: h100, nodes: 1}", lambda s: s.cluster.pools[0].gpu, "h100"),
        ("cluster.pools=[{gpu: h100, nodes: 1}]", lambda s: s.cluster.pools[0].gpu, "h100"),
        ("cluster.fabric.oversubscription={leaf: 2}", lambda s: s.cluster.fabric.oversubscription.leaf, 2.0),
        ("model.preset=deepseek-v3", lambda s: s.model.experts, 256),
        ("model.experts=128", lambda s: (s.model.experts, s.model.layers), (128, 28)),
        ("routing.balance.loss_free.gamma=0.01", lambda s: s.routing.balance.loss_free.gamma, 0.01),
        (
            "cluster.price_per_gpu_hour=null",
            lambda s: s.cluster.pools[0].price_source,
            "www.spheron.network, 2026-03-17",
        ),
        ("seed=7", lambda s: s.cluster.pools[0].price_source, "scenario"),
    ],
)
def test_any_key_can_be_set(override, read, value):
    assert read(quickstart(override)) == value


@pytest.mark.parametrize(
    ("override", "section", "kept"),
    [
        (
            "routing.kind=uniform",
            lambda s: s.routing,
            {"kind": "uniform", "router": {"kind": "deepseek_v2", "device_limit": 3}},
        ),
        ("capacity.kind=none", lambda s: s.capacity, {"kind": "none"}),
        ("capacity.kind=expert", lambda s: s.capacity, {"kind": "expert", "factor": 1.0}),
        ("routing.router.kind=topk_softmax", lambda s: s.routing.router, {"kind": "topk_softmax"}),
        ("routing.router.kind=deepseek_v3", lambda s: s.routing.router, {"kind": "deepseek_v3", "device_limit": 3}),
    ],
)
def test_switching_a_kind_drops_the_keys_of_the_old_one(override, section, kept):
    changed = section(quickstart(override))
    assert changed == type(changed).model_validate(kept)


def test_a_key_that_is_set_beside_the_kind_is_never_dropped():
    with pytest.raises(UserError, match=r"^--set routing\.steps=3: routing\.steps: unknown key"):
        quickstart("routing.kind=uniform", "routing.steps=3")


def test_the_last_override_wins():
    assert quickstart("routing.steps=50", "routing.steps=60").routing.steps == 60


def test_a_software_by_name_has_switches_for_the_overrides_behind_it():
    chosen = quickstart("implementation=torchtitan", "implementation.optimizer=flat").implementation
    assert (chosen.kind, chosen.switches.optimizer) == ("torchtitan", "flat")
    assert quickstart("implementation.optimizer=flat", "implementation=torchtitan").implementation.optimizer is None


def test_a_changed_attention_merges_with_the_preset_unless_its_kind_differs():
    base = "model.preset=deepseek-v3"
    merged = quickstart(base, "model.attention.kv_lora_rank=256").model.attention
    assert (merged.kind, merged.kv_lora_rank, merged.q_lora_rank) == ("mla", 256, 1536)
    assert quickstart(base, "model.attention={kind: mha}").model.attention.kind == "mha"
    assert quickstart(base, "model.attention.q_lora_rank=null").model.attention.q_lora_rank is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "--set x: write key=value, e.g. --set routing.steps=50"),
        ("=3", "--set =3: write key=value"),
        ("a..b=3", "--set a..b=3: write key=value"),
        ("routing.stops=3", '--set routing.stops=3: routing.stops: unknown key; did you mean "steps"?'),
        ("routing.steps=many", '--set routing.steps=many: routing.steps: expected a whole number, got "many"'),
        ("routing.steps=[1", "--set routing.steps=[1: not valid YAML"),
        ("routing.kind=trian", '--set routing.kind=trian: routing.kind: "trian" is unknown; did you mean "train"?'),
        ("seed=.inf", "--set seed=.inf: .inf is not a finite number"),
        (
            "model={preset: llama2-7b, layers: 2}",
            "--set model={preset: llama2-7b, layers: 2}: model.dense_layers: 32 of 2 layers, but a model without "
            "experts is dense in all; set model.dense_layers: 2",
        ),
        ("name.x=2", '--set name.x=2: "x" has no place inside the value'),
        ("cluster.pools.1.nodes=2", '--set cluster.pools.1.nodes=2: "1" is no item of a list'),
        ("cluster.gpu=H200", '--set cluster.gpu=H200: cluster.gpu: unknown GPU "H200"; did you mean "h200"?'),
        ("parallelism.expert=24", "--set parallelism.expert=24: parallelism.expert: 24 does not divide experts = 64"),
        (
            "routing={kind: trace, file: no.npz}",
            '--set routing={kind: trace, file: no.npz}: routing.file: "no.npz" does',
        ),
    ],
)
def test_a_mistake_names_the_override(override, message):
    with pytest.raises(UserError) as error:
        quickstart(override)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_scenario_and_those_of_overrides_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "words").write_text("a")
    (tmp_path / "here").write_text("b")
    text = "name: s\nmodel: {preset: olmoe-1b-7b}\ncluster: {gpu: h100, nodes: 1}\n"
    text += "routing: {kind: train, router: {kind: deepseek_moe}, corpus: words}\n"
    text += "workload: {sequence_length: 8, global_batch: 1}\n"
    (tmp_path / "there" / "s.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load_scenario("there/s.yaml").routing.corpus == str(tmp_path / "there" / "words")
    assert load_scenario("there/s.yaml", ["routing.corpus=here"]).routing.corpus == str(tmp_path / "here")
    assert load_scenario("there/s.yaml", ["routing.corpus=stdlib"]).routing.corpus == "stdlib"


@pytest.mark.parametrize("stages", ["{dense: 1, expert: 1}", "{dense: 2}", "{expert: 3}", "{dense: 3, expert: 3}"])
def test_all_stages_of_zero_are_supported(stages):
    scenario = quickstart(f"parallelism.zero={stages}")
    require_supported(scenario)
    assert 1 <= max(scenario.parallelism.zero.dense, scenario.parallelism.zero.expert) <= 3


def test_a_checked_copy_reports_plain_paths():
    scenario = load_scenario(QUICKSTART)
    broken = scenario.model_copy(update={"parallelism": scenario.parallelism.model_copy(update={"expert": 24})})
    with pytest.raises(UserError, match=r"^parallelism\.expert: 24 does not divide"):
        check_scenario(broken)
