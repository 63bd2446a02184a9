"""From a name to a kernel model: shipped profiles, profile files, GPUs derived from a measured one, the roofline."""

from collections.abc import Mapping
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import UserError, closest
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.estimate import KernelModel
from moesim.kernels.measured import measured_rates
from moesim.kernels.profile import SHIPPED, Profile, load_profile_file
from moesim.kernels.roofline import GpuRates, Rates, Roofline
from moesim.kernels.scaled import ScaledModel
from moesim.kernels.tabulated import TabulatedModel, reached_rates

if TYPE_CHECKING:
    from moesim.scenario import Compute, GpuSpec

# Whose FP8 kernels, beyond the library's forward GEMMs, stand for those of another GPU of the same chip.
FP8_OF = {"h200": "h100"}
# Those whose dense block-scaled FP8 GEMMs are DeepGEMM's, not the vendor library's (`moesim.kernels.fp8`).
DENSE_BY_DEEP_GEMM = ("h800",)
REGIMES = ("sustained", "short")
_NO_CLOCK = "at a clock run only GPUs whose clocks were measured; use sustained or short"


@cache
def _catalogue() -> "Mapping[str, GpuSpec]":
    from moesim.scenario import gpu_names, gpu_spec  # only here: benchmarks run on machines that lack its needs

    return {name: gpu_spec(name) for name in gpu_names()}


def _spec(name: str) -> "GpuSpec":
    return _catalogue()[name]


def rates_of(name: str) -> GpuRates:
    """Peaks and bandwidth of a GPU of the catalogue."""
    return _spec(name)


def scaled_from(name: str) -> str | None:
    """The measured GPU that the catalogue's GPU `name` is derived from; None for a measured and for an unknown one."""
    spec = _catalogue().get(name.lower())
    return spec.scaled_from if spec else None


def _catalogue_name(profile: Profile) -> str | None:
    """The catalogue's name of the profile's device, e.g. "h200" for "NVIDIA H200"."""
    devices = {str(session.get("device", "")) for session in profile.sessions}
    found = {gpu_of_device(device) for device in devices}
    return found.pop() if len(found) == 1 else None


def gpu_of_device(device: str) -> str | None:
    """The catalogue's name of a device as its driver calls it, e.g. "h200" for "NVIDIA H200"."""
    words = set(device.lower().replace("-", " ").split())
    return next((name for name in _catalogue() if set(name.split("-")) <= words), None)


def _model_of(profile: Profile) -> CalibratedModel | TabulatedModel:
    gpu = _catalogue_name(profile)
    if profile.tables is not None:
        base = load_profile(profile.tables["base"])
        if gpu is None or not isinstance(base, CalibratedModel):
            raise UserError(
                f"profile {profile.name}: tables of a GPU that the catalogue lacks, or with an unknown base"
            )
        return TabulatedModel(profile, base=base, measured=_spec(profile.tables["base"]), target=_spec(gpu))
    if gpu is not None:
        return CalibratedModel(profile, fallback=Roofline(_spec(gpu)), relative=_relative(gpu))
    rates = measured_rates(profile)
    if rates is None:
        raise UserError(
            f"profile {profile.name}: unknown device and no rows of gemm and memory_bound to judge it by; "
            "run `moesim calibrate` again with those families"
        )
    seen = Rates(profile.name, {"bf16": rates[0], "fp16": rates[0]}, rates[1])  # the best that its own profile shows
    return CalibratedModel(profile, fallback=Roofline(seen))


def _relative(gpu: str) -> ScaledModel | None:
    if gpu not in FP8_OF:
        return None
    other = load_profile(FP8_OF[gpu])
    assert isinstance(other, CalibratedModel)
    return ScaledModel(other, measured=_spec(FP8_OF[gpu]), target=_spec(gpu))


@cache
def _shipped_model(path: Path) -> CalibratedModel | TabulatedModel:
    """Of a file that ships, read once a process: a model answers alike however often it was asked."""
    return _model_of(load_profile_file(path, shipped=True))


