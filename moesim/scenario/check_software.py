"""What a software cannot run: layers, ranks and switches, number formats, dispatch algorithms.

Of dispatch algorithms, whether the cluster and the mesh can run one, of training and of serving.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple, get_args

from moesim.scenario.base import GemmFormat
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.check_layout import Report
from moesim.scenario.cluster import Cluster, Dispatch
from moesim.scenario.dispatch import DISPATCH, DispatchAlgorithm
from moesim.scenario.model import Mla
from moesim.scenario.schema import Precision, Scenario
from moesim.scenario.software import FUSED, IMPORTED, RECIPES
from moesim.schedules import SPLIT


def require_supported_step(scenario: Scenario, report: Report) -> None:
    """Raises UserError for ways of running a step that the simulation core does not have yet, naming the key."""
    mesh, software = scenario.parallelism, scenario.implementation.software
    facts = mesh.schedule.facts
    shared = f"{facts.name} puts each stage on {facts.copies} pipeline ranks; use 0 or 1, or {SPLIT.name}"
    for part in ("dense", "expert"):
        if (stage := getattr(mesh.zero, part)) < 2:
            continue
        for refused, why in (
            (not software.shards_gradients, f"{software.name} keeps whole gradients; use 0 or 1, or {FUSED.name}"),
            (facts.copies > 1, shared),
        ):
            if refused:
                raise report.user(f"parallelism.zero.{part}", f"{stage} shards layer by layer, but {why}")
    if isinstance(scenario.model.attention, Mla) and scenario.model.attention.indexer is not None:
        what = "sparse attention with an indexer (DSA) is counted by `moesim model`, but no step with it is modelled"
        raise report.user("model.attention.indexer", f"{what}; drop it to take full attention instead")
    require_software(scenario, report)


FREE_OF_FILE = (
    "reduce_dtype",
    "counts",
    "accumulation",
    "sequence_parallel",
)  # what a recorded step of one rank leaves open


def require_software(scenario: Scenario, report: Report) -> None:
    """Raises UserError for what the software cannot do, and for settings that contradict another key."""
    software = scenario.implementation.software
    if not software.other_layers:
        for key in ("dense_at", "local", "shared_intermediate", "expert_hidden"):
            if getattr(scenario.model, key):
                raise report.user(f"model.{key}", f"{software.name} has none; use {FUSED.name}")
        if not scenario.model.gated:
            raise report.user("model.gated", f"networks of {software.name} are gated; use {FUSED.name}")
    if not software.shares_layers:
        for axis in ("tensor", "context", "expert_tensor"):
            if (size := getattr(scenario.parallelism, axis)) > 1:
                message = f"{software.name} has no such ranks ({size}); use {FUSED.name}"
                raise report.user(f"parallelism.{axis}", message)
    if scenario.workload.recomputed_parts and not software.recomputes_parts:
        message = f"{software.name} can only recompute whole layers; use none or full, or implementation {FUSED.name}"
        raise report.user("workload.recompute", message)
    if not software.overlaps:
        for key in type(scenario.overlap).model_fields:
            if getattr(scenario.overlap, key):
                raise report.user(
                    f"overlap.{key}", f"{software.name} overlaps nothing; leave it out, or use {FUSED.name}"
                )
    for key, message in _refused(scenario):
        raise report.user(key, message)


def _refused(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """(key, message) of what the software does not have, and of switches that cannot be honoured."""
    software, mesh = scenario.implementation.software, scenario.parallelism
    switches = scenario.implementation.switches
    yield from _refused_of_file(scenario)
    if scenario.workload.precision.scaling and not software.casts_fp8:
        gemm = scenario.workload.precision.gemm
        yield "workload.precision.gemm", f"{software.name} has no GEMMs in {gemm}; use bf16, or {FUSED.name}"
    if mesh.expert > 1 and not software.expert_ranks:
        what = f"{software.name} shares experts by copies of all tokens on every rank, which is not modelled"
        yield "parallelism.expert", f"{what}; use 1"
    if scenario.overlap.parameter_gather and max(mesh.zero.dense, mesh.zero.expert) == 2:
        yield "overlap.parameter_gather", "ZeRO 2 gathers behind the optimizer; use parallelism.zero 1 or 3, or false"
    if switches.attention != "fused" and mesh.context > 1:
        yield (
            "implementation.attention",
            f"{switches.attention} needs whole sequences; use parallelism.context: 1, or fused",
        )
    if not switches.sequence_parallel and mesh.tensor > 1 and scenario.model.experts:
        what = "layers with experts share their tokens among tensor ranks"
        yield "implementation.sequence_parallel", f"{what}; use true, or parallelism.tensor: 1"
    if switches.cuda_graphs != "none" and switches.host == "free":
        yield "implementation.cuda_graphs", "launches cost nothing with host: free; drop this key, or host: launches"
    reads = "counts" if switches.counts and mesh.expert * mesh.expert_tensor > 1 else ""
    reads = "permute" if switches.permute == "mask" else reads
    if switches.cuda_graphs == "step" and scenario.model.experts and reads:
        what = f"the host reads back how many rows there are (implementation.{reads}), which no graph can hold"
        yield "implementation.cuda_graphs", f"{what}; use attention"


def _refused_of_file(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """A recorded step without its file, a file of a software that reads none, and switches that a file decides."""
    given, reads_file = scenario.implementation, scenario.implementation.software.kernels == "own_program"
    if reads_file and given.file is None:
        yield "implementation.file", "is missing; name the file that moesim import-step STEP --out FILE wrote"
    if not reads_file and given.file is not None:
        yield "implementation.file", f"{given.kind} reads no file; drop this key, or use kind: {IMPORTED.name}"
    if reads_file and scenario.overlap.weight_gradients:
        yield "overlap.weight_gradients", "a recorded step keeps the order of its program; drop this key"
    fixed = [name for name in given.overridden if name not in FREE_OF_FILE] if reads_file else []
    if fixed:
        yield f"implementation.{fixed[0]}", "is as the recorded program has it; drop this key, or record it otherwise"


KEY = "workload.precision"


def check_recipe(precision: Precision, report: Report) -> None:
    """A recipe belongs to the format of the GEMMs."""
    if precision.recipe is None:
        return
    meant = RECIPES[precision.recipe].gemm
    if precision.gemm != meant:
        known = [recipe.name for recipe in RECIPES.values() if recipe.gemm == precision.gemm]
        remedy = f"use {' or '.join(known)}, or gemm: {meant}" if known else f"set precision.gemm: {meant}, or drop it"
        what = f"{precision.recipe} is for GEMMs of {meant}, but precision.gemm is {precision.gemm}"
        raise report.user(f"{KEY}.recipe", f"{what}; {remedy}")


def check_formats(precision: Precision, spec: GpuSpec, report: Report) -> None:
    """The GPU has units for the GEMMs and their recipe."""
    if precision.gemm not in spec.peak_flops:
        formats = ", ".join(name for name in spec.peak_flops if name in get_args(GemmFormat))
        raise report.user(f"{KEY}.gemm", f"{spec.name} has no {precision.gemm}; it has {formats}")
    recipe = precision.scaling
    if recipe is not None and recipe.peak not in spec.peak_flops:
        others = " or ".join(_recipes_of(precision.gemm, spec))
        raise report.user(f"{KEY}.recipe", f"{spec.name} has no {recipe.name}; use {others}")


def _recipes_of(gemm: str, spec: GpuSpec) -> Iterator[str]:
    return (recipe.name for recipe in RECIPES.values() if recipe.gemm == gemm and recipe.peak in spec.peak_flops)


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
