"""Which trained routers the library holds, by name.

A name is LAYOUT/POINT/seedN, e.g. `64x6/M2/seed1`; without a seed it means seed 0, and `library:` may stand before it.
The published setting of a layout lies on every axis, so `64x6/M3` and `64x6/capacity-1.0` are other names of
`64x6/published`.
"""

import difflib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.routing import LIBRARY_PREFIX
from moesim.strict_json import json_text, parse_json
from moesim.trace.library.codec import read_entry, read_facts
from moesim.trace.record import Json, RoutingTrace

DATA = Path(__file__).parent / "data"
INDEX = "index.json"
SUFFIX = ".routing"


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """One trained router. Losses are nats per byte; `held_out_loss` is over 262,144 held-out tokens without dropping.

    `axis` is what was varied around the layout's published setting and `value` to what; `aliases` are other names
    without a seed. `imbalance` is max / mean expert load over the last tenth of the training steps, `dropped_share`
    the rows dropped there.
    """

    name: str
    aliases: tuple[str, ...]
    layout: str
    axis: str
    value: str
    seed: int
    tokens: int
    train_loss: float
    held_out_loss: float
    imbalance: float
    dropped_share: float
    provenance: dict[str, Json]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the entry, each with its seed."""
        return (self.name, *(f"{alias}/seed{self.seed}" for alias in self.aliases))

    @property
    def file(self) -> str:
        """The entry's file in the data folder."""
        return file_of(self.name)


def file_of(name: str) -> str:
    """File name of an entry: one flat folder, so that it can be shipped by one pattern."""
    return name.replace("/", "--") + SUFFIX


def is_library_name(file: str) -> bool:
    """Whether `routing.file` names an entry of the library and not a file."""
    return file.startswith(LIBRARY_PREFIX)


@lru_cache(maxsize=4)
def library_entries(folder: Path = DATA) -> tuple[LibraryEntry, ...]:
    """Every entry, ordered by name. Raises UserError when the index cannot be read."""
    try:
        rows = parse_json((folder / INDEX).read_text())["entries"]
        return tuple(LibraryEntry(**{**row, "aliases": tuple(row["aliases"])}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: cannot read the library's index ({error}); install moesim again") from error


def find_entry(name: str, folder: Path = DATA) -> LibraryEntry:
    """The entry called `name`, with or without `library:` and the seed. Raises UserError with the nearest names."""
    wanted = name.removeprefix(LIBRARY_PREFIX).strip("/")
    by_name = {each: entry for entry in library_entries(folder) for each in entry.names}
    for candidate in (wanted, f"{wanted}/seed0"):
        if candidate in by_name:
            return by_name[candidate]
    near = difflib.get_close_matches(wanted, [*by_name, *(each.removesuffix("/seed0") for each in by_name)], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"`moesim trace {LIBRARY_PREFIX}` lists all names"
    raise UserError(f"{LIBRARY_PREFIX}{wanted}: the library has no such entry; {hint}")


def load_library(name: str, folder: Path = DATA) -> RoutingTrace:
    """The routing of the entry called `name`. Raises UserError for an unknown name or a damaged file."""
    entry = find_entry(name, folder)
    return read_entry(folder / entry.file, digest=entry.digest)


def write_index(folder: Path) -> int:
    """Write the index of all entries in `folder` from their own headers; how many they are. Raises UserError."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        facts, digest = read_facts(path)
        rows.append({**facts, "digest": digest})
    rows.sort(key=lambda row: row["name"])
    text = ",\n".join(json_text(row, sort_keys=True) for row in rows)
    (folder / INDEX).write_text(f'{{"entries": [\n{text}\n]}}\n')
    return len(rows)
