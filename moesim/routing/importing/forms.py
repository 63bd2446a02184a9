"""The forms of recorded routing that are read, and how a file or a folder tells its own.

A file tells its form by its keys, its tensors and its columns, not by its name alone; a folder by its files. Nothing is
executed to find out.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from moesim.errors import UserError
from moesim.routing.importing.data_files import load_arrays, load_parquet_names, load_tensors, refuse
from moesim.routing.importing.programs import read_flame, read_megatron, read_olmoe, read_sglang, read_trtllm, read_vllm
from moesim.routing.importing.source import Source, read_counts, read_table, rows_of_csv
from moesim.strict_json import parse_json
from moesim.trace.store import is_trace_file

AUTO = "auto"  # the form that stands for "find out"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form. line_keys: keys of which a line of JSON has all. tensor_keys: keys of which a dictionary of tensors has
    one. text: what stands in a text file. columns: of a parquet file. suffixes: of files that no other form has.
    folders: patterns below a folder, of which one is there. tensors, arrays, tables: whether what torch or numpy saved,
    or a text, is of this form.
    """

    name: str
    read: Callable[[Path], Source]
    line_keys: tuple[frozenset[str], ...] = ()
    tensor_keys: frozenset[str] = frozenset()
    text: str | None = None
    columns: frozenset[str] | None = None
    suffixes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    tensors: Callable[[Any], bool] = lambda value: False
    arrays: Callable[[Any], bool] = lambda array: False
    tables: Callable[[str], bool] = lambda text: False


def _is_replay(value: Any) -> bool:
    """A list of [T, K] whole numbers, one a layer."""
    return isinstance(value, list) and bool(value) and all(_is_ids(each) for each in value)


def _is_capture(value: Any) -> bool:
    """A pair (scores, indices)."""
    return isinstance(value, list) and len(value) == 2 and not _is_ids(value[0]) and _is_ids(value[1])


def _is_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "iu"


def _is_counts(text: str) -> bool:
    """JSON lists of numbers, also under weight or counts, or lines of numbers."""
    try:
        value = parse_json(text)
    except ValueError:
        rows = rows_of_csv(text)
        value = rows if rows and all(len(row) == len(rows[0]) > 1 for row in rows) else None
    if isinstance(value, dict):
        value = value.get("weight", value.get("counts"))
    try:
        array = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError):
        return False
    return array.ndim == 2 and array.size > 0


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form(
                name="flame",
                read=read_flame,
                columns=frozenset({"scores", "indices"}),
                folders=("layer_*.parquet", "**/iter_*/layer_*.parquet", "**/actives/*/*/*.pt"),
                tensors=_is_capture,
            ),
            Form(
                name="megatron",
                read=read_megatron,
                line_keys=(frozenset({"step", "layer", "top_indices"}),),
                tensors=_is_replay,
            ),
            Form(name="sglang", read=read_sglang, tensor_keys=frozenset({"logical_count", "records"})),
            Form(
                name="vllm",
                read=read_vllm,
                line_keys=(frozenset({"layer", "token_idx", "topk_ids"}), frozenset({"routed_experts"})),
                tensor_keys=frozenset({"expert_load_window"}),
                text=r"EPLB step: avg_tokens=[\d.]",
                arrays=lambda array: array.ndim == 3 and array.dtype.kind in "iu",
            ),
            Form(
                name="trtllm",
                read=read_trtllm,
                text=r"^initial_global_assignments:",
                suffixes=(".safetensors",),
                folders=("meta_info.json", "*/meta_info.json"),
            ),
            Form(
                name="olmoe",
                read=read_olmoe,
                line_keys=(frozenset({"exp_ids"}),),
                suffixes=(".pkl",),
                folders=("expert_counts/*.pkl",),
            ),
            Form(name="table", read=read_table, columns=frozenset({"layer", "experts"})),
            Form(name="counts", read=read_counts, tables=_is_counts),
        )
    }
)
_MOST_PEEKED = 64  # files of a folder that are looked at


def form_of(path: Path) -> Form:
    """The form of a file or folder. Raises UserError, one line, where there is none or more than one."""
    if not path.exists():
        refuse(path, "no such file or folder", "name what was recorded")
    if is_trace_file(path):
        refuse(path, "is a routing trace of moesim already", "name it in routing.file")
    try:
        found = _forms_of_folder(path) if path.is_dir() else _forms_of_file(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}); check the path") from None
    if len(found) > 1:
        refuse(
            path,
            f"holds several forms of routing ({', '.join(sorted(found))})",
            "name one file of it, or the form: `moesim trace import KIND PATH --out FILE`",
        )
    if not found:
        refuse(
            path,
            f"neither a routing trace of moesim nor in a form that is known by its content (tried {', '.join(FORMS)})",
            "name the form with `moesim trace import KIND PATH --out FILE`, which says what it misses",
        )
    return FORMS[found.pop()]


def _forms_of_folder(path: Path) -> set[str]:
    """Those of its files, one of each family of names that differ in digits alone, and of its structure."""
    found = {form.name for form in FORMS.values() if any(_holds(path, pattern) for pattern in form.folders)}
    if path.name == "actives" and any(path.glob("*/*/*.pt")):
        found.add("flame")
    families: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            families.setdefault(re.sub(r"\d+", "", file.name), file)
    for file in list(families.values())[:_MOST_PEEKED]:
        found |= _forms_of_file(file)
    # a table of numbers beside files that say more, such as the meta_info.json of a server, decides nothing
    return found - {"counts"} or found


def _holds(path: Path, pattern: str) -> bool:
    return next(path.glob(pattern), None) is not None


def _forms_of_file(path: Path) -> set[str]:
    """At most one form, by the content."""
    by_suffix = {form.name for form in FORMS.values() if path.suffix in form.suffixes}
    if by_suffix:
        return by_suffix
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        names = load_parquet_names(path)
        return {form.name for form in FORMS.values() if form.columns is not None and form.columns <= names}
    members = _members(path)
    if head == b"\x93NUM" or (members and all(name.endswith(".npy") for name in members)):
        arrays = load_arrays(path).values()
        return {form.name for form in FORMS.values() if arrays and all(map(form.arrays, arrays))}
    if members or path.suffix == ".pt":
        value = load_tensors(path)
        keys = {key for key in value if isinstance(key, str)} if isinstance(value, dict) else set()
        return {form.name for form in FORMS.values() if form.tensor_keys & keys or form.tensors(value)}
    return _forms_of_text(path)


def _members(path: Path) -> list[str]:
    """Names in a zip archive; none for any other file."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


_MOST_TEXT = 64 << 20  # of a file that may be a table of counts


def _forms_of_text(path: Path) -> set[str]:
    keys, start = _first_record(path)
    by_line = {form.name for form in FORMS.values() if any(each <= keys for each in form.line_keys)}
    if by_line:
        return by_line
    by_text = {form.name for form in FORMS.values() if form.text and re.search(form.text, start, re.MULTILINE)}
    if by_text or path.stat().st_size > _MOST_TEXT:
        return by_text
    text = path.read_text(encoding="utf-8", errors="replace")
    return {form.name for form in FORMS.values() if form.tables(text)}


def _first_record(path: Path) -> tuple[set[str], str]:
    """Keys of the first line that is not empty, if it is an object of JSON; and the first few thousand characters."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        start = lines.read(4096)
        lines.seek(0)
        line = next((line for line in lines if line.strip()), "")
    try:
        value = parse_json(line)
    except ValueError:
        return set(), start
    return {str(key) for key in value} if isinstance(value, dict) else set(), start
