"""Routes on fabrics that are trees: links by rank and by switch, up the tree and down again, without a graph search.

Legend: R ranks, F flows, P hops (padded with -1).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.network.topology import Site

IntArray = NDArray[np.int32]

NONE = -1  # no link
_HOPS = 10  # longest preset route: NVLink out and in (PXN), GPU-NIC, NIC, leaf, spine, spine, leaf, NIC, NIC-GPU


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Link ids by rank and by switch, for routes without a graph search: up the tree and down again.

    Entries are -1 where the tier is absent and `failed` where the link has failed.
    """

    nvlink_up_R: IntArray
    nvlink_down_R: IntArray
    nic_up_R2: IntArray  # GPU to NIC, NIC to leaf
    nic_down_R2: IntArray  # leaf to NIC, NIC to GPU
    leaf_up_R: IntArray
    leaf_down_R: IntArray
    spine_up_R: IntArray
    spine_down_R: IntArray
    leaf_R: IntArray  # number of the rank's leaf
    spine_R: IntArray
    plane_R: IntArray
    node_R: IntArray
    rail_R: IntArray
    node_size_R: IntArray
    domain_R: IntArray
    failed: int
    any_failed: bool

    @cached_property
    def shares_nics(self) -> bool:
        """Whether several GPUs are behind one NIC."""
        port_R = self.nic_up_R2[:, 1]
        return len(np.unique(port_R)) < len(port_R) and bool((port_R != NONE).any())

    def routes(
        self, sources_F: NDArray[np.integer], targets_F: NDArray[np.integer], *, avoid_nvlink: bool, pxn: bool
    ) -> IntArray:
        """Links of each flow in order of travel, [F, P], padded with -1; see Fabric.routes."""
        s, d = sources_F, targets_F
        path_FP = np.full((len(s), _HOPS), NONE, dtype=np.int32)
        local_F = self.domain_R[s] == self.domain_R[d]
        if avoid_nvlink and (self.nic_up_R2[:, 0] != NONE).any():
            local_F = np.zeros_like(local_F)
        path_FP[local_F, 0] = self.nvlink_up_R[s[local_F]]
        path_FP[local_F, 1] = self.nvlink_down_R[d[local_F]]
        far_F = ~local_F
        if not far_F.any():
            return path_FP[:, :2]
        s, d = s[far_F], d[far_F]
        # A flow leaves by its own rail, or by the target's rail where PXN or separate planes ask for it.
        forward = (self.plane_R[s] != self.plane_R[d]) | (pxn & (self.leaf_R[s] != self.leaf_R[d]))
        exit_rank = np.where(forward, s - self.rail_R[s] + self.rail_R[d] % self.node_size_R[s], s)
        hop = exit_rank != s
        far_path = np.full((len(s), _HOPS), NONE, dtype=np.int32)
        far_path[hop, 0] = self.nvlink_up_R[s[hop]]
        far_path[hop, 1] = self.nvlink_down_R[exit_rank[hop]]
        far_path[:, 2:4] = self.nic_up_R2[exit_rank]
        over = self.leaf_R[exit_rank] != self.leaf_R[d]
        far_path[over, 4] = self.leaf_up_R[exit_rank[over]]
        far_path[over, 7] = self.leaf_down_R[d[over]]
        core = self.spine_R[exit_rank] != self.spine_R[d]
        far_path[core, 5] = self.spine_up_R[exit_rank[core]]
        far_path[core, 6] = self.spine_down_R[d[core]]
        far_path[:, 8:] = self.nic_down_R2[d]
        path_FP[far_F] = far_path
        return path_FP


def build_ladder(sites: list[Site], links: tuple[tuple[str, str], ...], failed: set[tuple[str, str]]) -> Ladder:
    """The links of all ranks by their place; `failed` ones are no longer among `links`."""
    ids = {link: index for index, link in enumerate(links)}
    ids |= dict.fromkeys(failed, len(links))

    def ids_of(pairs: list[tuple[str, str]]) -> IntArray:
        return np.array([ids.get(pair, NONE) for pair in pairs], dtype=np.int32)

    gpus = [f"gpu{s.rank}" for s in sites]
    nics = [s.nic_name for s in sites]
    switches = [f"nvswitch{s.domain}" for s in sites]
    leaves = [s.leaf for s in sites]
    spines = [s.spine for s in sites]
    cores = ["core"] * len(sites)

    def numbers(names: list[str]) -> IntArray:
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        return np.array([order[name] for name in names], dtype=np.int32)

    def both(below: list[str], above: list[str]) -> tuple[IntArray, IntArray]:
        return ids_of(list(zip(below, above, strict=True))), ids_of(list(zip(above, below, strict=True)))

    nvlink_up_R, nvlink_down_R = both(gpus, switches)
    pcie_up_R, pcie_down_R = both(gpus, nics)
    port_up_R, port_down_R = both(nics, leaves)
    leaf_up_R, leaf_down_R = both(leaves, spines)
    spine_up_R, spine_down_R = both(spines, cores)
    return Ladder(
        nvlink_up_R=nvlink_up_R,
        nvlink_down_R=nvlink_down_R,
        nic_up_R2=np.stack([pcie_up_R, port_up_R], axis=1),
        nic_down_R2=np.stack([port_down_R, pcie_down_R], axis=1),
        leaf_up_R=leaf_up_R,
        leaf_down_R=leaf_down_R,
        spine_up_R=spine_up_R,
        spine_down_R=spine_down_R,
        leaf_R=numbers(leaves),
        spine_R=numbers(spines),
        plane_R=np.array([s.plane for s in sites], dtype=np.int32),
        node_R=np.array([s.node for s in sites], dtype=np.int32),
        rail_R=np.array([s.rail for s in sites], dtype=np.int32),
        node_size_R=np.array([s.node_size for s in sites], dtype=np.int32),
        domain_R=np.array([s.domain for s in sites], dtype=np.int32),
        failed=len(links),
        any_failed=bool(failed),
    )
