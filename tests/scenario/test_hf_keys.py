"""No key of a config.json is passed over in silence: read, known to change nothing, or named; and files as released."""

import json
from pathlib import Path

import pytest
import yaml

from moesim.errors import UserError
from moesim.scenario import LocalGlobal, Model, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import attention_score_flops, forward_flops_per_token, keys_per_query, parameters
from moesim.scenario.hf_config import FAMILIES, NOT_MODELLED, flat, read_hf_config

CONFIGS = Path(__file__).parent / "configs"
COUNTS = yaml.safe_load((CONFIGS / "counts.yaml").read_text())
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
# Of every family at once, so that each of them finds what it needs.
EVERYTHING = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "num_hidden_layers": 8, "head_dim": 128,
    "vocab_size": 1000, "intermediate_size": 14336, "moe_intermediate_size": 768, "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "n_routed_experts": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "n_heads": 32, "d_model": 4096, "n_layers": 8, "moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 768,
}  # fmt: skip


def config(name: str) -> dict:
    """The keys of a released file, nested ones as if they stood outside."""
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    return flat(fields, FAMILIES[fields["model_type"]].sections, name=name)


# Of each reader the file with the most keys.
LARGEST = {
    FAMILIES[json.loads((CONFIGS / f"{name}.json").read_text())["model_type"]].read.__name__: name
    for name in sorted(NAMES, key=lambda name: len(config(name)))
}


def read(tmp_path: Path, fields: dict):
    """Of nested sections of the family, the keys may stand outside: the sections are empty."""
    path = tmp_path / "config.json"
    family = FAMILIES.get(fields["model_type"])
    empty = {section: {} for section in family.sections} if family else {}
    path.write_text(json.dumps(fields | empty))
    return read_hf_config(path)


def model_of(name: str) -> Model:
    return Model.model_validate(read_hf_config(CONFIGS / f"{name}.json").fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_released_file_has_one_fate(name: str) -> None:
    keys = read_hf_config(CONFIGS / f"{name}.json").keys
    named = [key for key in config(name) if any(f'"{key}"' in text for text in keys.left_out)]
    assert sorted([*keys.read, *keys.harmless, *named]) == sorted(config(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_key_that_is_read_counts(tmp_path: Path, name: str) -> None:
    """Another value gives another model, or is refused, or is named."""
    before = read(tmp_path, config(name))
    switched_off = {"sliding_window", "max_window_layers", "use_sliding_window"}
    fields = config(name)
    unused = switched_off if fields.get("use_sliding_window") is False else set()
    if fields.get("sliding_window") is None:
        unused |= {"max_window_layers"}
    for key in set(before.keys.read) - unused:
        value = config(name)[key]
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, int | float):
            other = 2 * abs(value) + 1
        else:
            other = [0, 1] if isinstance(value, list) else "other"
        try:
            assert read(tmp_path, config(name) | {key: other}).fields != before.fields, key
        except UserError as error:
            assert f'"{key}"' in str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_key_is_named_for_every_family(tmp_path: Path, family: str) -> None:
    unknown = {"memory_layers": 3, "off": None}
    text = read(tmp_path, unknown | EVERYTHING | {"model_type": family}).keys.left_out[-1]
    assert f'not known for model_type {family} and left out: "memory_layers" = 3' in text
    assert "off" not in text


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("mixtral-8x7b-sliding-window", {"n_shared_experts": 2}, '"n_shared_experts" = 2'),
        ("mixtral-8x7b-sliding-window", {"hidden_act": "gelu"}, '"hidden_act" = "gelu": feed-forward networks are'),
        ("deepseek-v3", {"attention_bias": True}, '"attention_bias" = true: the biases of attention'),
        ("qwen3-dense-layers-first", {"quantization_config": {"quant_method": "gptq"}}, '"quantization_config" (gptq)'),
        ("deepseek-v3", {}, '"quantization_config" (fp8): it says how the released weights are stored'),
        ("deepseek-v3", {"index_topk": 2048}, '"index_topk" = 2048'),
        ("deepseek-v3", {"topk_method": "new"}, '"topk_method" = "new": an unknown way'),
    ],
)
def test_what_is_left_out_is_named(tmp_path: Path, name: str, change: dict, text: str) -> None:
    found = read(tmp_path, config(name) | change)
    assert text in " ".join(found.keys.left_out)
    assert found.fields["left_out"] == list(found.keys.left_out)


