"""What every number of result.json means: `definitions.yaml`, which the reference of the documentation shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NO_UNIT = ""


@dataclass(frozen=True)
class Definition:
    """The unit of a number (empty: a text, or a number without one) and what it means."""

    unit: str
    text: str


def _read(path: str, line: str | list[str]) -> Iterator[tuple[str, Definition]]:
    """The definitions of one line of the file."""
    if path.endswith("}"):
        before, _, name = path[:-1].partition("{")
        assert isinstance(line, str), "the unit of every name of the list"
        for each, text in LISTS[name].items():
            yield before + each, Definition(line, text)
    else:
        yield path, Definition(NO_UNIT, line) if isinstance(line, str) else Definition(*line)


_FILE = yaml.safe_load((Path(__file__).parent / "definitions.yaml").read_text(encoding="utf-8"))
# What names of a list mean wherever they stand: categories of time, parts of memory, sources of estimates.
LISTS: Mapping[str, Mapping[str, str]] = _FILE["lists"]
# Heading of a section of the reference, a sentence on all of it, and its definitions.
SECTIONS: Sequence[tuple[str, str, Mapping[str, Definition]]] = tuple(
    (section["title"], section["about"], dict(each for line in section["numbers"].items() for each in _read(*line)))
    for section in _FILE["sections"]
)
DEFINITIONS: Mapping[str, Definition] = {
    path: definition for _, _, section in SECTIONS for path, definition in section.items()
}


def definition(path: str) -> Definition | None:
    """What the number at the path of a result means; None where nobody has written it down."""
    return DEFINITIONS.get(path) or DEFINITIONS.get(f"{path}.[]") or DEFINITIONS.get(path.rpartition(".")[0] + ".*")


def paths(result: Any, path: str = "") -> set[str]:
    """The paths of all numbers and texts of a result; a null stands for what it could be, an empty list for nothing."""
    if isinstance(result, Mapping):
        below = [paths(value, f"{path}.{key}" if path else str(key)) for key, value in result.items()]
        return set().union(*below)
    if isinstance(result, list):
        return set().union(*(paths(item, f"{path}.[]") for item in result))
    return {path}
