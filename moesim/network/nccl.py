"""What NCCL takes inside one NVLink domain, by kind of GPU, of call and number of ranks: `nccl.json`.

`tools/fit_nccl.py` fits the constants to tables of nccl-tests with 2, 4 and 8 ranks; more ranks take the efficiency of
the most that were measured, and a hop more for each rank that a ring is longer.

Legend: n ranks.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.network.parameters import Evidence, Protocol
from moesim.scenario.catalogue import gpu_names
from moesim.strict_json import parse_json

if TYPE_CHECKING:
    from moesim.network.fabric import Fabric

# Kinds of GPU with tables, and whether their switches reduce (NVLS: NVSwitch of the third generation and later).
KINDS = {"a100": False, "h100": True, "h200": True, "b200": True, "b300": True, "gb200": True, "gb300": True}
NVLS_MIN_RANKS = 3


def sums_in_switch(kind: str | None, call: str, ranks: int) -> bool:
    """Whether the switches of such GPUs do this call among so many of them."""
    return call == "all_reduce" and ranks >= NVLS_MIN_RANKS and reduces_in_switch(kind)


def busiest_port_bytes(kind: str, bytes_N: NDArray[np.float64], *, ranks: int, in_switch: bool) -> NDArray[np.float64]:
    """Bytes through a GPU's port in one direction: of a ring, of a switch that reduces, of an exchange."""
    return bytes_N * ((1 + 1 / ranks) if in_switch else ring_bytes(kind, 1.0, ranks=ranks))


def ring_bytes(kind: str, num_bytes: float, *, ranks: int) -> float:
    """Bytes that each rank of a ring sends: of the whole buffer, twice where it is summed and handed out."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * num_bytes


@cache
def _tables() -> Mapping[str, Any]:
    found: Mapping[str, Any] = parse_json((Path(__file__).parent / "nccl.json").read_text(encoding="utf-8"))
    return found


@cache
def kind_of(gpu: str, like: str | None = None) -> str | None:
    """The kind whose tables hold for a GPU: of the catalogue by its name, of the scenario's own by what it is like."""
    name = gpu if gpu in gpu_names() else like
    return next((kind for kind, table in _tables()["kinds"].items() if name in table["gpus"]), None)


def reduces_in_switch(kind: str | None) -> bool:
    """Whether the NVSwitch of a kind of GPU can sum."""
    return kind is not None and KINDS[kind]


def hop_seconds(kind: str) -> float:
    """What a rank more adds to a ring of a kind of GPU, of small messages."""
    return float(_tables()["kinds"][kind]["hop_seconds"])


def ranks_measured(kind: str, call: str) -> Collection[int]:
    """Numbers of ranks with a table."""
    return [int(count) for count in _tables()["kinds"][kind]["calls"][call]]


def measured_call(fabric: "Fabric", call: str, ranks_R: NDArray[np.integer]) -> Protocol | None:
    """The constants of NCCL's call inside one NVLink domain: measured on these very GPUs, else of their kind's tables.

    Its hops are in them, but for `all_to_all` and `send_recv`, whose paths come on top. None where nothing is.
    """
    launch, launched = fabric.parameters.launch_seconds, fabric.parameters.launch_source
    own = next((each for each in fabric.parameters.own if (each.call, each.ranks) == (call, len(ranks_R))), None)
    if own is not None and fabric.are_equal(ranks_R):
        source = f"{own.protocol.source}; torch's launch: {launched}"
        call_seconds = own.protocol.call_seconds + launch
        return replace(own.protocol, call_seconds=call_seconds, evidence=Evidence.OWN, source=source)
    kind = fabric.nccl_kind(ranks_R)
    if kind is None or call not in _tables()["kinds"][kind]["calls"]:
        return None
    found = protocol_of(kind, call, len(ranks_R), launch_seconds=launch)
    return replace(found, source=f"{found.source}; torch's launch: {launched}")


@cache
def protocol_of(kind: str, call: str, ranks: int, *, launch_seconds: float) -> Protocol:
    """The constants of a call among `ranks`, its hops in `call_seconds`; of the nearest number of ranks measured.

    From three ranks on a switch can reduce: what was measured with two does not tell. Racks whose tables hold a tray
    alone take more ranks from a board of the same NVLink. `launch_seconds`: what torch adds.
    """
    table, counts = _tables()["kinds"][kind], ranks_measured(kind, call)
    more = table.get("more_ranks")
    if more is not None and ranks > 1.5 * max(counts):
        return protocol_of(more, call, ranks, launch_seconds=launch_seconds)
    able = [n for n in counts if (n >= NVLS_MIN_RANKS) == (ranks >= NVLS_MIN_RANKS)]
    nearest = min(able, key=lambda n: abs(np.log(n / ranks)))
    seconds, efficiency, transition, size = table["calls"][call][str(nearest)]
    in_switch = sums_in_switch(kind, call, ranks)
    hops = 0 if in_switch or call == "all_to_all" else ranks - nearest
    hops *= 2 if call == "all_reduce" else 1
    return Protocol(
        call_seconds=seconds + launch_seconds + hops * table["hop_seconds"],
        efficiency=efficiency,
        transition_seconds=transition,
        transition_bytes=size,
        one_way=max(1.0, efficiency) if call == "all_to_all" else None,  # alone, a direction has the port's share
        evidence=Evidence.TABLES,
        source=f"NCCL {table['nccl']} on {nearest} {kind.upper()} ({_tables()['source']})",
    )
