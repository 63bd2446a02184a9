"""Whether the cluster and the mesh can run a dispatch algorithm, of training and of serving."""

import itertools
from typing import NamedTuple

from moesim.scenario.cluster import Cluster, Dispatch
from moesim.scenario.dispatch import DISPATCH, DispatchAlgorithm


class ExpertGroups(NamedTuple):
    """Where experts are: groups of `block` consecutive ranks with `expert` ways of experts, on `ranks` in all.

    domain_sizes: GPUs of each NVLink domain in rank order. divisible: whether a group may be smaller.
    """

    cluster: Cluster
    expert: int
    block: int
    ranks: int
    domain_sizes: tuple[int, ...]
    divisible: bool = True


class DispatchFault(NamedTuple):
    """The key of the section `dispatch` that is wrong, what is, and what would be right."""

    key: str
    message: str


def dispatch_fault(dispatch: Dispatch, groups: ExpertGroups) -> DispatchFault | None:
    """What does not fit; the remedy names only what the cluster and the mesh can run. None: all fits."""
    facts, given = DISPATCH[dispatch.algorithm], dispatch.deduplicate
    if (obstacle := _obstacle(facts, groups)) is not None:
        linked = all(pool.spec.has_nvlink for pool in groups.cluster.pools)
        divided = groups.divisible and facts.needs_one_domain and linked
        divide = "a parallelism.expert that divides it, or " if divided else ""
        return DispatchFault("algorithm", f"{obstacle}; use {divide}{_others(dispatch, groups)}")
    if given in facts.deduplicate:
        return None
    own = " or ".join(facts.deduplicate)
    fanning = [name for name, other in _usable(groups).items() if other.fans_out]
    if given == "per_node" and fanning:
        able = f"dispatch.algorithm: {' or '.join(fanning)}, or dispatch.deduplicate: {own}"
        return DispatchFault("algorithm", f"{facts.name} has no fan-out inside a node; set {able}")
    what = f"{facts.name} sends {facts.sends}, not {given}; set dispatch.deduplicate: {own}"
    return DispatchFault("deduplicate", what)


def _obstacle(facts: DispatchAlgorithm, groups: ExpertGroups) -> str | None:
    """What of the cluster or the mesh an algorithm cannot run on; None: nothing."""
    cluster, kind = groups.cluster, groups.cluster.fabric_kind
    if facts.avoids_nvlink and kind.rack_gpus is None and not (kind.has_network or kind.listed):
        return f"{facts.name} sends over NICs inside a node, too, and {kind.name} has none"
    if groups.expert == 1:
        return None
    without = [pool.gpu_name for pool in cluster.pools if not pool.spec.has_nvlink]
    if facts.needs_nvlink and without and cluster.fabric.nvlink is None:
        return f"{facts.name} needs NVLink inside a node, which {without[0]} lacks"
    # groups are blocks of consecutive ranks: each lies in one domain where no domain ends inside a block
    ends = [end for end in itertools.accumulate(groups.domain_sizes) if end < groups.ranks]
    if facts.needs_one_domain and any(end % groups.block for end in ends):
        ranks = f"the {groups.block} ranks of an expert group in one NVLink domain"
        return f"{facts.name} needs {ranks}, which here has {max(groups.domain_sizes)}"
    return None


def _usable(groups: ExpertGroups) -> dict[str, DispatchAlgorithm]:
    """The algorithms that the cluster and the mesh can run."""
    return {name: facts for name, facts in DISPATCH.items() if _obstacle(facts, groups) is None}


def _others(dispatch: Dispatch, groups: ExpertGroups) -> str:
    """These in words: those that take the given deduplicate, or where none does, each with one that it takes."""
    usable = _usable(groups)
    same = [name for name, facts in usable.items() if dispatch.deduplicate in facts.deduplicate]
    others = [f"{name} with dispatch.deduplicate: {facts.deduplicate[-1]}" for name, facts in usable.items()]
    return " or ".join(same) or ", or ".join(others)
