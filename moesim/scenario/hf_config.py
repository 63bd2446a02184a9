"""Read the architecture from a released `config.json` of the families that moesim models.

Field names follow each family's public configuration; what a family calls `intermediate_size` is the width of its
dense FFN, except in Mixtral and OLMoE, where it is the width of one expert. Transformers 5 writes `num_local_experts`
for every family. `hf_keys` says of each key that is not read here why that is right, or it is named to the user.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.hf_keys import Keys, shown, sort_keys
from moesim.strict_json import parse_json


class _Config:
    """The file's fields; a missing one is a user's mistake, not a KeyError. It knows which were looked at."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self._fields, self._name = fields, name
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

    def flag(self, key: str) -> bool:
        """True or false; false where the file has none or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value is True

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


def _common(config: _Config) -> dict[str, Any]:
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", default=heads)
    hidden = config.count("hidden_size")
    return {
        "layers": config.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": config.count("head_dim", default=hidden // max(heads, 1)),
        "attention": {"kind": "mha" if kv_heads == heads else "gqa"},
        "vocab": config.count("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings"),
    }


def _windowed(config: _Config) -> dict[str, Any]:
    """What a window of attention in all layers alters: a plain window has no global tokens."""
    window = config.count("sliding_window", default=0)
    return {"attention": {"kind": "local_global", "window": window, "global_every": None}} if window else {}


def _qwen(config: _Config) -> dict[str, Any]:
    """Qwen attends to a window only where `use_sliding_window` says so, and from layer `max_window_layers` on."""
    fields = _common(config)
    layers, types = fields["layers"], config.items("layer_types")
    config.get("sliding_window")  # read, whatever the switches below say of it
    full = min(config.count("max_window_layers", default=28), layers)
    known = ("full_attention", "sliding_attention")
    if types and (len(types) != layers or not all(kind in known for kind in types)):
        raise config.refuse("layer_types", f"must name {known[0]} or {known[1]} for each of {layers} layers")
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return fields
    windowed = types.count(known[1]) if types else layers - full
    if windowed == layers:
        return fields | _windowed(config)
    if windowed:
        config.note("sliding_window", f"the window of {windowed} of {layers} layers; all are costed as full attention")
    return fields


def _dense(config: _Config, common: Callable[[_Config], dict[str, Any]] = _common) -> dict[str, Any]:
    fields = common(config)
    return fields | {"dense_layers": fields["layers"], "dense_intermediate": config.count("intermediate_size")}


def _qwen_dense(config: _Config) -> dict[str, Any]:
    return _dense(config, _qwen)


def _deepseek_moe(config: _Config) -> dict[str, Any]:
    config.only("moe_layer_freq", 1)
    return _common(config) | {
        "dense_layers": config.count("first_k_dense_replace", default=0),
        "dense_intermediate": config.count("intermediate_size"),
        "experts": config.count("n_routed_experts", "num_local_experts"),
        "top_k": config.count("num_experts_per_tok"),
        "shared_experts": config.count("n_shared_experts", default=0),
        "expert_intermediate": config.count("moe_intermediate_size"),
        "routed_scaling_factor": config.number("routed_scaling_factor", 1.0),
    }


def _deepseek_mla(config: _Config, *, method: str) -> dict[str, Any]:
    head_dim = config.count("qk_nope_head_dim")
    attention = {
        "kind": "mla",
        "q_lora_rank": None if config.get("q_lora_rank") is None else config.count("q_lora_rank"),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "rope_head_dim": config.count("qk_rope_head_dim"),
        "value_head_dim": config.count("v_head_dim", default=head_dim),
    }
    mtp_layers = config.count("num_nextn_predict_layers", default=0)
    latent = {"head_dim": head_dim, "attention": attention, "mtp_layers": mtp_layers}
    return _deepseek_moe(config) | latent | _router_groups(config, method=method)


def _router_groups(config: _Config, *, method: str) -> dict[str, int]:
    """The group limit of the family's router; `method` is what `topk_method` is without a word."""
    groups, limit = config.count("n_group", default=1), config.count("topk_group", default=1)
    method = config.get("topk_method") or method
    if method in ("group_limited_greedy", "noaux_tc"):
        return {"router_groups": groups, "router_group_limit": limit}
    if method != "greedy":
        config.note("topk_method", "an unknown way to select experts; no group limit is applied")
    return {}


def _deepseek_v2(config: _Config) -> dict[str, Any]:
    return _deepseek_mla(config, method="greedy")


def _deepseek_v3(config: _Config) -> dict[str, Any]:
    return _deepseek_mla(config, method="noaux_tc")


def _mixtral(config: _Config) -> dict[str, Any]:
    return _experts_everywhere(config, _common(config), width="intermediate_size") | _windowed(config)


def _olmoe(config: _Config) -> dict[str, Any]:
    return _experts_everywhere(config, _common(config), width="intermediate_size")


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    config.only("decoder_sparse_step", 1)
    fields = _experts_everywhere(config, _qwen(config), width="moe_intermediate_size")
    dense = config.items("mlp_only_layers")
    if not dense:
        return fields
    if not all(type(layer) is int for layer in dense) or sorted(dense) != list(range(len(dense))):
        raise config.refuse("mlp_only_layers", "is not supported: dense layers must be the first ones, e.g. [0, 1]")
    return fields | {"dense_layers": len(dense), "dense_intermediate": config.count("intermediate_size")}


def _experts_everywhere(config: _Config, common: dict[str, Any], *, width: str) -> dict[str, Any]:
    return common | {
        "experts": config.count("num_experts", "num_local_experts"),
        "top_k": config.count("num_experts_per_tok"),
        "expert_intermediate": config.count(width),
    }


_FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "deepseek": _deepseek_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "llama": _dense,
    "qwen2": _qwen_dense,
    "qwen3": _qwen_dense,
}


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
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UserError(
            f"{path} has {shown('model_type', family)}, a family that is not read; read are {', '.join(_FAMILIES)}: "
            "write its layout out under model, or change model_type in a copy of the file where the layout is the same"
        )
    config = _Config(fields, path.name)
    config.get("model_type")
    model = _FAMILIES[family](config)
    keys = sort_keys(fields, name=path.name, model_type=family, read=config.read, noted=config.left_out)
    source = f"config.json of model type {family}"
    return HfModel(fields=model | {"source": source, "left_out": list(keys.left_out)}, keys=keys)


def _fields(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds {type(fields).__name__}, expected a JSON object")
    return fields
