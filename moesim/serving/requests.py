"""When requests come and how long they are: drawn, or read from a log."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.seeding import stream
from moesim.serving.batch import Job
from moesim.serving.schema import Arrivals, FixedLength, Gamma, Length, Serving, TraceArrivals

# Columns by what publishers call them, in small letters: Azure LLM inference traces, BurstGPT, and plain words.
_TIMES = ("timestamp", "time", "arrival")
_INPUTS = ("contexttokens", "request tokens", "input", "input tokens", "prompt tokens")
_OUTPUTS = ("generatedtokens", "response tokens", "output", "output tokens", "generated tokens")
_OPTIONAL = ("prefix", "prefix tokens", "priority")  # of a log: a whole number each, -1 for none


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

    def __len__(self) -> int:
        return len(self.arrival_N)

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
        return _read(Path(arrivals.file), count=count, speed=arrivals.speed)
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


def _read(path: Path, *, count: int, speed: float) -> Requests:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_rows(csv.reader(file), path, count=count))
    except OSError as error:
        raise UserError(f"workload.arrivals.file: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"workload.arrivals.file: {path}: not UTF-8 text; save the CSV as UTF-8") from None
    if not rows:
        raise UserError(f"workload.arrivals.file: {path}: no request in it; give a CSV with a line for each")
    rows.sort(key=lambda row: row[0])
    time_N, input_N, output_N, prefix_N, prefix_tokens_N, class_N = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    input_N = np.maximum(input_N, 1).astype(np.int64)
    prefix_N = np.where(prefix_tokens_N > 0, prefix_N, -1).astype(np.int64)
    return Requests(
        arrival_N=(time_N - time_N[0]) / speed,
        input_N=input_N,
        output_N=np.maximum(output_N, 1).astype(np.int64),
        class_N=class_N.astype(np.int64) if class_N.max() >= 0 else None,
        prefix_N=prefix_N,
        prefix_tokens_N=np.clip(prefix_tokens_N, 0, input_N).astype(np.int64),
    )


def _rows(lines: Iterable[list[str]], path: Path, *, count: int) -> Iterable[tuple[float, ...]]:
    """Time, tokens of prompt and answer, and what the log says of prefix, its tokens and the class (-1: nothing)."""
    lines = iter(lines)
    header = [name.strip().lower() for name in next(lines, [])]
    places = [_place(header, names, path) for names in (_TIMES, _INPUTS, _OUTPUTS)]
    optional = [header.index(name) if name in header else None for name in _OPTIONAL]
    for number, line in enumerate(lines, start=2):
        if number - 2 >= count:
            return
        try:
            time, *tokens = (line[place] for place in places)
            others = (-1.0 if place is None or not line[place].strip() else float(line[place]) for place in optional)
            yield _seconds(time), float(tokens[0]), float(tokens[1]), *others
        except (ValueError, IndexError):
            what = f"{path}:{number}: needs a time and two numbers of tokens (and numbers in {', '.join(_OPTIONAL)})"
            raise UserError(f"workload.arrivals.file: {what}; mend or drop the line") from None


def _place(header: list[str], names: tuple[str, ...], path: Path) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    what = f"{path}: no column {' or '.join(repr(name) for name in names)}"
    raise UserError(f"workload.arrivals.file: {what} in its first line; name the columns")


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        head, _, fraction = text.strip().partition(".")  # Azure writes seven digits of a second
        digits = "".join(sign for sign in fraction if sign.isdigit())
        return datetime.fromisoformat(head).timestamp() + (float(f"0.{digits}") if digits else 0.0)
