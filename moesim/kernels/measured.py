"""What a profile says beside kernels: host costs, contention, the usual width of memory-bound rows."""

import numpy as np

from moesim.kernels.estimate import Contention, HostCosts
from moesim.kernels.profile import Profile
from moesim.kernels.roofline import CONTENTION, HOST, MEMORY_SHARE

# Operations whose host time stands for "an eager kernel": one launch each, in the backward one or two.
_LAUNCHES = ("elementwise", "mul", "silu", "cast", "linear", "rms_norm", "softmax", "index_select", "cat", "reduce")
_BACKWARD = ("elementwise", "silu", "linear", "rms_norm", "softmax", "index_select", "index_add")
_OVERLAP_BYTES = 32 << 20  # smaller transfers end before contention settles


def host_costs_of(profile: Profile) -> HostCosts:
    """Medians of the host rows; the roofline's constants where there are none."""
    seconds = {(row["part"], row["kind"]): float(row["p50"]) for row in profile.family("host")}

    def median(part: str, kinds: tuple[str, ...], default: float) -> float:
        found = [seconds[part, kind] for kind in kinds if (part, kind) in seconds]
        return float(np.median(found)) if found else default

    return HostCosts(
        launch=median("forward", _LAUNCHES, HOST.launch),
        backward_launch=median("backward", _BACKWARD, HOST.backward_launch),
        readback=median("readback", ("tolist_64",), HOST.readback),
        kernel_floor=median("device", ("kernel_floor",), HOST.kernel_floor),
        source="measured" if seconds else HOST.source,
    )


def contention_of(profile: Profile, family: str | None = None) -> Contention:
    """Median slow-downs of compute kernels and transfers of at least 32 MiB that overlap all the time.

    With `family`, of compute kernels of that family alone.
    """
    rows = [row for row in profile.family("contention") if row["bytes"] >= _OVERLAP_BYTES]
    rows = [row for row in rows if family is None or row["compute"]["family"] == family]
    if not rows:
        return CONTENTION
    compute = float(np.median([row["compute_beside"] / row["compute_alone"] for row in rows]))
    transfer = float(np.median([row["transfer_beside"] / row["transfer_alone"] for row in rows]))
    return Contention(compute=max(compute, 1.0), transfer=max(transfer, 1.0), source="measured")


def typical_widths(profile: Profile) -> dict[str, float]:
    """Per memory-bound kind the geometric mean of the measured row widths."""
    widths: dict[str, list[float]] = {}
    for row in profile.family("memory_bound"):
        widths.setdefault(row["kind"], []).append(float(row["width"]))
    return {kind: float(np.exp(np.mean(np.log(found)))) for kind, found in widths.items()}


def measured_rates(profile: Profile) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) that the profile's device seems to have, for a roofline of a device outside the catalogue."""
    products = [row for row in profile.family("gemm") if row.get("dtype") == "bf16"]
    moves = profile.family("memory_bound")
    if not products or not moves:
        return None
    flops = max(2.0 * row["m"] * row["k"] * row["n"] / row["p50"] for row in products)
    bandwidth = max(row["bytes"] / row["p50"] for row in moves)
    return float(flops) / 0.8, float(bandwidth) / MEMORY_SHARE
