import json
import math
from pathlib import Path

import pytest

from moesim.errors import LONGEST_LINE, UserError
from moesim.scenario import Model, load_scenario, model_names, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import parameters
from moesim.scenario.hf_config import read_hf_config

CONFIGS = Path(__file__).parent / "configs"

COMMON = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "top_k": "num_experts_per_tok",
}
DEEPSEEK = COMMON | {
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "expert_intermediate": "moe_intermediate_size",
    "dense_layers": "first_k_dense_replace",
    "dense_intermediate": "intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
}
MLA = DEEPSEEK | {"head_dim": "qk_nope_head_dim", "mtp_layers": "num_nextn_predict_layers"}
QWEN = COMMON | {"experts": "num_experts", "expert_intermediate": "moe_intermediate_size", "head_dim": "head_dim"}
DENSE = {key: name for key, name in COMMON.items() if key != "top_k"} | {"dense_intermediate": "intermediate_size"}
FAMILIES = {
    "deepseek-moe-16b": ("deepseek", DEEPSEEK),
    "deepseek-v2-lite": ("deepseek_v2", MLA),
    "deepseek-v2": ("deepseek_v2", MLA),
    "deepseek-v3": ("deepseek_v3", MLA),
    "mixtral-8x7b": ("mixtral", COMMON | {"experts": "num_local_experts", "expert_intermediate": "intermediate_size"}),
    "mixtral-8x22b": ("mixtral", COMMON | {"experts": "num_local_experts", "expert_intermediate": "intermediate_size"}),
    "qwen3-30b-a3b": ("qwen3_moe", QWEN),
    "qwen3-235b-a22b": ("qwen3_moe", QWEN),
    "olmoe-1b-7b": ("olmoe", COMMON | {"experts": "num_experts", "expert_intermediate": "intermediate_size"}),
    "llama2-7b": ("llama", DENSE),
    "deepseek-67b": ("llama", DENSE),
    "deepseek-7b": ("llama", DENSE),
}


def config_of(name):
    """The preset `name` in the words of its family's config.json."""
    model = Model.model_validate(model_preset(name))
    family, words = FAMILIES[name]
    config = {word: getattr(model, key) for key, word in words.items()} | {"model_type": family, "architectures": ["X"]}
    if model.attention.kind == "mla":
        mla = model.attention
        config |= {"q_lora_rank": mla.q_lora_rank, "kv_lora_rank": mla.kv_lora_rank, "v_head_dim": model.head_dim}
        config |= {"qk_rope_head_dim": mla.rope_head_dim, "moe_layer_freq": 1}
        method = "noaux_tc" if family == "deepseek_v3" else "group_limited_greedy"
        config |= {"n_group": model.router_groups, "topk_group": model.router_group_limit, "topk_method": method}
    return config


def written(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_released_config_gives_the_preset(tmp_path, name):
    read = Model.model_validate(read_hf_config(written(tmp_path, config_of(name))).fields)
    expected = Model.model_validate(model_preset(name))
    ignored = {"source", "preset", "attention", "routing"}  # a config.json names no trained router
    assert read.model_dump(exclude=ignored) == expected.model_dump(exclude=ignored)
    rewritten = expected.attention.model_dump(exclude_none=True)
    assert rewritten.items() <= read.attention.model_dump().items()


def test_presets_without_a_released_config_are_the_rest():
    rest = {"deepseek-moe-2b", "deepseek-moe-145b", "gshard-137b"}
    assert set(model_names()) - set(FAMILIES) - {path.stem for path in CONFIGS.glob("*.json")} == rest


@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("*.json")} & set(model_names())))
def test_a_released_file_is_the_preset_of_its_name(name):
    read = Model.model_validate(read_hf_config(CONFIGS / f"{name}.json").fields).model_dump()
    expected = Model.model_validate(model_preset(name)).model_dump()
    assert parameters(Model.model_validate(read)) == parameters(Model.model_validate(expected))
    for key in ("source", "preset", "left_out", "routing"):
        del read[key], expected[key]
    if read["attention"]["kind"] == "mla":
        assert read["attention"].pop("value_head_dim") == expected["head_dim"]
        assert expected["attention"].pop("value_head_dim") is None
    assert read == expected


@pytest.mark.parametrize("layers", [1, 2, 7, 36])
def test_fewer_layers_cut_the_patterns_of_a_source(layers):
    sections = {
        "name": "s",
        "routing": {"kind": "uniform"},
        "cluster": {"gpu": "h200", "nodes": 1},
        "workload": {"sequence_length": 8, "global_batch": 1},
    }

    def model(source, **changes):
        return scenario_from_mapping(sections | {"model": source | changes}).model

    oss = model({"preset": "gpt-oss-120b"}, layers=layers)
    assert oss.local.layers == tuple(range(0, layers, 2))
    if layers > 1:
        maverick = model({"hf_config": str(CONFIGS / "llama-4-maverick.json")}, layers=layers)
        assert maverick.dense_at == tuple(range(0, layers, 2))
        assert maverick.dense_layers == len(maverick.dense_at)
    assert model({"preset": "gpt-oss-120b"}, layers=layers, local=None).local is None


def test_head_width_and_kv_heads_have_their_usual_defaults(tmp_path):
    config = config_of("llama2-7b")
    del config["num_key_value_heads"]
    read = Model.model_validate(read_hf_config(written(tmp_path, config)).fields)
    assert (read.kv_heads, read.head_dim, read.attention.kind) == (32, 128, "mha")


