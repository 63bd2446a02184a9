"""What a file of somebody else's says about routing: selections of tokens, or only how often experts were chosen.

Legend: L layers, T tokens, K selections, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.strict_json import parse_json

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Selections:
    """The experts of every token at one training step (or of one recording).

    expert_ids_LTK: int64, logical ids. weights_LTK: float32 gates as recorded, None where the source has none.
    """

    step: int
    expert_ids_LTK: NDArray[np.int64]
    weights_LTK: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source as read. Either `steps` hold selections, or `counts_LE` how often each expert was chosen.

    layers: the source's own numbers of the L layers. num_experts, top_k, sequence_length: None where the source does
    not say. notes: what was left out, mapped or assumed, one sentence each.
    """

    layers: tuple[int, ...]
    steps: tuple[Selections, ...] = ()
    counts_LE: NDArray[np.float64] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    sequence_length: int | None = None
    notes: tuple[str, ...] = field(default=())


def refuse(path: Path, what: str, remedy: str) -> NoReturn:
    """Raise the one line about a file that cannot be imported."""
    raise UserError(f"{path}: {what}; {remedy}")


def files_under(path: Path, patterns: Sequence[str], *, what: str) -> list[Path]:
    """The file itself, or those of a folder that fit one of the patterns, sorted. Raises UserError for none."""
    if path.is_file():
        return [path]
    if not path.exists():
        refuse(path, "no such file or folder", f"name {what}")
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        refuse(path, f"holds no {' or '.join(patterns)}", f"name {what}")
    return found


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, object) of a file of JSON lines. Raises UserError for a line that is no JSON object."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append((f"{path}:{number}", _object(path, number, line)))
    if not found:
        refuse(path, "has no lines", "record the routing again")
    return found


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: no line of JSON ({error}); a recording may have been cut off here") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: no JSON object; one line must hold one record")
    return value


def table_of(value: object, where: str, *, axes: int) -> Array:
    """Nested lists, or a tensor, as a whole-number array with this many axes. Raises UserError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros(0)
    if array.ndim != axes or not array.size or array.dtype.kind not in "iu":
        raise UserError(
            f"{where}: no table of whole numbers with {axes} axes; the recording is damaged or another form"
        )
    return array.astype(np.int64)


def numbers_of(value: object, where: str, *, axes: int) -> NDArray[np.float64]:
    """The same of finite numbers that are not negative."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if array.ndim != axes or not array.size or not np.isfinite(array).all() or array.min() < 0:
        raise UserError(f"{where}: no table of counts with {axes} axes; counts are finite and not negative")
    return array


def field_of(record: dict[str, Any], key: str, where: str) -> Any:
    """A field of a record. Raises UserError where it is missing."""
    if key not in record:
        raise UserError(f"{where}: the record has no {key!r}; its fields are {', '.join(map(str, list(record)[:8]))}")
    return record[key]


def logical_ids(physical_LTK: Array, map_LP: Array, where: str) -> NDArray[np.int64]:
    """Logical experts of physical slots, layer by layer. Raises UserError where a slot is not in the map."""
    if len(map_LP) != len(physical_LTK):
        raise UserError(f"{where}: selections of {len(physical_LTK)} layers, but a map of {len(map_LP)}")
    if physical_LTK.max() >= map_LP.shape[1]:
        raise UserError(f"{where}: slot {physical_LTK.max()} is not among the map's {map_LP.shape[1]}")
    return np.stack([slots_P[ids] for slots_P, ids in zip(map_LP, physical_LTK, strict=True)])


def counts_of_logical(physical_LP: Array, map_LP: Array, where: str) -> NDArray[np.float64]:
    """Counts of logical experts from those of slots, [L, E]."""
    if physical_LP.shape != map_LP.shape:
        raise UserError(f"{where}: counts of {list(physical_LP.shape)} slots, but a map of {list(map_LP.shape)}")
    counts_LE = np.zeros((len(map_LP), int(map_LP.max()) + 1))
    for layer, (counts_P, slots_P) in enumerate(zip(physical_LP, map_LP, strict=True)):
        np.add.at(counts_LE[layer], slots_P, counts_P)
    return counts_LE
