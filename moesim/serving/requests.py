"""When requests come and how long they are: drawn, or read from a log.

A log is CSV with a time and two numbers of tokens in each line, as publishers of traces write it. Names of columns are
compared by their letters and digits alone. Times are seconds, milliseconds or microseconds, or dates (ISO 8601, those
without a zone as UTC). Lines need not be in order; of requests without a token of prompt or answer (BurstGPT has them
where a call failed) there is nothing to serve: they are left out, and counted.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError, closest
from moesim.seeding import stream
from moesim.serving.batch import Job
from moesim.serving.schema import Arrivals, FixedLength, Gamma, Length, Serving, TraceArrivals

# Columns by what publishers call them, letters and digits alone: Azure LLM inference traces, BurstGPT, Vidur, others.
NAMES: Mapping[str, tuple[str, ...]] = {
    "time": ("timestamp", "time", "arrival", "arrivaltime", "arrivedat", "times", "timestamps", "timeseconds"),
    "input": (
        "contexttokens", "requesttokens", "input", "inputtokens", "prompttokens", "inputlength", "promptlength",
        "inputlen", "promptlen", "numprefilltokens", "numinputtokens", "numprompttokens",
    ),
    "output": (
        "generatedtokens", "responsetokens", "output", "outputtokens", "outputlength", "outputlen", "responselength",
        "completiontokens", "numdecodetokens", "numoutputtokens", "numgeneratedtokens",
    ),
}  # fmt: skip
OPTIONAL = ("prefix", "prefixtokens", "priority")  # a whole number each, nothing or -1 for none
_ALL = {*OPTIONAL, *(name for names in NAMES.values() for name in names)}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_SUFFIXES = {"ms": "ms", "milliseconds": "ms", "us": "us", "microseconds": "us", "sec": "s", "seconds": "s"}
_LATEST = 1e10  # seconds; a larger time is one of another unit, such as milliseconds since 1970
_MOST_TOKENS = 10_000_000
_MOST_NUMBER = 2**53  # of a prefix or a class: whole numbers beyond are not exact
_BEHIND_TIME = ("input tokens", "output tokens", "prefix", "prefix tokens", "priority")
_OF_TOKENS = np.array(["tokens" in name for name in _BEHIND_TIME])
_NEEDED = np.arange(len(_BEHIND_TIME)) < 2
_LINES = 65_536  # that are turned into numbers at once
_DATE = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d+))?(Z|[+-]\d\d:?\d\d)?")

FloatArray = NDArray[np.float64]


def read_log(path: Path, *, count: int, unit: str, columns: Mapping[str, str]) -> "Requests":
    """The requests of the first `count` lines. `unit` of times that are numbers; `columns`: own names, by ours.

    Raises UserError, one line with the place, for what is no such file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = list(_chunks(file, path, count=count, unit=unit, columns=columns))
    except OSError as error:
        raise UserError(f"{_where(path)}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{_where(path)}: not UTF-8 text; save the CSV as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{_where(path)}: no CSV ({error}); save it as plain text with commas") from None
    rows_NC = np.concatenate(found) if found else np.zeros((0, 3 + len(OPTIONAL)))
    if not len(rows_NC):
        raise UserError(f"{_where(path)}: no request in it; give a CSV with a line for each")
    counts_N = (rows_NC[:, 1] > 0) & (rows_NC[:, 2] > 0)
    if not counts_N.any():
        raise UserError(f"{_where(path)}: no request has tokens of prompt and answer; look at the columns")
    rows_NC = rows_NC[counts_N]
    rows_NC = rows_NC[np.argsort(rows_NC[:, 0], kind="stable")]
    input_N, output_N, prefix_N, prefix_tokens_N, class_N = np.ascontiguousarray(rows_NC[:, 1:].T).astype(np.int64)
    return Requests(
        arrival_N=rows_NC[:, 0] - rows_NC[0, 0],
        input_N=input_N,
        output_N=output_N,
        class_N=np.maximum(class_N, 0) if class_N.max() >= 0 else None,
        prefix_N=np.where(prefix_tokens_N > 0, prefix_N, -1),
        prefix_tokens_N=np.clip(prefix_tokens_N, 0, input_N),
        left_out=int((~counts_N).sum()),
    )


def _where(path: Path, line: int | None = None) -> str:
    return f"workload.arrivals.file: {path}" + ("" if line is None else f":{line}")


def _chunks(
    file: Iterator[str], path: Path, *, count: int, unit: str, columns: Mapping[str, str]
) -> Iterator[FloatArray]:
    """[lines, 3 + OPTIONAL] numbers of so many lines at a time."""
    head = next(iter(file), "")
    if not head.strip():
        raise UserError(f"{_where(path)}: its first line is empty; name the columns there")
    delimiter = max(",;\t", key=head.count)
    header = [name.strip() for name in next(csv.reader([head], delimiter=delimiter))]
    places, own_unit = _places(header, columns, path)
    scale: float | None = UNITS[own_unit or unit]
    lines, first = csv.reader(file, delimiter=delimiter), 2
    by_date: bool | None = None  # whether times are dates, as the first one says
    while count > 0 and (chunk := list(islice(lines, min(_LINES, count)))):
        count -= len(chunk)
        if by_date is None:
            told = (line[places[0]] for line in chunk if places[0] is not None and len(line) > places[0])
            by_date = _DATE.fullmatch(next((text.strip() for text in told if text.strip()), "")) is not None
            scale = None if by_date else scale
        yield _numbers(chunk, places, scale, path, first)
        first += len(chunk)


