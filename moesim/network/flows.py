"""Flows of one transfer: who sends how much to whom over which links.

Legend: S routing samples in lockstep, R ranks of the group, F flows (source-target pairs), P hops, X links.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """The pairs with traffic in at least one sample, in row-major order of (source, target).

    `source_F` and `target_F` count within the group. `path_FP` holds the links that can be a bottleneck (links of the
    fabric, -1 for none); `latency_F` counts every link. `bytes_SF` may be 0 in some samples.
    """

    num_ranks: int
    source_F: IntArray
    target_F: IntArray
    bytes_SF: FloatArray
    path_FP: IntArray
    latency_F: FloatArray

    def slowed(self, efficiency: float) -> "Flows":
        """The flows of software that reaches `efficiency` of what the links achieve: more bytes' worth of time."""
        return self if efficiency == 1.0 else dataclasses.replace(self, bytes_SF=self.bytes_SF / efficiency)


def as_ranks(fabric: Fabric, ranks: Sequence[int] | NDArray[np.integer] | None) -> NDArray[np.int64]:
    """Ranks of the fabric as an array; None means all."""
    chosen = np.arange(fabric.num_ranks) if ranks is None else np.asarray(ranks, dtype=np.int64)
    assert chosen.ndim == 1 and len(chosen) and chosen.min() >= 0 and chosen.max() < fabric.num_ranks, chosen
    return chosen


def build_flows(
    fabric: Fabric,
    bytes_SRR: FloatArray,
    *,
    ranks: NDArray[np.int64],
    avoid_nvlink: bool = False,
    loopback: bool = False,
) -> Flows:
    """Flows for the byte matrices [S, R, R]. Own rows (the diagonal) are no traffic unless `loopback` is set."""
    num_ranks = len(ranks)
    assert bytes_SRR.shape[1:] == (num_ranks, num_ranks), (bytes_SRR.shape, num_ranks)
    assert np.isfinite(bytes_SRR).all() and (bytes_SRR >= 0).all()
    active_RR = np.asarray((bytes_SRR > 0).any(axis=0))
    if not loopback:
        np.fill_diagonal(active_RR, False)
    source_F, target_F = (index.astype(np.int32) for index in np.nonzero(active_RR))
    whole_FP = fabric.routes(ranks[source_F], ranks[target_F], avoid_nvlink=avoid_nvlink)
    binding_X = np.append(np.where(fabric.redundant_X, NONE, np.arange(len(fabric.links))), NONE).astype(np.int32)
    path_FP = binding_X[whole_FP]
    return Flows(
        num_ranks=num_ranks,
        source_F=source_F,
        target_F=target_F,
        bytes_SF=bytes_SRR[:, source_F, target_F],
        path_FP=np.ascontiguousarray(path_FP[:, (path_FP != NONE).any(axis=0)]),
        latency_F=fabric.path_latency(whole_FP),
    )


def link_bytes(fabric: Fabric, flows: Flows) -> FloatArray:
    """Bytes over each link that can be a bottleneck, float64 [S, X]."""
    totals_SX = np.zeros((len(flows.bytes_SF), len(fabric.links)))
    for hop in range(flows.path_FP.shape[1]):
        used = flows.path_FP[:, hop] != NONE
        for sample, bytes_F in enumerate(flows.bytes_SF):
            totals_SX[sample] += np.bincount(
                flows.path_FP[used, hop], weights=bytes_F[used], minlength=len(fabric.links)
            )
    return totals_SX
