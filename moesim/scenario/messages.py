"""A pydantic error as one line of a user's language: what, where in the file, and the remedy."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moesim.errors import UserError
from moesim.scenario.base import FILE_NAME, Section
from moesim.scenario.catalogue import suggest
from moesim.scenario.document import Node, Path, dotted, find
from moesim.scenario.schema import Scenario
from moesim.scenario.short_forms import FLAT_CLUSTER_KEYS, home_within, kinds_at, section_at

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_MOST_KEYS = 8  # of a section, named to the user
_NAMES = {dict: "a mapping", list: "a list", str: "text", bool: "a flag", type(None): "nothing"}


AnySection = TypeVar("AnySection", bound=Section)


def validated(
    root: Node, schema: type[AnySection], *, subject: str = "scenario", shown: Callable[[Path], str] = dotted
) -> AnySection:
    """The section that a document is, by `schema`. Raises UserError with the most useful of its mistakes, one line."""
    try:
        return schema.model_validate(root.plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise UserError(describe(details, root, shown=shown, schema=schema, subject=subject)) from None


def describe(
    errors: Sequence[ErrorDetails],
    root: Node,
    *,
    shown: Callable[[Path], str],
    schema: type[Section] = Scenario,
    subject: str = "scenario",
) -> str:
    """The most useful of `errors` as one line `place: dotted.path: what; remedy`.

    An unknown key comes first, because a misspelt key also makes the right one missing; then the order of the schema.
    `shown` writes a path of the resolved file the way the user has it; the file follows `schema` and is a `subject`.
    """
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    data = root.plain
    path = _path_of(error["loc"], data)
    node, reached = find(root, path)
    if error["type"] in ("missing", "union_tag_not_found"):
        missing = shown((*path, "kind") if error["type"] == "union_tag_not_found" else path)
        return f"{node.where}: {missing}: missing{_choices(error, data, path, schema)}"
    place = node.key_where if error["type"] == "extra_forbidden" and reached == path else node.where
    if error["type"].startswith("union_tag"):
        place, path = find(root, (*path, "kind"))[0].where, (*path, "kind")
    return f"{place}: {shown(path) or subject}: {_what(error, data, path, schema)}"


def _path_of(loc: Sequence[int | str], data: Any) -> Path:
    """A pydantic location without the union tags that pydantic puts into it."""
    path: list[int | str] = []
    for index, key in enumerate(loc):
        is_item = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if is_item or (isinstance(data, dict) and key in data):
            data = data[key]
            path.append(key)
        elif index == len(loc) - 1 and isinstance(data, dict) and key != data.get("kind") and not _is_tag(key):
            path.append(key)  # a missing key
    return tuple(path)


def _is_tag(key: int | str) -> bool:
    return isinstance(key, str) and key.startswith("<")


def _choices(error: ErrorDetails, data: Any, path: Path, schema: type[Section]) -> str:
    if error["type"] == "union_tag_not_found":
        return f"; one of {', '.join(kinds_at(data, path, schema=schema))}"
    section = section_at(data, path[:-1], schema=schema)
    field = section.model_fields.get(str(path[-1])) if section and path else None
    kinds = kinds_at(data, path, schema=schema) if field else []
    return f"; one kind of {', '.join(kinds)} is needed" if len(kinds) > 1 else "; this key is required"


def _what(error: ErrorDetails, data: Any, path: Path, schema: type[Section]) -> str:
    kind, value = error["type"], error["input"]
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_known_keys(data, path, schema)}"
    if kind == "union_tag_invalid":
        kinds = kinds_at(data, path[:-1], schema=schema)
        return f'"{context["tag"]}" is unknown; {suggest(str(context["tag"]), kinds)}'
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"{_show(value)} is not allowed; {suggest(str(value), choices)}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"]))
    if kind in _EXPECTED:
        return _wrong_type(_EXPECTED[kind], value) + (_mapping(value, data, path, schema) if "model" in kind else "")
    comparisons = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in comparisons:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        bound = comparisons[kind]
        return f"must be {words[bound]} {_show_bound(context[bound])}, got {_show(value)}"
    if kind == "finite_number":
        return f"{_show(value)} is not a finite number"
    if kind == "string_pattern_mismatch":
        if context["pattern"] == FILE_NAME:
            return f"{_show(value)} may hold only letters, digits and . _ -"
        return f"{_show(value)} does not have the form {context['pattern'].strip('^$')}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"at most {context['max_length']:,} values are allowed, got {context['actual_length']:,}"
    if kind == "string_too_long":
        return f"must be at most {context['max_length']:,} characters long, got {_show(value)}"
    return f"{error['msg']}, got {_show(value)}"


def _wrong_type(expected: str, value: Any) -> str:
    if isinstance(value, str) and expected in ("a number", "a whole number") and _is_number(value):
        return f'"{value}" is text; write the number without quotes'
    if isinstance(value, float) and expected == "a whole number" and value.is_integer() and abs(value) < 1e18:
        return f"expected a whole number, got {value!r}; write {int(value)}"
    if isinstance(value, str) and expected == "true or false":
        return f'expected true or false, got the text "{value}"'
    return f"expected {expected}, got {_show(value)}"


def _mapping(value: Any, data: Any, path: Path, schema: type[Section]) -> str:
    """What to write where one word stands for a section."""
    kinds = kinds_at(data, path, schema=schema)
    if value in kinds:
        return f"; write {{kind: {value}}}"
    if kinds:
        return f"; write {{kind: ...}}, one of {', '.join(kinds)}"
    section = section_at(data, path, schema=schema)
    keys = [*(FLAT_CLUSTER_KEYS if path == ("cluster",) else ()), *(section.model_fields if section else ())]
    return f"; its keys are {', '.join(keys[:_MOST_KEYS])}{' ...' if len(keys) > _MOST_KEYS else ''}" if keys else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show_bound(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'the text "{value[:57]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _NAMES.get(type(value), type(value).__name__)


def _known_keys(data: Any, path: Path, schema: type[Section]) -> str:
    section = section_at(data, path[:-1], schema=schema)
    known = list(section.model_fields) if section else []
    if section and (home := home_within(section, str(path[-1]))):
        return f"did you mean {'.'.join(map(str, (*path[:-1], home, path[-1])))}?"
    if path[:-1] == ("cluster",):
        known += FLAT_CLUSTER_KEYS
    if path[:-1] == ("model",):
        known += ["hf_config"]
    return suggest(str(path[-1]), known)