def _places(header: Sequence[str], columns: Mapping[str, str], path: Path) -> tuple[list[int | None], str | None]:
    """Where each column is, and the unit of time where the name of its column says one."""
    plain, places, unit = [_plain(name) for name in header], [], None
    if twice := sorted({name for name in plain if name and plain.count(name) > 1 and name in _ALL}):
        raise UserError(f"{_where(path)}: two columns are called {twice[0]}; rename or drop one")
    for what, names in NAMES.items():
        if what in columns:
            if columns[what] not in header:
                hint = closest(columns[what], header) or f"; it has {', '.join(header)}"
                raise UserError(f"workload.arrivals.columns.{what}: {path} has no column {columns[what]!r}{hint}")
            place = header.index(columns[what])
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", columns[what])
            if what == "time" and words:
                unit = _SUFFIXES.get(words[-1].lower())
        else:
            place, said = _place(what, names, plain)
            if place < 0:
                known = f"it has {', '.join(header)[:80]}"
                remedy = f"name its {what} with workload.arrivals.columns: {{{what}: ...}}"
                raise UserError(f"{_where(path)}: no column that is called {' or '.join(names[:3])}; {known}; {remedy}")
            unit = said or unit
        places.append(place)
    return [*places, *(plain.index(name) if name in plain else None for name in OPTIONAL)], unit


def _place(what: str, names: Sequence[str], plain: Sequence[str]) -> tuple[int, str | None]:
    for name in names:
        if name in plain:
            return plain.index(name), None
        for suffix, unit in _SUFFIXES.items():
            if what == "time" and name + suffix in plain:
                return plain.index(name + suffix), unit
    return -1, None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _numbers(
    chunk: Sequence[Sequence[str]], places: Sequence[int | None], scale: float | None, path: Path, first: int
) -> FloatArray:
    """The columns of lines as numbers: in one go, or line by line to find out which is wrong."""
    try:
        rows_NC = np.empty((len(chunk), len(places)))
        for column, place in enumerate(places):
            if place is None:
                rows_NC[:, column] = -1.0
            elif column == 0:
                rows_NC[:, 0] = _seconds_of([line[place] for line in chunk], scale)
            else:
                empty = "-1" if column >= 3 else ""
                rows_NC[:, column] = np.array([line[place].strip() or empty for line in chunk]).astype(float)
        if not (_are_late(rows_NC) | _are_wrong(rows_NC).any(axis=1)).any():
            return rows_NC
    except (ValueError, IndexError):
        pass  # the line is looked for below
    return np.concatenate([_checked(line, places, scale, _where(path, first + n)) for n, line in enumerate(chunk)])


def _are_late(rows_NC: FloatArray) -> NDArray[np.bool_]:
    return np.asarray(~(np.abs(rows_NC[:, 0]) <= _LATEST))  # or no number


def _are_wrong(rows_NC: FloatArray) -> NDArray[np.bool_]:
    """[lines, columns behind the time]: whole numbers; of tokens no more than anybody asks for, and none below 0."""
    numbers = rows_NC[:, 1:]
    most = np.where(_OF_TOKENS, _MOST_TOKENS, _MOST_NUMBER)
    least = np.where(_NEEDED, 0, -np.inf)
    return np.asarray(~(np.isfinite(numbers) & (numbers == np.floor(numbers)) & (numbers <= most) & (numbers >= least)))


def _checked(line: Sequence[str], places: Sequence[int | None], scale: float | None, where: str) -> FloatArray:
    """[1, columns] of a line, or none of an empty one. Raises UserError for what is wrong with it."""
    if not any(cell.strip() for cell in line):
        return np.empty((0, len(places)))
    needs = "needs a time and two numbers of tokens (and numbers in prefix, prefix tokens, priority)"
    try:
        cells = ["-1" if place is None or (n >= 3 and not line[place].strip()) else line[place]
                 for n, place in enumerate(places)]  # fmt: skip
        row = np.array([[_seconds_of(cells[:1], scale)[0], *(float(cell) for cell in cells[1:])]])
    except (ValueError, IndexError, OverflowError):
        raise UserError(f"{where}: {needs}; mend or drop the line") from None
    if np.isnan(row[0, 0]):
        raise UserError(f"{where}: {needs}; mend or drop the line")
    if abs(row[0, 0]) > _LATEST:
        what = f"time {cells[0].strip()} is no number of seconds; set workload.arrivals.unit: ms (or us)"
        raise UserError(f"{where}: {what}")
    if len(wrong := np.flatnonzero(_are_wrong(row)[0])):
        at = int(wrong[0])
        least, most = ("0" if _NEEDED[at] else "-1"), f"{_MOST_TOKENS if _OF_TOKENS[at] else _MOST_NUMBER:,}"
        what = f"{_BEHIND_TIME[at]} {cells[at + 1].strip()}: a whole number from {least} to {most} is needed"
        raise UserError(f"{where}: {what}; mend or drop the line")
    return row