def test_many_unknown_keys_are_one_short_line(tmp_path: Path) -> None:
    unknown = {f"key{number}": "v" * 1000 for number in range(1000)}
    (text,) = read(tmp_path, config("mixtral-8x7b-sliding-window") | unknown).keys.left_out
    assert "and 992 more" in text
    assert len(text) < 800


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_parameters_of_files_as_transformers_counts_them(name: str, counts: dict) -> None:
    """transformers on the meta device (tools/config_parameters.py); norms of single heads are what it has more."""
    held = parameters(model_of(name))
    assert held.total == pytest.approx(counts["total"], rel=1e-3)
    assert held.activated == pytest.approx(counts["activated"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [("ling-lite", 16.8e9, 2.75e9), ("grok-1", 314e9, None)],
)
def test_parameters_of_families_that_transformers_lacks_are_as_published(
    name: str, total: float, activated: float | None
) -> None:
    """As rounded as published: inclusionAI/Ling and xai-org/grok-1."""
    held = parameters(model_of(name))
    assert held.total == pytest.approx(total, rel=6e-3)
    assert activated is None or held.activated == pytest.approx(activated, rel=6e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("aria", 25.3),  # with the encoder of pictures
        ("dots.llm1", 142),
        ("ernie-4.5-21b-a3b", 21),
        ("flexolmo-7x7b", 33),
        ("glm-4.5", 355),  # with the prediction layer
        ("glm-4.7-flash", 30),
        ("granite-3.0-3b-a800m", 3.3),
        ("k-exaone-236b-a23b", 236),
        ("olmoe-1b-7b", 6.9),
        ("phi-3.5-moe", 41.9),
        ("solar-open-100b", 102),
    ],
)
def test_files_written_from_stated_fields_have_the_published_totals(name: str, billions: float) -> None:
    assert parameters(model_of(name)).total == pytest.approx(billions * 1e9, rel=0.04)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-4-scout", {"dense_layers": 0, "shared_experts": 1}),
        ("llama-4-maverick", {"dense_layers": 24, "dense_at": tuple(range(0, 48, 2)), "dense_intermediate": 16384}),
        ("gpt-oss-120b", {"attention_sinks": True, "expert_bias": True, "attention_bias": "all", "gated": True}),
        ("glm-4.5-air", {"attention_bias": "qkv", "mtp_layers": 1, "dense_layers": 1}),
        ("hunyuan-a13b", {"top_k": 8, "shared_experts": 1, "shared_intermediate": 3072, "tied_embeddings": True}),
        ("qwen1.5-moe-a2.7b", {"shared_intermediate": 5632, "shared_gate": True, "attention_bias": "qkv"}),
        ("solar-open-100b", {"dense_layers": 0, "shared_experts": 1}),
        ("glm-4.7-flash", {"dense_layers": 1, "dense_at": None, "mtp_layers": 1}),
        ("k-exaone-236b-a23b", {"dense_layers": 1, "shared_width": 2048, "mtp_layers": 1}),
        ("minimax-m2", {"mtp_layers": 3, "experts": 256, "shared_experts": 0}),
        ("ernie-4.5-21b-a3b", {"dense_layers": 1, "dense_at": None, "shared_width": 3072, "tied_embeddings": True}),
    ],
)
def test_what_counts_do_not_show_is_read(name: str, expected: dict) -> None:
    model = model_of(name)
    assert {key: getattr(model, key) for key in expected} == expected


def test_windows_and_chunks_of_some_layers_are_read() -> None:
    oss, scout = model_of("gpt-oss-120b").local, model_of("llama-4-scout").local
    assert oss and (oss.window, oss.chunked, oss.layers) == (128, False, tuple(range(0, 36, 2)))
    assert scout and (scout.window, scout.chunked) == (8192, True)
    assert scout.layers == tuple(n for n in range(48) if n % 4 != 3)


def test_an_indexer_is_read_and_those_that_layers_share_are_refused(tmp_path: Path) -> None:
    indexer = model_of("deepseek-v3.2").attention.indexer
    assert (indexer.heads, indexer.head_dim, indexer.top_k) == (64, 128, 2048)
    for change in ({"indexer_types": ["full", "shared"]}, {"index_topk_freq": 4}):
        with pytest.raises(UserError, match=r"is not modelled: indexers that several layers share"):
            read(tmp_path, config("glm-5") | change)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("hunyuan-a13b", {"use_cla": True}, '"use_cla" = true is not modelled: keys and values that layers share'),
        ("minimax-m2", {"attn_type_list": [1, 0] * 31}, "is not modelled: lightning attention layers"),
        ("glm-5", {"mlp_layer_types": ["sparse"] * 7}, "must name dense or sparse for each of 78 layers"),
        ("hunyuan-a13b", {"moe_topk": [8, 4]}, '"moe_topk" = [8,'),
        ("llama-4-scout", {"interleave_moe_layer_step": 0}, '"interleave_moe_layer_step" = 0 must be at least 1'),
        ("llama-4-scout", {"no_rope_layers": [1]}, '"no_rope_layers" = [1] must have 0 or 1 for each of 48 layers'),
    ],
)
def test_layouts_without_fields_are_refused_by_key(tmp_path: Path, name: str, change: dict, text: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, config(name) | change)
    assert text in str(error.value)


