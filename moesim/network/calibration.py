"""Constants of NCCL's calls from a profile's measured collectives, by call and number of ranks.

Legend: n payload of one rank in bytes, N rows.

A measured call of n bytes takes call + wire(n) / efficiency + transition * n / (n + transition_bytes) (see `Protocol`).
The wire is what the links give at the default share of their bandwidth. The call is read off the smallest sizes, the
transition fitted by least squares of the relative error over a grid of efficiencies and transition bytes. Rows that say
`held_out` are in no fit; rows with `max_ctas` tell what so many SMs move.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.nccl import busiest_port_bytes, sums_in_switch
from moesim.network.parameters import NetworkParameters, OwnCall, Protocol
from moesim.scenario.dispatch import rate_of_both
from moesim.strict_json import json_text, parse_json

FloatArray = NDArray[np.float64]
Row = Mapping[str, Any]
SMALL_BYTES = 64 * 1024  # at and below, a call is latency alone
MIN_ROWS = 4  # fewer sizes cannot tell a transition from bandwidth
_TRANSITION_BYTES = np.geomspace(2.0**18, 2.0**30, 49)
_OVER = 1 / 8  # of the largest size measured: a transition half done beyond is not told apart from bandwidth
_EFFICIENCIES = np.arange(50, 111) / 100
SM_CALL, _SM_BYTES = "all_to_all", 256 << 20  # whose rows tell what an SM moves, and from how many bytes on


class Measured(NamedTuple):
    """Which rows a call is fitted to; `on_path`: links' latency comes on top of its constants."""

    call: str
    kinds: tuple[str, ...]
    on_path: bool = False


MEASURED = (
    Measured("send_recv", ("send_recv",), on_path=True),  # first: what one direction reaches alone
    Measured("all_to_all", ("all_to_all", "all_to_all_uneven"), on_path=True),
    Measured("all_reduce", ("all_reduce",)),
    Measured("all_gather", ("all_gather",)),
    Measured("reduce_scatter", ("reduce_scatter",)),
)


def fitted_rows(rows: Sequence[Row]) -> list[Row]:
    """Those that constants are fitted to."""
    return [row for row in rows if not row.get("held_out")]


def measured_parameters(
    rows: Sequence[Row], *, link_bandwidth: float, source: str, world: int | None = None, kind: str | None = None
) -> NetworkParameters | None:
    """The default constants with those of the calls that `rows` measured before them, each from its own rows.

    `rows` are a profile's collectives (`kind`, `bytes` of one rank's buffer, `ranks`, `p50` seconds on the device, the
    host's part not included); `link_bandwidth` is NVLink's per direction (bytes/s). A call among as many ranks as the
    `world` has takes what was measured; in larger worlds torch's launch comes on top, as it does of tables. `kind`: of
    GPU, which says whether its switch reduces (`moesim.network.nccl`). None when there are no rows.
    """
    chosen = fitted_rows(rows)
    if not chosen:
        return None
    counts = sorted({int(row["ranks"]) for row in chosen})
    texts = tuple(json_text(row, sort_keys=True) for row in chosen)
    parameters = _fitted(texts, link_bandwidth=link_bandwidth, source=source, kind=kind)
    whole_world = world is None or world in counts
    return replace(parameters, launch_seconds=0.0) if parameters.own and whole_world else parameters


@lru_cache(maxsize=16)
def _fitted(texts: tuple[str, ...], *, link_bandwidth: float, source: str, kind: str | None) -> NetworkParameters:
    """The constants of rows, given as texts so that a process fits those of a profile once."""
    rows = [parse_json(text) for text in texts]
    own = tuple(
        call for ranks in sorted({int(row["ranks"]) for row in rows})
        for call in _calls(
            [row for row in rows if int(row["ranks"]) == ranks and "max_ctas" not in row],
            ranks=ranks, link_bandwidth=link_bandwidth, source=source, kind=kind,
        )
    )  # fmt: skip
    return replace(NetworkParameters(), own=own, **_of_sms(rows, link_bandwidth=link_bandwidth, source=source))


def _calls(
    rows: Sequence[Row], *, ranks: int, link_bandwidth: float, source: str, kind: str | None
) -> Iterator[OwnCall]:  # fmt: skip
    defaults = NetworkParameters()
    port = link_bandwidth * defaults.nvlink_efficiency
    one_way = 1.0
    for call, kinds, on_path in MEASURED:
        chosen = [row for row in rows if row["kind"] in kinds and payload_of(row) > 0]
        in_switch = sums_in_switch(kind, call, ranks)
        if in_switch:  # a ring's rows do not tell what the switch does
            chosen = [row for row in chosen if row.get("nvls") != 0]
        if len(chosen) < MIN_ROWS:
            continue
        payload_N = np.array([payload_of(row) for row in chosen])
        seconds_N = np.array([float(row["p50"]) for row in chosen]) - (2 * defaults.nvlink_latency if on_path else 0.0)
        if call == "all_to_all":
            mean_N = np.array([directions(row).mean() for row in chosen])
            wire_N, least_N = mean_N / port, payload_N / port / one_way
            found = fit_protocol(payload_N, seconds_N, wire_N, source=source, least_N=least_N)
            found = replace(found, one_way=max(one_way, found.efficiency))
        elif call == "send_recv":
            found = fit_protocol(payload_N, seconds_N, payload_N / port, source=source)
            one_way = found.efficiency
        else:
            bytes_N = busiest_port_bytes(call, payload_N, ranks=ranks, in_switch=in_switch)
            found = fit_protocol(payload_N, seconds_N, bytes_N / port, source=source)
        yield OwnCall(call, 2 if call == "send_recv" else ranks, found)


