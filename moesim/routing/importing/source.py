"""What a file of somebody else's says about routing: selections of tokens, or only how often experts were chosen.

Layers, steps and counts of a recording are put together, or refused where they do not fit each other. The simplest
readers are here, too: plain counts as CSV or JSON, and a routing trace as a parquet table with a row a token: step,
layer, sequence, position, experts, affinities, gates.
Legend: L layers, T tokens, N tokens of all sequences, K selections, E experts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.routing.importing.data_files import load_parquet, refuse
from moesim.strict_json import parse_json
from moesim.trace import RoutingTrace

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


Layer = tuple[Array, Array | None]  # ids [T, K], and gates where the source has them
NUMBER = re.compile(r"\d+")


def of_counts(parts: list[NDArray[np.float64]], where: str, *, notes: tuple[str, ...] = ()) -> Source:
    """Counts [L, E] added up. Layers that counted nothing, the dense ones of a server's list, are left out."""
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"{where}: counts of different numbers of layers or experts; import them apart")
    counts_LE = np.sum(parts, axis=0)
    routed = [layer for layer, counts_E in enumerate(counts_LE) if counts_E.any()]
    if not routed:
        raise UserError(f"{where}: all counts are zero; record while the model works")
    return Source(
        layers=tuple(routed),
        counts_LE=counts_LE[routed],
        num_experts=counts_LE.shape[1],
        notes=(*notes, *note_of_silent(routed, len(counts_LE))),
    )


def note_of_silent(routed: Iterable[int], num_layers: int) -> tuple[str, ...]:
    """The note about layers of which nothing was recorded; none where there are no such."""
    silent = sorted(set(range(num_layers)) - set(routed))
    return (f"nothing is routed in layers {listed(silent)} (dense?): left out",) if silent else ()


def of_steps(found: Mapping[int, Mapping[int, Layer]], where: str, *, notes: tuple[str, ...] = ()) -> Source:
    """Steps of layers of (ids, weights); every step must have the same layers, and these the same tokens."""
    layers = tuple(sorted(next(iter(found.values()))))
    steps = []
    for step, of_layer in sorted(found.items()):
        shapes = {ids.shape for ids, _ in of_layer.values()}
        if tuple(sorted(of_layer)) != layers or len(shapes) > 1:
            raise UserError(
                f"{where}: step {step} has layers {listed(of_layer)} of {len(shapes)} sizes, where all steps must "
                f"have layers {listed(layers)} of equal size; a recording may be incomplete"
            )
        weights = [w for layer in layers if (w := of_layer[layer][1]) is not None]
        steps.append(
            Selections(
                step=step,
                expert_ids_LTK=np.stack([of_layer[layer][0] for layer in layers]),
                weights_LTK=np.stack(weights).astype(np.float32) if len(weights) == len(layers) else None,
            )
        )
    return Source(layers=layers, steps=tuple(steps), notes=notes)


def listed(layers: Iterable[int]) -> str:
    """Numbers of layers in order, between commas."""
    return ", ".join(map(str, sorted(layers)))


def number_in(path: Path) -> int:
    """The last number in a file's name."""
    found = NUMBER.findall(path.stem)
    if not found:
        refuse(path, "has no number in its name", "keep the names that the recording gave")
    return int(found[-1])


