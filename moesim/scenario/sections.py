"""Which section class the schema expects at a path: what messages suggest and what a switch of `kind` keeps."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from moesim.scenario.base import Section
from moesim.scenario.document import Path
from moesim.scenario.schema import Scenario


def section_at(data: Any, path: Path, *, schema: type[Section] = Scenario) -> type[Section] | None:
    """The section class that `schema` expects at `path` of the file `data` (nested dicts and lists).

    None where there is no section or where its kind is unknown.
    """
    annotation: Any = schema
    for key in path:
        annotation, data = _step(annotation, data, key)
    return _choose(annotation, data)


def _child(data: Any, key: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and str(key).isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def kinds_at(data: Any, path: Path, *, schema: type[Section] = Scenario) -> list[str]:
    """The kinds that a section at `path` may have, in the order of the schema."""
    annotation: Any = schema
    for key in path:
        annotation, data = _step(annotation, data, key)
    sections = _sections_of(annotation)
    fields = [section.model_fields["kind"] for section in sections if "kind" in section.model_fields]
    return [kind for kind_field in fields for kind in get_args(kind_field.annotation)]


def home_within(section: type[Section], key: str) -> str | None:
    """The field of `section` whose own section has the key: what a key written one level too high was meant for."""
    for name, field in section.model_fields.items():
        if any(key in part.model_fields for part in _sections_of(field.annotation)):
            return name
    return None


def _step(annotation: Any, data: Any, key: str | int) -> tuple[Any, Any]:
    section = _choose(annotation, data)
    if section is not None and key in section.model_fields:
        return section.model_fields[str(key)].annotation, _child(data, key)
    return _item_type(annotation), _child(data, key)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [alternative for part in get_args(annotation) for alternative in _alternatives(part)]
    return [annotation]


def _sections_of(annotation: Any) -> list[type[Section]]:
    return [part for part in _alternatives(annotation) if isinstance(part, type) and issubclass(part, Section)]


def _choose(annotation: Any, data: Any) -> type[Section] | None:
    sections = _sections_of(annotation)
    if len(sections) == 1:
        return sections[0]
    kind = data.get("kind") if isinstance(data, dict) else None
    for section in sections:
        if kind in get_args(section.model_fields["kind"].annotation):
            return section
    return None


def _item_type(annotation: Any) -> Any:
    for part in _alternatives(annotation):
        if get_origin(part) is tuple:
            return get_args(part)[0]
    return None
