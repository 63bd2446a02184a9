"""How wrong each source of a kernel's time is known to be: the shipped table `errors.json` and what of it holds where.

`tools/kernel_errors.py` computes the table from the shipped profiles (`moesim.kernels.error_study`).
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InternalError
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.estimate import SOURCES, KernelModel, MixedKernels
from moesim.kernels.families import FloatArray, families_without_units
from moesim.kernels.scaled import ScaledModel
from moesim.kernels.tabulated import TabulatedModel
from moesim.strict_json import parse_json

TABLE = Path(__file__).parent / "errors.json"
NETWORK, TRANSFERS = "network", "transfers"  # source and family of what is no kernel
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class KnownError:
    """Errors of one family of kernels from one source: log of measured over predicted seconds.

    basis: the profile, or what the model rests on (`measured`, `tables`, `scaled`, `any`); `median` keeps its sign, p50
    and p90 are of its absolute value; `apart`: how far the rows themselves are from this project's own (tables), p90;
    `how`: the way they were found.
    """

    basis: str
    source: str
    family: str
    count: int
    median: float
    p50: float
    p90: float
    apart: float
    how: str

    @property
    def half_width(self) -> float:
        """Log of the factor that nine of ten kernels of the family stay within."""
        return math.hypot(self.p90, self.apart)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def transfers_of(evidence: str) -> str:
    """The family of transfers of which such rows were measured; "": of which none were."""
    return f"{TRANSFERS}, {evidence}" if evidence else TRANSFERS


def known_error_of(
    logs: list[FloatArray], *, basis: str, source: str, family: str, how: str, apart: float = 0.0
) -> KnownError:
    """The error of rows of several GPU kinds, each kind counting as much as the others."""
    quantiles = np.linspace(0.0, 1.0, 201)
    even = np.concatenate([np.quantile(logs_P, quantiles) for logs_P in logs]) if len(logs) > 1 else logs[0]
    p50, p90 = np.quantile(np.abs(even), [0.5, 0.9])
    numbers = {"median": float(np.median(even)), "p50": float(p50), "p90": float(p90), "apart": apart}
    rounded = {name: round(value, _DIGITS) for name, value in numbers.items()}
    return KnownError(basis=basis, source=source, family=family, count=sum(map(len, logs)), how=how, **rounded)


@cache
def known_errors() -> tuple[KnownError, ...]:
    """All rows of the shipped table."""
    content = parse_json(TABLE.read_bytes())
    return tuple(KnownError(**row) for row in content["errors"])


@cache
def _by_key() -> dict[tuple[str, str, str], KnownError]:
    return {(row.basis, row.source, row.family): row for row in known_errors()}


def bases_of(model: KernelModel) -> tuple[str, ...]:
    """The bases whose errors hold for a model, the nearest first.

    A GPU whose rates are those of the measured one (H800 and H100) has that one's errors: nothing is scaled. Of several
    kinds of GPU those that hold for all of them.
    """
    if isinstance(model, MixedKernels):
        first, *others = map(bases_of, model.models.values())
        return tuple(basis for basis in first if all(basis in other for other in others))
    if isinstance(model, ScaledModel):
        return bases_of(model.base) if model.is_same_chip else ("scaled", "any")
    if isinstance(model, TabulatedModel):
        return (model.profile.name, "tables", "any")
    return (model.profile.name, "measured", "any") if isinstance(model, CalibratedModel) else ("any",)


def kernels_rest_on(model: KernelModel) -> str:
    """The model's name, and that it is a data sheet where it is: runs of one such name share the errors of kernels."""
    if isinstance(model, MixedKernels):
        return " and ".join(dict.fromkeys(map(kernels_rest_on, model.models.values())))
    regime = getattr(model, "regime", None)
    name = f"{model.name} (data sheet)" if bases_of(model) == ("any",) else model.name
    return name if regime is None else f"{name}, {regime}"


def clock_error_of(model: KernelModel) -> float:
    """Log seconds by which a step's kernels may be off because the kind's clock under load is not known; mostly 0."""
    if isinstance(model, MixedKernels):
        return max(map(clock_error_of, model.models.values()))
    if isinstance(model, ScaledModel):
        return clock_error_of(model.base)
    return model.clock_error if isinstance(model, TabulatedModel) else 0.0


def known_error(bases: tuple[str, ...], source: str, family: str) -> KnownError:
    """The error of a family from a source: of the nearest basis that has it, else of the next firmer source there,
    else of the next weaker one.
    """
    if source == NETWORK:
        return _by_key()["any", NETWORK, family]
    at = SOURCES.index(source)
    for near in (*reversed(SOURCES[: at + 1]), *SOURCES[at + 1 :]):
        for basis in bases:
            if (found := _by_key().get((basis, near, family))) is not None:
                return found
    raise InternalError(f"no known error of {family} from {source} on {', '.join(bases)}")


def errors_that_hold(model: KernelModel) -> list[KnownError]:
    """What ranges of steps on this model's GPU are made of, data sheets (`roofline`) apart: of each source and family
    the nearest basis that has it, where the GPU has units for it.
    """
    assert isinstance(model, CalibratedModel | TabulatedModel | ScaledModel)
    lacking = families_without_units(model.fallback.gpu.peak_flops)
    found: dict[tuple[str, str], KnownError] = {}
    for basis in bases_of(model):
        for (of, source, family), row in _by_key().items():
            if of == basis and source not in (NETWORK, "roofline") and family not in lacking:
                found.setdefault((source, family), row)
    return sorted(found.values(), key=lambda row: (SOURCES.index(row.source), row.family))