@pytest.mark.parametrize("name", LARGEST.values(), ids=LARGEST)
def test_no_value_of_a_key_is_more_than_a_mistake_of_the_file(tmp_path: Path, name: str) -> None:
    """Whatever a key holds, the file is read, or refused in a UserError by name: in one file of every reader."""
    for key in config(name).keys() - {"model_type"}:
        for value in (-1, 0, 10**12, 0.5, "x", True, None, [], [None], [{}], [10**12], {"a": 1}):
            try:
                read(tmp_path, config(name) | {key: value})
            except UserError as error:
                assert "config.json" in str(error)


def test_a_nested_section_must_be_there_and_agree(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for fields, text in (
        ({"model_type": "llama4"}, 'has no object "text_config"'),
        (
            {"model_type": "llama4", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
            '"tie_word_embeddings" = true contradicts "tie_word_embeddings" = false of text_config',
        ),
    ):
        path.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=text):
            read_hf_config(path)


def test_dense_layers_that_come_first_are_read() -> None:
    model = model_of("qwen3-dense-layers-first")
    assert (model.layers, model.dense_layers, model.dense_intermediate) == (48, 3, 6144)


def test_a_window_of_all_layers_is_modelled() -> None:
    model = model_of("mixtral-8x7b-sliding-window")
    assert model.attention == LocalGlobal(kind="local_global", window=4096, global_every=None)
    assert keys_per_query(model, sequence_length=32768, causal=True).total == pytest.approx(3840.06, abs=0.01)
    forward = forward_flops_per_token(model, sequence_length=32768, causal=True)
    assert forward["attention_scores"] == pytest.approx(2.0133e9, rel=1e-4)
    full = model.model_copy(update={"attention": Model.model_validate(model_preset("mixtral-8x7b")).attention})
    for length in (1, 100, 4096):  # within the window there is none
        assert attention_score_flops(model, sequence_length=length, causal=True) == attention_score_flops(
            full, sequence_length=length, causal=True
        )


@pytest.mark.parametrize(
    ("change", "window", "some"),
    [
        ({}, None, None),
        ({"sliding_window": 4096}, None, None),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, 4096, None),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 48}, None, None),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 24}, None, range(24, 48)),
        ({"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 48}, 4096, None),
        (
            {
                "sliding_window": 4096,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 24,
            },
            None,
            range(0, 48, 2),
        ),
    ],
)
def test_windows_of_qwen_follow_its_switches(
    tmp_path: Path, change: dict, window: int | None, some: range | None
) -> None:
    found = read(tmp_path, config("qwen3-30b-a3b-transformers5") | change)
    assert found.fields["attention"].get("window") == window
    assert not found.keys.left_out
    local = Model.model_validate(found.fields).local
    assert (local and (local.window, local.layers)) == (some and (4096, tuple(some)))


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    change = {"layer_types": ["linear_attention"] * 48}
    found = (
        r"layer_types.* \(linear_attention\) has layers that are not modelled: it must name full_attention or sliding"
    )
    with pytest.raises(UserError, match=found):
        read(tmp_path, config("qwen3-30b-a3b-transformers5") | change)


@pytest.mark.parametrize("family", NOT_MODELLED)
def test_a_family_with_layers_that_are_not_modelled_is_refused_by_their_name(tmp_path: Path, family: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError) as error:
        read_hf_config(path)
    assert f'"model_type" = "{family}": {NOT_MODELLED[family]} are not modelled' in str(error.value)


def test_groups_are_read_where_the_router_uses_them(tmp_path: Path) -> None:
    for change, groups in (({}, (8, 4)), ({"topk_method": None}, (8, 4)), ({"topk_method": "greedy"}, (1, 1))):
        model = Model.model_validate(read(tmp_path, config("deepseek-v3") | change).fields)
        assert (model.router_groups, model.router_group_limit) == groups
    v2 = read(tmp_path, config("deepseek-v3") | {"model_type": "deepseek_v2", "topk_method": None})
    assert "router_groups" not in v2.fields


def test_what_is_left_out_survives_the_scenario_and_may_be_taken_back() -> None:
    sections = {
        "name": "s",
        "routing": {"kind": "uniform"},
        "cluster": {"gpu": "h200", "nodes": 1},
        "workload": {"sequence_length": 8, "global_batch": 1},
    }
    path = str(CONFIGS / "deepseek-v3.json")
    assert scenario_from_mapping(sections | {"model": {"hf_config": path}}).model.left_out
    assert not scenario_from_mapping(sections | {"model": {"hf_config": path, "left_out": []}}).model.left_out


def test_the_documented_table_is_what_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name in NAMES:
        found = read_hf_config(CONFIGS / f"{name}.json")
        held = parameters(Model.model_validate(found.fields))
        row = f"| `{found.keys.model_type}` | {name} | {held.total / 1e9:.3f} | {held.activated / 1e9:.3f} |"
        assert row in text
    for family, what in NOT_MODELLED.items():
        assert f"| `{family}` | {what} |" in text
    assert all(f"`{family}`" in text for family in FAMILIES)
