"""Readers of `config.json`, one for every layout: from a family's words to the fields of the `model` section.

The weights of norms of single heads are not counted: under 0.01 % of a model.
"""

from moesim.scenario.hf_keys import (
    CHUNKED,
    SLIDING,
    Config,
    Fields,
    all_windows,
    common_fields,
    dense_fields,
    every,
    experts,
    first_dense,
    layer_numbers,
    leading,
    local_numbers,
    numbers_of,
    router_groups,
    shared,
    windows,
)


def llama(config: Config) -> Fields:
    """A dense model."""
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


def qwen2(config: Config) -> Fields:
    """A dense model with biases of queries, keys and values."""
    fields = common_fields(config) | {"attention_bias": "qkv"}
    return _all_dense(config, fields | _qwen_windows(config, fields))


def qwen3(config: Config) -> Fields:
    """A dense model."""
    fields = common_fields(config) | {"query_key_norms": True}
    return _all_dense(config, fields | _qwen_windows(config, fields))


def qwen3_moe(config: Config) -> Fields:
    """Experts in all layers but those named dense."""
    fields = common_fields(config) | {"query_key_norms": True}
    fields |= _qwen_windows(config, fields) | experts(config, width="moe_intermediate_size")
    return fields | _qwen_dense_at(config, fields)


def qwen2_moe(config: Config) -> Fields:
    """As Qwen3-MoE, with a gated dense network beside the experts."""
    fields = common_fields(config)
    fields |= _qwen_windows(config, fields) | experts(config, width="moe_intermediate_size")
    beside = shared(1, config.count("shared_expert_intermediate_size", default=0))
    fields |= beside and beside | {"shared_gate": True}
    if config.flag("qkv_bias", default=True):
        fields |= {"attention_bias": "qkv"}
    return fields | _qwen_dense_at(config, fields)


def _deepseek_experts(config: Config, fields: Fields, *, dense: int = 0) -> Fields:
    """`dense`: dense layers where the file does not say."""
    config.only("moe_layer_freq", 1)
    return first_dense(config, fields, default=dense) | {
        "experts": config.count("n_routed_experts", "num_local_experts"),
        "top_k": config.count("num_experts_per_tok"),
        "shared_experts": config.count("n_shared_experts", default=0),
        "expert_intermediate": config.count("moe_intermediate_size"),
        "routed_scaling_factor": config.number("routed_scaling_factor", 1.0),
    }


def deepseek(config: Config) -> Fields:
    """DeepSeekMoE: dense layers first, then routed and shared experts."""
    fields = common_fields(config)
    return fields | _deepseek_experts(config, fields)


def _deepseek_mla(config: Config, *, method: str, dense: int = 0) -> Fields:
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
    fields = common_fields(config, head_dim=head_dim)
    fields |= _deepseek_experts(config, fields, dense=dense)
    fields |= {"attention": attention, "attention_bias": "none"}
    mtp_layers = config.count("num_nextn_predict_layers", "num_mtp_layers", default=0)
    return fields | {"mtp_layers": mtp_layers} | router_groups(config, method=method)


def deepseek_v2(config: Config) -> Fields:
    """Latent attention; groups of experts only where `topk_method` names them."""
    return _deepseek_mla(config, method="greedy")


def deepseek_v3(config: Config) -> Fields:
    """Latent attention; groups of experts always. Kimi-K2 is laid out likewise."""
    return _deepseek_mla(config, method="noaux_tc")


def glm4_moe_lite(config: Config) -> Fields:
    """Latent attention; the first layer is dense where the file does not say."""
    return _deepseek_mla(config, method="noaux_tc", dense=1)


def glm4_moe(config: Config) -> Fields:
    """As DeepSeekMoE, with prediction layers."""
    fields = common_fields(config, bias="qkv")
    fields |= _deepseek_experts(config, fields)
    mtp_layers = config.count("num_nextn_predict_layers", "num_mtp_layers", default=0)
    normed = {"query_key_norms": True} if config.flag("use_qk_norm") else {}
    return fields | normed | {"mtp_layers": mtp_layers} | router_groups(config, method="noaux_tc")


