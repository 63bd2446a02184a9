"""Read the architecture from a released `config.json` of the families that moesim models.

`hf_families` has the table of families, `hf_fields` looks fields up, and `hf_keys` says of each key that is not read
why that is right, or it is named to the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.hf_families import FAMILIES, NOT_MODELLED, Family
from moesim.scenario.hf_fields import Config
from moesim.scenario.hf_keys import Keys, shown, sort_keys
from moesim.strict_json import parse_json

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
