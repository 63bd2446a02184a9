"""Read the architecture from a released `config.json` of the families that moesim models: ONE table of families.

Every key of a file is one of four things for its `model_type`: read into a field of `model` (`hf_readers`); harmless,
as listed here with the reason or with the family; expected to have one of some values, with what is left out otherwise;
or unknown. A key that is left out or unknown is named to the user. null says nothing under any key.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moesim.errors import UserError
from moesim.scenario import hf_readers as readers
from moesim.scenario.hf_keys import Config, Fields, shown
from moesim.strict_json import parse_json

_TEXT = "how text is read and generated"
_NUMERICS = "changes numbers, not work"
_START = "how weights begin, are stored or loaded"
_ROUTING = "stated by routing: which router, how it is balanced"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A key that costs nothing at one of `values`; at any other, `left_out` says what the model here does not have."""

    values: tuple[Any, ...]
    left_out: str


_HARMLESS = {
    _TEXT: (
        "add_cross_attention", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "is_decoder",
        "is_encoder_decoder", "max_length", "max_position_embeddings", "model_max_length", "pad_token_id", "prefix",
        "sep_token_id", "suppress_tokens", "tokenizer_class", "use_cache", "bad_words_ids", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "length_penalty", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values",
        "repetition_penalty", "temperature", "top_k", "top_p", "typical_p", "output_scores",
        "return_dict_in_generate", "cross_attention_hidden_size", "tie_encoder_decoder",
    ),
    _NUMERICS: (
        "attention_dropout", "clip_qkv", "hidden_dropout", "original_max_position_embeddings", "rms_norm_eps",
        "rope_interleave", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
    ),
    _START: (
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
        "auto_map", "chunk_size_feed_forward", "dtype", "ep_size", "finetuning_task", "id2label", "initializer_range",
        "label2id", "name_or_path", "output_attentions", "output_hidden_states", "pretraining_tp",
        "problem_type", "pruned_heads", "return_dict", "task_specific_params", "tf_legacy_loss", "torch_dtype",
        "torchscript", "transformers_version", "use_bfloat16", "use_return_dict",
    ),
}  # fmt: skip
_EXPECTED = {
    "hidden_act": Expected(values=("silu", "swish"), left_out="feed-forward networks are costed as SwiGLU"),
    "quantization_config": Expected(
        values=(), left_out="it says how the released weights are stored; training is costed with workload.precision"
    ),
}
MOST_NAMED = 8  # unknown keys in one line


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


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What became of every key of one `config.json`, in the order of the file; `left_out` holds whole sentences."""

    model_type: str
    read: tuple[str, ...]
    harmless: tuple[str, ...]
    left_out: tuple[str, ...]


def sort_keys(
    fields: Mapping[str, Any],
    *,
    name: str,
    model_type: str,
    family: Family,
    read: Collection[str],
    noted: Sequence[str],
) -> Keys:
    """The keys of the file `name` by what became of them; `read`: those looked at, `noted`: what reading left out."""
    harmless = {key for keys in _HARMLESS.values() for key in keys} | set(family.harmless)
    expected = {**_EXPECTED, **family.expected}
    left_out, unknown, ignored = list(noted), list[str](), list[str]()
    for key, value in fields.items():
        if key in read:
            continue
        if value is None or key in harmless or (key in expected and value in expected[key].values):
            ignored.append(key)
        elif key in expected:
            left_out.append(f"{name}: {shown(key, value)}: {expected[key].left_out}")
        else:
            unknown.append(shown(key, value))
    if unknown:
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        left_out.append(
            f"{name}: not known for model_type {model_type} and left out: {', '.join(unknown[:MOST_NAMED])}{more}; "
            "if this changes the layout, write the fields of model beside hf_config"
        )
    return Keys(
        model_type=model_type,
        read=tuple(key for key in fields if key in read),
        harmless=tuple(ignored),
        left_out=tuple(left_out),
    )


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


KV_HEADS = "num_key_value_heads"


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A `config.json` as it was read: the fields of a scenario's `model` section, and what became of its keys."""

    fields: Mapping[str, Any]
    keys: Keys


def read_hf_config(path: Path) -> HfModel:
    """The architecture in the `config.json` at `path` (or in the folder `path`).

    Raises UserError for a missing file, malformed JSON, an unknown `model_type`, a missing field or one of a value that
    no scenario can express.
    """
    if path.is_dir():
        path = path / "config.json"
    fields = _fields(path)
    family = fields.get("model_type")
    if isinstance(family, str) and family in NOT_MODELLED:
        raise UserError(f"{path} has {shown('model_type', family)}: {NOT_MODELLED[family]} are not modelled")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{path} has {shown('model_type', family)}, a family that is not read; read are {', '.join(FAMILIES)}: "
            "write its layout out under model, or change model_type in a copy of the file where the layout is the same"
        )
    how = FAMILIES[family]
    fields = flat(fields, how.sections, name=path.name)
    config = Config(_with_kv_heads(fields, how), path.name)
    config.get("model_type")
    if KV_HEADS not in fields and how.kv_heads is not None:
        config.left_out.append(f'{path.name} has no "{KV_HEADS}": {how.kv_heads}, as transformers has for {family}')
    model = how.read(config)
    keys = sort_keys(fields, name=path.name, model_type=family, family=how, read=config.read, noted=config.left_out)
    source = f"config.json of model type {family}"
    return HfModel(fields=model | {"source": source, "left_out": list(keys.left_out)}, keys=keys)


def _with_kv_heads(fields: Mapping[str, Any], how: Family) -> dict[str, Any]:
    """The fields with the family's own default; a null in the file means as many as heads."""
    return dict(fields) if how.kv_heads is None else {KV_HEADS: how.kv_heads} | dict(fields)


def flat(fields: Mapping[str, Any], sections: tuple[str, ...], *, name: str) -> dict[str, Any]:
    """The keys of the nested `sections` and those outside in one mapping; the nested ones win, but for `model_type`."""
    inner: dict[str, Any] = {}
    for section in sections:
        nested = fields.get(section)
        if not isinstance(nested, dict):
            raise UserError(f'{name} has no object "{section}"')
        inner |= nested
    tied = "tie_word_embeddings"
    if tied in inner and tied in fields and inner[tied] != fields[tied]:
        raise UserError(f"{name}: {shown(tied, fields[tied])} contradicts {shown(tied, inner[tied])} of {sections[0]}")
    outer = {key: value for key, value in fields.items() if key not in sections}
    return outer | inner | {"model_type": fields["model_type"]}


def _fields(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    try:
        fields = parse_json(text, constants=True)  # Nemotron's files have Infinity
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds {type(fields).__name__}, expected a JSON object")
    return fields
