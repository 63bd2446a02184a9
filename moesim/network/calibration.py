"""Network constants from measured collectives, for plans no larger than what was measured.

Legend: n payload of one rank in bytes.

A measured call of n bytes takes call + wire(n) / efficiency + transition * n / (n + transition_bytes) (see `Protocol`).
The wire is what the links give at the default share of their bandwidth. The call is read off the smallest sizes, the
transition fitted by least squares of the relative error over a grid of efficiencies and transition bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.parameters import NetworkParameters, Protocol
from moesim.scenario.dispatch import DIRECT

FloatArray = NDArray[np.float64]
SMALL_BYTES = 64 * 1024  # at and below, a call is latency alone
MIN_ROWS = 4  # fewer sizes cannot tell a transition from bandwidth
_TRANSITION_BYTES = np.geomspace(2.0**18, 2.0**30, 49)
_EFFICIENCIES = np.arange(50, 111) / 100


class Measured(NamedTuple):
    """Which rows a protocol is fitted to: their kinds, and how often round the ring a rank's buffer goes."""

    protocol: str
    kinds: tuple[str, ...]
    rounds: int = 0  # 0: no ring, one hop


MEASURED = (
    Measured(DIRECT.name, ("all_to_all", "all_to_all_uneven")),
    Measured("ring", ("all_reduce",), rounds=2),
    Measured("all_gather", ("all_gather",), rounds=1),
    Measured("reduce_scatter", ("reduce_scatter",), rounds=1),
    Measured("point_to_point", ("send_recv",)),
)


def measured_parameters(
    rows: Sequence[Mapping[str, Any]], *, link_bandwidth: float, source: str
) -> NetworkParameters | None:
    """The default constants with those of the measured kinds of call in their place, each from its own rows.

    `rows` are a profile's collectives (`kind`, `bytes` of one rank's buffer, `ranks`, `p50` seconds on the device, the
    host's part not included); `link_bandwidth` is NVLink's per direction (bytes/s). None when there are none.
    """
    if not rows:
        return None
    parameters = NetworkParameters()
    found: dict[str, Any] = {}
    bandwidth = link_bandwidth * parameters.nvlink_efficiency
    for name, kinds, rounds in MEASURED:
        chosen = [row for row in rows if row["kind"] in kinds and _payload(row) > 0]
        if len(chosen) < MIN_ROWS:
            continue
        hops = rounds * (int(chosen[0]["ranks"]) - 1) if rounds else 1
        latency = hops * 2 * parameters.nvlink_latency
        payload_N = np.array([_payload(row) for row in chosen])
        seconds_N = np.array([float(row["p50"]) for row in chosen]) - latency
        wire_N = np.array([_wire_bytes(row, rounds) for row in chosen]) / bandwidth
        found[name] = fit_protocol(payload_N, seconds_N, wire_N, source=source)
    if DIRECT.name in found:
        found["dispatch"] = ((DIRECT.name, found.pop(DIRECT.name)),)
    if "ring" in found:
        found["tree"] = found["ring"]  # the library chose; what it achieved holds for either
    return replace(parameters, by_gpu=not found, **found)


def fit_protocol(bytes_N: FloatArray, seconds_N: FloatArray, wire_N: FloatArray, *, source: str) -> Protocol:
    """The call, efficiency and transition that explain `seconds_N`."""
    small_N = bytes_N <= max(SMALL_BYTES, float(bytes_N.min()))
    call = max(0.0, float((seconds_N - wire_N)[small_N].mean()))
    best = (np.inf, 1.0, 0.0, 1.0)
    for efficiency in _EFFICIENCIES:
        left_N = (seconds_N - wire_N / efficiency - call) / seconds_N
        for size in _TRANSITION_BYTES:
            shape_N = bytes_N / (bytes_N + size) / seconds_N
            height = max(0.0, float(shape_N @ left_N / (shape_N @ shape_N)))
            error = float(np.square(left_N - height * shape_N).sum())
            best = min(best, (error, float(efficiency), height, float(size)))
    _, efficiency, height, size = best
    return Protocol(
        call_seconds=call, efficiency=efficiency, transition_seconds=height, transition_bytes=size, source=source
    )


def _payload(row: Mapping[str, Any]) -> float:
    """Bytes that a call is about: what the busiest rank exchanges with others, else its whole buffer."""
    if row["kind"] == "all_to_all_uneven":
        sent_RR = np.array(row["bytes_matrix"], dtype=np.float64)
        np.fill_diagonal(sent_RR, 0.0)
        return float(max(sent_RR.sum(axis=0).max(), sent_RR.sum(axis=1).max()))
    share = 1.0 - 1.0 / float(row["ranks"]) if row["kind"] == "all_to_all" else 1.0
    return float(row["bytes"]) * share


def _wire_bytes(row: Mapping[str, Any], rounds: int) -> float:
    """Bytes through the busiest port: a ring sends each rank's buffer (n - 1) / n times in each of its rounds."""
    return _payload(row) * (rounds * (1.0 - 1.0 / float(row["ranks"])) if rounds else 1.0)
