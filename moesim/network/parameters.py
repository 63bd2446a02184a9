"""Calibrated constants of links and communication software, each with its source; a file can replace any of them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from moesim.errors import UserError
from moesim.scenario.cluster import INFINIBAND, NIC_BANDWIDTH, Transport
from moesim.scenario.dispatch import BYTES_PER_SM, DISPATCH, SM_SHARPNESS, SM_SOURCE, DispatchAlgorithm, Kernels


class Evidence(StrEnum):
    """What measured rows tell how far a transfer's time may be off: `moesim.kernels.errors` has a row for each."""

    OWN = "measured, own rows"
    TABLES = "NCCL's tables"
    KERNELS = "tables of dispatch kernels"
    NONE = ""  # links and constants alone: NCCL across nodes, unlike GPUs, shares that the scenario states


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Software cost of one kind of communication, on top of what the links take.

    seconds = call + messages * message + links(bytes) / efficiency + transition * n / (n + transition_bytes)
    where n is the payload in bytes. The last term is what a call loses between its small-message protocol (low latency,
    few channels) and its large-message protocol (full bandwidth). `efficiency` is relative to what the links achieve.

    `one_way`: each direction of a rank's port is a link of its own, which a rank that only sends or only receives uses
    at this efficiency, while `efficiency` is that of exchanges, where the same SMs copy both ways: a rank's port is
    busy for max(busier direction / one_way, mean of both / efficiency). None: no exchange, or one that nothing but the
    port holds up.
    """

    call_seconds: float = 0.0
    message_seconds: float = 0.0
    efficiency: float = 1.0
    transition_seconds: float = 0.0
    transition_bytes: float = 1.0
    one_way: float | None = None
    evidence: Evidence = Evidence.NONE
    source: str

    def overhead_seconds(self, payload_bytes: float, *, messages: float = 0.0) -> float:
        """Everything but the time on the links."""
        transition = self.transition_seconds * payload_bytes / (payload_bytes + self.transition_bytes)
        return self.call_seconds + messages * self.message_seconds + transition


class OwnCall(NamedTuple):
    """A call inside one NVLink domain as measured on the GPUs at hand: its hops are in `protocol`, but for exchanges
    and messages, whose paths on the links come on top."""

    call: str
    ranks: int
    protocol: Protocol


NVLINK_LATENCY_SOURCE = INFINIBAND.source
_ALL_REDUCE = "NCCL 2.27.7 on 8 H200 (stas00/ml-engineering network/benchmarks)"


@dataclass(frozen=True, kw_only=True)
class NetworkParameters:
    """Every constant of the network layer that no scenario key sets.

    Latencies are per link and direction, so that GPU to GPU over NVSwitch takes two of `nvlink_latency`, over one leaf
    two of `nic_latency`, and over the spine two of `leaf_latency` more. Efficiencies are the share of the nominal
    bandwidth that NCCL reaches in long transfers; dispatch algorithms may have shares of their own. `by_gpu`: inside
    one NVLink domain NCCL's calls take what was measured for the kind of GPU (`moesim.network.nccl`) and, on top,
    what torch needs to launch one. `own`: calls measured on the GPUs at hand, which go before those tables for as many
    ranks; `bytes_per_sm`, `sm_sharpness`: what NCCL's SMs move over NVLink (`moesim.scenario.dispatch`).
    """

    by_gpu: bool = True
    own: tuple[OwnCall, ...] = ()
    bytes_per_sm: float = BYTES_PER_SM
    sm_sharpness: float = SM_SHARPNESS
    sm_source: str = SM_SOURCE
    launch_seconds: float = 19e-6
    launch_source: str = f"{_ALL_REDUCE}, torch launch included, less nccl-tests on the same GPUs: 16 to 25 us"

    nvlink_latency: float = 3.33e-6 / 2
    nic_latency: float = INFINIBAND.nic_latency
    leaf_latency: float = INFINIBAND.leaf_latency
    latency_source: str = INFINIBAND.source
    nic_bandwidth: float = NIC_BANDWIDTH
    nvlink_efficiency: float = 0.817
    nvlink_source: str = f"{_ALL_REDUCE}: ring all-reduce of 16 GiB, 367.6 of 450 GB/s"
    nic_efficiency: float = 0.94
    nic_source: str = "NCCL (NVIDIA/nccl-tests issue 290): 46 to 48 GB/s of a 400 Gb/s NIC"
    ring: Protocol = Protocol(
        call_seconds=33e-6, source=f"{_ALL_REDUCE}: latency of small sizes, torch launch included"
    )
    tree: Protocol = Protocol(
        call_seconds=33e-6, source=f"{_ALL_REDUCE}: latency of small sizes, torch launch included"
    )
    all_gather: Protocol = Protocol(call_seconds=33e-6, source=f"{_ALL_REDUCE}: as a ring all-reduce, byte for byte")
    reduce_scatter: Protocol = Protocol(
        call_seconds=33e-6, source=f"{_ALL_REDUCE}: as a ring all-reduce, byte for byte"
    )
    nvls: Protocol = Protocol(
        call_seconds=35.3e-6,
        efficiency=276e9 * 1.125 / (450e9 * 0.817),
        transition_seconds=74e-6,
        transition_bytes=20 * 2.0**20,
        source=f"{_ALL_REDUCE}: fit of the sizes above 1 MiB",
    )
    point_to_point: Protocol = Protocol(call_seconds=33e-6, source=f"{_ALL_REDUCE}: launch of one call")
    dispatch: tuple[tuple[str, Protocol], ...] = ()  # measured, in the place of what the table of algorithms states

    def over(self, transport: Transport) -> "NetworkParameters":
        """The same with the latencies of what carries messages between nodes."""
        if transport is INFINIBAND:
            return self
        return dataclasses.replace(
            self,
            nic_latency=transport.nic_latency,
            leaf_latency=transport.leaf_latency,
            latency_source=f"{transport.name}: {transport.source}; NVLink: {NVLINK_LATENCY_SOURCE}",
        )

    def of_dispatch(
        self, algorithm: DispatchAlgorithm, kernels: Kernels | None = None, *, combine: bool = False, peers: int = 1
    ) -> Protocol:
        """The software cost of a dispatch algorithm among `peers`, by kernels of its own or as inside any domain."""
        kernels = kernels or algorithm.kernels
        kernel = kernels.combine if combine else kernels.dispatch
        seconds = kernel.call_seconds + kernel.doubling_seconds * math.log2(peers)
        source = "; ".join(filter(None, (algorithm.source, kernels.source)))
        evidence = Evidence.KERNELS if algorithm.measured else Evidence.NONE
        stated = Protocol(call_seconds=seconds, evidence=evidence, source=source)
        return dict(self.dispatch).get(algorithm.name, stated)


def load_parameters(values: Mapping[str, object], *, source: str) -> NetworkParameters:
    """The default constants with those of `values` in their place, e.g. {"ring": {"call_seconds": 2e-5}}.

    `source` (a profile's name, a file) becomes the source of every protocol that is replaced. Raises UserError for an
    unknown name or a value that is not a finite, non-negative number.
    """
    defaults = NetworkParameters()
    changes: dict[str, object] = {}
    dispatch: dict[str, Protocol] = {}
    for name, value in values.items():
        current = defaults.of_dispatch(DISPATCH[name]) if name in DISPATCH else getattr(defaults, name, None)
        if isinstance(current, Protocol) and isinstance(value, Mapping):
            fields = {
                key: _number(v, f"{name}.{key}", source, isinstance(getattr(current, str(key), None), float))
                for key, v in value.items()
            }
            (dispatch if name in DISPATCH else changes)[name] = dataclasses.replace(current, source=source, **fields)  # type: ignore[arg-type]
        else:
            changes[name] = _number(value, name, source, isinstance(current, float))
    if dispatch or any(isinstance(value, Protocol) for value in changes.values()):
        changes["by_gpu"] = False
    return dataclasses.replace(defaults, dispatch=tuple(dispatch.items()), **changes)  # type: ignore[arg-type]


def _number(value: object, name: str, source: str, known: bool) -> float:
    if not known:
        raise UserError(f'{source}: unknown network parameter "{name}"; see moesim.network.NetworkParameters')
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{source}: network parameter {name} = {value!r} must be a finite number that is not negative")
    return float(value)
