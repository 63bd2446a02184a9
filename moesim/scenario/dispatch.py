"""Dispatch algorithms as data, one entry each: what tokens travel as, what the software reaches and what it keeps.

A scenario names one in `dispatch.algorithm`; its checks, transfers and costs read the entry and no name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Deduplicate = Literal["per_expert", "per_rank", "per_node", "all_ranks"]

_DEEPEP = "DeepEP README (H800, 400 Gb/s NICs), normal kernels, EP8 and EP32"
_TABLES = "aiconfigurator-core 0.12.0"
# What an SM moves over NVLink both ways at once, and how sharply the sum bends at what the port reaches: all-to-alls of
# 512 MiB between two H100 by the number of NCCL's blocks (tests/data/fabric_h100.json.gz; held out: 2.0 %).
BYTES_PER_SM = 14.4e9
SM_SHARPNESS = 3.5
SM_SOURCE = "two H100"


def rate_of_both(port: Any, kernels: Any, *, sharpness: float = SM_SHARPNESS) -> Any:
    """Bytes/s (floats or arrays) of kernels that alone move `kernels`, through a port that alone gives `port`."""
    return (port**-sharpness + kernels**-sharpness) ** (-1 / sharpness)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the software of one direction, dispatch or combine, costs beside the links.

    call_seconds: before the first byte, the links' latency apart. doubling_seconds: more for each doubling of the
    NVLink domains that a group spans, or of its ranks where it spans one. bytes_per_sm: what an SM moves over NVLink in
    each second; None: as NCCL's (`NetworkParameters`). row_seconds: of an SM, for every row that it moves. rate:
    bytes/s over NVLink of kernels on all SMs; None: nothing but the port limits them. nic_share: of a NIC's nominal
    bandwidth; None: the algorithm's.
    """

    call_seconds: float
    doubling_seconds: float = 0.0
    bytes_per_sm: float | None = None
    row_seconds: float = 0.0
    rate: float | None = None
    nic_share: float | None = None

    def of_one_sm(self, row_bytes: float, *, usual: float) -> float:
        """Bytes/s over NVLink in rows of so many bytes; `usual`: where the kernel has no pace of its own."""
        pace = usual if self.bytes_per_sm is None else self.bytes_per_sm
        return pace if not self.row_seconds else 1 / (1 / pace + self.row_seconds / row_bytes)


class Kernels(NamedTuple):
    """Both directions, and where their figures are from beside the algorithm's source."""

    dispatch: Kernel
    combine: Kernel
    source: str = ""

    @classmethod
    def alike(cls, kernel: Kernel) -> "Kernels":
        """One for both directions."""
        return cls(kernel, kernel)


# What libraries of dispatch keep on every GPU for what other ranks write, as their source sizes it; not measured.
# DeepEP (csrc/config.hpp, deep_ep/buffer.py): `Buffer` at the size that its hints give, with the recommended number of
# tokens in a chunk; the part for NICs lies in a symmetric heap of NVSHMEM, which grows by 512 MiB. Hybrid-EP
# (csrc/hybrid_ep/hybrid_ep.cu): room for all tokens of all ranks, since all may go to one, once inside an NVLink domain
# and twice beyond, and with what comes from other domains.
PEERS = 8  # ranks that DeepEP's kernels reach over NVLink
CHUNKS = {8: 256, 64: 288, 128: 560}  # tokens that a channel receives at once over NVLink, up to so many ranks
MOST_IN_CHUNK = 720
FROM_NICS = 140  # the same over NICs: 128, in whole chunks that are sent
TOP_K, SCALES = 128, 128  # numbers of a token that there is always room for
SOURCE, IDS, FP32, BF16, CONTROL = 8, 8, 4, 2, 16  # bytes
HEAP_STEP = 512 * 2**20
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class BufferSizes:
    """A group that exchanges rows: tokens of a rank, width of their rows, bytes of a number on the way there, ranks,
    those of one NVLink domain, experts of the model, and SMs of the kernels.
    """

    tokens: float
    width: float
    dispatched: float
    ranks: int
    domain: int
    experts: int
    sms: float


