"""Readers of `config.json`, one for every layout: from a family's words to the fields of the `model` section.

First the fields of a file, each looked up by the kind of value that it must have; then what the layers of all families
have in common (attention, its windows, which layers have experts); then the families.
What a family calls `intermediate_size` is the width of its dense FFN, or of one expert where no layer is dense.
Transformers 5 writes `num_local_experts` for every family. The weights of norms of single heads are not counted: under
0.01 % of a model.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from moesim.errors import UserError
from moesim.scenario.base import MOST_LAYERS
from moesim.strict_json import json_text


class Config:
    """The file's fields; a missing one is a user's mistake, not a KeyError. It knows which were looked at."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self._fields, self._name = dict(fields), name
        self.read: set[str] = set()
        self.left_out: list[str] = []

    def get(self, key: str) -> Any:
        """The value as it is in the file; None where there is none."""
        self.read.add(key)
        return self._fields.get(key)

    def refuse(self, key: str, what: str) -> UserError:
        """The error that names the key and its value."""
        return UserError(f"{self._name}: {shown(key, self._fields.get(key))} {what}")

    def count(self, *keys: str, default: int | None = None) -> int:
        """A whole number under any of the names `keys`; `default` (or an error without one) where all are null."""
        found = {key: self.get(key) for key in keys if self.get(key) is not None}
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.refuse(key, "must be a whole number that is not negative")
            if value != next(iter(found.values())):
                raise self.refuse(key, f'contradicts "{next(iter(found))}", another name for the same')
        if not found and default is None:
            raise UserError(f'{self._name} has no "{keys[0]}"')
        return next(iter(found.values()), default or 0)

    def number(self, key: str, default: float) -> float:
        """A finite number; `default` where the file has none or null."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, "must be a finite number")
        return value

    def same(self, *keys: str, default: int | None = None) -> int:
        """As `count`, of keys that may also list a number for every layer; a list of several numbers is refused."""
        for key in keys:
            value = self.get(key)
            if isinstance(value, list) and value:
                if any(type(entry) is not int or entry < 0 or entry != value[0] for entry in value):
                    raise self.refuse(key, "is not supported, only one whole number for all layers")
                self._fields[key] = value[0]
        return self.count(*keys, default=default)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; `default` where the file has none or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return default if value is None else value

    def items(self, key: str) -> list[Any]:
        """A list; empty where the file has none or null."""
        value = self.get(key)
        if not isinstance(value, list | None):
            raise self.refuse(key, "must be a list")
        return value or []

    def only(self, key: str, value: int) -> None:
        """Refuses a layout that a scenario cannot express."""
        if self.get(key) not in (None, value):
            raise self.refuse(key, f"is not supported, only {value}")

    def note(self, key: str, left_out: str) -> None:
        """Keeps what the model here does not have of the file's."""
        self.left_out.append(f"{self._name}: {shown(key, self._fields.get(key))}: {left_out}")


Fields = dict[str, Any]  # fields of the `model` section

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def common_fields(config: Config, *, bias: str = "all", tied: bool = False, head_dim: int | None = None) -> Fields:
    """The fields that nearly all families write alike; `bias`: the biases that `attention_bias` switches on.

    `tied`: whether embedding and head are one matrix without a word; `head_dim`: of a family that does not write it.
    """
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", default=heads)
    hidden = config.count("hidden_size")
    fields = {
        "layers": config.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": config.count("head_dim", default=hidden // max(heads, 1)) if head_dim is None else head_dim,
        "attention": {"kind": "mha" if kv_heads == heads else "gqa"},
        "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", default=tied),
    }
    return fields | ({"attention_bias": bias} if config.flag("attention_bias") else {})


def windows(fields: Fields, numbers: Iterable[int], window: int, *, chunked: bool = False) -> Fields:
    """The fields of a model whose layers `numbers` see `window` tokens: of all layers, or of some of them."""
    numbers = list(numbers)
    if not numbers or not window:
        return {}
    if len(numbers) == fields["layers"] and not chunked:
        return {"attention": {"kind": "local_global", "window": window, "global_every": None}}
    return {"local": {"window": window, "chunked": chunked, "layers": numbers}}


def all_windows(config: Config, fields: Fields) -> Fields:
    """`sliding_window` of all layers, where there is one."""
    return windows(fields, layer_numbers(fields), config.count("sliding_window", default=0))