def _seconds_of(texts: Sequence[str], scale: float | None) -> FloatArray:
    """Seconds of times that are numbers of a unit, or (scale None) dates. Raises ValueError."""
    if scale is None:
        return np.array([_date(text) for text in texts])
    return np.asarray(np.array([text.strip() for text in texts]).astype(float)) * scale


def _date(text: str) -> float:
    """Seconds since 1970 of a date; Azure writes seven digits of a second."""
    match = _DATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    head, fraction, zone = match.groups()
    when = datetime.fromisoformat(head + (zone or ""))
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return when.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests in the order of their arrival: seconds from the first, tokens of the prompt, tokens to generate [N].

    Where there are any: the class of each (0 the most urgent), and which shared prefix (-1: none) of how many tokens
    the prompt begins with. `patience`: seconds that a class is put behind the one before it.
    """

    arrival_N: NDArray[np.float64]
    input_N: IntArray
    output_N: IntArray
    class_N: IntArray | None = None
    prefix_N: IntArray | None = None
    prefix_tokens_N: IntArray | None = None
    patience: float = 0.0
    left_out: int = 0  # lines of a log that ask for nothing

    def __len__(self) -> int:
        return len(self.arrival_N)

    @property
    def per_second(self) -> float:
        """How many arrive a second, of gaps between them; where all come at once, as within a nanosecond."""
        return (len(self) - 1) / max(float(self.arrival_N[-1]), 1e-9)

    def faster(self, factor: float) -> "Requests":
        """The same requests, `factor` times as many a second."""
        return replace(self, arrival_N=self.arrival_N / factor)

    def job(self, number: int) -> Job:
        """What an engine gets of request `number`."""
        urgency = 0 if self.class_N is None else int(self.class_N[number])
        prefix, prefix_tokens = -1, 0
        if self.prefix_N is not None and self.prefix_tokens_N is not None:
            prefix, prefix_tokens = int(self.prefix_N[number]), int(self.prefix_tokens_N[number])
        return Job(
            number,
            int(self.input_N[number]),
            int(self.output_N[number]),
            turn=float(self.arrival_N[number]) + urgency * self.patience,
            urgency=urgency,
            prefix=prefix,
            prefix_tokens=prefix_tokens,
        )


def draw_requests(load: Serving, *, seed: int) -> Requests:
    """The requests of a load. Raises UserError for a log that cannot be read."""
    requests = _arrivals(load.arrivals, count=load.requests, seed=seed)
    number = len(requests)
    if load.prefixes is not None:
        law, rng = load.prefixes, stream(seed, "prefixes")
        weight_P = np.arange(1, law.number + 1, dtype=float) ** -law.skew
        chosen_N = rng.choice(law.number, number, p=weight_P / weight_P.sum())
        prefix_N = np.where(rng.random(number) < law.share, chosen_N, -1)
        tokens_N = np.where(prefix_N >= 0, law.tokens, 0)
        requests = replace(requests, prefix_N=prefix_N, prefix_tokens_N=tokens_N, input_N=requests.input_N + tokens_N)
    if load.priorities is not None:
        shares = load.priorities.shares
        class_N = requests.class_N
        if class_N is None:
            class_N = stream(seed, "priorities").choice(len(shares), number, p=np.array(shares) / sum(shares))
        requests = replace(requests, class_N=class_N, patience=load.priorities.patience)
    return requests


def _arrivals(arrivals: Arrivals, *, count: int, seed: int) -> Requests:
    if isinstance(arrivals, TraceArrivals):
        columns = arrivals.columns.model_dump(exclude_none=True) if arrivals.columns else {}
        return read_log(Path(arrivals.file), count=count, unit=arrivals.unit, columns=columns).faster(arrivals.speed)
    gaps = stream(seed, "arrivals")
    shape = 1.0 / arrivals.variation**2 if isinstance(arrivals, Gamma) else 1.0
    gap_N = gaps.gamma(shape, 1.0 / (shape * arrivals.rate), size=count)
    gap_N[0] = 0.0
    return Requests(
        arrival_N=np.cumsum(gap_N),
        input_N=_lengths(arrivals.input, count, stream(seed, "input lengths")),
        output_N=_lengths(arrivals.output, count, stream(seed, "output lengths")),
    )


def _lengths(law: Length, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    if isinstance(law, FixedLength):
        return np.full(count, law.tokens)
    variance = np.log1p(law.variation**2)
    drawn_N = rng.lognormal(np.log(law.mean) - variance / 2, np.sqrt(variance), count)
    return np.clip(np.rint(drawn_N), 1, law.most).astype(np.int64)