def no_buffers(_: BufferSizes) -> float:
    """Rows go from tensors to tensors; what NCCL keeps is in `memory.reserved`."""
    return 0.0


def deepep_buffers(group: BufferSizes) -> float:
    """Bytes of the normal kernels' `Buffer`."""
    near, nodes, channels = min(group.ranks, PEERS), max(group.ranks // PEERS, 1), group.sms / 2
    chunk = next((tokens for ranks, tokens in CHUNKS.items() if group.ranks <= ranks), MOST_IN_CHUNK)
    of_token = BF16 * group.width + SOURCE + TOP_K * (IDS + FP32) + SCALES * FP32
    over_nvlink = channels * near * chunk * of_token
    if nodes == 1:
        return over_nvlink
    over_nics = channels * nodes * FROM_NICS * 2 * (of_token + CONTROL) + MEBIBYTE
    return over_nvlink + HEAP_STEP * -(-over_nics // HEAP_STEP)


def hybrid_ep_buffers(group: BufferSizes) -> float:
    """Bytes of `HybridEpBuffer`, tokens and their gates both ways."""
    domains = max(group.ranks // group.domain, 1)
    gates = FP32 * group.experts / group.ranks * min(group.ranks, group.domain)
    there, back = group.dispatched * group.width + gates, BF16 * group.width + gates
    everything = group.tokens * group.ranks
    if domains == 1:
        return everything * back
    return everything * (there + back) + group.tokens * (domains - 1) * (there + 2 * back)


@dataclass(frozen=True, kw_only=True)
class DispatchAlgorithm:
    """The facts of one algorithm.

    sends: what each message is for. deduplicate: how often it can send a token, as in a scenario; per_node makes it two
    stages, over the network to one GPU of each node and on from there over NVLink; all_ranks sends every token to all,
    as an all-gather, and sums the outputs by a reduce-scatter. two_sided: a message waits until its receiver has come,
    too. owns_sms: its kernels hold SMs of their own, so that compute beside them does not make it longer. sms: how many
    its kernels take where the scenario says nothing; None: so many that they limit nothing. sharpness: of the bend
    between what the SMs and what the port give; None: as NCCL's. megatron: its words for Megatron-LM, the dispatcher's
    type and the flex dispatcher's backend. avoids_nvlink: NICs carry the messages inside a node. needs_one_domain: a
    group's ranks must share an NVLink domain. needs_nvlink: GPUs without NVLink cannot run it inside a node.
    passes_own_rows: inside one node, rows that stay on their rank pass through its ports like others. moves_rows: its
    kernels read tokens where they lie and bring back sums, in the time that was measured of them. header_bytes: of
    every dispatched message. nvlink_share, nic_share: of the nominal bandwidth in long transfers; None: what NCCL
    reaches (`NetworkParameters`). kernels: what they cost inside an NVLink domain, by_kind: on kinds of GPU where that
    was measured, across: over NICs. measured: whether they are fitted to rows of its own kernels. buffers: bytes that
    the library keeps on every GPU.
    """

    name: str
    about: str
    sends: str
    deduplicate: tuple[Deduplicate, ...]
    two_sided: bool = True
    owns_sms: bool = False
    sms: float | None = None
    sharpness: float | None = None
    megatron: tuple[str, str | None] | None = None
    avoids_nvlink: bool = False
    needs_one_domain: bool = False
    needs_nvlink: bool = False
    passes_own_rows: bool = False
    moves_rows: bool = False
    header_bytes: float = 0.0
    nvlink_share: float | None = None
    nic_share: float | None = None
    kernels: Kernels
    by_kind: Mapping[str, Kernels] = field(default_factory=dict)
    across: Kernels | None = None
    measured: bool = False
    buffers: Callable[[BufferSizes], float] = no_buffers
    source: str

    def kernels_on(self, kind: str | None, *, over_nics: bool) -> Kernels:
        """Those of a kind of GPU (`moesim.network.nccl`), inside an NVLink domain or over NICs."""
        if over_nics and self.across is not None:
            return self.across
        return self.by_kind.get(kind or "", self.kernels)

    @property
    def uses_nccl(self) -> bool:
        """Whether NCCL carries its messages, by its calls and as far as these reach."""
        return self.nvlink_share is None

    @property
    def fans_out(self) -> bool:
        """Whether it sends one copy to each node."""
        return "per_node" in self.deduplicate

    @property
    def gathers(self) -> bool:
        """Whether every rank gets all tokens, whatever their experts."""
        return "all_ranks" in self.deduplicate


def _by_kind(table: Mapping[tuple[str, ...], tuple[Kernel, Kernel]], what: str) -> dict[str, Kernels]:
    return {
        kind: Kernels(*pair, f"{what} on {kind.upper()} ({_TABLES})") for kinds, pair in table.items() for kind in kinds
    }


# What DeepEP's kernels take on each kind of GPU: tools/fit_dispatch.py, every other row of its tables.
_NORMAL = _by_kind(
    {
        ("h100", "h200"): (
            Kernel(call_seconds=23.3e-6, bytes_per_sm=28.0e9, row_seconds=0.127e-6),
            Kernel(call_seconds=35.7e-6, bytes_per_sm=21.2e9, row_seconds=0.0344e-6),
        ),
        ("b200", "b300"): (
            Kernel(call_seconds=30.9e-6, bytes_per_sm=29.3e9, row_seconds=0.166e-6),
            Kernel(call_seconds=43.7e-6, bytes_per_sm=27.9e9, row_seconds=0.157e-6),
        ),
        ("gb200", "gb300"): (
            Kernel(call_seconds=31.9e-6, bytes_per_sm=49.9e9, row_seconds=0.333e-6),
            Kernel(call_seconds=38.2e-6, bytes_per_sm=31.1e9, row_seconds=0.347e-6),
        ),
    },
    "DeepEP's normal kernels",
)
_LOW_LATENCY = _by_kind(
    {
        ("h100", "h200"): (Kernel(call_seconds=7.8e-6, rate=261e9), Kernel(call_seconds=7.9e-6, rate=224e9)),
        ("b200", "b300"): (Kernel(call_seconds=16.6e-6, rate=476e9), Kernel(call_seconds=16.2e-6, rate=660e9)),
        ("gb200", "gb300"): (Kernel(call_seconds=12.2e-6, rate=443e9), Kernel(call_seconds=11.7e-6, rate=615e9)),
    },
    "DeepEP's low-latency kernels",
)

DIRECT = DispatchAlgorithm(
    name="direct",
    about="each copy straight to its rank",
    sends="one copy per rank or selected expert",
    deduplicate=("per_expert", "per_rank"),
    megatron=("alltoall", None),
    kernels=Kernels.alike(Kernel(call_seconds=33e-6)),
    source="NCCL 2.27.7 on 8 H200 (stas00/ml-engineering network/benchmarks): launch of one call",
)
HIERARCHICAL = DispatchAlgorithm(
    name="hierarchical",
    about="once per node, then fanned out over NVLink",
    sends="one copy per node",
    deduplicate=("per_node",),
    owns_sms=True,
    needs_nvlink=True,
    sms=24.0,
    megatron=("flex", "deepep"),
    passes_own_rows=True,
    moves_rows=True,
    sharpness=8.0,
    nvlink_share=0.78,  # dispatch 0.76, combine 0.79; H800's published rows: 0.79
    nic_share=0.905,  # H200's rows over nodes 0.91 and 0.89, H800's 0.91 and 0.88
    buffers=deepep_buffers,
    kernels=_NORMAL["h100"],
    by_kind=_NORMAL,
    across=Kernels(
        Kernel(call_seconds=22e-6, doubling_seconds=32.6e-6, bytes_per_sm=9.98e9),
        Kernel(call_seconds=52e-6, doubling_seconds=32.1e-6, bytes_per_sm=7.73e9),
        f"between nodes, with the call that counts rows: 2 and 4 nodes of 8 H200 ({_TABLES})",
    ),
    measured=True,
    source=_DEEPEP,
)
HYBRID_EP = DispatchAlgorithm(
    name="hybrid_ep",
    about="once per node (in a rack: per rack), then fanned out, by one-sided stores of few SMs (Hybrid-EP)",
    sends="one copy per node",
    deduplicate=("per_node",),
    two_sided=False,
    owns_sms=True,
    needs_nvlink=True,
    sms=16.0,
    megatron=("flex", "hybridep"),
    moves_rows=True,
    nvlink_share=0.816,
    nic_share=HIERARCHICAL.nic_share,
    buffers=hybrid_ep_buffers,
    kernels=Kernels(Kernel(call_seconds=6.7e-6, bytes_per_sm=31.6e9), Kernel(call_seconds=6.7e-6, bytes_per_sm=12.5e9)),
    source="none of its own: between two H100s rows by the bulk copy engine, and rows of the other GPU read and "
    "summed, by the number of SMs (tools/measure_few_sms.py); of a NIC what DeepEP's normal kernels reach; a call is "
    "two flags of 3.33 us (ISCA 2025 DeepSeek-V3 paper)",
)
ALLGATHER = DispatchAlgorithm(
    name="allgather",
    about="every rank gathers all tokens of the group and takes its own, outputs are summed by a reduce-scatter",
    sends="every token to all ranks",
    deduplicate=("all_ranks",),
    megatron=("allgather", None),
    kernels=DIRECT.kernels,
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
    sharpness=8.0,
    nvlink_share=0.73,  # as of stores of `one_sided`: most that low-latency kernels were seen at is 0.60
    nic_share=0.92,
    kernels=_LOW_LATENCY["h100"],
    by_kind=_LOW_LATENCY,
    across=Kernels(
        Kernel(call_seconds=12.3e-6, doubling_seconds=4.06e-6, nic_share=0.94),  # H200 0.96, H800 0.93
        Kernel(call_seconds=19.8e-6, doubling_seconds=0.87e-6, nic_share=0.90),  # H200 0.93, H800 0.88
        f"2 to 8 nodes of 8 H200 ({_TABLES})",
    ),
    measured=True,
    source="DeepEP README (H800, 400 Gb/s NICs), low-latency kernels EP8 to EP256",
)
LOW_LATENCY_NVLINK = replace(
    LOW_LATENCY,
    name="low_latency_nvlink",
    about="the same, but over NVLink to peers of the node (DeepEP's low-latency kernels since June 2025)",
    avoids_nvlink=False,
    needs_nvlink=True,
)
ONE_SIDED = DispatchAlgorithm(
    name="one_sided",
    about="stores into the peers' memory, all within one NVLink domain (as TensorRT-LLM does on NVL72)",
    sends="one copy per rank or selected expert",
    deduplicate=("per_rank", "per_expert"),
    two_sided=False,
    owns_sms=True,
    needs_nvlink=True,
    needs_one_domain=True,
    nvlink_share=0.73,  # dispatch 0.72, combine 0.74
    kernels=Kernels(
        Kernel(call_seconds=9.4e-6, doubling_seconds=1.54e-6, bytes_per_sm=40e9),  # 8 blocks: 322 GB/s
        Kernel(call_seconds=7.7e-6, doubling_seconds=3.82e-6, bytes_per_sm=40e9),
    ),
    measured=True,
    source=f"TensorRT-LLM's one-sided kernels among 2 to 32 GB200 ({_TABLES}); by SMs stores of own kernels between "
    "two H100s (tools/measure_ranks.py overlap)",
)
_ALL = (DIRECT, HIERARCHICAL, LOW_LATENCY, LOW_LATENCY_NVLINK, ONE_SIDED, HYBRID_EP, ALLGATHER)
DISPATCH = {facts.name: facts for facts in _ALL}
