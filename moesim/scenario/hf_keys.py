"""Keys of `config.json`, each looked up by the kind of value that it must have, and fields that all families share.

Those are attention, its windows, which layers have experts. What a family calls `intermediate_size` is the width of its
dense FFN, or of one expert where no layer is dense. Transformers 5 writes `num_local_experts` for every family.
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
