"""No key of a config.json is passed over in silence: read, known to change nothing, or named; and files as released."""

import json
from pathlib import Path

import pytest

from moesim.errors import UserError
from moesim.scenario import LocalGlobal, Model, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import attention_score_flops, forward_flops_per_token, keys_per_query, parameters
from moesim.scenario.hf_config import read_hf_config

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
FAMILIES = ["deepseek", "deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "olmoe", "llama", "qwen2", "qwen3"]
# Of every family at once, so that each of them finds what it needs.
EVERYTHING = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "num_hidden_layers": 8, "head_dim": 128,
    "vocab_size": 1000, "intermediate_size": 14336, "moe_intermediate_size": 768, "num_experts_per_tok": 2,
    "num_local_experts": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
}  # fmt: skip


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def read(tmp_path: Path, fields: dict):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
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
    unused = switched_off if config(name).get("use_sliding_window") is False else set()
    for key in set(before.keys.read) - unused:
        value = config(name)[key]
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, int | float):
            other = 2 * value + 1
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
        ("qwen3-30b-a3b-transformers5", {"attention_bias": True}, '"attention_bias" = true: the biases of attention'),
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


def test_parameters_of_files_as_transformers_counts_them() -> None:
    """transformers 5.17 on the meta device; it counts the norms of single heads, 256 parameters a layer, too."""
    for name, total, activated in (
        ("qwen3-30b-a3b-transformers5", 30.532e9, 3.353e9),
        ("qwen3-dense-layers-first", 28.832643072e9, 3.352246272e9),
    ):
        held = parameters(model_of(name))
        assert held.total == pytest.approx(total, rel=2e-5)
        assert held.activated == pytest.approx(activated, rel=1e-4)


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
    ("change", "window", "named"),
    [
        ({}, None, False),
        ({"sliding_window": 4096}, None, False),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, 4096, False),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 48}, None, False),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 24}, None, True),
        ({"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 48}, 4096, False),
        (
            {
                "sliding_window": 4096,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 24,
            },
            None,
            True,
        ),
    ],
)
def test_windows_of_qwen_follow_its_switches(tmp_path: Path, change: dict, window: int | None, named: bool) -> None:
    found = read(tmp_path, config("qwen3-30b-a3b-transformers5") | change)
    assert found.fields["attention"].get("window") == window
    assert bool(found.keys.left_out) == named
    if named:
        assert "the window of 24 of 48 layers; all are costed as full attention" in found.keys.left_out[0]


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    change = {"layer_types": ["linear_attention"] * 48}
    with pytest.raises(UserError, match=r"layer_types.* must name full_attention or sliding_attention"):
        read(tmp_path, config("qwen3-30b-a3b-transformers5") | change)


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
