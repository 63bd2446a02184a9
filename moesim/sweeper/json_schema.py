"""The JSON Schema of study files, for editors: the keys of the tables that the reader checks them by."""

from collections.abc import Mapping
from typing import Any

from moesim.sweeper.axes import AXIS_KEYS
from moesim.sweeper.study import PLOT_KEYS, PLOT_KINDS, STUDY_KEYS

_TEXT = {"type": "string", "minLength": 1}
_LIST = {"type": "array", "minItems": 1}
_SETTINGS = {"type": "object"}  # dotted keys of a scenario and their values


def study_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a study; the values of a scenario's keys are not looked into."""
    axis = _mapping(
        AXIS_KEYS,
        required=("values",),
        key=_TEXT,
        keys=_LIST | {"items": _TEXT},
        values=_LIST,
        labels=_LIST,
        repeat={"type": "boolean"},
    )
    plot = _mapping(
        PLOT_KEYS,
        required=("kind",),
        kind={"enum": list(PLOT_KINDS)},
        x=_TEXT,
        y=_LIST | {"items": _TEXT},
        colour=_TEXT,
    )
    study = _mapping(
        STUDY_KEYS,
        required=("name", "base"),
        name=_TEXT | {"pattern": "^[A-Za-z0-9._-]+$"},
        base=_TEXT,
        set=_SETTINGS,
        axes=_LIST | {"items": axis},
        points=_LIST | {"items": _SETTINGS},
        reference=_SETTINGS,
        plot=plot,
    )
    study["anyOf"] = [{"required": ["axes"]}, {"required": ["points"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **study, "title": "moesim study"}


def _mapping(texts: Mapping[str, str], *, required: tuple[str, ...], **types: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping that has the keys of `texts` alone, each with its type."""
    properties = {key: {**types[key], "description": text} for key, text in texts.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}
