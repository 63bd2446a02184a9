"""The families of `config.json` that are read: ONE table from `model_type` to the reader and the keys of the family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moesim.scenario import hf_readers as readers
from moesim.scenario.hf_fields import Config
from moesim.scenario.hf_keys import Expected
from moesim.scenario.hf_layers import Fields


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is read; `sections`: nested objects whose keys are read as if they stood outside.

    `kv_heads`: what transformers takes where a file has no `num_key_value_heads`; None where that is every head.
    """

    read: Callable[[Config], Fields]
    harmless: tuple[str, ...] = ()
    expected: Mapping[str, Expected] = field(default_factory=lambda: MappingProxyType({}))
    sections: tuple[str, ...] = ()
    kv_heads: int | None = None


_ROUTER = ("norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_DEEPSEEK_ROUTER = ("aux_loss_alpha", "norm_topk_prob", "output_router_logits", "scoring_func", "seq_aux")
# The heads' width is that of qk_nope_head_dim and qk_rope_head_dim.
_MLA = (*_DEEPSEEK_ROUTER, "head_dim", "qk_head_dim")
_MLP_BIAS = {"mlp_bias": Expected(values=(False,), left_out="the biases of feed-forward networks are not counted")}
_MEDIA = {"vision_config": Expected(values=(), left_out="the vision encoder: the language model alone is simulated")}
_MEDIA_KEYS = (
    "boi_token_index", "eoi_token_index", "ignore_index", "image_token_id", "image_token_index",
    "media_placeholder_token_id", "projector_patch_to_query_dict", "use_unified_vision_chunk", "video_placeholder",
    "video_token_id", "image_end_token_id", "image_start_token_id", "video_end_token_id", "video_start_token_id",
    "vision_end_token_id", "vision_feature_layer", "vision_start_token_id",
)  # fmt: skip

_BIASES = {"use_bias": Expected(values=(False,), left_out="the biases of projections are not counted")}
# A dense width beside experts in every layer belongs to no layer.
_QWEN_MOE = (*_ROUTER, "intermediate_size", "use_qk_norm")
_QWEN3_MOE: Mapping[str, Expected] = {
    "qkv_bias": Expected(values=(False,), left_out="the biases of attention are not counted"),
    "shared_expert_intermediate_size": Expected(values=(0,), left_out="the family has no shared expert"),
}

_GLM = (*_DEEPSEEK_ROUTER, "router_aux_loss_coef", "use_qk_norm")
_DSA = ("indexer_rope_interleave", "moe_router_dtype")
_GRANITE = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")
_MINIMAX = ("qk_norm_type", "rotary_dim", "scoring_func", "use_qk_norm", "use_routing_bias")
# Keys of a latent attention that use_mla switches off, and of a head that training does not have.
_HUNYUAN = (
    "add_classification_head", "cla_share_factor", "class_num", "group_limited_greedy", "kv_lora_rank",
    "moe_drop_tokens", "moe_random_routing_dropped_token", "norm_type", "num_media_embeds", "pool_type", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "routed_scaling_factor", "use_qk_norm", "use_rotary_pos_emb", "v_head_dim",
)  # fmt: skip
_ERNIE = ("moe_norm_min",)
_DBRX = (
    "attn_pdrop", "emb_pdrop", "hidden_size", "max_seq_len", "moe_jitter_eps", "moe_loss_weight",
    "moe_normalize_expert_weights", "resid_pdrop", "uniform_expert_assignment",
)  # fmt: skip
_DBRX_ACT = {"ffn_act_fn": Expected(values=({"name": "silu"},), left_out="feed-forward networks are costed as SwiGLU")}
# The dense width of a model without dense layers.
_LLAMA4 = ("attn_scale", "attn_temperature_tuning", "floor_scale", "for_llm_compressor", "intermediate_size_mlp",
           "use_qk_norm")  # fmt: skip
# The dense width of a model without dense layers.
_BAILING = (
    "embedding_dropout", "intermediate_size", "moe_router_enable_expert_bias", "multi_gate", "norm_head",
    "norm_softmax", "output_dropout", "rotary_dim", "router_dtype", "score_function", "use_qk_norm", "use_rmsnorm",
)  # fmt: skip
_GROK = ("attn_output_multiplier", "embedding_multiplier_scale", "max_attn_value", "output_multiplier_scale")
_GELU = {"hidden_act": Expected(values=("gelu", "gelu_new"), left_out="feed-forward networks are costed as GeGLU")}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek": Family(read=readers.deepseek, harmless=_DEEPSEEK_ROUTER),
        "deepseek_v2": Family(read=readers.deepseek_v2, harmless=(*_MLA, *_MLP_BIAS)),
        "deepseek_v3": Family(read=readers.deepseek_v3, harmless=_MLA),
        "kimi_k2": Family(read=readers.deepseek_v3, harmless=_MLA),
        "kimi_k25": Family(
            read=readers.deepseek_v3, harmless=(*_MLA, *_MEDIA_KEYS), expected=_MEDIA, sections=("text_config",)
        ),
        "glm4_moe": Family(read=readers.glm4_moe, harmless=_GLM, kv_heads=8),
        "glm4_moe_lite": Family(read=readers.glm4_moe_lite, harmless=_MLA),
        "glm4v_moe": Family(
            read=readers.glm4_moe,
            harmless=(*_GLM, *_MEDIA_KEYS),
            expected=_MEDIA,
            sections=("text_config",),
            kv_heads=8,
        ),
        "glm4v_moe_text": Family(read=readers.glm4_moe, harmless=_GLM, kv_heads=8),
        "solar_open": Family(read=readers.glm4_moe, harmless=_GLM, kv_heads=8),
        "exaone_moe": Family(read=readers.exaone_moe, harmless=_DEEPSEEK_ROUTER),
        "dots1": Family(read=readers.dots1, harmless=_DEEPSEEK_ROUTER),
        "mixtral": Family(read=readers.mixtral, harmless=_ROUTER, kv_heads=8),
        "qwen2_moe": Family(read=readers.qwen2_moe, harmless=_QWEN_MOE),
        "qwen3_moe": Family(read=readers.qwen3_moe, harmless=_QWEN_MOE, expected=_QWEN3_MOE, kv_heads=4),
        "qwen3_vl_moe": Family(
            read=readers.qwen3_moe, harmless=(*_QWEN_MOE, *_MEDIA_KEYS), expected=_MEDIA, sections=("text_config",)
        ),
        "qwen3_vl_moe_text": Family(read=readers.qwen3_moe, harmless=_QWEN_MOE),
        "olmoe": Family(read=readers.olmoe, harmless=_ROUTER),
        "flex_olmo": Family(read=readers.olmoe, harmless=_ROUTER),
        # lm_head_bias: one number for each entry of the vocabulary
        "phimoe": Family(read=readers.mixtral, harmless=(*_ROUTER, "input_jitter_noise", "lm_head_bias"), kv_heads=8),
        "granitemoe": Family(read=readers.granite, harmless=(*_ROUTER, *_GRANITE)),
        "granitemoeshared": Family(read=readers.granite, harmless=(*_ROUTER, *_GRANITE)),
        "minimax_m2": Family(read=readers.minimax_m2, harmless=(*_ROUTER, *_MINIMAX), kv_heads=8),
        "hunyuan_v1_moe": Family(read=readers.hunyuan, harmless=(*_ROUTER, *_HUNYUAN)),
        "ernie4_5_moe": Family(read=readers.ernie, harmless=(*_ROUTER, *_ERNIE), expected=_BIASES, kv_heads=4),
        "dbrx": Family(
            read=readers.dbrx, harmless=(*_ROUTER, *_DBRX), expected=_DBRX_ACT, sections=("attn_config", "ffn_config")
        ),
        "llama4": Family(
            read=readers.llama4,
            harmless=(*_ROUTER, *_LLAMA4, *_MEDIA_KEYS),
            expected=_MEDIA,
            sections=("text_config",),
            kv_heads=8,
        ),
        "llama4_text": Family(read=readers.llama4, harmless=(*_ROUTER, *_LLAMA4), kv_heads=8),
        "gpt_oss": Family(
            read=readers.gpt_oss, harmless=(*_ROUTER, "initial_context_length", "swiglu_limit"), kv_heads=8
        ),
        "bailing_moe": Family(read=readers.bailing, harmless=(*_ROUTER, *_BAILING), expected=_BIASES),
        "bailing_moe_v2": Family(read=readers.bailing, harmless=(*_ROUTER, *_BAILING), expected=_BIASES),
        "deepseek_v32": Family(read=readers.deepseek_v32, harmless=(*_MLA, *_DSA)),
        "glm_moe_dsa": Family(read=readers.deepseek_v32, harmless=(*_MLA, *_DSA)),
        "grok-1": Family(read=readers.grok, harmless=(*_ROUTER, *_GROK), expected=_GELU),
        "aria": Family(
            read=readers.aria, harmless=(*_ROUTER, *_MEDIA_KEYS), expected=_MLP_BIAS | _MEDIA, sections=("text_config",)
        ),
        "aria_text": Family(read=readers.aria, harmless=_ROUTER, expected=_MLP_BIAS),
        "llama": Family(read=readers.llama, expected=_MLP_BIAS),
        "qwen2": Family(read=readers.qwen2),
        "qwen3": Family(read=readers.qwen3),
        "qwen3_vl": Family(read=readers.qwen3, harmless=_MEDIA_KEYS, expected=_MEDIA, sections=("text_config",)),
    }
)

# Layers without a field here, by model_type: a reader that passed over them would give wrong costs in silence.
_LINEAR = "(linear attention)"
NOT_MODELLED: Mapping[str, str] = MappingProxyType(
    {
        "nemotron_h": "Mamba-2 layers (hybrid_override_pattern) and experts of two matrices (relu2)",
        "jamba": "Mamba layers (attn_layer_period)",
        "granitemoehybrid": "Mamba-2 layers (layer_types)",
        "qwen3_next": f"gated DeltaNet layers {_LINEAR}",
        "qwen3_5": f"gated DeltaNet layers {_LINEAR}",
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
        "afmoe": "attention outputs with gates of their own (gate_proj)",
        "ernie4_5_vl_moe": "experts of another width for pictures (moe_intermediate_size)",
        "switch_transformers": "encoder and decoder stacks",
        "nllb-moe": "encoder and decoder stacks",
        "lfm2_moe": "short convolution layers (layer_types)",
        "longcat_flash": "experts without work (zero_expert_num) and two attentions in a layer",
        "hunyuan": "keys and values that layers share (use_cla)",
    }
)