def fit_protocol(
    bytes_N: FloatArray, seconds_N: FloatArray, wire_N: FloatArray, *, source: str, least_N: FloatArray | float = 0.0
) -> Protocol:
    """The call, efficiency and transition that explain `seconds_N`; `least_N`: seconds that any efficiency leaves."""
    small_N = bytes_N <= max(SMALL_BYTES, float(bytes_N.min()))
    call = max(0.0, float((seconds_N - np.maximum(wire_N, least_N))[small_N].mean()))
    best = (np.inf, 1.0, 0.0, 1.0)
    largest = max(float(_TRANSITION_BYTES[0]), float(bytes_N.max()) * _OVER)
    told = [size for size in _TRANSITION_BYTES if size <= largest]
    for efficiency in _EFFICIENCIES:
        left_N = (seconds_N - np.maximum(wire_N / efficiency, least_N) - call) / seconds_N
        for size in told:
            shape_N = bytes_N / (bytes_N + size) / seconds_N
            height = max(0.0, float(shape_N @ left_N / (shape_N @ shape_N)))
            error = float(np.square(left_N - height * shape_N).sum())
            best = min(best, (error, float(efficiency), height, float(size)))
    _, efficiency, height, size = best
    return Protocol(
        call_seconds=call, efficiency=efficiency, transition_seconds=height, transition_bytes=size, source=source
    )


def fit_sms(sms_N: FloatArray, rate_N: FloatArray, *, link_bandwidth: float) -> tuple[float, float, float]:
    """Bytes/s of one SM, the sharpness and the port's bytes/s that explain what so many SMs move (see
    `moesim.scenario.dispatch.rate_of_both`): least squares of logs over a grid."""
    ports = np.linspace(0.4, 1.0, 121) * link_bandwidth
    per_sms = np.geomspace(0.01, 0.2, 301) * link_bandwidth
    best = (np.inf, 0.0, 0.0, 0.0)
    for sharpness in np.arange(2.0, 6.25, 0.25):
        for port in ports:
            predicted_AN = rate_of_both(port, per_sms[:, None] * sms_N, sharpness=sharpness)
            error_A = np.square(np.log(predicted_AN / rate_N)).sum(axis=1)
            at = int(error_A.argmin())
            best = min(best, (float(error_A[at]), float(per_sms[at]), float(sharpness), float(port)))
    return best[1:]


def sm_rates(rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
    """SMs and bytes/s that a GPU sends, of all-to-alls held to `max_ctas` blocks; NCCL takes a power of two of them."""
    chosen = [row for row in rows if "max_ctas" in row and row["kind"] == SM_CALL and row["bytes"] >= _SM_BYTES]
    sms_N = 2.0 ** np.ceil(np.log2(np.array([row["max_ctas"] for row in chosen], dtype=float)))
    return sms_N, np.array([payload_of(row) / float(row["p50"]) for row in chosen])


def _of_sms(rows: Sequence[Row], *, link_bandwidth: float, source: str) -> dict[str, Any]:
    sms_N, rate_N = sm_rates(rows)
    if len(sms_N) < MIN_ROWS:
        return {}
    per_sm, sharpness, _ = fit_sms(sms_N, rate_N, link_bandwidth=link_bandwidth)
    return {"bytes_per_sm": per_sm, "sm_sharpness": sharpness, "sm_source": source}


def directions(row: Row) -> FloatArray:
    """Bytes that the busiest rank of an exchange sends to others and receives from them."""
    if "bytes_matrix" not in row:
        return np.full(2, payload_of(row))
    sent_RR = np.array(row["bytes_matrix"], dtype=np.float64)
    np.fill_diagonal(sent_RR, 0.0)
    ways_2R = np.stack([sent_RR.sum(axis=1), sent_RR.sum(axis=0)])
    return np.asarray(ways_2R[:, ways_2R.max(axis=0).argmax()])


def payload_of(row: Row) -> float:
    """Bytes that a call is about: what the busiest rank exchanges with others, else its whole buffer."""
    if row["kind"] == "all_to_all_uneven":
        return float(directions(row).max())
    share = 1.0 - 1.0 / float(row["ranks"]) if row["kind"] == "all_to_all" else 1.0
    return float(row["bytes"]) * share
