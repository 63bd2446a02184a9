"""How well NCCL's constants of a profile meet the rows that were kept out of their fits.

Legend: N rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.network.calibration import (
    MEASURED,
    Row,
    directions,
    measured_parameters,
    payload_of,
    sm_rates,
)
from moesim.network.flows import port_bytes
from moesim.network.nccl import busiest_port_bytes, sums_in_switch
from moesim.network.parameters import NetworkParameters, Protocol
from moesim.scenario.dispatch import rate_of_both

if TYPE_CHECKING:
    from rich.table import Table

_CALL_OF = {kind: each for each in MEASURED for kind in each.kinds}
_CALL_OF["exchange"] = _CALL_OF["all_to_all"]
_CAPTION = """error = |measured / predicted - 1| of rows (sizes, splits, numbers of blocks) in no fit;
call = of nearly no bytes; share = of NVLink's nominal bandwidth (alone: one direction);
loss = what large calls lose besides"""


class CallErrors(NamedTuple):
    """One kind of call among so many ranks: its constants, and |measured / predicted - 1| of rows kept out.

    `constants`: seconds of a call of nearly no bytes, share of NVLink's nominal bandwidth, and what large calls lose
    besides, all in words.
    """

    kind: str
    ranks: int
    constants: tuple[str, str, str]
    errors: tuple[float, ...]


def call_errors(rows: Sequence[Row], *, link_bandwidth: float, kind: str | None) -> list[CallErrors]:
    """Every kind of call in `rows`, and what an SM moves; `kind` of GPU as in `measured_parameters`."""
    parameters = measured_parameters(rows, link_bandwidth=link_bandwidth, source="", kind=kind)
    if parameters is None:
        return []
    found = []
    plain = [row for row in rows if "max_ctas" not in row]
    for name, ranks in sorted({(row["kind"], int(row["ranks"])) for row in plain}):
        own = _protocol(parameters, name, ranks)
        if own is None:
            continue
        share = parameters.nvlink_efficiency * own.efficiency
        one_way = "" if own.one_way is None else f" ({parameters.nvlink_efficiency * own.one_way:.2f})"
        words = f"{own.call_seconds * 1e6:.1f} us", f"{share:.2f}{one_way}", f"{own.transition_seconds * 1e6:.0f} us"
        kept = [row for row in plain if (row["kind"], int(row["ranks"])) == (name, ranks) and _is_kept_out(row)]
        errors = [
            abs(float(row["p50"]) / seconds - 1.0)
            for row in kept
            if (seconds := predicted_seconds(row, parameters, link_bandwidth=link_bandwidth, kind=kind)) is not None
        ]
        found.append(CallErrors(name, ranks, words, tuple(errors)))
    return found + _sm_errors(rows, parameters)


def seen_bandwidth(rows: Sequence[Row]) -> float:
    """NVLink's bytes/s per direction of GPUs that no catalogue knows, from the fastest row at the usual share."""
    sends = [row for row in rows if row["kind"] == "send_recv"]
    return max(payload_of(row) / float(row["p50"]) for row in sends or rows) / NetworkParameters().nvlink_efficiency


def predicted_seconds(
    row: Row, parameters: NetworkParameters, *, link_bandwidth: float, kind: str | None
) -> float | None:
    """What a row with the library's own number of blocks takes by the constants; None where its call has none."""
    ranks, call = int(row["ranks"]), _CALL_OF.get(row["kind"])
    protocol = _protocol(parameters, row["kind"], ranks)
    if protocol is None or call is None:
        return None
    payload = payload_of(row)
    bytes_1 = np.array([payload])
    if call.call == "all_to_all":
        worth = port_bytes(bytes_1, np.array([directions(row).mean()]), protocol)
    elif call.call == "send_recv":
        worth = bytes_1 / protocol.efficiency
    else:
        in_switch = sums_in_switch(kind, call.call, ranks)
        worth = busiest_port_bytes(call.call, bytes_1, ranks=ranks, in_switch=in_switch) / protocol.efficiency
    path = 2 * parameters.nvlink_latency if call.on_path else 0.0
    wire = float(worth[0]) / (link_bandwidth * parameters.nvlink_efficiency)
    return wire + path + protocol.overhead_seconds(payload)


def call_table(found: list[CallErrors], *, title: str) -> "Table":
    """The same for the terminal."""
    from rich.table import Table  # here: whoever predicts a transfer does without

    table = Table(title=title, caption=_CAPTION)
    table.add_column("calls", no_wrap=True)
    for header in ("rows", "median / worst", "call", "share", "loss"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in found:
        errors = f"{np.median(each.errors):.1%} / {max(each.errors):.0%}" if each.errors else ""
        table.add_row(f"{each.kind} x{each.ranks}", str(len(each.errors)), errors, *each.constants)
    return table


def _protocol(parameters: NetworkParameters, kind: str, ranks: int) -> Protocol | None:
    call = _CALL_OF.get(kind)
    if call is None:
        return None
    ranks = 2 if call.call == "send_recv" else ranks
    return next((own.protocol for own in parameters.own if (own.call, own.ranks) == (call.call, ranks)), None)


def _is_kept_out(row: Row) -> bool:
    return bool(row.get("held_out")) or row["kind"] == "exchange"


def _sm_errors(rows: Sequence[Row], parameters: NetworkParameters) -> list[CallErrors]:
    """Of all-to-alls held to so many blocks, the port's share being that of the most blocks."""
    sms_N, rate_N = sm_rates(rows)
    if not len(sms_N) or parameters.sm_source == NetworkParameters().sm_source:
        return []  # constants of other GPUs
    kept_N, kept_rate_N = sm_rates([row for row in rows if row.get("held_out")])
    predicted_N = rate_of_both(rate_N.max(), kept_N * parameters.bytes_per_sm, sharpness=parameters.sm_sharpness)
    words = "", f"{parameters.bytes_per_sm / 1e9:.1f} GB/s", ""
    errors = np.abs(predicted_N / kept_rate_N - 1.0)
    return [CallErrors("an SM of exchanges", int(rows[0]["ranks"]), words, tuple(errors.tolist()))]
