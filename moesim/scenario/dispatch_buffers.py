"""What libraries of dispatch keep on every GPU for what other ranks write, as their source sizes it; not measured.

DeepEP (csrc/config.hpp, deep_ep/buffer.py): `Buffer` at the size that its hints give, with the recommended number of
tokens in a chunk; the part for NICs lies in a symmetric heap of NVSHMEM, which grows by 512 MiB. Hybrid-EP
(csrc/hybrid_ep/hybrid_ep.cu): room for all tokens of all ranks, since all may go to one, once inside an NVLink domain
and twice beyond, and with what comes from other domains.
"""

from dataclasses import dataclass

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