def _shipped_file(name: str) -> Path | None:
    for suffix in (".json.gz", ".json"):
        path = SHIPPED / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def load_profile(name_or_path: str | Path) -> CalibratedModel | TabulatedModel | ScaledModel:
    """The kernel model of a shipped profile ("h200", or "b200" of tables), of a GPU derived from one ("h800"), or of a
    profile file.

    Raises UserError for an unknown name, a missing or damaged file, another schema version. A file that lacks families
    warns and answers those by the roofline.

    >>> from moesim.kernels import Gemm
    >>> load_profile("h200").seconds(Gemm(m=4096, k=2048, n=3072)).source
    'interpolated'
    """
    name = str(name_or_path)
    shipped = _shipped_file(name.lower())
    if shipped is not None:
        return _shipped_model(shipped)
    measured = scaled_from(name)
    if measured is not None:
        base = load_profile(measured)
        assert not isinstance(base, ScaledModel)
        return _scaled(base, measured, _spec(name.lower()))
    path = Path(name_or_path)
    if not path.exists() and path.suffix not in (".json", ".gz"):
        known = ", ".join(sorted(found.name.split(".")[0] for found in SHIPPED.glob("*.json*")))
        derived = ", ".join(gpu for gpu in _catalogue() if scaled_from(gpu))
        raise UserError(f"no profile {name!r}: shipped are {known}; derived: {derived}; or give a file")
    return _model_of(load_profile_file(path))


def kernel_model(gpu: "str | GpuSpec", profile: str | None = None, *, regime: str | float | None = None) -> KernelModel:
    """The kernel model of a GPU, by its name in the catalogue or by its facts, in a regime where one is given.

    profile: a shipped name or a file; "roofline" for the datasheet alone; None for that of the GPU itself, or of the
    one that it is scaled from. A profile measured on another GPU of the catalogue is scaled to this one.
    """
    if regime is not None:
        return in_regime(kernel_model(gpu, profile), regime)
    spec = _spec_of(gpu)
    if profile == "roofline":
        return Roofline(spec)
    if profile is None and (_shipped_file(spec.name) or spec.scaled_from):
        return _own_model(spec)
    return _on(spec, load_profile(profile or spec.name))


def compute_model(gpu: "GpuSpec", compute: "Compute") -> KernelModel:
    """The kernel model that a scenario's section `compute` asks for."""
    return kernel_model(gpu, compute.profile, regime=compute.held_regime)


@cache
def _own_model(spec: "GpuSpec") -> KernelModel:
    """That of a shipped profile, made once a process, as the profile is read once."""
    return _on(spec, load_profile(spec.name if _shipped_file(spec.name) else spec.scaled_from or spec.name))


def _on(spec: "GpuSpec", model: CalibratedModel | TabulatedModel | ScaledModel) -> KernelModel:
    """A profile's kernels on a GPU: scaled where it was measured on another one of the catalogue."""
    base = model.base if isinstance(model, ScaledModel) else model
    measured = _catalogue_name(base.profile)
    if measured is None or measured == spec.name:
        return base
    return _scaled(base, measured, spec)


def in_regime(model: KernelModel, regime: str | float) -> KernelModel:
    """A GPU's kernels as they run: `sustained` (without pause, under the power limit), `short` (at the clocks of short
    benchmarks) or at a clock in MHz; no step's load changes that. Raises UserError for another word, for a data sheet,
    and for a clock of a GPU whose clocks nobody here measured.
    """
    if not isinstance(model, CalibratedModel | TabulatedModel | ScaledModel):
        raise UserError(f"{model.name}: a data sheet has no regime of kernels; leave it out, or name a profile")
    if isinstance(regime, str) and regime not in REGIMES:
        raise UserError(f"no regime {regime!r}; use {', '.join(REGIMES)}, or a clock in MHz{closest(regime, REGIMES)}")
    if isinstance(model, ScaledModel):
        if not isinstance(regime, str) and not model.is_same_chip:
            raise UserError(f"{model.name}: {_NO_CLOCK}")
        base = in_regime(model.base, regime)
        assert isinstance(base, CalibratedModel | TabulatedModel)
        return model.of_base(base)
    if regime == "sustained":
        return _held(model, "without pause")
    if regime == "short":
        return _held(model.at_benchmark_clock(), "in short runs")
    if not isinstance(model, CalibratedModel):
        raise UserError(f"{model.name}: {_NO_CLOCK}")
    return _held(model.at_clock(float(regime)), f"at {regime:.0f} MHz")


def _held(model: CalibratedModel | TabulatedModel, regime: str) -> CalibratedModel | TabulatedModel:
    """The same kernels whatever the load of a step is; `regime` says in words how they run."""
    model = copy(model)
    model.regime = regime
    return model


def _scaled(base: CalibratedModel | TabulatedModel, measured: str, target: "GpuSpec") -> ScaledModel:
    rates = target if target.reached is None else reached_rates(target, target.reached)
    return ScaledModel(base, measured=_spec(measured), target=rates, by_deep_gemm=target.name in DENSE_BY_DEEP_GEMM)


def _spec_of(gpu: "str | GpuSpec") -> "GpuSpec":
    if not isinstance(gpu, str):
        return gpu
    from moesim.scenario import gpu_spec

    return gpu_spec(gpu)
