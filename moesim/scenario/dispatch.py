"""Dispatch algorithms as data, one entry each: what tokens travel as, and what the software on the wires reaches.

A scenario names one in `dispatch.algorithm`; its checks, transfers and costs read the entry and no name.
"""

from dataclasses import dataclass, replace
from typing import Literal

Deduplicate = Literal["per_expert", "per_rank", "per_node"]

_DEEPEP = "DeepEP README (H800, 400 Gb/s NICs), normal kernels, EP8 and EP32"


@dataclass(frozen=True, kw_only=True)
class DispatchAlgorithm:
    """The facts of one algorithm.

    sends: what each message is for. deduplicate: how often it can send a token, as in a scenario; per_node makes it two
    stages, over the network to one GPU of each node and on from there over NVLink. two_sided: a message waits until its
    receiver has come, too. owns_sms: its kernels hold SMs of their own, so that compute beside them does not make it
    longer. avoids_nvlink: NICs carry the messages inside a node. needs_one_domain: a group's ranks must share an NVLink
    domain. passes_own_rows: inside one node, rows that stay on their rank pass through its ports like others.
    header_bytes: of every dispatched message. nvlink_share, nic_share: of the nominal bandwidth in long transfers;
    None: what NCCL reaches (`NetworkParameters`). call_seconds, message_seconds: of the software, per transfer and per
    message, the least that a transfer takes.
    """

    name: str
    about: str
    sends: str
    deduplicate: tuple[Deduplicate, ...]
    two_sided: bool = True
    owns_sms: bool = False
    avoids_nvlink: bool = False
    needs_one_domain: bool = False
    passes_own_rows: bool = False
    header_bytes: float = 0.0
    nvlink_share: float | None = None
    nic_share: float | None = None
    call_seconds: float
    message_seconds: float = 0.0
    source: str

    @property
    def fans_out(self) -> bool:
        """Whether it sends one copy to each node."""
        return "per_node" in self.deduplicate


DIRECT = DispatchAlgorithm(
    name="direct",
    about="each copy straight to its rank",
    sends="one copy per rank or selected expert",
    deduplicate=("per_expert", "per_rank"),
    call_seconds=33e-6,
    source="NCCL 2.27.7 on 8 H200 (stas00/ml-engineering network/benchmarks): launch of one call",
)
HIERARCHICAL = DispatchAlgorithm(
    name="hierarchical",
    about="once per node, then fanned out over NVLink",
    sends="one copy per node",
    deduplicate=("per_node",),
    owns_sms=True,
    passes_own_rows=True,
    nvlink_share=0.817,
    nic_share=0.87,
    call_seconds=66e-6,
    source=_DEEPEP,
)
LOW_LATENCY = DispatchAlgorithm(
    name="low_latency",
    about="one message per selected expert, over the NICs inside a node, too (DeepEP's first low-latency kernels)",
    sends="per selected expert",
    deduplicate=("per_expert",),
    two_sided=False,
    owns_sms=True,
    avoids_nvlink=True,
    header_bytes=16.0,
    nvlink_share=0.817,
    nic_share=0.87,
    call_seconds=1e-6,
    message_seconds=13e-9,
    source=f"{_DEEPEP}; low-latency kernels EP8 to EP256",
)
LOW_LATENCY_NVLINK = replace(
    LOW_LATENCY,
    name="low_latency_nvlink",
    about="the same, but over NVLink to peers of the node (DeepEP's low-latency kernels since June 2025)",
    avoids_nvlink=False,
)
ONE_SIDED = DispatchAlgorithm(
    name="one_sided",
    about="stores into the peers' memory, all within one NVLink domain (as TensorRT-LLM does on NVL72)",
    sends="one copy per rank or selected expert",
    deduplicate=("per_rank", "per_expert"),
    two_sided=False,
    owns_sms=True,
    needs_one_domain=True,
    nvlink_share=0.816,
    call_seconds=6.7e-6,
    source="stores of own kernels between two H100s (tools/measure_overlap.py): 367 of 450 GB/s; a call is two flags, "
    "3.33 us each (ISCA 2025 DeepSeek-V3 paper)",
)
DISPATCH = {facts.name: facts for facts in (DIRECT, HIERARCHICAL, LOW_LATENCY, LOW_LATENCY_NVLINK, ONE_SIDED)}
