"""What the layers of a `config.json` have in common: attention, its windows, and which layers have experts."""

from collections.abc import Iterable
from typing import Any

from moesim.scenario.base import MOST_LAYERS
from moesim.scenario.hf_fields import Config

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
