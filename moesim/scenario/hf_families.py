"""The families of `config.json` that are read: ONE table from `model_type` to the reader and the keys of the family.

What a family calls `intermediate_size` is the width of its dense FFN, or of one expert where no layer is dense.
Transformers 5 writes `num_local_experts` for every family. Norms of single heads are no field: under 0.01 % of a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moesim.scenario.hf_fields import Config
from moesim.scenario.hf_keys import Expected
from moesim.scenario.hf_layers import (
    Fields,
    all_windows,
    common_fields,
    dense_fields,
    every,
    experts,
    first_dense,
    layer_numbers,
    local_numbers,
    numbers_of,
    router_groups,
    shared,
    windows,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is read; `sections`: nested objects whose keys are read as if they stood outside."""

    read: Callable[[Config], Fields]
    harmless: tuple[str, ...] = ()
    expected: Mapping[str, Expected] = field(default_factory=lambda: MappingProxyType({}))
    sections: tuple[str, ...] = ()


def _llama(config: Config) -> Fields:
    return _all_dense(config, common_fields(config))


def _all_dense(config: Config, fields: Fields) -> Fields:
    return fields | {"dense_layers": fields["layers"], "dense_intermediate": config.count("intermediate_size")}


def _qwen_windows(config: Config, fields: Fields) -> Fields:
    """Qwen attends to a window only where `use_sliding_window` says so, and from layer `max_window_layers` on."""
    config.get("sliding_window")  # read, whatever the switches below say of it
    first = min(config.count("max_window_layers", default=28), fields["layers"])
    listed = local_numbers(config, fields)
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return {}
    numbers = layer_numbers(fields)[first:] if listed is None else listed
    return windows(fields, numbers, config.count("sliding_window"))


def _qwen_dense_at(config: Config, fields: Fields) -> Fields:
    """Dense layers: those listed, and all but every `decoder_sparse_step`-th."""
    listed, step = numbers_of(config, "mlp_only_layers", fields), every(config, "decoder_sparse_step")
    dense = [n for n in layer_numbers(fields) if n in listed or (n + 1) % step]
    return dense_fields(config, fields, dense)


def _qwen2(config: Config) -> Fields:
    fields = common_fields(config) | {"attention_bias": "qkv"}
    return _all_dense(config, fields | _qwen_windows(config, fields))


def _qwen3(config: Config) -> Fields:
    fields = common_fields(config)
    return _all_dense(config, fields | _qwen_windows(config, fields))


def _qwen3_moe(config: Config) -> Fields:
    fields = common_fields(config)
    fields |= _qwen_windows(config, fields) | experts(config, width="moe_intermediate_size")
    return fields | _qwen_dense_at(config, fields)


def _qwen2_moe(config: Config) -> Fields:
    fields = common_fields(config)
    fields |= _qwen_windows(config, fields) | experts(config, width="moe_intermediate_size")
    beside = shared(1, config.count("shared_expert_intermediate_size", default=0))
    fields |= beside and beside | {"shared_gate": True}
    if config.flag("qkv_bias", default=True):
        fields |= {"attention_bias": "qkv"}
    return fields | _qwen_dense_at(config, fields)


def _deepseek_experts(config: Config) -> Fields:
    config.only("moe_layer_freq", 1)
    return first_dense(config) | {
        "experts": config.count("n_routed_experts", "num_local_experts"),
        "top_k": config.count("num_experts_per_tok"),
        "shared_experts": config.count("n_shared_experts", default=0),
        "expert_intermediate": config.count("moe_intermediate_size"),
        "routed_scaling_factor": config.number("routed_scaling_factor", 1.0),
    }


def _deepseek(config: Config) -> Fields:
    return common_fields(config) | _deepseek_experts(config)


def _deepseek_mla(config: Config, *, method: str) -> Fields:
    head_dim = config.count("qk_nope_head_dim")
    attention = {
        "kind": "mla",
        "q_lora_rank": None if config.get("q_lora_rank") is None else config.count("q_lora_rank"),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "rope_head_dim": config.count("qk_rope_head_dim"),
        "value_head_dim": config.count("v_head_dim", default=head_dim),
    }
    if config.flag("attention_bias"):
        config.note("attention_bias", "the biases of attention are not counted")
    fields = _deepseek(config) | {"head_dim": head_dim, "attention": attention, "attention_bias": "none"}
    mtp_layers = config.count("num_nextn_predict_layers", "num_mtp_layers", default=0)
    return fields | {"mtp_layers": mtp_layers} | router_groups(config, method=method)


def _deepseek_v2(config: Config) -> Fields:
    return _deepseek_mla(config, method="greedy")


def _deepseek_v3(config: Config) -> Fields:
    return _deepseek_mla(config, method="noaux_tc")


def _glm4_moe(config: Config) -> Fields:
    fields = common_fields(config, bias="qkv") | _deepseek_experts(config)
    mtp_layers = config.count("num_nextn_predict_layers", "num_mtp_layers", default=0)
    return fields | {"mtp_layers": mtp_layers} | router_groups(config, method="noaux_tc")


