"""From a name to a kernel model: shipped profiles, profile files, GPUs derived from a measured one, the roofline."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.estimate import KernelModel
from moesim.kernels.measured import measured_rates
from moesim.kernels.profile import SHIPPED, Profile, load_profile_file
from moesim.kernels.roofline import Roofline
from moesim.kernels.scaled import ScaledModel

if TYPE_CHECKING:
    from moesim.scenario import GpuSpec

MEASURED_GPUS = ("h200", "h100")  # those with a profile of their own
# Derived from a measured GPU, of the same chip where there is one.
SCALED_FROM = {"h800": "h100", "a100": "h200", "b200": "h200", "gb200": "h200"}
# Those whose block-scaled FP8 kernels have published rates (`moesim.kernels.fp8`).
PUBLISHED_FP8 = ("h800",)


@dataclass(frozen=True)
class _SeenRates:
    """The roofline's view of a device that no catalogue knows: the best rates that its own profile shows."""

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float


@dataclass(frozen=True)
class _CatalogueRates:
    """A GPU of the catalogue, which is read when a kernel needs the roofline: most need the profile alone."""

    name: str

    @property
    def peak_flops(self) -> Mapping[str, float]:
        """FLOP/s by number format."""
        return _spec(self.name).peak_flops

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s."""
        return _spec(self.name).memory_bandwidth


@cache
def _spec(name: str) -> "GpuSpec":
    from moesim.scenario import gpu_spec  # only here: benchmarks must run on machines that lack the scenario's needs

    return gpu_spec(name)


def _catalogue_name(profile: Profile) -> str | None:
    """The catalogue's name of the profile's device, e.g. "h200" for "NVIDIA H200"."""
    devices = {str(session.get("device", "")).lower() for session in profile.sessions}
    known = (*MEASURED_GPUS, *SCALED_FROM)
    matches = [name for name in known if devices and all(name in device.split() for device in devices)]
    return matches[0] if matches else None


def _model_of(profile: Profile) -> CalibratedModel:
    gpu = _catalogue_name(profile)
    if gpu is not None:
        return CalibratedModel(profile, fallback=Roofline(_CatalogueRates(gpu)))
    rates = measured_rates(profile)
    if rates is None:
        raise UserError(
            f"profile {profile.name}: unknown device and no rows of gemm and memory_bound to judge it by; "
            "run `moesim calibrate` again with those families"
        )
    seen = _SeenRates(profile.name, {"bf16": rates[0], "fp16": rates[0]}, rates[1])
    return CalibratedModel(profile, fallback=Roofline(seen))


def _shipped_file(name: str) -> Path | None:
    for suffix in (".json.gz", ".json"):
        path = SHIPPED / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def load_profile(name_or_path: str | Path) -> CalibratedModel | ScaledModel:
    """The kernel model of a shipped profile ("h200"), of a GPU derived from one ("h800"), or of a profile file.

    Raises UserError for an unknown name, a missing or damaged file, another schema version. A file that lacks families
    warns and answers those by the roofline.

    >>> load_profile("h200").gemm(m=4096, k=2048, n=3072, dtype="bf16").source
    'interpolated'
    """
    name = str(name_or_path)
    shipped = _shipped_file(name.lower())
    if shipped is not None:
        return _model_of(load_profile_file(shipped))
    measured = SCALED_FROM.get(name.lower())
    if measured is not None:
        base = load_profile(measured)
        assert isinstance(base, CalibratedModel)
        published_fp8 = name.lower() in PUBLISHED_FP8
        return ScaledModel(base, measured=_spec(measured), target=_spec(name.lower()), published_fp8=published_fp8)
    path = Path(name_or_path)
    if not path.exists() and path.suffix not in (".json", ".gz"):
        known = ", ".join(sorted(found.name.split(".")[0] for found in SHIPPED.glob("*.json*")))
        raise UserError(f"no profile {name!r}: shipped are {known}; derived: {', '.join(SCALED_FROM)}; or give a file")
    return _model_of(load_profile_file(path))


def kernel_model(gpu_name: str, profile: str | None = None) -> KernelModel:
    """The kernel model of a GPU of the catalogue.

    profile: a shipped name or a file; "roofline" for the datasheet alone; None for the best there is (a shipped or
    derived profile, else the roofline). A profile measured on another GPU of the catalogue is scaled to this one.
    """
    spec = _spec(gpu_name)
    if profile == "roofline":
        return Roofline(spec)
    if profile is None:
        if spec.name in MEASURED_GPUS or spec.name in SCALED_FROM:
            return load_profile(spec.name)
        return Roofline(spec)
    model = load_profile(profile)
    if isinstance(model, CalibratedModel):
        measured = _catalogue_name(model.profile)
        if measured is not None and measured != spec.name:
            return ScaledModel(model, measured=_spec(measured), target=spec)
    return model