def layer_numbers(fields: Fields) -> range:
    """The numbers of the layers, as many as a scenario may have: the schema refuses more."""
    return range(min(fields["layers"], MOST_LAYERS))


def local_numbers(config: Config, fields: Fields, *, local: str = SLIDING) -> list[int] | None:
    """The layers that `layer_types` calls `local`; None where the file lists no types."""
    layers, types = fields["layers"], config.items("layer_types")
    if not types:
        return None
    for kind in types:
        if kind not in (FULL, local):
            what = f"has layers that are not modelled: it must name {FULL} or {local} for each layer"
            raise config.refuse("layer_types", f"({_word(kind)}) {what}")
    if len(types) != layers:
        raise config.refuse("layer_types", f'must name {FULL} or {local} for each of "num_hidden_layers" = {layers}')
    return [number for number, kind in enumerate(types) if kind == local]


def _word(value: Any) -> str:
    return value[:30] if isinstance(value, str) else type(value).__name__


def dense_fields(config: Config, fields: Fields, dense: Iterable[int], *, width: str = "intermediate_size") -> Fields:
    """The fields of a model whose layers `dense` have no experts; `width` is the key of their width."""
    numbers = sorted(dense)
    if not numbers:
        return {}
    found: Fields = {"dense_layers": len(numbers), "dense_intermediate": config.count(width)}
    return found if numbers == list(range(len(numbers))) else found | {"dense_at": numbers}


def first_dense(config: Config, fields: Fields, *, default: int = 0) -> Fields:
    """Dense layers that come first, as DeepSeek counts them, or those that `mlp_layer_types` names."""
    dense, types = config.count("first_k_dense_replace", default=default), config.items("mlp_layer_types")
    if types:
        if len(types) != fields["layers"] or any(kind not in ("dense", "sparse") for kind in types):
            raise config.refuse("mlp_layer_types", f"must name dense or sparse for each of {fields['layers']} layers")
        return dense_fields(config, fields, [n for n, kind in enumerate(types) if kind == "dense"])
    return {
        "dense_layers": dense,
        "dense_intermediate": config.count("intermediate_size", default=None if dense else 0),
    }


def leading(config: Config, key: str) -> range:
    """The layers before the number that `key` holds; as many as a scenario may have."""
    return range(min(config.count(key, default=0), MOST_LAYERS))


def experts(config: Config, *, width: str, of: tuple[str, ...] = (), top_k: tuple[str, ...] = ()) -> Fields:
    """The routed experts; `width`: the key of an expert's width, `of` and `top_k`: the family's own names."""
    return {
        "experts": config.count(*of, "num_experts", "num_local_experts"),
        "top_k": config.count(*top_k, "num_experts_per_tok"),
        "expert_intermediate": config.count(width),
    }


def shared(count: int, width: int) -> Fields:
    """`count` shared experts of `width`; no fields where there are none."""
    return {"shared_experts": count, "shared_intermediate": width} if count and width else {}


def router_groups(config: Config, *, method: str) -> Fields:
    """The group limit of the family's router; `method` is what `topk_method` is without a word."""
    groups, limit = config.count("n_group", default=1), config.count("topk_group", default=1)
    method = config.get("topk_method") or method
    if method in ("group_limited_greedy", "noaux_tc"):
        return {"router_groups": groups, "router_group_limit": limit}
    if method != "greedy":
        config.note("topk_method", "an unknown way to select experts; no group limit is applied")
    return {}


def numbers_of(config: Config, key: str, fields: Fields) -> set[int]:
    """A list of layer numbers."""
    listed = config.items(key)
    if not all(type(number) is int and 0 <= number < fields["layers"] for number in listed):
        raise config.refuse(key, f"must list numbers of layers, 0 to {fields['layers'] - 1}")
    return set(listed)


def every(config: Config, key: str, default: int = 1) -> int:
    """A step between layers, at least 1."""
    step = config.count(key, default=default)
    if step < 1:
        raise config.refuse(key, "must be at least 1")
    return step


def shown(key: str, value: Any) -> str:
    """A key and its value in few words, e.g. `"sliding_window" = 4096`; a section by its kind alone."""
    if isinstance(value, dict):
        kind = value.get("quant_method", value.get("kind"))
        return f"{_short(key)} ({kind if isinstance(kind, str) else f'{len(value)} keys'})"
    return f"{_short(key)} = {_short(value)}"


def _short(value: Any, most: int = 40) -> str:
    text = json_text(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


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