def dots1(config: Config) -> Fields:
    """A window holds from layer `max_window_layers` on, without a switch."""
    fields = common_fields(config)
    fields |= _deepseek_experts(config, fields)
    listed, window = local_numbers(config, fields), config.count("sliding_window", default=0)
    first = min(config.count("max_window_layers", default=fields["layers"]), fields["layers"])
    numbers = layer_numbers(fields)[first:] if listed is None else listed
    return fields | windows(fields, numbers, window) | router_groups(config, method="noaux_tc")


def exaone_moe(config: Config) -> Fields:
    """A window in all layers but every `sliding_window_pattern`-th."""
    fields = common_fields(config) | experts(config, width="moe_intermediate_size")
    listed, window = local_numbers(config, fields), config.count("sliding_window", default=0)
    if listed is None:
        step = every(config, "sliding_window_pattern", default=4)
        listed = [n for n in layer_numbers(fields) if (n + 1) % step]
    fields |= windows(fields, listed, window)
    fields |= shared(config.count("num_shared_experts", default=1), fields["expert_intermediate"])
    fields |= {
        "mtp_layers": config.count("num_nextn_predict_layers", default=0),
        "routed_scaling_factor": config.number("routed_scaling_factor", 2.5),
    }
    return fields | first_dense(config, fields, default=1) | router_groups(config, method="noaux_tc")


def mixtral(config: Config) -> Fields:
    """Experts in every layer, maybe with a window."""
    fields = common_fields(config) | experts(config, width="intermediate_size")
    return fields | all_windows(config, fields)


def olmoe(config: Config) -> Fields:
    """Experts in every layer; Phi-3.5-MoE is read as Mixtral."""
    return common_fields(config) | experts(config, width="intermediate_size") | {"query_key_norms": True}


def deepseek_v32(config: Config) -> Fields:
    """DeepSeek-V3 and the indexer of its sparse attention."""
    fields = deepseek_v3(config)
    if config.get("index_topk_freq") not in (None, 1) or set(map(str, config.items("indexer_types"))) - {"full"}:
        key = "indexer_types" if config.get("indexer_types") else "index_topk_freq"
        raise config.refuse(key, "is not modelled: indexers that several layers share")
    indexer = {
        "heads": config.count("index_n_heads"),
        "head_dim": config.count("index_head_dim"),
        "top_k": config.count("index_topk"),
    }
    return fields | {"attention": fields["attention"] | {"indexer": indexer}}


def granite(config: Config) -> Fields:
    """Experts in every layer, maybe with a dense network beside them."""
    fields = common_fields(config) | experts(config, width="intermediate_size")
    return fields | shared(1, config.count("shared_intermediate_size", default=0))


def minimax_m2(config: Config) -> Fields:
    """Experts in every layer and prediction modules."""
    if any(kind != 1 for kind in config.items("attn_type_list")):
        raise config.refuse("attn_type_list", "is not modelled: lightning attention layers (linear attention)")
    fields = granite(config)
    modules, depth = config.count("num_mtp_modules", default=0), config.count("mtp_transformer_layers", default=1)
    return fields | {"mtp_layers": modules * depth if config.flag("use_mtp") else 0}


def hunyuan(config: Config) -> Fields:
    """Widths and numbers of experts may be lists of all layers."""
    for key, what in (("use_cla", "keys and values that layers share"), ("use_mla", "latent attention here")):
        if config.flag(key):
            raise config.refuse(key, f"is not modelled: {what}")
    fields = common_fields(config)
    width = config.count("intermediate_size")
    fields |= {
        "head_dim": config.count("head_dim", "attention_head_dim", default=fields["head_dim"]),
        "experts": config.same("num_experts", "num_local_experts"),
        "top_k": config.same("moe_topk", "num_experts_per_tok"),
        "expert_intermediate": config.same("moe_intermediate_size", default=width),
    }
    if config.flag("use_mixed_mlp_moe", default=True):
        fields |= shared(config.same("num_shared_expert", default=1), width)
    return fields | dense_fields(config, fields, leading(config, "moe_layer_num_skipped"))


