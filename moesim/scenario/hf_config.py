"""Read the architecture from a released `config.json` of the families that moesim models.

Field names follow each family's public configuration; what a family calls `intermediate_size` is the width of its
dense FFN, except in Mixtral and OLMoE, where it is the width of one expert.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.strict_json import parse_json


class _Config:
    """The file's fields; a missing one is a user's mistake, not a KeyError."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self.fields, self.name = fields, name

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; `default` (or an error without one) where the file has none or null."""
        value = self.fields.get(key)
        if value is None:
            if default is None:
                raise UserError(f'{self.name} has no "{key}"')
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f'{self.name}: "{key}" must be a whole number that is not negative, got {value!r}')
        return value

    def only(self, key: str, value: int) -> None:
        """Refuses a layout that a scenario cannot express."""
        if self.fields.get(key) not in (None, value):
            raise UserError(f'{self.name}: "{key}" = {self.fields[key]!r} is not supported, only {value}')


def _common(config: _Config) -> dict[str, Any]:
    heads = config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads)
    hidden = config.count("hidden_size")
    return {
        "layers": config.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": config.count("head_dim", hidden // max(heads, 1)),
        "attention": {"kind": "mha" if kv_heads == heads else "gqa"},
        "vocab": config.count("vocab_size"),
        "tied_embeddings": config.fields.get("tie_word_embeddings") is True,
    }


def _dense(config: _Config) -> dict[str, Any]:
    fields = _common(config)
    return fields | {"dense_layers": fields["layers"], "dense_intermediate": config.count("intermediate_size")}


def _deepseek_moe(config: _Config) -> dict[str, Any]:
    config.only("moe_layer_freq", 1)
    scaling = config.fields.get("routed_scaling_factor")
    return _common(config) | {
        "dense_layers": config.count("first_k_dense_replace", 0),
        "dense_intermediate": config.count("intermediate_size"),
        "experts": config.count("n_routed_experts"),
        "top_k": config.count("num_experts_per_tok"),
        "shared_experts": config.count("n_shared_experts", 0),
        "expert_intermediate": config.count("moe_intermediate_size"),
        "routed_scaling_factor": 1.0 if scaling is None else scaling,
    }


def _deepseek_mla(config: _Config) -> dict[str, Any]:
    head_dim = config.count("qk_nope_head_dim")
    attention = {
        "kind": "mla",
        "q_lora_rank": config.fields.get("q_lora_rank"),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "rope_head_dim": config.count("qk_rope_head_dim"),
        "value_head_dim": config.count("v_head_dim", head_dim),
    }
    return _deepseek_moe(config) | {
        "head_dim": head_dim,
        "attention": attention,
        "mtp_layers": config.count("num_nextn_predict_layers", 0),
    }


def _mixtral(config: _Config) -> dict[str, Any]:
    return _experts_everywhere(config, experts="num_local_experts", width="intermediate_size")


def _olmoe(config: _Config) -> dict[str, Any]:
    return _experts_everywhere(config, experts="num_experts", width="intermediate_size")


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    config.only("decoder_sparse_step", 1)
    if config.fields.get("mlp_only_layers"):
        raise UserError(f'{config.name}: "mlp_only_layers" is not supported: dense layers must come first')
    return _experts_everywhere(config, experts="num_experts", width="moe_intermediate_size")


def _experts_everywhere(config: _Config, *, experts: str, width: str) -> dict[str, Any]:
    return _common(config) | {
        "experts": config.count(experts),
        "top_k": config.count("num_experts_per_tok"),
        "expert_intermediate": config.count(width),
    }


_FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "deepseek": _deepseek_moe,
    "deepseek_v2": _deepseek_mla,
    "deepseek_v3": _deepseek_mla,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
}


def read_hf_config(path: Path) -> dict[str, Any]:
    """The fields of a scenario's `model` section from the `config.json` at `path` (or in the folder `path`).

    Raises UserError for a missing file, malformed JSON, an unknown `model_type` or a missing field.
    """
    if path.is_dir():
        path = path / "config.json"
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
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UserError(f"{path} has model_type {family!r}; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[family](_Config(fields, path.name)) | {"source": f"config.json of model type {family}"}
