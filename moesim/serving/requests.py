"""When requests come and how long they are: drawn, or read from a log."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.seeding import stream
from moesim.serving.batch import Job
from moesim.serving.request_log import read_log
from moesim.serving.schema import Arrivals, FixedLength, Gamma, Length, Serving, TraceArrivals

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
        return _read(arrivals, count=count)
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


def _read(arrivals: TraceArrivals, *, count: int) -> Requests:
    columns = arrivals.columns.model_dump(exclude_none=True) if arrivals.columns else {}
    log = read_log(Path(arrivals.file), count=count, unit=arrivals.unit, columns=columns)
    prefix_N, prefix_tokens_N, class_N = log.optional_NO.T.astype(np.int64)
    input_N = log.input_N.astype(np.int64)
    return Requests(
        arrival_N=log.time_N / arrivals.speed,
        input_N=input_N,
        output_N=log.output_N.astype(np.int64),
        class_N=np.maximum(class_N, 0) if class_N.max() >= 0 else None,
        prefix_N=np.where(prefix_tokens_N > 0, prefix_N, -1),
        prefix_tokens_N=np.clip(prefix_tokens_N, 0, input_N),
        left_out=log.left_out,
    )