def test_a_family_with_few_key_value_heads_keeps_its_own_number_where_the_file_has_none(tmp_path):
    config = config_of("mixtral-8x7b")
    del config["num_key_value_heads"]
    found = read_hf_config(written(tmp_path, config))
    read = Model.model_validate(found.fields)
    assert (read.kv_heads, read.attention.kind) == (8, "gqa")
    assert any("num_key_value_heads" in line for line in read.left_out)
    config["num_key_value_heads"] = None
    assert Model.model_validate(read_hf_config(written(tmp_path, config)).fields).kv_heads == 32


def test_a_scenario_reads_a_config_beside_it_and_overrides_fields(tmp_path):
    written(tmp_path, config_of("olmoe-1b-7b"))
    text = "name: s\nmodel: {hf_config: config.json, layers: 4}\nrouting: {kind: uniform}\n"
    text += "cluster: {gpu: h100, nodes: 1}\nworkload: {sequence_length: 8, global_batch: 1}\n"
    (tmp_path / "s.yaml").write_text(text)
    model = load_scenario(tmp_path / "s.yaml").model
    assert (model.layers, model.experts, model.preset) == (4, 64, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            'has "model_type" = "gpt2", a family that is not read; read are deepseek, deepseek_v2, ',
        ),
        ({"model_type": None}, 'has "model_type" = null, a family that is not read'),
        ({"n_routed_experts": None}, 'config.json has no "n_routed_experts"'),
        ({"hidden_size": "2048"}, '"hidden_size" = "2048" must be a whole number'),
        ({"hidden_size": True}, '"hidden_size" = true must be a whole number'),
        ({"moe_layer_freq": 2}, '"moe_layer_freq" = 2 is not supported, only 1'),
        ({"routed_scaling_factor": [{"k" * 10_000: 0}]}, '"routed_scaling_factor" = [{"kkkkk'),
        ({"routed_scaling_factor": True}, "must be a finite number"),
        ({"tie_word_embeddings": "false"}, '"tie_word_embeddings" = "false" must be true or false'),
        ({"num_local_experts": 65}, '"num_local_experts" = 65 contradicts "n_routed_experts"'),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        read_hf_config(written(tmp_path, config_of("deepseek-moe-16b") | change))
    assert message in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < LONGEST_LINE


@pytest.mark.parametrize("layers", [["0"], [0.0], [False], [-1], [48], [[0]]])
def test_dense_layers_that_are_no_numbers_of_layers_are_refused(tmp_path, layers):
    with pytest.raises(UserError, match=r"mlp_only_layers.* must list numbers of layers, 0 to 47"):
        read_hf_config(written(tmp_path, config_of("qwen3-30b-a3b") | {"mlp_only_layers": layers}))


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({"mlp_only_layers": [3]}, (3,)),
        ({"mlp_only_layers": [1, 0, 3, 3]}, (0, 1, 3)),
        ({"mlp_only_layers": [1, 0]}, None),
        ({"decoder_sparse_step": 2}, tuple(range(0, 48, 2))),
        ({"decoder_sparse_step": 4, "mlp_only_layers": [3]}, tuple(n for n in range(48) if n % 4 != 3 or n == 3)),
    ],
)
def test_dense_layers_anywhere_are_read(tmp_path, change, dense):
    config = config_of("qwen3-30b-a3b") | {"intermediate_size": 6144} | change
    read = Model.model_validate(read_hf_config(written(tmp_path, config)).fields)
    assert read.dense_at == dense
    assert read.dense_layers == (2 if dense is None else len(dense))
    assert read.dense_intermediate == 6144


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object"), ("[" * 100_000, "not valid JSON")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_infinity_where_no_number_is_read_does_no_harm_and_is_no_number_elsewhere(tmp_path):
    config = json.loads((CONFIGS / "qwen3-30b-a3b-transformers5.json").read_text())
    text = json.dumps(config)[:-1]
    (tmp_path / "config.json").write_text(text + ', "time_step_limit": [0.0, Infinity]}')
    assert read_hf_config(tmp_path / "config.json").fields["experts"] == 128
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": math.inf}))
    with pytest.raises(UserError, match='"hidden_size" = "Infinity" must be'):
        read_hf_config(tmp_path / "config.json")


def test_a_file_of_a_known_model_gets_that_models_routing_and_another_one_uniform(tmp_path):
    text = (
        "name: a\nmodel: {hf_config: config.json}\ncluster: {gpu: h100, nodes: 64}\nparallelism: {data: 8, expert: 8}\n"
    )
    text += "workload: {sequence_length: 4096, global_batch: 8}\nmemory: {check: warn}\n"
    (tmp_path / "scenario.yaml").write_text("schema_version: 1\n" + text)
    for name, routing in (
        ("qwen3-30b-a3b-transformers5", {"kind": "trace", "file": "library:128x8/published"}),
        ("kimi-k2", {"kind": "trace", "file": "library:384x8/published"}),
        ("minimax-m2", {"kind": "uniform"}),
    ):
        (tmp_path / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
        found = load_scenario(tmp_path / "scenario.yaml").routing.model_dump()
        assert {key: found[key] for key in routing} == routing, name
