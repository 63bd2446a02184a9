"""YAML text as plain data plus the place of every key and value: the strict subset that scenario files use.

Strict means: YAML 1.2 scalars (`1e9` is a number, `on` and `yes` are text), no duplicate keys, no tags, finite numbers,
one document, and limits on nesting and on what aliases expand to.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from moesim.errors import UserError

MAX_DEPTH = 24
MAX_NODES = 200_000  # 94 layers of 512 expert counts are 48,000
MAX_CHARACTERS = 8_000_000
_MAX_DIGITS = 40

_NULLS = {"", "~", "null", "Null", "NULL"}
_FLAGS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Path = tuple[str | int, ...]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Node:
    """One YAML value: `value` is a scalar, a dict of key to Node or a list of Node. `where` is its place for messages.

    `key_where` is the place of the key that holds it (its own place inside lists and at the root).
    `size` counts the nodes below it, each alias expanded.
    """

    value: Any
    where: str
    key_where: str
    size: int = 1

    @property
    def plain(self) -> Any:
        """The value as nested dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain for child in self.value]
        return self.value


def mapping_node(children: dict[str, Node], like: Node) -> Node:
    """A mapping at the place of the node `like`."""
    return Node(children, like.where, like.key_where, 1 + sum(child.size for child in children.values()))


def list_node(children: list[Node], like: Node) -> Node:
    """A list at the place of the node `like`."""
    return Node(children, like.where, like.key_where, 1 + sum(child.size for child in children))


def node_of(value: Any, like: Node) -> Node:
    """Plain data as nodes, all at the place of the node `like`."""
    if isinstance(value, Mapping):
        return mapping_node({str(key): node_of(child, like) for key, child in value.items()}, like)
    if isinstance(value, list | tuple):
        return list_node([node_of(child, like) for child in value], like)
    return Node(value, like.where, like.key_where)


def read_yaml(path: FilePath, *, what: str) -> Node:
    """The document in a file that holds a `what`. Raises UserError, one line, where it cannot be read or parsed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        column = error.start - (content.rfind(b"\n", 0, error.start) + 1) + 1
        remedy = f"save the file as UTF-8, or name the YAML file of the {what}"
        raise UserError(f"{path}:{line}:{column}: not UTF-8 text; {remedy}") from None
    return parse_yaml(text, source=str(path))


def find(node: Node, path: Path) -> tuple[Node, Path]:
    """The node at `path`, or the deepest existing one above it, with the path that was reached; items by number."""
    for depth, key in enumerate(path):
        child = None
        if isinstance(node.value, dict):
            child = node.value.get(key)
        elif isinstance(node.value, list) and str(key).isdigit() and int(key) < len(node.value):
            child = node.value[int(key)]
        if child is None:
            return node, path[:depth]
        node = child
    return node, path


def dotted(path: Path) -> str:
    """The keys of a path as one writes them."""
    return ".".join(str(key) for key in path)


def refusal(root: Node, path: Path, message: str, *, shown: Callable[[Path], str] = dotted) -> UserError:
    """The error of a key in one line: where it stands, its path as `shown` writes it, and the message."""
    return UserError(f"{find(root, path)[0].where}: {shown(path)}: {message}")


def parse_yaml(text: str, *, source: str, located: bool = True) -> Node:
    """The single document in `text`. Places read `source:line:column`, or just `source` when not `located`.

    Raises UserError, with the place, for anything outside the strict subset.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source}: {len(text):,} characters; a scenario has at most {MAX_CHARACTERS:,}")
    builder = _Builder(source=source, located=located)
    try:
        return builder.document(iter(yaml.parse(text, Loader=_Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{builder.place(mark)}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


@dataclass
class _Builder:
    """Turns parser events into nodes; the parser itself does not recurse, so nesting is bounded here."""

    source: str
    located: bool
    anchors: dict[str, Node] = field(default_factory=dict)
    num_nodes: int = 0

    def place(self, mark: Any) -> str:
        if not self.located or mark is None:
            return self.source
        return f"{self.source}:{mark.line + 1}:{mark.column + 1}"

    def document(self, events: Iterator[Any]) -> Node:
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise UserError(f"{self.place(event.start_mark)}: a second document; keep one per file")
                root = self.node(next(events), events, depth=0, key_where=None)
        if root is None:
            return Node(None, self.source, self.source)
        return root

    def node(self, event: Any, events: Iterator[Any], *, depth: int, key_where: str | None) -> Node:
        where = self.place(event.start_mark)
        key_where = key_where or where
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), where, key_where)
        if event.tag not in (None, "!"):
            raise UserError(
                f'{where}: tags such as "{event.tag}" are not supported; write plain text, numbers, lists and mappings'
            )
        node = self._content(event, events, depth=depth, where=where, key_where=key_where)
        self._count(1, where)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _content(self, event: Any, events: Iterator[Any], *, depth: int, where: str, key_where: str) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0]
            return Node(_scalar(event.value, where) if plain else event.value, where, key_where)
        if isinstance(event, yaml.SequenceStartEvent):
            children = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                children.append(self.node(item, events, depth=depth + 1, key_where=None))
            return Node(children, where, key_where, 1 + sum(child.size for child in children))
        mapping: dict[str, Node] = {}
        while not isinstance(item := next(events), yaml.MappingEndEvent):
            key, place = self._key(item)
            if key in mapping:
                raise UserError(f'{place}: duplicate key "{key}"; it is already at {mapping[key].key_where}')
            mapping[key] = self.node(next(events), events, depth=depth + 1, key_where=place)
        return Node(mapping, where, key_where, 1 + sum(child.size for child in mapping.values()))

    def _key(self, event: Any) -> tuple[str, str]:
        place = self.place(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent) or event.tag not in (None, "!"):
            raise UserError(f"{place}: a key must be plain text")
        return event.value, place

    def _alias(self, anchor: str, where: str, key_where: str) -> Node:
        if anchor not in self.anchors:
            raise UserError(f'{where}: alias "*{anchor}" has no complete anchor "&{anchor}" before it')
        target = self.anchors[anchor]
        self._count(target.size, where)
        return Node(target.value, target.where, key_where, target.size)

    def _count(self, num_nodes: int, where: str) -> None:
        self.num_nodes += num_nodes
        if self.num_nodes > MAX_NODES:
            raise UserError(f"{where}: more than {MAX_NODES:,} values once aliases are expanded")


def _scalar(text: str, where: str) -> Any:
    try:
        return plain_scalar(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def plain_scalar(text: str) -> Any:
    """What unquoted `text` means under the YAML 1.2 core schema. Raises ValueError for a number that is not finite."""
    if text in _NULLS:
        return None
    if text in _FLAGS:
        return _FLAGS[text]
    if _INT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits; write it as a float, e.g. 2e12")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
        raise ValueError(f"{text} is not a finite number")
    return float(text) if _FLOAT.fullmatch(text) else text
