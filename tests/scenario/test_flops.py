"""Parameters and FLOPs against published numbers, which other people counted, and against plain arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.scenario import Model, model_names
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import (
    attention_score_flops,
    forward_flops_per_token,
    keys_per_query,
    model_flops_per_token,
    parameters,
)

# Billions, from the papers and model cards named in the catalogue.
PUBLISHED_TOTAL = {
    "deepseek-moe-2b": 1.97,
    "deepseek-moe-16b": 16.4,
    "deepseek-moe-145b": 144.6,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "olmoe-1b-7b": 6.9,
    "gshard-137b": 137,
    "deepseek-67b": 67.4,
    "llama2-7b": 6.74,
}
PUBLISHED_ACTIVE = {
    "deepseek-moe-16b": 2.8,
    "deepseek-moe-145b": 22.2,
    "deepseek-v2": 21,
    "deepseek-v3": 37,
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "olmoe-1b-7b": 1.3,
}
# TFLOPs of one 4096-token training sequence (arXiv 2401.06066) and the layout that the paper's rule counts.
THIRD = 8 / 3
PUBLISHED_FLOPS = {
    "deepseekmoe_16b": (74.4, {"layers": 28, "hidden": 2048, "active_width": 8 * THIRD * 2048 / 4}),
    "deepseek_7b": (183.5, {"layers": 30, "hidden": 4096, "active_width": THIRD * 4096}),
    "llama2_7b": (187.9, {"layers": 32, "hidden": 4096, "active_width": THIRD * 4096, "vocab": 32000}),
    "deepseek_67b": (2057.5, {"layers": 95, "hidden": 8192, "active_width": THIRD * 8192}),
    "gshard_137b": (572.7, {"layers": 62, "hidden": 4096, "active_width": 2 * THIRD * 4096}),
    "deepseekmoe_145b": (585.6, {"layers": 62, "hidden": 4096, "active_width": 16 * 1408}),
    "deepseekmoe_142b_half": (374.6, {"layers": 62, "hidden": 4096, "active_width": 8 * 1408}),
}
MOE_MODELS = [name for name in model_names() if model_preset(name).get("experts")]


def published_rule_flops(*, layers, hidden, active_width, vocab=102400, sequence_length=4096):
    """Training FLOPs of one sequence as arXiv 2401.06066 counts them in its comparison tables.

    The rule: SwiGLU experts of `active_width` = active experts x width in every layer (no dense first layer),
    multi-head attention of width h throughout, full (non-causal) scores 4 n^2 h per layer, the head counted and
    the router not.
    """
    matrices = layers * (4 * hidden * hidden + 3 * hidden * active_width) + hidden * vocab
    scores = layers * 4.0 * sequence_length**2 * hidden
    return 3 * (2.0 * matrices * sequence_length + scores)


def preset(name, **changes):
    return Model.model_validate(model_preset(name) | changes)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_TOTAL.items())
def test_totals_are_the_published_ones(name, billions):
    assert parameters(preset(name)).total == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ACTIVE.items())
def test_activated_parameters_are_the_published_ones_to_their_rounding(name, billions):
    assert parameters(preset(name)).activated == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize(("teraflops", "layout"), PUBLISHED_FLOPS.values(), ids=PUBLISHED_FLOPS)
def test_the_published_flop_table(teraflops, layout):
    assert published_rule_flops(**layout) == pytest.approx(teraflops * 1e12, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "baseline", "share", "rounding"),
    [
        ("deepseekmoe_16b", "deepseek_7b", 0.40, 0.01),
        ("deepseekmoe_145b", "deepseek_67b", 0.285, 0.0005),
        ("deepseekmoe_142b_half", "deepseek_67b", 0.182, 0.0005),
    ],
)
def test_the_headline_shares(model, baseline, share, rounding):
    counted = {name: published_rule_flops(**layout) for name, (_, layout) in PUBLISHED_FLOPS.items()}
    assert counted[model] / counted[baseline] == pytest.approx(share, abs=rounding)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("deepseek-moe-16b", "deepseekmoe_16b"),
        ("deepseek-7b", "deepseek_7b"),
        ("llama2-7b", "llama2_7b"),
        ("gshard-137b", "gshard_137b"),
        ("deepseek-moe-145b", "deepseekmoe_145b"),
    ],
)
def test_the_real_layouts_cost_nearly_what_the_simplified_rule_says(name, row):
    ours = 4096 * model_flops_per_token(preset(name), sequence_length=4096, causal=False)
    assert ours == pytest.approx(PUBLISHED_FLOPS[row][0] * 1e12, rel=0.05)


@pytest.mark.parametrize("name", model_names())
def test_matrix_flops_are_twice_the_parameters_that_a_token_multiplies(name):
    model = preset(name)
    parts = forward_flops_per_token(model, sequence_length=4096, causal=True)
    counts = parameters(model)
    head = model.vocab * model.hidden
    multiplied = counts.activated - counts.embedding - counts.head - counts.norms + head
    assert sum(parts.values()) - parts["attention_scores"] == pytest.approx(2 * multiplied, rel=1e-12)


@pytest.mark.parametrize("name", MOE_MODELS)
def test_flops_do_not_grow_with_experts_that_are_not_selected(name):
    model = preset(name)
    doubled = model.model_copy(update={"experts": 2 * model.experts})
    before, after = (forward_flops_per_token(m, sequence_length=128, causal=True) for m in (model, doubled))
    assert after["routed_experts"] == before["routed_experts"]
    assert after["router"] == 2 * before["router"]
    assert parameters(doubled).activated - parameters(model).activated == parameters(model).router


@given(factor=st.sampled_from([2, 4, 8]), sequence_length=st.integers(min_value=1, max_value=8192))
@settings(max_examples=30)
def test_finer_experts_at_equal_compute_change_only_the_router(factor, sequence_length):
    coarse = preset("mixtral-8x7b")
    changes = {"experts": 8 * factor, "top_k": 2 * factor, "expert_intermediate": 14336 // factor}
    before, after = (
        forward_flops_per_token(m, sequence_length=sequence_length, causal=True)
        for m in (coarse, coarse.model_copy(update=changes))
    )
    assert {part for part in before if before[part] != after[part]} == {"router"}


def test_a_window_saves_98_4_percent_of_the_scores_before_global_tokens():
    model = preset("llama2-7b", attention={"kind": "local_global", "window": 64, "global_every": 32})
    full = keys_per_query(preset("llama2-7b"), sequence_length=4096, causal=False)
    local = keys_per_query(model, sequence_length=4096, causal=False)
    assert 1 - local.near / full.total == pytest.approx(0.984, abs=5e-4)
    assert local.beyond == (4096 - 64) / 32


@given(
    window=st.integers(min_value=1, max_value=600),
    every=st.integers(min_value=1, max_value=64),
    length=st.integers(min_value=1, max_value=500),
)
@settings(max_examples=60)
def test_keys_per_query_are_the_average_over_queries(window, every, length):
    model = preset("llama2-7b", attention={"kind": "local_global", "window": window, "global_every": every})
    near = [min(t, window) for t in range(1, length + 1)]
    beyond = [(t - min(t, window)) / every for t in range(1, length + 1)]
    keys = keys_per_query(model, sequence_length=length, causal=True)
    assert keys.near == pytest.approx(sum(near) / length)
    assert keys.beyond == pytest.approx(sum(beyond) / length, abs=1e-9)
    assert keys.total <= keys_per_query(preset("llama2-7b"), sequence_length=length, causal=True).total + 1e-9


def test_causal_scores_are_half_of_full_ones_for_long_sequences():
    model = preset("deepseek-v3")
    full = attention_score_flops(model, sequence_length=4096, causal=False)
    assert attention_score_flops(model, sequence_length=4096, causal=True) / full == pytest.approx(0.5, abs=2e-4)
    assert full == 2 * 4096 * 128 * (192 + 128)


def test_multi_token_prediction_stays_outside_the_totals():
    with_mtp, without = preset("deepseek-v3"), preset("deepseek-v3", mtp_layers=0)
    assert parameters(with_mtp).total == parameters(without).total
    # the module's own weights, embedding and head shared: 14 B as published less 2 * 129280 * 7168
    assert parameters(with_mtp).mtp == pytest.approx(11.6e9, rel=0.02)
    assert parameters(without).mtp == 0
