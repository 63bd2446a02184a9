"""The scenarios, studies and plans that ship with the package, by name.

They are the repository's folder `scenarios/`; `setup.py` puts a copy of it into the wheel, beside this file.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesim.errors import UserError, closest

Kind = Literal["scenario", "study", "plan", "serving"]
# folder below that of the scenarios
KINDS: dict[Kind, str] = {"scenario": ".", "study": "studies", "plan": "plans", "serving": "serving"}
VERBS: dict[Kind, str] = {"scenario": "run", "study": "sweep", "plan": "plan", "serving": "serve"}  # takes its names
WORDS: dict[Kind, str] = {"serving": "serving scenario"}  # where the kind by itself is no word for one of them
SCHEMA_FILE = "schema.json"  # named by the first line of scenarios, for editors

_BASE = re.compile(r"^base: *([^#\n]*?) *(?:#.*)?$", re.MULTILINE)
_CLAUSE = re.compile(r".+?(?=[.:;](\s|$)| - |(?<=\?)\s)")


@dataclass(frozen=True)
class Shipped:
    """A shipped file. `place` is its path below the folder of all of them, such as studies/capacity.yaml."""

    kind: Kind
    name: str
    place: Path
    purpose: str


def folder() -> Path:
    """Where they lie: in the installed package, or in the repository that the package is run from."""
    here = Path(__file__).parent
    installed = here / "scenarios"
    return installed if installed.is_dir() else here.parents[1] / "scenarios"


def shipped() -> tuple[Shipped, ...]:
    """All shipped files: scenarios, then studies, plans and deployments, each by name."""
    return tuple(
        Shipped(kind=kind, name=path.stem, place=path.relative_to(folder()), purpose=_purpose(path))
        for kind, below in KINDS.items()
        for path in sorted((folder() / below).glob("*.yaml"))
    )


def names(kind: Kind) -> tuple[str, ...]:
    """Names of the shipped files of a kind."""
    return tuple(sorted(path.stem for path in (folder() / KINDS[kind]).glob("*.yaml")))


def resolve(path: str | Path, kind: Kind) -> Path:
    """`path` where there is one; else, if it is a bare name, the shipped file of the kind with this name.

    Raises UserError, with the shipped name that may be meant, for a bare name that is neither. Any other path is
    returned as it is, unless it lacks a file that ships: then the message says under which name.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        return path
    known = names(kind)
    bare = len(path.parts) == 1 and not path.suffix
    if bare and path.name in known:
        return folder() / KINDS[kind] / f"{path.name}.yaml"
    other = next((each for each in KINDS if each != kind and path.name in names(each)), None) if bare else None
    if other is not None:
        what = f"the {WORDS.get(other, other)} of this name is for `moesim {VERBS[other]}`"
        if kind == "serving":
            what += f"; serving scenarios that ship: {', '.join(known)}"
        raise UserError(f"{path}: {what}")
    if bare:
        hint = closest(path.name, known) or "; `moesim scenarios` lists those that ship"
        raise UserError(
            f"{path}: there is no such file, and no {WORDS.get(kind, kind)} of this name ships with moesim{hint}"
        )
    if path.stem in known and path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: there is no such file; the {kind} that ships: moesim {VERBS[kind]} {path.stem}")
    return path


def copy(wanted: str, target: Path, *, force: bool = False) -> list[Path]:
    """Copy the shipped files called `wanted`, or `all`, into the folder `target`; returns what lies there now.

    The places below `target` are the shipped ones, and what a file refers to (a study's base, the schema) comes along.
    A file that is there already may be the same; raises UserError where it differs, unless `force`, and for a name that
    nothing has.
    """
    files = shipped()
    chosen = [file for file in files if wanted in ("all", file.name, file.place.with_suffix("").as_posix())]
    if not chosen:
        raise UserError(
            f"{wanted!r} does not ship{closest(wanted, [file.name for file in files])}; see `moesim scenarios`"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder")
    places = _with_references([file.place for file in chosen])
    differing = [place for place in places if not force and _differs(folder() / place, target / place)]
    if differing:
        raise UserError(f"{target / differing[0]} exists and differs; choose another folder, or --force to replace it")
    for place in places:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder() / place, target / place)
    return [target / place for place in places]


def _with_references(places: Sequence[Path]) -> list[Path]:
    found = [Path(SCHEMA_FILE), *places]
    for place in places:
        for base in _BASE.findall((folder() / place).read_text(encoding="utf-8")):
            found.append((folder() / place.parent / base).resolve().relative_to(folder().resolve()))
    return sorted(set(found))


def _differs(source: Path, target: Path) -> bool:
    return target.exists() and (not target.is_file() or source.read_bytes() != target.read_bytes())


def _purpose(path: Path) -> str:
    """The first clause of the comment at the top of the file: up to a full stop, a colon or a question mark."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# yaml-language-server"):
            continue
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        lines.append(text)
    clause = _CLAUSE.match(" ".join(lines))
    return clause[0] if clause else " ".join(lines)