def _dots1(config: Config) -> Fields:
    """A window holds from layer `max_window_layers` on, without a switch."""
    fields = common_fields(config) | _deepseek_experts(config)
    listed, window = local_numbers(config, fields), config.count("sliding_window", default=0)
    first = min(config.count("max_window_layers", default=fields["layers"]), fields["layers"])
    numbers = layer_numbers(fields)[first:] if listed is None else listed
    return fields | windows(fields, numbers, window) | router_groups(config, method="noaux_tc")


def _mixtral(config: Config) -> Fields:
    fields = common_fields(config) | experts(config, width="intermediate_size")
    return fields | all_windows(config, fields)


def _olmoe(config: Config) -> Fields:
    return common_fields(config) | experts(config, width="intermediate_size")


_ROUTER = ("norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_DEEPSEEK_ROUTER = ("aux_loss_alpha", "norm_topk_prob", "output_router_logits", "scoring_func", "seq_aux")
# The heads' width is that of qk_nope_head_dim and qk_rope_head_dim.
_MLA = (*_DEEPSEEK_ROUTER, "head_dim", "qk_head_dim")
_MLP_BIAS = {"mlp_bias": Expected(values=(False,), left_out="the biases of feed-forward networks are not counted")}
_MEDIA = {"vision_config": Expected(values=(), left_out="the vision encoder: the language model alone is simulated")}
_MEDIA_KEYS = (
    "boi_token_index", "eoi_token_index", "ignore_index", "image_token_id", "image_token_index",
    "media_placeholder_token_id", "use_unified_vision_chunk", "video_placeholder", "video_token_id",
    "vision_end_token_id", "vision_start_token_id",
)  # fmt: skip

# A dense width beside experts in every layer belongs to no layer.
_QWEN_MOE = (*_ROUTER, "intermediate_size")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek": Family(read=_deepseek, harmless=_DEEPSEEK_ROUTER),
        "deepseek_v2": Family(read=_deepseek_v2, harmless=(*_MLA, *_MLP_BIAS)),
        "deepseek_v3": Family(read=_deepseek_v3, harmless=_MLA),
        "kimi_k2": Family(read=_deepseek_v3, harmless=_MLA),
        "kimi_k25": Family(
            read=_deepseek_v3, harmless=(*_MLA, *_MEDIA_KEYS), expected=_MEDIA, sections=("text_config",)
        ),
        "glm4_moe": Family(read=_glm4_moe, harmless=(*_DEEPSEEK_ROUTER, "use_qk_norm")),
        "dots1": Family(read=_dots1, harmless=_DEEPSEEK_ROUTER),
        "mixtral": Family(read=_mixtral, harmless=_ROUTER),
        "qwen2_moe": Family(read=_qwen2_moe, harmless=_QWEN_MOE),
        "qwen3_moe": Family(read=_qwen3_moe, harmless=_QWEN_MOE),
        "qwen3_vl_moe": Family(
            read=_qwen3_moe, harmless=(*_QWEN_MOE, *_MEDIA_KEYS), expected=_MEDIA, sections=("text_config",)
        ),
        "qwen3_vl_moe_text": Family(read=_qwen3_moe, harmless=_QWEN_MOE),
        "olmoe": Family(read=_olmoe, harmless=_ROUTER),
        "llama": Family(read=_llama, expected=_MLP_BIAS),
        "qwen2": Family(read=_qwen2),
        "qwen3": Family(read=_qwen3),
    }
)

# Layers without a field here, by model_type: a reader that passed over them would give wrong costs in silence.
_LINEAR = "(linear attention)"
NOT_MODELLED: Mapping[str, str] = MappingProxyType(
    {
        "nemotron_h": "Mamba-2 layers (hybrid_override_pattern)",
        "jamba": "Mamba layers (attn_layer_period)",
        "granitemoehybrid": "Mamba-2 layers (layer_types)",
        "qwen3_next": f"gated DeltaNet layers {_LINEAR}",
        "qwen3_5_moe": f"gated DeltaNet layers {_LINEAR}",
        "qwen3_5_moe_text": f"gated DeltaNet layers {_LINEAR}",
        "kimi_linear": f"Kimi delta attention layers {_LINEAR}",
        "kimi_k3": f"Kimi delta attention layers {_LINEAR}",
        "minimax": f"lightning attention layers {_LINEAR}",
        "minimax_text_01": f"lightning attention layers {_LINEAR}",
        "minimax_m3": "layers of sparse attention (sparse_attention_config)",
        "minimax_m3_vl": "layers of sparse attention (sparse_attention_config)",
        "deepseek_v4": "layers of compressed attention (compress_ratios) and several residual streams (hc_mult)",
        "deepseek_ref": "layers of compressed attention (compress_ratios) and several residual streams (hc_mult)",
        "gemma4": "layers of several head widths (global_head_dim)",
        "gemma4_text": "layers of several head widths (global_head_dim)",
        "mimo_v2_flash": "windowed layers with key/value heads of their own (swa_num_key_value_heads)",
        "jetmoe": "attention heads that a router selects (mixture of attention heads)",
        "lfm2_moe": "short convolution layers (layer_types)",
        "longcat_flash": "experts without work (zero_expert_num) and two attentions in a layer",
        "hunyuan": "keys and values that layers share (use_cla)",
    }
)
