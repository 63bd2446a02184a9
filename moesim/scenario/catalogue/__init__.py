"""GPUs and models by name, each entry with its source. Adding one is adding it to the YAML beside this file."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from moesim.errors import UserError
from moesim.scenario.document import parse_yaml
from moesim.spelling import same_product


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU of the catalogue; all rates are decimal, per second and without sparsity.

    `scaled_from` names the GPU whose measured kernels stand for its own, scaled; None: it is measured itself.
    `peak_flops` maps a number format to FLOP/s (a format that the chip lacks is absent), `nvlink_bandwidth` is bytes/s
    per direction, `nvlink_domain` the GPUs of a rack that one NVSwitch fabric joins (None: those of a node),
    `price_per_gpu_hour` the default rent in USD with its own source.
    """

    name: str
    scaled_from: str | None
    sm_count: int
    clock_hz: float
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float
    memory_bytes: float
    l2_bytes: float
    nvlink_bandwidth: float
    nvlink_domain: int | None
    source: str
    price_per_gpu_hour: float
    price_source: str


_BOUNDS = {  # of the numbers of a GPU
    "sm_count": (1, 1e5),
    "clock_hz": (1e6, 1e11),
    "peak_flops": (1e9, 1e20),
    "memory_bandwidth": (1e6, 1e17),
    "memory_bytes": (1e6, 1e15),
    "l2_bytes": (0, 1e13),
    "nvlink_bandwidth": (1e3, 1e18),
    "price_per_gpu_hour": (0, 1e6),
}


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?` when a known word is close, else the list of known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"


def _suggest_product(word: str, known: Iterable[str]) -> str:
    same = same_product(word, known)
    return f'did you mean "{same}"?' if same else f"known: {', '.join(known)}"


@cache
def _catalogue(name: str) -> Mapping[str, Mapping[str, Any]]:
    text = (resources.files("moesim.scenario.catalogue") / f"{name}.yaml").read_text(encoding="utf-8")
    entries = parse_yaml(text, source=f"catalogue/{name}.yaml").plain
    assert isinstance(entries, dict)
    return MappingProxyType(entries)


def gpu_names() -> tuple[str, ...]:
    """Names of the GPUs in the catalogue."""
    return tuple(_catalogue("gpus"))


@cache
def gpu_spec(name: str) -> GpuSpec:
    """The catalogue's GPU `name`. Raises UserError with a suggestion for an unknown name."""
    entries = _catalogue("gpus")
    if name not in entries:
        own = "or describe yours, e.g. gpu: {like: h200, name: mine, memory: 96 GB, peak: {bf16: 148 TFLOP/s}}"
        raise UserError(f'unknown GPU "{name}"; {_suggest_product(name, entries)}; {own}')
    entry = dict(entries[name])
    for key, (least, most) in _BOUNDS.items():
        numbers = entry[key].values() if key == "peak_flops" else [entry[key]]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
                text = f"must be between {least:g} and {most:g}, got {number!r}"
                raise UserError(f"catalogue/gpus.yaml: {name}.{key}: {text}")
    domain = entry.pop("nvlink_domain", None)
    peaks = {dtype: float(peak) for dtype, peak in entry.pop("peak_flops").items()}
    entry |= {key: float(value) for key, value in entry.items() if isinstance(value, int) and key != "sm_count"}
    return GpuSpec(name=name, scaled_from=entry.pop("like", None), peak_flops=peaks, nvlink_domain=domain, **entry)


def model_names() -> tuple[str, ...]:
    """Names of the model presets in the catalogue."""
    return tuple(_catalogue("models"))


def model_preset(name: str) -> dict[str, Any]:
    """The fields of the preset `name`, as in a scenario's `model` section. Raises UserError for an unknown name."""
    entries = _catalogue("models")
    if name not in entries:
        raise UserError(f'unknown model "{name}"; {_suggest_product(name, entries)}')
    return {"preset": name, **entries[name]}
