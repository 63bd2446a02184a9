"""No port or link passes more than its capacity, from any instant on: all algorithms, models and kinds of fabric."""

from dataclasses import dataclass

import numpy as np
import pytest
from network_cases import make_fabric

from moesim.network import Fabric, all_gather_seconds, prepare_combine, prepare_dispatch
from moesim.parallel.traffic import ring_copies
from moesim.scenario.dispatch import DISPATCH, DispatchAlgorithm

TOKEN_BYTES = 1e7
FABRICS: dict[str, dict[str, object]] = {
    "rails": {"nodes": 4, "gpus_per_node": 4},
    "fast NICs": {"nodes": 4, "gpus_per_node": 4, "nic": "300 GB/s", "nvlink": "200 GB/s"},
    "two NICs a node": {"nodes": 4, "gpus_per_node": 4, "nics_per_node": 2},
    "one leaf, core at 4:1": {"nodes": 4, "gpus_per_node": 4, "preset": "leaf_spine", "pod_nodes": 1}
    | {"oversubscription": 4.0},
    "rails at 2:1, PXN": {"nodes": 4, "gpus_per_node": 4, "oversubscription": 2.0, "pxn": True},
    "planes": {"nodes": 4, "gpus_per_node": 4, "preset": "multi_plane", "planes": 2},
    "racks": {"nodes": 4, "gpus_per_node": 4, "gpu": "gb200"},
    "a slow rail": {"nodes": 4, "gpus_per_node": 4, "degraded": [{"rail": 1, "factor": 0.3}]},
    "one node": {"nodes": 1, "gpus_per_node": 16},
}
RANKS = 16
FINISH_SLACK = {"ports": 1e-6, "exact": 1e-3, "fluid": 0.01}


def fabric_of(name: str) -> Fabric:
    keys = dict(FABRICS[name])
    return make_fabric(int(str(keys.pop("nodes"))), **keys)


def copies_of(fabric: Fabric, facts: DispatchAlgorithm, rng: np.random.Generator) -> list[np.ndarray]:
    """Skewed copies from rank to rank; of two stages over the GPU of the same rail in each domain."""
    copies_RR = rng.integers(1, 40, (RANKS, RANKS)) * rng.dirichlet(np.full(RANKS, 2.0)) * RANKS * (1 - np.eye(RANKS))
    domain_R = fabric.domain_of_rank_R
    if not facts.fans_out or len(set(domain_R.tolist())) == 1:
        return [copies_RR]
    first_RR, second_RR = np.where(domain_R[:, None] == domain_R, copies_RR, 0.0), np.zeros((RANKS, RANKS))
    for source, target in np.argwhere(domain_R[:, None] != domain_R):
        relay = int(np.flatnonzero(domain_R == domain_R[target])[fabric.rail_of_rank_R[source]])
        first_RR[source, relay] += copies_RR[source, target] / 2  # several of a node share one copy
        second_RR[relay, target] += copies_RR[source, target] * (relay != target)
    return [first_RR, second_RR]


@dataclass(frozen=True)
class Use:
    """The flows of all stages on one link, and the ranks all of whose flows pass it, to whom or from whom they go."""

    capacity: float
    bytes_F: np.ndarray
    source_F: np.ndarray
    target_F: np.ndarray

    def least(self, start_R: np.ndarray, *, two_sided: bool) -> float:
        """The least time by which the link can have passed all: what came at t or later needs its bytes after t."""
        at_F = np.maximum(start_R[self.source_F], start_R[self.target_F]) if two_sided else start_R[self.source_F]
        order_F = at_F.argsort()
        later_F = self.bytes_F[order_F][::-1].cumsum()[::-1]
        return float((at_F[order_F] + later_F / self.capacity).max())

    def finish(self, finish_R: np.ndarray) -> float:
        """When it has passed all: no rank whose own link it is ends before that, of others the last one."""
        own = [int(ends_F[0]) for ends_F in (self.source_F, self.target_F) if (ends_F == ends_F[0]).all()]
        return float(finish_R[own].min() if own else finish_R[[self.source_F, self.target_F]].max())


def uses_of(fabric: Fabric, stages_RR: list[np.ndarray], facts: DispatchAlgorithm) -> list[Use]:
    """Every link that any stage uses."""
    around = facts.avoids_nvlink and not fabric.is_rack_scale
    pairs_2F = np.concatenate([np.nonzero(bytes_RR * (1 - np.eye(RANKS))) for bytes_RR in stages_RR], axis=1)
    bytes_F = np.concatenate([bytes_RR[np.nonzero(bytes_RR * (1 - np.eye(RANKS)))] for bytes_RR in stages_RR])
    path_FP = fabric.routes(*pairs_2F, avoid_nvlink=around)
    on_link = ((link, (path_FP == link).any(axis=1)) for link in np.unique(path_FP[path_FP >= 0]))
    return [Use(fabric.capacity_X[link], bytes_F[on_F], *pairs_2F[:, on_F]) for link, on_F in on_link]


@pytest.mark.parametrize("name", FABRICS)
def test_no_link_passes_more_than_its_capacity(name: str) -> None:
    fabric = fabric_of(name)
    one_domain = len(set(fabric.domain_of_rank_R.tolist())) == 1
    for algorithm, facts in DISPATCH.items():
        if facts.gathers or (facts.needs_one_domain and not one_domain):
            continue
        if facts.avoids_nvlink and name == "one node":
            continue
        copies = copies_of(fabric, facts, np.random.default_rng(7))
        for prepare in (prepare_dispatch, prepare_combine):
            sent = [(matrix.T if prepare is prepare_combine else matrix) * TOKEN_BYTES for matrix in copies]
            uses = uses_of(fabric, sent, facts)
            for model, spread in (("ports", 0.0), ("ports", 0.4), ("fluid", 0.4), ("exact", 0.4)):
                prepared = prepare(fabric, copies, token_bytes=TOKEN_BYTES, algorithm=algorithm, model=model)
                start_R = np.random.default_rng(3).random(RANKS) * spread * float(prepared.alone_R.max())
                finish_R = prepared.finish(start_R)
                for use in uses:
                    least = use.least(start_R, two_sided=facts.two_sided)
                    assert use.finish(finish_R) >= least * (1 - FINISH_SLACK[model]), (algorithm, prepare, model)


@pytest.mark.parametrize("name", [name for name in FABRICS if name != "one node"])
def test_gathered_tokens_pass_every_port(name: str) -> None:
    """All but a rank's own tokens enter it, over links of its domain or of its NIC."""
    fabric, tokens = fabric_of(name), 100.0
    total = RANKS * tokens * TOKEN_BYTES
    ring = ring_copies(tokens, RANKS)
    prepared = prepare_dispatch(fabric, [ring], token_bytes=TOKEN_BYTES, algorithm="allgather")
    into_R = np.bincount([int(target[3:]) for _, target in fabric.links if target.startswith("gpu")], minlength=RANKS)
    assert (into_R > 0).all()
    capacity = np.zeros(RANKS)
    for (_, target), rate in zip(fabric.links, fabric.capacity_X.tolist(), strict=True):
        if target.startswith("gpu"):
            capacity[int(target[3:])] += rate
    assert prepared.alone_R.max() >= (total * (RANKS - 1) / RANKS / capacity).max()
    assert prepared.alone_R.max() == pytest.approx(all_gather_seconds(fabric, None, total).seconds)
