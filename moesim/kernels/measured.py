"""What a profile says beside kernels: host costs, contention, the usual width of memory-bound rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.kernels.estimate import Beside, BesideSend, Contention, HostCosts
from moesim.kernels.profile import Profile
from moesim.kernels.roofline import CONTENTION, HOST, MEMORY_SHARE

# Operations whose host time stands for "an eager kernel": one launch each, in the backward one or two.
_LAUNCHES = ("elementwise", "mul", "silu", "cast", "linear", "rms_norm", "softmax", "index_select", "cat", "reduce")
_BACKWARD = ("elementwise", "silu", "linear", "rms_norm", "softmax", "index_select", "index_add")
OVERLAP_BYTES = 32 << 20  # smaller transfers end before contention settles
DISPATCH, SEND = "all_to_all", "send_recv"
_SHARES, _MOSTS = np.arange(1, 101) / 20, np.arange(1, 41) / 10


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


def contention_of(profile: Profile) -> Contention:
    """What kernels of each family and transfers of at least 32 MiB cost each other where they overlap all the time.

    From the rows with the library's own number of blocks, all-to-alls and other collectives apart; those marked
    `held_out` are for reports alone. A row without a kind is an all-to-all.
    """
    rows = [row for row in profile.family("contention") if row["bytes"] >= OVERLAP_BYTES and "max_ctas" not in row]
    rows = [row for row in rows if not row.get("held_out")]
    found = _by_family([row for row in rows if row.get("kind", DISPATCH) == DISPATCH])
    if not found:
        return CONTENTION
    middle = Beside(*(float(np.median([getattr(each, name) for each in found.values()])) for name in Beside._fields))
    others = [row for row in rows if row.get("kind", DISPATCH) not in (DISPATCH, SEND)]
    rates = [_sent_share(row["kind"], row["ranks"]) * row["bytes"] / row["transfer_alone"] for row in others]
    return Contention(
        by_family=found,
        other=middle,
        source="measured",
        collectives=_by_family(others),
        collective_rate=float(np.median(rates)) if rates else 0.0,
        sends=sends_of(profile),
    )


def _sent_share(kind: str, ranks: int) -> float:
    """Of the whole buffer, what a rank sends in a ring."""
    return (2.0 if kind == "all_reduce" else 1.0) * (ranks - 1) / ranks


def _families(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    families = sorted({row["compute"]["family"] for row in rows})
    return {family: [row for row in rows if row["compute"]["family"] == family] for family in families}


def _by_family(rows: Sequence[dict[str, Any]]) -> dict[str, Beside]:
    return {family: fit_beside(found) for family, found in _families(rows).items()}


def _with_usual_alone(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with what messages of each size took alone in the middle: which kernel came later is no matter then."""
    alone: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        alone.setdefault((row["bytes"], row.get("session")), []).append(row["transfer_alone"])
    return [row | {"transfer_alone": float(np.median(alone[row["bytes"], row.get("session")]))} for row in rows]


def sends_of(profile: Profile) -> dict[str, BesideSend]:
    """What kernels of each family and messages from GPU to GPU cost each other, from the rows not `held_out`."""
    rows = [row for row in profile.family("contention") if row.get("kind") == SEND and not row.get("held_out")]
    return {family: fit_send(found) for family, found in _families(_with_usual_alone(rows)).items()}


def fit_send(rows: Sequence[dict[str, Any]]) -> BesideSend:
    """The facts of one family beside messages that meet its rows best: least absolute errors of logs over a grid."""
    kernel_N, alone_N, beside_N = (
        np.array([row[name] for row in rows]) for name in ("compute_alone", "transfer_alone", "transfer_beside")
    )

    shares, mosts = np.meshgrid(_SHARES, _MOSTS, indexing="ij")
    by_kernel, by_message = shares[..., None] * kernel_N, mosts[..., None] * alone_N
    later = by_kernel * by_message / np.hypot(by_kernel, by_message)
    place = np.abs(np.log((alone_N + later) / beside_N)).sum(axis=2).argmin()
    share, most = float(shares.flat[place]), float(mosts.flat[place])
    large = [row for row in rows if row["bytes"] >= OVERLAP_BYTES] or rows
    slower = float(np.median([row["compute_beside"] / row["compute_alone"] for row in large]))
    return BesideSend(max(1.0, slower), share, most)


def fit_beside(rows: Sequence[dict[str, Any]]) -> Beside:
    """The three facts of one family that meet its rows best.

    A transfer takes wait + factor * (its time alone), by least squares of relative errors. Until its wait is over the
    kernel runs as if alone, which is taken out of how much slower the kernel was in all.
    """
    alone_N, beside_N = (np.array([row[name] for row in rows]) for name in ("transfer_alone", "transfer_beside"))
    terms_N2 = np.stack([alone_N / beside_N, 1.0 / beside_N], axis=1)
    factor, wait = np.linalg.lstsq(terms_N2, np.ones(len(rows)), rcond=None)[0] if len(rows) > 1 else (0.0, -1.0)
    if wait < 0.0:
        factor, wait = float(terms_N2[:, 0].sum() / (terms_N2[:, 0] ** 2).sum()), 0.0
    if factor < 1.0:
        factor, wait = 1.0, max(0.0, float(np.median(beside_N - alone_N)))
    free_N = wait / (wait + factor * alone_N)
    speed_N = np.array([row["compute_alone"] / row["compute_beside"] for row in rows])
    slowed_N = (1.0 - free_N) / np.maximum(speed_N - free_N, 0.1 * (1.0 - free_N))
    return Beside(max(1.0, float(np.median(slowed_N))), float(factor), float(wait))


def typical_widths(profile: Profile) -> dict[str, float]:
    """Per memory-bound kind the geometric mean of the measured row widths."""
    widths: dict[str, list[float]] = {}
    for row in profile.family("memory_bound"):
        widths.setdefault(row["kind"], []).append(float(row["width"]))
    return {kind: float(np.exp(np.mean(np.log(found)))) for kind, found in widths.items()}


def measured_rates(profile: Profile) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) that the profile's device seems to have, for a roofline of a device outside the catalogue."""
    gemms = [row for row in profile.family("gemm") if row.get("dtype") == "bf16"]
    moves = profile.family("memory_bound")
    if not gemms or not moves:
        return None
    flops = max(2.0 * row["m"] * row["k"] * row["n"] / row["p50"] for row in gemms)
    bandwidth = max(row["bytes"] / row["p50"] for row in moves)
    return float(flops) / 0.8, float(bandwidth) / MEMORY_SHARE
