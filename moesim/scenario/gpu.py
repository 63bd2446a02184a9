"""A GPU of one's own: what a data sheet says of it, and the GPU of the catalogue that the rest is taken from."""

from dataclasses import replace
from functools import cache
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag

from moesim.scenario.base import Bandwidth, FlopRate, Memory, MemoryBandwidth, Name, Rent, Section, Text
from moesim.scenario.catalogue import GpuSpec, gpu_names, gpu_spec


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
