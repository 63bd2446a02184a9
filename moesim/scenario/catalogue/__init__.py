"""GPUs and models by name, each entry with its source. Adding one is adding it to the YAML beside this file.

A GPU of one's own is what a data sheet says of it, and the GPU of the catalogue that the rest is taken from.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from moesim.errors import UserError, same_product
from moesim.scenario.base import Bandwidth, FlopRate, Memory, MemoryBandwidth, Name, Rent, Section, Text
from moesim.scenario.document import parse_yaml


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU of the catalogue; all rates are decimal, per second and without sparsity.

    `scaled_from` names the GPU whose measured kernels stand for its own, scaled; None: it is measured itself.
    `peak_flops` maps a number format to FLOP/s (a format that the chip lacks is absent), `nvlink_bandwidth` is bytes/s
    per direction (of its PCIe without `has_nvlink`), `nvlink_domain` the GPUs of a rack that one NVSwitch fabric joins
    (None: those of a node), `price_per_gpu_hour` the default rent in USD with its own source. `reached`: the share of
    the peak that large products reach over that of `scaled_from`, by number format, where a run tells (others have that
    of bf16).
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
    reached: Mapping[str, float] | None = field(default=None, hash=False)
    has_nvlink: bool = True


_BOUNDS = {  # of the numbers of a GPU
    "sm_count": (1, 1e5),
    "clock_hz": (1e6, 1e11),
    "peak_flops": (1e9, 1e20),
    "memory_bandwidth": (1e6, 1e17),
    "memory_bytes": (1e6, 1e15),
    "l2_bytes": (0, 1e13),
    "nvlink_bandwidth": (1e3, 1e18),
    "price_per_gpu_hour": (0, 1e6),
    "reached": (0.05, 2.0),
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
def catalogue(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The entries of `gpus`, `models` or `failures` by name, as they stand in the file."""
    text = (resources.files("moesim.scenario.catalogue") / f"{name}.yaml").read_text(encoding="utf-8")
    entries = parse_yaml(text, source=f"catalogue/{name}.yaml").plain
    assert isinstance(entries, dict)
    return MappingProxyType(entries)


def gpu_names() -> tuple[str, ...]:
    """Names of the GPUs in the catalogue."""
    return tuple(catalogue("gpus"))


@cache
def gpu_spec(name: str) -> GpuSpec:
    """The catalogue's GPU `name`. Raises UserError with a suggestion for an unknown name."""
    entries = catalogue("gpus")
    if name not in entries:
        mine = "{like: h200, name: mine, memory: 96 GB, peak: {bf16: 148 TFLOP/s}}"
        own = f"or describe yours in a scenario, cluster.gpu: {mine}"
        raise UserError(f'unknown GPU "{name}"; {_suggest_product(name, entries)}; {own}')
    entry = dict(entries[name])
    for key, (least, most) in _BOUNDS.items():
        given = entry.get(key, {}) if key == "reached" else entry[key]
        numbers = given.values() if isinstance(given, dict) else [given]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
                text = f"must be between {least:g} and {most:g}, got {number!r}"
                raise UserError(f"catalogue/gpus.yaml: {name}.{key}: {text}")
    domain, has_nvlink = entry.pop("nvlink_domain", None), entry.pop("has_nvlink", True)
    peaks = {dtype: float(peak) for dtype, peak in entry.pop("peak_flops").items()}
    entry |= {key: float(value) for key, value in entry.items() if isinstance(value, int) and key != "sm_count"}
    return GpuSpec(
        name=name,
        scaled_from=entry.pop("like", None),
        peak_flops=peaks,
        nvlink_domain=domain,
        has_nvlink=has_nvlink,
        **entry,
    )


def model_names() -> tuple[str, ...]:
    """Names of the model presets in the catalogue."""
    return tuple(catalogue("models"))


def model_preset(name: str) -> dict[str, Any]:
    """The fields of the preset `name`, as in a scenario's `model` section. Raises UserError for an unknown name."""
    entries = catalogue("models")
    if name not in entries:
        raise UserError(f'unknown model "{name}"; {_suggest_product(name, entries)}')
    return {"preset": name, **entries[name]}


