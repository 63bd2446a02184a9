"""Reading a study file: nodes with places to plain values, and one line for every mistake."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from moesim.errors import UserError
from moesim.scenario.catalogue import suggest
from moesim.scenario.document import Node, read_yaml


def read_file(path: Path) -> Node:
    """The mapping in a study file. Raises UserError."""
    root = read_yaml(path, what="study")
    mapping(root, "a study", known=None)
    return root


def mapping(node: Node, what: str, *, known: Collection[str] | None) -> dict[str, Node]:
    """The children of a mapping whose keys are all `known` (any keys when None). Raises UserError."""
    if not isinstance(node.value, dict):
        raise UserError(f"{node.where}: {what} is a mapping of keys to values")
    children: dict[str, Node] = node.value
    for key, child in children.items():
        if known is not None and key not in known:
            raise UserError(f"{child.key_where}: {what} has no key {key!r}; {suggest(key, known)}")
    return children


def items(node: Node, what: str) -> list[Node]:
    """The items of a list that is not empty. Raises UserError."""
    if not isinstance(node.value, list) or not node.value:
        raise UserError(f"{node.where}: {what} is a list with at least one item, such as [1, 2]")
    return node.value


def text(node: Node, what: str) -> str:
    """A text that is not empty. Raises UserError."""
    if not isinstance(node.value, str) or not node.value:
        raise UserError(f"{node.where}: {what} is a text")
    return node.value


def flag(node: Node, what: str) -> bool:
    """true or false. Raises UserError."""
    if not isinstance(node.value, bool):
        raise UserError(f"{node.where}: {what} is true or false")
    return node.value


def chosen(node: Node, what: str, *, known: Sequence[str]) -> str:
    """One of the `known` words. Raises UserError with the nearest."""
    word = text(node, what)
    if word not in known:
        raise UserError(f"{node.where}: {what} {word!r} is unknown; {suggest(word, known)}")
    return word


def distinct(nodes: Sequence[Node], read: Callable[[Node], str], what: str) -> list[str]:
    """Texts of which none comes twice. Raises UserError."""
    found: list[str] = []
    for node in nodes:
        word = read(node)
        if word in found:
            raise UserError(f"{node.where}: {what} {word!r} comes twice")
        found.append(word)
    return found
