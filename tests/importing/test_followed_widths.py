"""A recording follows the widths of its weights: scaled to a wider model it is what recording that model gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import DEEPSEEK_V2_LITE, DEEPSEEK_V3_LIKE, GLM_SMALL, GPT_OSS, MIXTRAL, OLMOE, QWEN3
from measure_library_steps import Case, closure, module

from moesim.importing.recording import record_step
from moesim.kernels import kernel_model
from moesim.recorded import widths
from moesim.recorded.estimate import step_estimate
from moesim.recorded.scaling import scaled
from moesim.recorded.sizes import matched, sizes_of
from moesim.recorded.step_file import RecordedOp

FEW_LAYERS = 2
# Of each family every width at once, each by a factor of its own, so that none can stand for another.
WIDER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3": (
        "Qwen3MoeConfig",
        QWEN3,
        {"hidden_size": 3072, "num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 96,
         "moe_intermediate_size": 1280, "num_experts": 96, "vocab_size": 32000},
    ),
    "mixtral": (
        "MixtralConfig",
        MIXTRAL | {"head_dim": 128},
        {"hidden_size": 2048, "num_attention_heads": 48, "num_key_value_heads": 24, "head_dim": 96,
         "intermediate_size": 8960, "num_local_experts": 12, "vocab_size": 64000},
    ),
    "olmoe": (
        "OlmoeConfig",
        OLMOE,
        {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 24, "intermediate_size": 896,
         "num_experts": 48, "vocab_size": 32000},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        DEEPSEEK_V2_LITE,
        {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 640,
         "qk_nope_head_dim": 96, "qk_rope_head_dim": 32, "v_head_dim": 112, "intermediate_size": 7168,
         "moe_intermediate_size": 1280, "n_routed_experts": 48, "vocab_size": 32000},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        DEEPSEEK_V3_LIKE,
        {"hidden_size": 3072, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 896,
         "kv_lora_rank": 640, "intermediate_size": 7168, "moe_intermediate_size": 1280, "vocab_size": 64000},
    ),
    "glm": (
        "Glm4MoeConfig",
        GLM_SMALL,
        {"hidden_size": 3072, "num_attention_heads": 48, "num_key_value_heads": 16, "head_dim": 96,
         "intermediate_size": 7168, "moe_intermediate_size": 1280, "n_routed_experts": 48, "vocab_size": 64000},
    ),
    "gpt-oss": (
        "GptOssConfig",
        GPT_OSS | {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "head_dim": 64},
        {"hidden_size": 1920, "intermediate_size": 1280, "num_attention_heads": 48, "num_key_value_heads": 12,
         "head_dim": 96, "num_local_experts": 24, "vocab_size": 64000},
    ),
}  # fmt: skip


def recorded(family: str, sizes: dict[str, Any], *, sequence: int = 2048) -> list[RecordedOp]:
    pytest.importorskip("transformers")
    case = Case(name=family, family=family, layers=FEW_LAYERS, batch=2, sequence=sequence, sizes=sizes)
    with torch.device("meta"):
        model = module(case, "meta")
        return record_step(model, closure(case, model, "meta"))


@pytest.mark.parametrize("name", WIDER)
def test_a_list_at_other_widths_is_recorded_anew(name: str) -> None:
    family, sizes, wider = WIDER[name]
    first, anew = recorded(family, sizes), recorded(family, sizes | wider)
    before, to = sizes_of(first, where="it"), sizes_of(anew, where="it")
    kernels = kernel_model("h100")
    ours, theirs = (step_estimate(ops, kernels) for ops in (scaled(first, before, to), anew))
    assert ours.gaps_s == pytest.approx(theirs.gaps_s, rel=1e-9)
    for phase in ("forward", "backward", "optimizer"):
        sums = [sum(op.count * op.seconds for op in each.ops if op.phase == phase) for each in (ours, theirs)]
        assert sums[0] == pytest.approx(sums[1], rel=0.01), phase
    assert ours.kernels_s == pytest.approx(theirs.kernels_s, rel=0.005)


def test_widths_have_the_names_that_a_model_has() -> None:
    sizes = sizes_of(recorded("DeepseekV3Config", DEEPSEEK_V3_LIKE), where="it")
    assert sizes.widths == {
        "hidden": 1792, "vocabulary": 32000, "experts": 128, "expert_width": 1024, "heads": 32, "kv_heads": 32,
        "head_dim": 128, "rope_head_dim": 64, "value_head_dim": 128, "q_lora_rank": 768, "kv_lora_rank": 512,
        "dense_width": 4608, "shared_width": 1024,
    }  # fmt: skip


def test_tokens_as_many_as_the_hidden_size_are_told_from_it() -> None:
    """By value nothing could tell them apart."""
    small = QWEN3 | {"hidden_size": 1024, "vocab_size": 32000}
    first, anew = (recorded("Qwen3MoeConfig", small, sequence=length) for length in (1024, 3072))
    before = sizes_of(first, where="it")
    kernels = kernel_model("h100")
    ours, theirs = (
        step_estimate(ops, kernels) for ops in (scaled(first, before, replace(before, sequence_length=3072)), anew)
    )
    assert ours.kernels_s == pytest.approx(theirs.kernels_s, rel=0.01)


def test_a_vocabulary_of_an_odd_width_slows_its_gemms() -> None:
    first, anew = (recorded("Qwen3MoeConfig", QWEN3 | {"vocab_size": size}) for size in (32000, 32001))
    before, to = (sizes_of(ops, where="it") for ops in (first, anew))
    kernels = kernel_model("h100")
    ours, theirs = (step_estimate(ops, kernels) for ops in (scaled(first, before, to), anew))
    assert any(op.kind.endswith(" unaligned") for op in ours.ops)
    assert ours.kernels_s == pytest.approx(theirs.kernels_s, rel=0.01)


def test_every_width_of_a_program_is_known() -> None:
    first = recorded("MixtralConfig", MIXTRAL)
    sizes = sizes_of(first, where="it")
    large = [
        (op.name, shape)
        for op, each in zip(first, matched(first, sizes), strict=True)
        for (shape, _, _), symbols in zip((*op.reads, *op.writes), (*each.reads, *each.writes), strict=True)
        for size, symbol in zip(shape, symbols, strict=True)
        if symbol in "W?" and size > 128 and op.phase != "optimizer"
    ]
    assert not large


HIDDEN, HEADS, HEAD_DIM, KV_HEADS = map(widths.named, ("hidden", "heads", "head_dim", "kv_heads"))


@pytest.mark.parametrize(
    ("width", "value"),
    [
        (HIDDEN, 6.0),
        (widths.times(widths.number(2), HIDDEN), 12.0),
        (widths.over(widths.times(HEADS, HEAD_DIM), widths.number(2)), 9.0),
        (widths.total([HIDDEN, widths.times(HEADS, HEAD_DIM), widths.number(1)]), 25.0),
        (widths.over(HEADS, KV_HEADS), 0.5),
        (widths.over(widths.number(1), KV_HEADS), 1 / 6),
    ],
)
def test_a_width_is_a_text_and_back(width: widths.Width, value: float) -> None:
    sizes = {"hidden": 6, "heads": 3, "head_dim": 6, "kv_heads": 6}
    assert widths.value_of(widths.text_of(width), sizes) == value


def test_what_is_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="no width"):
        widths.parsed("hidden++")