def _own_name(name: str) -> str:
    if name in gpu_names():
        raise ValueError(f'"{name}" is a GPU of the catalogue; give your own another name')
    return name


class Peaks(Section):
    """Dense peaks by number format; one that is not given keeps the ratio to bf16 that it has on `like`."""

    bf16: FlopRate | None = Field(default=None, description="Dense peak of the tensor cores in bf16.")
    fp16: FlopRate | None = Field(default=None, description="Dense peak in fp16; absent: in proportion to bf16.")
    fp8: FlopRate | None = Field(default=None, description="Dense peak in fp8; absent: in proportion to bf16.")
    mxfp8: FlopRate | None = Field(default=None, description="Dense peak in mxfp8; absent: in proportion to bf16.")
    fp4: FlopRate | None = Field(default=None, description="Dense peak in nvfp4; absent: in proportion to bf16.")
    tf32: FlopRate | None = Field(default=None, description="Dense peak in tf32; absent: in proportion to bf16.")
    fp32: FlopRate | None = Field(default=None, description="Peak of the plain cores; absent: in proportion to bf16.")


class OwnGpu(Section):
    """A GPU that the catalogue lacks, or a variant of one: `like` with the figures of its own data sheet.

    Durations of its kernels are those of `like` scaled by the ratios of peaks and bandwidths (source "scaled").
    """

    like: Name = Field(description="GPU of the catalogue whose kernels are scaled; what is not given here is its.")
    name: Annotated[Name, AfterValidator(_own_name)] = Field(description="Name in results, none of the catalogue's.")
    memory: Memory | None = Field(default=None, description="Memory as the driver reports it, e.g. 96 GB.")
    peak: Peaks = Field(default=Peaks(), description="Dense peaks by number format, e.g. {bf16: 148 TFLOP/s}.")
    memory_bandwidth: MemoryBandwidth | None = Field(default=None, description="Bandwidth of its memory, e.g. 4 TB/s.")
    nvlink: Bandwidth | None = Field(
        default=None, description="NVLink (or what stands in its place) of one GPU in one direction, e.g. 450 GB/s."
    )
    sm_count: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = Field(
        default=None, description="Streaming multiprocessors (compute units)."
    )
    price: Rent | None = Field(default=None, description="Rent in USD per hour; a price of the pool wins.")
    source: Text | None = Field(default=None, description="Where these figures are published.")

    @property
    def spec(self) -> GpuSpec:
        """All facts. Raises UserError where `like` is not in the catalogue."""
        return _spec(self)


@cache
def _spec(own: OwnGpu) -> GpuSpec:
    like = gpu_spec(own.like)
    return replace(
        like,
        name=own.name,
        scaled_from=like.name,
        peak_flops=_peaks(own.peak, like),
        memory_bytes=like.memory_bytes if own.memory is None else own.memory,
        memory_bandwidth=like.memory_bandwidth if own.memory_bandwidth is None else own.memory_bandwidth,
        nvlink_bandwidth=like.nvlink_bandwidth if own.nvlink is None else own.nvlink,
        has_nvlink=like.has_nvlink or own.nvlink is not None,
        sm_count=like.sm_count if own.sm_count is None else own.sm_count,
        price_per_gpu_hour=like.price_per_gpu_hour if own.price is None else own.price,
        source=f"scenario: {own.source or 'no source given'}; what it does not give: {like.source}",
        price_source=like.price_source if own.price is None else "scenario",
    )


def _peaks(given: Peaks, like: GpuSpec) -> dict[str, float]:
    ratio = 1.0 if given.bf16 is None else given.bf16 / like.peak_flops["bf16"]
    in_proportion = {dtype: peak * ratio for dtype, peak in like.peak_flops.items()}
    named = {dtype: peak for dtype in Peaks.model_fields if (peak := getattr(given, dtype)) is not None}
    return in_proportion | named


def _form(value: object) -> str:
    return "<mapping>" if isinstance(value, dict | OwnGpu) else "<name>"


# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyGpu = Annotated[Annotated[Name, Tag("<name>")] | Annotated[OwnGpu, Tag("<mapping>")], Discriminator(_form)]
