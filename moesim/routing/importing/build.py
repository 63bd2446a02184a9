"""The forms of recorded routing that are read, and the routing trace that is made of what a source says.

A file tells its form by its keys, its tensors and its columns, not by its name alone; a folder by its files. Nothing is
executed to find out. Then experts and top-K are agreed, and tokens cut into sequences.
Legend: L layers, T tokens, K selections, E experts.
"""

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from moesim.errors import UserError, closest
from moesim.routing.importing.programs import read_flame, read_megatron, read_olmoe, read_sglang, read_trtllm, read_vllm
from moesim.routing.importing.source import (
    Selections,
    Source,
    load_arrays,
    load_parquet_names,
    load_tensors,
    read_counts,
    read_table,
    refuse,
    rows_of_csv,
)
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.strict_json import parse_json
from moesim.trace import RoutingTrace, popularity_trace
from moesim.trace.check import check_trace, has_duplicates
from moesim.trace.record import TraceStep
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


DRAWN_TOKENS = 65_536  # of a trace that is drawn from counts
DRAWN_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class MessageWords:
    """What the user calls what the source is asked to agree with."""

    experts: str = "--experts"
    top_k: str = "--top-k"
    sequence_length: str = "--sequence-length"
    remedy: str = "leave {} out or fix it"


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What the user says beside the source: each None where the source is to say it itself.

    fill: whether tokens are repeated up to one sequence where there are fewer. yields: whether the length of the
    source's own sequences wins over `sequence_length`.
    """

    experts: int | None = None
    top_k: int | None = None
    sequence_length: int | None = None
    tokens: int = DRAWN_TOKENS
    seed: int = 0
    fill: bool = False
    yields: bool = False
    words: MessageWords = MessageWords()


def import_routing(kind: str, path: str | os.PathLike[str], *, asked: ImportRequest | None = None) -> RoutingTrace:
    """The routing trace of a file or folder of form `kind`: a key of `FORMS`, or "auto" to tell by the content.

    Counts alone become a drawn trace of that popularity per layer. Raises UserError for an unknown form, a damaged
    source, what neither the source nor `asked` says, and where the two differ.
    """
    asked, place = asked or ImportRequest(), Path(path)
    form = _named(kind) if kind != AUTO else form_of(place)
    try:
        source = form.read(place)
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be read ({error.strerror}); check the path") from None
    if source.steps and any(has_duplicates(step.expert_ids_LTK) for step in source.steps):
        source = _as_counts(source, _experts(source, asked, place))
    trace, notes = _drawn(source, asked, place) if source.counts_LE is not None else _recorded(source, asked, place)
    provenance = {
        **trace.provenance,
        "source": f"imported, {form.name}",
        "form": form.name,
        "path": place.name,
        "layers": list(source.layers),
        "sequences": None if source.sequence_length is not None else asked.words.sequence_length,
        "notes": [*source.notes, *notes],
    }
    provenance.pop("counts", None)
    trace = replace(trace, provenance=provenance)
    check_trace(trace)
    return trace


def _named(kind: str) -> Form:
    if kind not in FORMS:
        known = [AUTO, *FORMS]
        raise UserError(f"unknown form of routing {kind!r}{closest(kind, known)}; use one of: {', '.join(known)}")
    return FORMS[kind]


def _agreed(name: str, said: int | None, asked: int | None, place: Path, *, word: str, remedy: str) -> int:
    if said is not None and asked is not None and said != asked:
        raise UserError(f"{place}: {name} is {said} there, but {word} says {asked}; {remedy.format(word)}")
    found = said if said is not None else asked
    if found is None:
        raise UserError(f"{place}: this form does not say {name}; add {word}")
    return found


def _agreed_experts(source: Source, asked: ImportRequest, place: Path) -> int:
    words = asked.words
    return _agreed(
        "the number of experts", source.num_experts, asked.experts, place, word=words.experts, remedy=words.remedy
    )


def _agreed_top_k(said: int | None, asked: ImportRequest, place: Path) -> int:
    return _agreed("top-K", said, asked.top_k, place, word=asked.words.top_k, remedy=asked.words.remedy)


def _experts(source: Source, asked: ImportRequest, place: Path) -> int:
    found = _agreed_experts(source, asked, place)
    highest = max((int(step.expert_ids_LTK.max()) for step in source.steps), default=-1)
    lowest = min((int(step.expert_ids_LTK.min()) for step in source.steps), default=0)
    if highest >= found or lowest < 0:
        wrong = highest if highest >= found else lowest
        raise UserError(f"{place}: expert {wrong} of {found} is chosen there; give the right {asked.words.experts}")
    return found


def _recorded(source: Source, asked: ImportRequest, place: Path) -> tuple[RoutingTrace, list[str]]:
    """Tokens with their experts, in sequences; gates where the source has them, else equal ones. And notes."""
    width = int(source.steps[0].expert_ids_LTK.shape[2])
    if source.sequence_length is not None and asked.yields:
        length = source.sequence_length
    else:
        length = _agreed(
            "the sequence length",
            source.sequence_length,
            asked.sequence_length,
            place,
            word=asked.words.sequence_length,
            remedy=asked.words.remedy,
        )
    top_k = _agreed_top_k(width, asked, place)
    source, notes = _as_shares(source)
    weighed = all(step.weights_LTK is not None for step in source.steps)
    shape = RouterShape(
        kind="recorded" if weighed else "selections", num_experts=_experts(source, asked, place), top_k=top_k
    )
    tokens = source.steps[-1].expert_ids_LTK.shape[1]
    if not weighed:
        notes.append("the source has no gates: equal ones stand for them, and capacity drops at random")
    if asked.fill and tokens < (asked.sequence_length or length):
        source, length = _filled(source, asked.sequence_length or length), asked.sequence_length or length
        notes.append(
            f"its {tokens:,} tokens are repeated to fill one sequence of {length:,}: loads are as uncertain as those "
            "of so few tokens; record more"
        )
    elif source.sequence_length is None and asked.yields:
        notes.append(f"it does not part sequences: {asked.words.sequence_length} = {length:,} does")
    highest = max(int(step.expert_ids_LTK.max()) for step in source.steps)
    if highest + 1 < shape.num_experts:
        notes.append(f"no token chose an expert above {highest} of 0 to {shape.num_experts - 1}")
    steps = tuple(_trace_step(step, length, weighed=weighed, asked=asked, place=place) for step in source.steps)
    return RoutingTrace(router=shape, steps=steps), notes


def _as_shares(source: Source) -> tuple[Source, list[str]]:
    """Gates no larger than 1: a factor that a router multiplies all of them by is divided out again, and noted."""
    most = max((float(step.weights_LTK.max()) for step in source.steps if step.weights_LTK is not None), default=0.0)
    if most <= 1:
        return source, []
    steps = tuple(
        replace(step, weights_LTK=None if step.weights_LTK is None else step.weights_LTK / np.float32(most))
        for step in source.steps
    )
    return replace(source, steps=steps), [f"gates are divided by {most:.4g}, the largest, so that they are shares"]


def _filled(source: Source, length: int) -> Source:
    """Every step with its tokens repeated, in order, up to `length`."""

    def fill(step: Selections) -> Selections:
        index_T = np.arange(length) % step.expert_ids_LTK.shape[1]
        weights = step.weights_LTK
        return replace(
            step,
            expert_ids_LTK=step.expert_ids_LTK[:, index_T],
            weights_LTK=None if weights is None else weights[:, index_T],
        )

    return replace(source, steps=tuple(fill(step) for step in source.steps))


def _trace_step(step: Selections, length: int, *, weighed: bool, asked: ImportRequest, place: Path) -> TraceStep:
    ids_LTK = step.expert_ids_LTK
    layers, tokens, top_k = ids_LTK.shape
    if tokens < length:
        raise UserError(
            f"{place}: step {step.step} has {tokens} tokens, less than a sequence of {length}; "
            f"give a smaller {asked.words.sequence_length}"
        )
    shape = (layers, tokens // length, length, top_k)
    kept = shape[1] * length
    if weighed:
        assert step.weights_LTK is not None
        affinities = gates = step.weights_LTK[:, :kept].reshape(shape)
    else:  # they mean nothing, but let capacity by score drop at random and not always the last tokens
        affinities = stream(asked.seed, "trace-affinities").random(shape, dtype=np.float32)
        gates = np.full(shape, 1.0 / top_k, dtype=np.float32)
    return TraceStep(
        step=step.step,
        expert_ids_LSTK=ids_LTK[:, :kept].reshape(shape).astype(np.int16),
        affinities_LSTK=affinities,
        gates_LSTK=gates,
    )


def _as_counts(source: Source, experts: int) -> Source:
    """Counts of the last step, where tokens have an expert twice (two slots of one expert, say)."""
    ids_LTK = source.steps[-1].expert_ids_LTK
    counts_LE = np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in ids_LTK]).astype(float)
    twice = np.mean([has_duplicates(ids_TK[None, None]) for ids_TK in ids_LTK.swapaxes(0, 1)])
    note = f"{twice:.0%} of the tokens choose an expert twice: only counts per layer were taken"
    return replace(source, steps=(), counts_LE=counts_LE, top_k=ids_LTK.shape[2], notes=(*source.notes, note))


def _drawn(source: Source, asked: ImportRequest, place: Path) -> tuple[RoutingTrace, list[str]]:
    counts_LE = source.counts_LE
    assert counts_LE is not None
    if source.num_experts is None and asked.experts is not None and counts_LE.shape[1] > asked.experts:
        raise UserError(f"{place}: counts of {counts_LE.shape[1]} experts; give the right {asked.words.experts}")
    experts = _agreed_experts(source, asked, place)
    counts_LE = np.pad(counts_LE, ((0, 0), (0, experts - counts_LE.shape[1])))
    top_k = _agreed_top_k(source.top_k, asked, place)
    if top_k > experts:
        raise UserError(f"{place}: {asked.words.top_k} = {top_k} exceeds its {experts} experts; give the right one")
    length = asked.sequence_length or source.sequence_length or DRAWN_LENGTH
    counts_LE = np.maximum(counts_LE, 0.5)  # an expert that was never seen may still be chosen
    trace = popularity_trace(
        RouterShape(kind="popularity", num_experts=experts, top_k=top_k),
        counts=counts_LE.tolist(),
        num_layers=len(counts_LE),
        num_sequences=max(1, asked.tokens // length),
        sequence_length=length,
        seed=asked.seed,
    )
    notes = [f"only counts: {trace.final.num_tokens:,} tokens were drawn; which experts go together is not known"]
    most = (counts_LE.max(axis=1) / counts_LE.sum(axis=1)).max()
    if most * top_k > 1:
        notes.append(
            f"an expert has {most:.0%} of a layer's selections, more than 1 of {top_k} distinct ones of each token: "
            f"is {asked.words.top_k} right?"
        )
    return trace, notes