def ernie(config: Config) -> Fields:
    """Experts in every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""
    fields = common_fields(config, tied=True) | experts(
        config, width="moe_intermediate_size", of=("moe_num_experts",), top_k=("moe_k",)
    )
    first, step = config.count("moe_layer_start_index", default=1), every(config, "moe_layer_interval")
    end = config.get("moe_layer_end_index")
    last = fields["layers"] - 1 if end in (None, -1) else config.count("moe_layer_end_index")
    dense = [n for n in layer_numbers(fields) if not first <= n <= last or (n + 1) % step]
    beside = shared(config.count("moe_num_shared_experts", default=0), fields["expert_intermediate"])
    mtp_layers = config.count("num_nextn_predict_layers", default=0)
    return fields | beside | {"mtp_layers": mtp_layers} | dense_fields(config, fields, dense)


def dbrx(config: Config) -> Fields:
    """Own names, in two nested sections."""
    heads, hidden = config.count("n_heads"), config.count("d_model")
    kv_heads = config.count("kv_n_heads", default=heads)
    return {
        "layers": config.count("n_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": hidden // max(heads, 1),
        "attention": {"kind": "mha" if kv_heads == heads else "gqa"},
        "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings"),
        "experts": config.count("moe_num_experts"),
        "top_k": config.count("moe_top_k"),
        "expert_intermediate": config.count("ffn_hidden_size"),
    }


def llama4(config: Config) -> Fields:
    """One shared expert; layers with rotary positions attend within chunks, the others to all."""
    fields = common_fields(config) | experts(config, width="intermediate_size") | {"shared_experts": 1}
    step = every(config, "interleave_moe_layer_step")
    sparse = numbers_of(config, "moe_layers", fields) or {n for n in layer_numbers(fields) if not (n + 1) % step}
    dense = [n for n in layer_numbers(fields) if n not in sparse]
    chunk, listed = config.count("attention_chunk_size", default=0), local_numbers(config, fields, local=CHUNKED)
    if listed is None:
        listed = _rotary_layers(config, fields)
    fields |= windows(fields, listed, chunk, chunked=True)
    return fields | dense_fields(config, fields, dense, width="intermediate_size_mlp")


def _rotary_layers(config: Config, fields: Fields) -> list[int]:
    """Layers with rotary positions: `no_rope_layers` has a 1 for them, or all but every fourth."""
    marks, interval = config.items("no_rope_layers"), every(config, "no_rope_layer_interval", default=4)
    if marks and len(marks) != fields["layers"]:
        raise config.refuse("no_rope_layers", f"must have 0 or 1 for each of {fields['layers']} layers")
    if marks:
        return [number for number, mark in enumerate(marks) if mark]
    return [number for number in layer_numbers(fields) if (number + 1) % interval]


def gpt_oss(config: Config) -> Fields:
    """Every other layer has a window; heads have sinks, and experts and their router biases."""
    fields = common_fields(config) | experts(config, width="intermediate_size", top_k=("experts_per_token",))
    listed = local_numbers(config, fields, local=SLIDING)
    if listed is None:
        listed = list(layer_numbers(fields)[::2])
    fields |= windows(fields, listed, config.count("sliding_window", default=128))
    return fields | {"attention_sinks": True, "expert_bias": True}


def bailing(config: Config) -> Fields:
    """Ling and Ring: dense layers first, routed and shared experts."""
    fields = common_fields(config) | experts(config, width="moe_intermediate_size")
    width = config.count("moe_shared_expert_intermediate_size", default=fields["expert_intermediate"])
    fields |= shared(config.count("num_shared_experts", default=0), width)
    if config.flag("use_qkv_bias"):
        fields |= {"attention_bias": "all" if config.flag("use_bias") else "qkv"}
    fields |= {"mtp_layers": config.count("num_nextn_predict_layers", default=0)}
    fields |= {"routed_scaling_factor": config.number("routed_scaling_factor", 1.0)}
    dense = leading(config, "first_k_dense_replace")
    return fields | dense_fields(config, fields, dense) | router_groups(config, method="noaux_tc")


def grok(config: Config) -> Fields:
    """The embedding and the head are one matrix in the published code."""
    return common_fields(config, tied=True) | experts(config, width="intermediate_size")


def aria(config: Config) -> Fields:
    """The language model of Aria."""
    fields = common_fields(config)
    fields |= experts(config, width="intermediate_size", of=("moe_num_experts",), top_k=("moe_topk",))
    return fields | shared(config.count("moe_num_shared_experts", default=2), fields["expert_intermediate"])
