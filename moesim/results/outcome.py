"""What a simulated step gives, before it is told in the words of a result, and the range of its step time.

The range is what chance of routing and the known errors of kernels and transfers make of it together. The error of one
family of kernels from one source is one unknown factor, common to all kernels of that family in the step; families and
sources are independent of each other and of the routing. A kernel's own error is not drawn anew for each kernel: it
would average out over a step's thousands, and errors of a profile or of scaling do not. The step follows a family's
factor by the family's share of the critical path. In log space the parts add in squares.

Legend: S routing samples, W ranks of the world, C categories, P pipeline ranks.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.errors import NETWORK, TRANSFERS, known_error
from moesim.results.spans import SpanTable

CLOCK = "clock"  # under load, of a kind without a published sustained rate
_CLOCK_HOW = (
    "no sustained rate of this kind is known: the nearest kind's threshold per watt (moesim/kernels/clock_laws.py)"
)
_COMPUTING = ("gemm", "grouped_gemm", "attention")
_TRANSFER_CATEGORIES = ("dispatch_exposed", "combine_exposed", "data_parallel", "tensor", "pipeline")


class Basis(NamedTuple):
    """What seconds of an attribution category rest on: their source, and the family whose errors they share."""

    category: str
    source: str
    family: str


@dataclass(frozen=True, kw_only=True)
class ErrorPart:
    """A family of kernels from one source in a step. `share`: of the critical path; `log_error`: log of the factor that
    nine of ten such predictions stay within; `count`: kernels that it was measured on; `how`: the way.
    """

    source: str
    family: str
    share: float
    log_error: float
    count: int
    how: str

    @property
    def log_range(self) -> tuple[float, float]:
        """By how much less and how much more, in logs, the step takes at either end of the error; both >= 0."""
        grown = [math.log1p(self.share * math.expm1(error)) for error in (-self.log_error, self.log_error)]
        return -grown[0], grown[1]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def path_shares(
    source_seconds: Mapping[Basis, float], path_seconds: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Share of the critical path by (source, family): its seconds of a category are split as the category's operations.

    Bubbles, host stalls and what no operation stands for belong to none.
    """
    total = sum(path_seconds.values())
    in_category: defaultdict[str, float] = defaultdict(float)
    for basis, seconds in source_seconds.items():
        in_category[basis.category] += seconds
    shares: defaultdict[tuple[str, str], float] = defaultdict(float)
    for basis, seconds in sorted(source_seconds.items()):
        if seconds > 0.0:
            part = seconds / in_category[basis.category]
            shares[basis.source, basis.family] += part * path_seconds.get(basis.category, 0.0) / total
    for category in _TRANSFER_CATEGORIES:
        if not in_category.get(category) and path_seconds.get(category):
            shares[NETWORK, TRANSFERS] += path_seconds[category] / total
    return dict(shares)


def error_parts(
    shares: Mapping[tuple[str, str], float], bases: tuple[str, ...], *, clock_error: float = 0.0
) -> tuple[ErrorPart, ...]:
    """The known error of every part of a step on a GPU whose kernels rest on `bases`; the weightiest first.

    clock_error: log of the factor that a clock under load, of which nothing was published, may be off: of all kernels
    that compute.
    """
    parts = []
    if clock_error > 0.0:
        computing = sum(share for (_, family), share in shares.items() if family.split()[0] in _COMPUTING)
        clock = ErrorPart(
            source=CLOCK, family="all that compute", share=computing, log_error=clock_error, count=0, how=_CLOCK_HOW
        )
        parts.append(clock)
    for (source, family), share in shares.items():
        known = known_error(bases, source, family)
        part = ErrorPart(
            source=source, family=family, share=share, log_error=known.half_width, count=known.count, how=known.how
        )
        parts.append(part)
    return tuple(sorted(parts, key=lambda part: (-part.share * part.log_error, part.source, part.family)))


def kernel_range(step_s: float, parts: Sequence[ErrorPart]) -> list[float]:
    """The 90 % range of the step time from errors of kernels and transfers alone."""
    down, up = (math.hypot(*(part.log_range[end] for part in parts)) for end in (0, 1))
    return [step_s * math.exp(-down), step_s * math.exp(up)]


def whole_range(step_s: float, *ranges: Sequence[float]) -> list[float]:
    """Independent ranges around one mean as one, end by end, in squares of logs."""
    down, up = (math.hypot(*(math.log(found[end] / step_s) for found in ranges)) for end in (0, 1))
    return [step_s * math.exp(-down), step_s * math.exp(up)]


FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Samples simulated in lockstep. `spans`: group 0 of every pipeline rank, first sample; `critical_path`: of it.

    `jitter_SW`: at most so many seconds of the waiting in `attribution_CSW` are for chips and hosts that are slower
    than others by chance. `shared_links`: how many links groups of ranks can fill together. `waits`: seconds of sample
    0 by (who, for whom).
    """

    step_S: FloatArray
    attribution_CSW: FloatArray
    jitter_SW: FloatArray
    compute_time_SW: FloatArray
    busy_SP: FloatArray
    source_seconds: Mapping[Basis, float]
    tensor_bytes: float
    transfer_sources: tuple[str, ...]
    spans: tuple[SpanTable, ...]
    critical_path: dict[str, Any]
    shared_links: int
    waits: Mapping[tuple[int, int], float]

    def samples(self, chosen: slice) -> "Outcome":
        """The outcome of some of the samples."""
        return replace(
            self,
            step_S=self.step_S[chosen],
            attribution_CSW=self.attribution_CSW[:, chosen],
            jitter_SW=self.jitter_SW[chosen],
            compute_time_SW=self.compute_time_SW[chosen],
            busy_SP=self.busy_SP[chosen],
        )

    @classmethod
    def joined(cls, parts: "Sequence[Outcome]") -> "Outcome":
        """Samples simulated one part after the other; what is kept of one sample alone is that of the first part."""
        return replace(
            parts[0],
            step_S=np.concatenate([part.step_S for part in parts]),
            attribution_CSW=np.concatenate([part.attribution_CSW for part in parts], axis=1),
            jitter_SW=np.concatenate([part.jitter_SW for part in parts]),
            compute_time_SW=np.concatenate([part.compute_time_SW for part in parts]),
            busy_SP=np.concatenate([part.busy_SP for part in parts]),
            shared_links=max(part.shared_links for part in parts),
        )
