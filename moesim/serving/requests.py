"""When requests come and how long they are: drawn, or read from a log."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.seeding import stream
from moesim.serving.schema import Arrivals, FixedLength, Gamma, Length, TraceArrivals

# Columns by what publishers call them, in small letters: Azure LLM inference traces, BurstGPT, and plain words.
_TIMES = ("timestamp", "time", "arrival")
_INPUTS = ("contexttokens", "request tokens", "input", "input tokens", "prompt tokens")
_OUTPUTS = ("generatedtokens", "response tokens", "output", "output tokens", "generated tokens")


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests in the order of their arrival: seconds from the first, tokens of the prompt, tokens to generate [N]."""

    arrival_N: NDArray[np.float64]
    input_N: NDArray[np.int64]
    output_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival_N)

    def faster(self, factor: float) -> "Requests":
        """The same requests, `factor` times as many a second."""
        return Requests(arrival_N=self.arrival_N / factor, input_N=self.input_N, output_N=self.output_N)


def draw_requests(arrivals: Arrivals, *, count: int, seed: int) -> Requests:
    """`count` requests. Raises UserError for a log that cannot be read."""
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
    time_N, input_N, output_N = (np.array(column) for column in zip(*rows, strict=True))
    return Requests(
        arrival_N=(time_N - time_N[0]) / speed,
        input_N=np.maximum(input_N, 1).astype(np.int64),
        output_N=np.maximum(output_N, 1).astype(np.int64),
    )


def _rows(lines: Iterable[list[str]], path: Path, *, count: int) -> Iterable[tuple[float, float, float]]:
    lines = iter(lines)
    header = [name.strip().lower() for name in next(lines, [])]
    places = [_place(header, names, path) for names in (_TIMES, _INPUTS, _OUTPUTS)]
    for number, line in enumerate(lines, start=2):
        if number - 2 >= count:
            return
        try:
            time, *tokens = (line[place] for place in places)
            yield _seconds(time), float(tokens[0]), float(tokens[1])
        except (ValueError, IndexError):
            what = f"{path}:{number}: needs a time and two numbers of tokens"
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
