"""Dispatch algorithms as data, one entry each: what tokens travel as, and what the software on the wires reaches.

A scenario names one in `dispatch.algorithm`; its checks, transfers and costs read the entry and no name.
"""

from dataclasses import dataclass, replace
from typing import Literal

Deduplicate = Literal["per_expert", "per_rank", "per_node", "all_ranks"]

_DEEPEP = "DeepEP README (H800, 400 Gb/s NICs), normal kernels, EP8 and EP32"
# What an SM moves over NVLink both ways at once, and how sharply the sum bends at what the port reaches: all-to-alls of
# 512 MiB between two H100 by the number of NCCL's blocks (tests/data/fabric_h100.json.gz; held out: 2.0 %).
BYTES_PER_SM = 14.4e9
SM_SHARPNESS = 3.5
SM_SOURCE = "two H100"


def nvlink_share_of_sms(
    share: float, *, sms: float, nvlink: float, per_sm: float = BYTES_PER_SM, sharpness: float = SM_SHARPNESS
) -> float:
    """The share of `nvlink` (bytes/s) that kernels on `sms` SMs reach, each of them `per_sm`; many reach `share`."""
    port, own = share * nvlink, sms * per_sm
    return float((port**-sharpness + own**-sharpness) ** (-1 / sharpness) / nvlink)


@dataclass(frozen=True, kw_only=True)
class DispatchAlgorithm:
    """The facts of one algorithm.

    sends: what each message is for. deduplicate: how often it can send a token, as in a scenario; per_node makes it two
    stages, over the network to one GPU of each node and on from there over NVLink; all_ranks sends every token to all,
    as an all-gather, and sums the outputs by a reduce-scatter. two_sided: a message waits until its receiver has come,
    too. owns_sms: its kernels hold SMs of their own, so that compute beside them does not make it longer. sms: how many
    its kernels take where the scenario says nothing; None: so many that they limit nothing. bytes_per_sm: what one of
    them moves over NVLink in each second; None: as NCCL's (`NetworkParameters`). combine_bytes_per_sm: of a combine
    that reads the rows of others and sums them; None: the same. megatron: its words for
    Megatron-LM, the dispatcher's type and the flex dispatcher's backend. avoids_nvlink: NICs carry the messages
    inside a node. needs_one_domain: a group's ranks must share an NVLink domain. passes_own_rows: inside one node,
    rows that stay on their rank pass through its ports like others. moves_rows: its kernels read tokens where they lie
    and bring back sums, in the time that was measured of them. header_bytes: of every dispatched message.
    nvlink_share, nic_share: of the nominal bandwidth in long transfers; None: what NCCL reaches
    (`NetworkParameters`). call_seconds, message_seconds: of the software, per transfer and per message, the least
    that a transfer takes.
    """

    name: str
    about: str
    sends: str
    deduplicate: tuple[Deduplicate, ...]
    two_sided: bool = True
    owns_sms: bool = False
    sms: float | None = None
    bytes_per_sm: float | None = None
    combine_bytes_per_sm: float | None = None
    megatron: tuple[str, str | None] | None = None
    avoids_nvlink: bool = False
    needs_one_domain: bool = False
    passes_own_rows: bool = False
    moves_rows: bool = False
    header_bytes: float = 0.0
    nvlink_share: float | None = None
    nic_share: float | None = None
    call_seconds: float
    message_seconds: float = 0.0
    source: str

    def of_one_sm(self, *, combine: bool) -> float | None:
        """Bytes/s over NVLink; None: as NCCL's."""
        if combine and self.combine_bytes_per_sm is not None:
            return self.combine_bytes_per_sm
        return self.bytes_per_sm

    @property
    def fans_out(self) -> bool:
        """Whether it sends one copy to each node."""
        return "per_node" in self.deduplicate

    @property
    def gathers(self) -> bool:
        """Whether every rank gets all tokens, whatever their experts."""
        return "all_ranks" in self.deduplicate


DIRECT = DispatchAlgorithm(
    name="direct",
    about="each copy straight to its rank",
    sends="one copy per rank or selected expert",
    deduplicate=("per_expert", "per_rank"),
    megatron=("alltoall", None),
    call_seconds=33e-6,
    source="NCCL 2.27.7 on 8 H200 (stas00/ml-engineering network/benchmarks): launch of one call",
)
HIERARCHICAL = DispatchAlgorithm(
    name="hierarchical",
    about="once per node, then fanned out over NVLink",
    sends="one copy per node",
    deduplicate=("per_node",),
    owns_sms=True,
    sms=24.0,
    megatron=("flex", "deepep"),
    passes_own_rows=True,
    moves_rows=True,
    nvlink_share=0.8345,  # of many SMs: with 24 of them 0.817 of an H800's port, as published
    nic_share=0.87,
    call_seconds=66e-6,
    source=_DEEPEP,
)
HYBRID_EP = DispatchAlgorithm(
    name="hybrid_ep",
    about="once per node (in a rack: per rack), then fanned out, by one-sided stores of few SMs (Hybrid-EP)",
    sends="one copy per node",
    deduplicate=("per_node",),
    two_sided=False,
    owns_sms=True,
    sms=16.0,
    bytes_per_sm=31.6e9,
    combine_bytes_per_sm=12.5e9,
    megatron=("flex", "hybridep"),
    moves_rows=True,
    nvlink_share=0.816,
    nic_share=0.87,
    call_seconds=6.7e-6,
    source="none of its own: between two H100s rows by the bulk copy engine, and rows of the other GPU read and "
    "summed, by the number of SMs (tools/measure_few_sms.py); 0.87 of a NIC as DeepEP's, a call is two flags of "
    "3.33 us (ISCA 2025 DeepSeek-V3 paper)",
)
ALLGATHER = DispatchAlgorithm(
    name="allgather",
    about="every rank gathers all tokens of the group and takes its own, outputs are summed by a reduce-scatter",
    sends="every token to all ranks",
    deduplicate=("all_ranks",),
    megatron=("allgather", None),
    call_seconds=33e-6,
    source="NCCL's all-gather and reduce-scatter",
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
    bytes_per_sm=40e9,  # 8 blocks: 322 GB/s
    nvlink_share=0.816,
    call_seconds=6.7e-6,
    source="stores of own kernels between two H100s (tools/measure_overlap.py): 367 of 450 GB/s; a call is two flags, "
    "3.33 us each (ISCA 2025 DeepSeek-V3 paper)",
)
_ALL = (DIRECT, HIERARCHICAL, LOW_LATENCY, LOW_LATENCY_NVLINK, ONE_SIDED, HYBRID_EP, ALLGATHER)
DISPATCH = {facts.name: facts for facts in _ALL}