def whole(value: object, where: str) -> int:
    """A whole number of a record. Raises UserError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {value!r} is no whole number; the recording is damaged")
    return value


def note_of_unread(folder: Path, read: Iterable[Path], *, why: str) -> tuple[str, ...]:
    """The note about files that lie beside those that were read; none for a single file or where all were read."""
    if folder.is_file():
        return ()
    rest = sorted({file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")} - set(read))
    if not rest:
        return ()
    names = ", ".join(file.name for file in rest[:3]) + (" and others" if len(rest) > 3 else "")
    return (f"{names}: not read, {why}",)


def read_counts(path: Path) -> Source:
    """CSV (a line a layer, a number an expert), or JSON: lists, or `{"weight": lists}` as EPLB takes.

    A folder must hold one such file alone.
    """
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.csv")])
        if len(files) != 1:
            refuse(path, f"holds {len(files)} files of JSON or CSV", "name the file of counts")
        path = files[0]
    if not path.is_file():
        refuse(path, "no such file", "name a CSV or JSON file of counts, a row per layer")
    text = path.read_text(encoding="utf-8", errors="replace")
    value = _rows_of_json(path, text) if path.suffix == ".json" else _checked_rows(path, text)
    return of_counts([numbers_of(value, str(path), axes=2)], str(path))


def _rows_of_json(path: Path, text: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        refuse(path, f"is no JSON ({error})", "write a list of counts per layer")
    return value.get("weight", value.get("counts")) if isinstance(value, dict) else value


def _checked_rows(path: Path, text: str) -> list[list[float]]:
    """The numbers of every line. Raises UserError with the first line that has other than counts, or too many."""
    rows = rows_of_csv(text)
    filled = [number for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    numbers = filled[len(filled) - len(rows) :]
    for number, row in zip(numbers, rows, strict=True):
        for cell in row:
            if not cell.strip().isprintable():
                what = f"no table of counts: line {number} is no text"
                refuse(path, what, "if it is a pickle of OLMoE's, `moesim trace import olmoe` reads it")
            if not _is_count(cell):
                what = f"no table of counts: line {number}: {cell.strip()[:20]!r} is no count"
                refuse(path, what, "counts are finite numbers that are not negative")
        if len(row) != len(rows[0]):
            have = f"line {number} has {len(row)} counts, line {numbers[0]} has {len(rows[0])}"
            refuse(path, have, "write one for every expert of a layer")
    return [[float(cell) for cell in row] for row in rows]


def _is_count(cell: str) -> bool:
    try:
        return 0 <= float(cell) < math.inf
    except ValueError:
        return False


def rows_of_csv(text: str) -> list[list[str]]:
    """Cells of the lines that are not empty, without a first line of names."""
    rows = [re.split(r"[,;\t]", line.strip().rstrip(",;")) for line in text.splitlines() if line.strip()]
    return rows[1:] if rows and any(re.search("[A-Za-z_]", cell) for cell in rows[0]) else rows


def write_parquet(trace: RoutingTrace, path: Path) -> int:
    """Write every recorded step; the file appears complete or not at all. Gives the number of rows.

    Lists have K entries, -1 for none. Raises UserError where pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet needs pyarrow; pip install 'moesim[import]'") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    rows = 0
    with parquet.ParquetWriter(partial, _schema()) as writer:
        for step in trace.steps:
            layers, sequences, length, top_k = step.expert_ids_LSTK.shape
            for layer in range(layers):
                count = sequences * length
                columns = {
                    "step": np.full(count, step.step),
                    "layer": np.full(count, layer),
                    "sequence": np.repeat(np.arange(sequences), length),
                    "position": np.tile(np.arange(length), sequences),
                    "experts": list(step.expert_ids_LSTK[layer].reshape(-1, top_k)),
                    "affinities": list(step.affinities_LSTK[layer].reshape(-1, top_k)),
                    "gates": list(step.gates_LSTK[layer].reshape(-1, top_k)),
                }
                writer.write_table(pyarrow.table(columns, schema=_schema()))
                rows += count
    partial.replace(path)
    return rows


def read_table(path: Path) -> Source:
    """The parquet table of `moesim trace export`, or any with its columns layer and experts; the others may lack.

    Rows may stand in any order where step, sequence and position say theirs. Affinities are not read.
    """
    columns = load_parquet(path, columns=("step", "layer", "sequence", "position", "experts", "gates"))
    ids_RK = table_of(field_of(columns, "experts", str(path)), f"{path}: column experts", axes=2)
    rows = len(ids_RK)
    none = np.zeros(rows, dtype=np.int64)
    step_R, layer_R, sequence_R, position_R = (
        table_of(columns.get(name, none), f"{path}: column {name}", axes=1)
        for name in ("step", "layer", "sequence", "position")
    )
    field_of(columns, "layer", str(path))
    order_R = np.lexsort((position_R, sequence_R, layer_R, step_R))
    found: dict[int, dict[int, Layer]] = {}
    for step, layer in sorted({*zip(step_R.tolist(), layer_R.tolist(), strict=True)}):
        here_N = order_R[(step_R[order_R] == step) & (layer_R[order_R] == layer)]
        gates_NK = columns["gates"][here_N] if "gates" in columns else None
        found.setdefault(step, {})[layer] = ids_RK[here_N], gates_NK
    lengths = np.unique(np.unique(sequence_R, return_counts=True)[1]) if "sequence" in columns else none[:0]
    source = of_steps(found, str(path))
    per_layer = len({(step, layer) for step in found for layer in found[step]})
    alike = len(lengths) == 1 and int(lengths[0]) % per_layer == 0
    return replace(source, sequence_length=int(lengths[0]) // per_layer if alike else None)


def _schema() -> "object":
    import pyarrow

    whole, number = pyarrow.int32(), pyarrow.float32()
    return pyarrow.schema(
        [(name, whole) for name in ("step", "layer", "sequence", "position")]
        + [("experts", pyarrow.list_(pyarrow.int16())), ("affinities", pyarrow.list_(number))]
        + [("gates", pyarrow.list_(number))]
    )
