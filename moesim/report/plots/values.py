"""Values of keys: nested data as dotted keys, and every value as a short text."""

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"  # what a point has of a key that it does not know
_LONGEST = 40
_SIZES = ("data", "context", "tensor", "pipeline", "expert", "expert_tensor")
_VAGUE = ("kind", "limit", "factor", "name", "expert", "device", "communication", "file", "dtype", "model", "preset")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as dotted keys; lists of plain values stay whole."""
    if isinstance(value, Mapping):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in items:
        found |= flatten(child, f"{prefix}.{key}" if prefix else key)
    return found


def look_up(flat: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in flattened data; `cluster.gpu` also means `cluster.pools.0.gpu`."""
    section, _, rest = key.partition(".")
    for name in (key, f"cluster.pools.0.{rest}" if section == "cluster" else key):
        if name in flat:
            return flat[name]
        below = {inner.removeprefix(name + "."): value for inner, value in flat.items() if inner.startswith(name + ".")}
        if below:
            return below
    return MISSING


def text_of(value: Any, *, longest: int = _LONGEST) -> str:
    """A value as a person writes it; what is longer than `longest` loses its head, as a path does, or its tail."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, Mapping):
        parts = [(key, text_of(child, longest=longest)) for key, child in value.items()]
        text = ", ".join(child if key == "kind" else f"{key} {child}" for key, child in parts) or "nothing"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(text_of(child, longest=longest) for child in value) or "nothing"
    else:
        text = str(value)
    text = "".join(char if char.isprintable() else " " for char in text)
    if len(text) <= longest:
        return text
    return "…" + text[1 - longest :] if isinstance(value, str) else text[: longest - 1] + "…"


def is_number(value: Any) -> bool:
    """Whether an axis can place the value; a flag is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key without the front parts that are not needed to tell the keys apart: `routing.seed` -> `seed`.

    Underscores become blanks; a part that says nothing alone, as `kind`, keeps the one before it.
    """
    unique = [key.removeprefix("$").split(".") for key in dict.fromkeys(keys)]
    names = {}
    for key, parts in zip(dict.fromkeys(keys), unique, strict=True):
        if parts[:-1] == ["parallelism"] and parts[-1] in _SIZES:
            names[key] = parts[-1].replace("_", " ") + " parallel"
            continue
        length = 2 if parts[-1] in _VAGUE and len(parts) > 1 else 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in unique) > 1:
            length += 1
        names[key] = " ".join(parts[-length:]).replace("_", " ")
    return names


def plain(text: str) -> str:
    """A text as plotly shows it: what plotly would read as a tag or an entity is escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
