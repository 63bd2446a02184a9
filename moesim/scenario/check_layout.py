"""Checks across sections of the layout, of its software, and of where ranks and experts are.

What is shared out must divide, pipelines, number formats; what a software cannot run, and settings of its switches that
contradict another key. Clusters of several pools: which axis crosses them, how they share the batch, ranks that differ.
The `placement` section: every expert has a slot, and slots are spread as they are said to be.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import get_args

from moesim.errors import ConflictError, InfeasibleError, UserError
from moesim.scenario.base import MOST_EXPERTS, GemmFormat
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.document import Path, dotted
from moesim.scenario.failures import LinkChange, Slowdown
from moesim.scenario.model import LocalGlobal, Mla
from moesim.scenario.placement import Explicit, MadeFromRows, keeps_groups
from moesim.scenario.routing import ExpertCapacity
from moesim.scenario.schema import PART_NEEDS, Precision, Scenario
from moesim.scenario.software import FUSED, IMPORTED, RECIPES
from moesim.scenario.stages import data_ranks_of_pools, is_mixed, pools_of_ranks, ranked_cluster
from moesim.schedules import PLAIN, SCHEDULES, SPLIT


@dataclass(frozen=True)
class Report:
    """Makes the error of a dotted key; `where` says its place."""

    where: Callable[[Path], str] = dotted

    def place(self, key: str) -> str:
        """Where the key stands."""
        return self.where(tuple(int(part) if part.isdigit() else part for part in key.split(".")))

    def user(self, key: str, message: str) -> ConflictError:
        """A mistake of the user at `key` (exit code 1)."""
        return ConflictError(f"{self.place(key)}: {message}")

    def infeasible(self, key: str, message: str) -> InfeasibleError:
        """What is well-formed and cannot run, by `key` (exit code 2)."""
        return InfeasibleError(f"{self.place(key)}: {message}")


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
        yield "workload.precision.gemm", f"{software.name} has no products in {gemm}; use bf16, or {FUSED.name}"
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
DIVISOR_SEARCH = 10**6  # beyond that nobody reads the remedy, and a slip of the keyboard must not take for ever


def check_pipeline(scenario: Scenario, report: Report) -> None:
    """Raises UserError when the schedule, the ranks and the micro-batches do not fit each other."""
    mesh, schedule = scenario.parallelism, scenario.parallelism.schedule
    facts = schedule.facts
    if facts.virtual and schedule.virtual < 2 and not facts.single:
        message = f"{facts.name} needs at least 2 stages per rank; set it to 2 or more, or use kind: {PLAIN.name}"
        raise report.user("parallelism.schedule.virtual", message)
    if not facts.virtual and schedule.virtual != 1:
        others = " or ".join(other.name for other in SCHEDULES.values() if other.virtual)
        message = f"{facts.name} has no virtual stages; use kind: {others}, or drop this key"
        raise report.user("parallelism.schedule.virtual", message)
    p, m = mesh.pipeline, scenario.num_micro_batches
    unit = mesh.data * scenario.workload.micro_batch
    if facts.even and p % 2:
        message = f"{facts.name} needs an even number of ranks, got {p}; use {p + 1}, or another schedule"
        raise report.user("parallelism.pipeline", message)
    if mesh.batch_share != "even":
        return  # `check_mixed` looks at the numbers of every pool
    if facts.whole_rounds and m % p:
        sizes = " or ".join(str(count * unit) for count in (m // p * p, m // p * p + p) if count)
        what = f"{facts.name} needs micro-batches in rounds of pipeline = {p}, got {m}"
        raise report.user("workload.global_batch", f"{what}; use {sizes}")
    least = facts.least_rounds * p
    if (facts.even and m % 2) or m < least:
        fits = max(least, m + m % 2 if facts.even else m) * unit
        kind = "an even number of micro-batches" if facts.even else "micro-batches"
        at_least = f", at least {facts.least_rounds} * pipeline = {least}" if least else ""
        raise report.user("workload.global_batch", f"{facts.name} needs {kind}{at_least}, got {m}; use {fits}")


def check_stages(scenario: Scenario, report: Report) -> None:
    """Raises UserError when the layers do not go into the stages."""
    mesh, layers = scenario.parallelism, scenario.model.layers
    if mesh.stages is None:
        if mesh.num_stages > layers:
            message = f"{mesh.num_stages} stages for {layers} layers; use fewer, or say where they go with stages"
            raise report.user("parallelism.pipeline", message)
        return
    if len(mesh.stages) != mesh.num_stages:
        virtual = " * schedule.virtual" if mesh.schedule.virtual > 1 else ""
        what = f"{len(mesh.stages)} numbers of layers for pipeline{virtual} = {mesh.num_stages} stages"
        raise report.user("parallelism.stages", f"{what}; give one per stage")
    if sum(mesh.stages) != layers:
        what = f"{sum(mesh.stages)} layers in all stages together, but model.layers = {layers}"
        raise report.user("parallelism.stages", f"{what}; make them add up")


def check_recomputation(scenario: Scenario, report: Report) -> None:
    """Raises UserError for parts to recompute that the model does not have."""
    recompute, model = scenario.workload.recompute, scenario.model
    for place, part in enumerate(recompute if isinstance(recompute, tuple) else ()):
        key = f"workload.recompute.{place}"
        if part == "mla_up_projection" and not isinstance(model.attention, Mla):
            what = f"{part} is a part of latent attention, but model.attention is {model.attention.kind}"
            raise report.user(key, f"{what}; drop it")
        if part in PART_NEEDS and not getattr(model, PART_NEEDS[part]):
            raise report.user(key, f"the model has no {part}: model.{PART_NEEDS[part]} is 0; drop it")


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


def nearest_divisors(number: int, target: int, *, multiple_of: int = 1) -> list[int]:
    """The divisors of `number` just below and just above `target` that are multiples of `multiple_of`.

    Where none lies within a million of `target`, the smallest (`multiple_of` itself) or largest one stands in.
    """

    def first(candidates: range, instead: int) -> list[int]:
        near = candidates[:DIVISOR_SEARCH]
        tried = [instead] if candidates[DIVISOR_SEARCH:] else []
        fitting = (d for d in chain(near, tried) if number % d == 0 and d % multiple_of == 0)
        return list(islice(fitting, 1))

    below = first(range(min(target - 1, number), 0, -1), multiple_of)
    return below + first(range(target + 1, number + 1), number)


def either(values: Iterable[int]) -> str:
    """The numbers as a choice: `2 or 4`."""
    return " or ".join(str(value) for value in values)


def check_recipe(precision: Precision, report: Report) -> None:
    """A recipe belongs to the format of the products."""
    if precision.recipe is None:
        return
    meant = RECIPES[precision.recipe].gemm
    if precision.gemm != meant:
        known = [recipe.name for recipe in RECIPES.values() if recipe.gemm == precision.gemm]
        remedy = f"use {' or '.join(known)}, or gemm: {meant}" if known else f"set precision.gemm: {meant}, or drop it"
        what = f"{precision.recipe} is for products of {meant}, but precision.gemm is {precision.gemm}"
        raise report.user(f"{KEY}.recipe", f"{what}; {remedy}")


def check_formats(precision: Precision, spec: GpuSpec, report: Report) -> None:
    """The GPU has units for the products and their recipe."""
    if precision.gemm not in spec.peak_flops:
        formats = ", ".join(name for name in spec.peak_flops if name in get_args(GemmFormat))
        raise report.user(f"{KEY}.gemm", f"{spec.name} has no {precision.gemm}; it has {formats}")
    recipe = precision.scaling
    if recipe is not None and recipe.peak not in spec.peak_flops:
        others = " or ".join(_recipes_of(precision.gemm, spec))
        raise report.user(f"{KEY}.recipe", f"{spec.name} has no {recipe.name}; use {others}")


def _recipes_of(gemm: str, spec: GpuSpec) -> Iterator[str]:
    return (recipe.name for recipe in RECIPES.values() if recipe.gemm == gemm and recipe.peak in spec.peak_flops)


def check_sharing(scenario: Scenario, report: Report) -> None:
    """Raises UserError when ranks cannot share the sequences and matrices of a layer evenly, or cannot be folded."""
    model, mesh = scenario.model, scenario.parallelism
    shared = [("tensor", mesh.tensor, "model.heads", model.heads)]
    if not isinstance(model.attention, Mla):
        shared.append(("tensor", mesh.tensor, "model.kv_heads", model.kv_heads))
    if model.dense_layers:
        shared.append(("tensor", mesh.tensor, "model.dense_intermediate", model.dense_intermediate))
    if model.shared_experts:
        name = f"model.shared_experts * {'shared' if model.shared_intermediate else 'expert'}_intermediate"
        shared.append(("tensor", mesh.tensor, name, model.shared_width))
    shared.append(("expert_tensor", mesh.expert_tensor, "model.expert_intermediate", model.expert_intermediate))
    for key, size, name, value in shared:
        if value % size:
            fits = either(nearest_divisors(value, size))
            raise report.user(f"parallelism.{key}", f"{size} does not divide {name} = {value}; use {fits}")
    _check_sequence(scenario, report)
    _check_folding(scenario, report)


def _check_sequence(scenario: Scenario, report: Report) -> None:
    """Tensor ranks share the tokens of two chunks of each of 2 * context."""
    mesh, length = scenario.parallelism, scenario.workload.sequence_length
    chunks = 2 * mesh.context if mesh.context > 1 else 1
    for key, name, parts in (
        ("context", f"{mesh.context}", mesh.context),
        ("context", f"2 * context = {chunks}", chunks),
        ("tensor", f"{mesh.tensor} ranks * {chunks} chunks = {mesh.tensor * chunks}", mesh.tensor * chunks),
    ):
        if length % parts:
            unit = parts // getattr(mesh, key)
            fits = either(near // unit for near in nearest_divisors(length, parts, multiple_of=unit))
            what = f"{name} does not divide workload.sequence_length = {length}"
            raise report.user(f"parallelism.{key}", f"{what}; use {fits}")
    attention = scenario.model.attention
    if mesh.context > 1 and isinstance(attention, LocalGlobal) and attention.window < length:
        message = "a ring of whole sequences has no windows; use 1, or another model.attention than local_global"
        raise report.user("parallelism.context", message)
    if mesh.context > 1 and scenario.model.local is not None and scenario.model.local.window < length:
        raise report.user("parallelism.context", "a ring of whole sequences has no windows; use 1, or drop model.local")


def _check_folding(scenario: Scenario, report: Report) -> None:
    mesh = scenario.parallelism
    attention, experts = mesh.context * mesh.tensor, mesh.expert * mesh.expert_tensor
    small, large = sorted((attention, experts))
    if large % small:
        what = f"expert * expert_tensor = {experts} and context * tensor = {attention} ranks do not fit into each other"
        raise report.user("parallelism.expert", f"{what}; make one of them a multiple of the other")


def check_mixed(scenario: Scenario, report: Report) -> None:
    """Raises UserError where ranks cannot be on the pools as the scenario says."""
    mesh, cluster = scenario.parallelism, scenario.cluster
    _check_speeds(scenario, report)
    _check_changes(scenario, report)
    axis = mesh.across_pools
    if axis is not None and len(cluster.pools) == 1:
        raise report.user("parallelism.across_pools", f"{axis} crosses no pool: there is one; name several, or drop it")
    if axis == "expert" and mesh.expert == 1:
        raise report.user("parallelism.across_pools", "expert groups of 1 rank cross no pool; use data or pipeline")
    if axis == "pipeline" and mesh.pipeline == 1:
        raise report.user("parallelism.across_pools", "1 pipeline stage crosses no pool; use data or expert")
    if axis in ("data", "expert") and scenario.idle_gpus:
        what = f"{mesh.world_size} ranks on {cluster.num_gpus} GPUs: ranks are dealt out over all nodes of every pool"
        raise report.user("parallelism.across_pools", f"{what}; name as many nodes as there are ranks")
    try:
        ranked_cluster(cluster, mesh)
    except UserError as error:
        raise report.user("parallelism.across_pools", str(error).partition(": ")[2]) from None
    if is_mixed(cluster, mesh) or mesh.batch_share != "even":
        _check_boundaries(scenario, report)


def _check_speeds(scenario: Scenario, report: Report) -> None:
    speeds, world = scenario.cluster.speeds, scenario.parallelism.world_size
    if speeds.factors is not None and len(speeds.factors) != world:
        what = f"{len(speeds.factors)} factors for {world} ranks"
        raise report.user("cluster.speeds.factors", f"{what}; give one per rank, or name single ones in ranks")
    for index, one in enumerate(speeds.ranks):
        if one.rank >= world:
            raise report.user(f"cluster.speeds.ranks.{index}.rank", f"rank {one.rank} of ranks 0 to {world - 1}")


def _check_changes(scenario: Scenario, report: Report) -> None:
    cluster, world = scenario.cluster, scenario.parallelism.world_size
    nodes = sum(pool.nodes for pool in cluster.pools)
    steps = scenario.uncertainty.samples if scenario.model.experts else 1
    lists: tuple[tuple[str, Sequence[Slowdown | LinkChange]], ...] = (
        ("cluster.slowdowns", cluster.slowdowns),
        ("cluster.fabric.changes", cluster.fabric.changes),
    )
    for where, changes in lists:
        for index, one in enumerate(changes):
            key, rank, node = f"{where}.{index}", getattr(one, "rank", None), one.node
            named = [name for name in ("rank", "node", "link", "rail") if getattr(one, name, None) is not None]
            if len(named) != 1:
                raise report.user(key, "names " + (" and ".join(named) or "nothing") + "; name one")
            if rank is not None and rank >= world:
                raise report.user(f"{key}.rank", f"rank {rank} of ranks 0 to {world - 1}")
            if node is not None and node >= nodes:
                raise report.user(f"{key}.node", f"node {node} of nodes 0 to {nodes - 1}")
            if one.until is not None and one.until <= one.at:
                raise report.user(f"{key}.until", f"{one.until:g} s is not behind at = {one.at:g} s")
            if one.from_step >= steps:
                what = f"step {one.from_step} of the {steps} that are simulated"
                raise report.user(f"{key}.from_step", f"{what}; a step is a routing sample (uncertainty.samples)")


def _check_boundaries(scenario: Scenario, report: Report) -> None:
    """No group that cannot be on several kinds of GPU has ranks on two pools."""
    mesh, cluster = scenario.parallelism, scenario.cluster
    blocks = {
        "tensor and context parallelism": mesh.tensor * mesh.context,
        "expert-tensor parallelism": mesh.expert_tensor,
    }
    if mesh.across_pools == "pipeline":
        blocks = {"the ranks of a pipeline stage (across_pools: pipeline)": mesh.stage_ranks, **blocks}
    if mesh.across_pools == "data":
        blocks["an expert group (across_pools: data)"] = mesh.expert * mesh.expert_tensor
    pools = pools_of_ranks(cluster, mesh)
    ends = [(rank + 1, first, second) for rank, (first, second) in enumerate(pairwise(pools)) if first != second]
    for what, size in blocks.items():
        for end, first, second in ends:
            if end % size:
                names = f'"{cluster.pools[first].name}" and "{cluster.pools[second].name}"'
                why = f"{what} cannot cross pools, but {size} ranks of it are on {names} (from rank {end} on)"
                key = "cluster.pools" if mesh.across_pools is None else "parallelism.across_pools"
                raise report.user(key, f"{why}; use pools whose GPUs are multiples of {size}, or smaller groups")


def check_batch(scenario: Scenario, report: Report) -> None:
    """Raises UserError where the global batch does not split into whole micro-batches of all ranks."""
    work, mesh = scenario.workload, scenario.parallelism
    if mesh.batch_share != "even":
        _check_shares(scenario, report)
        return
    unit = mesh.data * work.micro_batch
    if work.global_batch % unit:
        below = work.global_batch // unit * unit
        fits = either(size for size in (below, below + unit) if size)
        what = (
            f"{work.global_batch} sequences do not split into data * micro_batch = {mesh.data} * {work.micro_batch} = "
            f"{unit}"
        )
        raise report.user("workload.global_batch", f"{what}; use {fits}")


def _check_shares(scenario: Scenario, report: Report) -> None:
    work, mesh, pools = scenario.workload, scenario.parallelism, scenario.cluster.pools
    key = "parallelism.batch_share"
    if mesh.across_pools != "data":
        what = "data-parallel ranks of one pool share the batch evenly; shares need parallelism.across_pools: data"
        raise report.user(key, f"{what}; or use even")
    if max(mesh.zero.dense, mesh.zero.expert) > 1:
        what = "ZeRO 2 and 3 gather and reduce in every micro-batch, so that all ranks need equally many"
        raise report.user(key, f"{what}; use even, or ZeRO 0 or 1")
    ranks = data_ranks_of_pools(scenario)
    if isinstance(mesh.batch_share, tuple):
        if len(mesh.batch_share) != len(pools):
            what = f"{len(mesh.batch_share)} numbers of micro-batches for {len(pools)} pools"
            raise report.user(key, f"{what}; give one per pool, in their order")
        total = sum(n * share for n, share in zip(ranks, mesh.batch_share, strict=True)) * work.micro_batch
        if total != work.global_batch:
            terms = " + ".join(f"{n} * {share}" for n, share in zip(ranks, mesh.batch_share, strict=True))
            what = f"({terms}) micro-batches of {work.micro_batch} are {total} sequences"
            raise report.user(key, f"{what}, not workload.global_batch = {work.global_batch}; make them equal")
        counts = mesh.batch_share
    else:
        try:
            counts = scenario.micro_batches_of_pools
        except UserError as error:
            raise report.user("workload.global_batch", str(error).partition(": ")[2]) from None
    facts, p = mesh.schedule.facts, mesh.pipeline
    for pool, count in zip(pools, counts, strict=True):
        if (facts.whole_rounds and count % p) or (facts.even and count % 2) or count < facts.least_rounds * p:
            what = f'{facts.name} cannot run {count} micro-batches (pool "{pool.name}") on {p} pipeline ranks'
            raise report.user(key, f"{what}; give numbers that it can as a list, or use 1f1b")


def check_placement(scenario: Scenario, report: Report) -> None:
    """Raises UserError for maps that are not complete or of another model, and for slots that do not spread evenly."""
    experts, num_ranks, placement = scenario.model.experts, scenario.parallelism.expert, scenario.placement
    if experts == 0:
        return
    if isinstance(placement, Explicit):
        _check_explicit(scenario, placement, report)
    else:
        _check_number(experts, placement.redundant_experts, num_ranks, report)
    _check_split(scenario, report)
    speeds = placement.rank_speeds if isinstance(placement, MadeFromRows) else None
    if speeds is not None and len(speeds) != num_ranks:
        what = f"{len(speeds)} speeds for parallelism.expert = {num_ranks} ranks"
        raise report.user("placement.speeds", f"{what}; give one per rank")
    slots = sum(placement.slots_of_ranks(num_experts=experts, num_ranks=num_ranks))
    if slots > MOST_EXPERTS:
        raise report.user("placement", f"{slots:,} slots of {num_ranks} ranks; at most {MOST_EXPERTS:,} are simulated")
    _check_places(scenario, report)
    if slots > experts and isinstance(scenario.capacity, ExpertCapacity) and scenario.capacity.pad:
        raise report.user("capacity.pad", "rows of experts with copies are not padded; use pad: false")


def _check_number(experts: int, redundant: int, num_ranks: int, report: Report) -> None:
    """Equally many slots on each rank."""
    if redundant == 0 and experts % num_ranks:
        fits = either(nearest_divisors(experts, num_ranks))
        raise report.user("parallelism.expert", f"{num_ranks} does not divide experts = {experts}; use {fits}")
    if (experts + redundant) % num_ranks:
        most = redundant + -(experts + redundant) % num_ranks
        fits = either(number for number in (most - num_ranks, most) if number >= 0)
        what = f"{experts} experts and {redundant} copies do not spread over parallelism.expert = {num_ranks} ranks"
        raise report.user("placement.redundant_experts", f"{what}; use {fits}")


def _check_places(scenario: Scenario, report: Report) -> None:
    """Software without copies needs each expert in one place, alike in all layers, and router groups together."""
    software, placement = scenario.implementation.software, scenario.placement
    experts = scenario.model.experts
    slots = placement.fixed_slots(num_experts=experts, num_ranks=scenario.parallelism.expert)
    once = slots is not None and sum(map(len, slots)) == experts
    if software.copies_experts:
        return
    if slots is None or not once:
        what = f"{software.name} holds every expert once, at the same place in all layers"
        raise report.user("placement.kind", f"{what}; use contiguous, or implementation: {{kind: {FUSED.name}}}")
    num_groups = scenario.router_shape().num_groups
    if num_groups == 1 or experts % num_groups:
        return  # groups that do not divide the experts are refused as such
    even = len(set(map(len, slots))) == 1
    if not even or not keeps_groups(slots, num_groups=num_groups):
        what = f"{placement.kind} splits the router's {num_groups} groups of {experts // num_groups} experts over ranks"
        raise report.user(
            "placement.kind", f"{what}, which {software.name} does not; use implementation: {{kind: {FUSED.name}}}"
        )


def _check_explicit(scenario: Scenario, placement: Explicit, report: Report) -> None:
    experts, num_ranks = scenario.model.experts, scenario.parallelism.expert
    if (placement.slots is None) == (placement.file is None):
        what = "missing" if placement.slots is None else "conflicts with placement.file"
        raise report.user("placement.slots", f"{what}; give one of slots and file")
    if placement.slots is not None:
        _check_slots(placement.slots, experts, num_ranks, report)
        return
    try:
        found = placement.read_file()
    except UserError as error:
        raise report.user("placement.file", str(error)) from None
    model = scenario.model
    maps = found.of_layers(model.moe_layer_numbers, num_layers=model.layers)
    if maps is None:
        what = f"{len(found.slots)} layers" if found.numbers is None else f"layers {_run(found.numbers)}"
        wanted = _run(model.moe_layer_numbers[: model.moe_layers])
        raise report.user(
            "placement.file", f"{found.path.name} maps {what}, but the model has experts in layers {wanted}"
        )
    if found.num_slots % num_ranks:
        fits = either(nearest_divisors(found.num_slots, num_ranks))
        what = f"{found.path.name} has {found.num_slots} slots, which parallelism.expert = {num_ranks} does not divide"
        raise report.user("placement.file", f"{what}; use {fits} ranks")
    for layer, slots in zip(model.moe_layer_numbers, maps, strict=True):
        if fault := _fault(slots, experts):
            raise report.user("placement.file", f"{found.path.name}: layer {layer}: {fault}")


def _check_split(scenario: Scenario, report: Report) -> None:
    """Weights are there where a split is by weights and no rows give them, and there alone."""
    placement = scenario.placement
    weights = placement.weights if isinstance(placement, Explicit) else None
    if weights is not None and placement.split != "weighted":
        raise report.user("placement.weights", "are of no account without split: weighted; add it, or drop them")
    if placement.split != "weighted" or isinstance(placement, MadeFromRows):
        return
    if weights is None:
        what = f"weighted needs weights, which {placement.kind} without rows to place by has not"
        raise report.user("placement.split", f"{what}; use an explicit map with slots and weights, or eplb")
    assert isinstance(placement, Explicit)
    if placement.slots is None:
        raise report.user("placement.weights", "go with slots; a file of maps has none")
    if list(map(len, weights)) != list(map(len, placement.slots)):
        raise report.user("placement.weights", "must be lists as long as those of slots, one number per slot")
    given = [0.0] * scenario.model.experts
    for row, numbers in zip(placement.slots, weights, strict=True):
        for expert, weight in zip(row, numbers, strict=True):
            given[expert] += weight
    if 0.0 in given:
        raise report.user("placement.weights", f"expert {given.index(0.0)} has no weight in any slot; give it one")


def _check_slots(slots: tuple[tuple[int, ...], ...], experts: int, num_ranks: int, report: Report) -> None:
    if len(slots) != num_ranks:
        raise report.user("placement.slots", f"{len(slots)} lists for parallelism.expert = {num_ranks} ranks")
    for rank, row in enumerate(slots):
        if not row:
            raise report.user(f"placement.slots.{rank}", f"rank {rank} has no slot; give it an expert")
    if fault := _fault([expert for row in slots for expert in row], experts):
        raise report.user("placement.slots", fault)


def _fault(held: tuple[int, ...] | list[int], experts: int) -> str | None:
    """What is wrong with the experts of a layer's slots."""
    if (most := max(held)) >= experts or min(held) < 0:
        return f"expert {most if most >= experts else min(held)} is none of experts 0 to {experts - 1}"
    missing = sorted(set(range(experts)) - set(held))
    return f"every expert 0 to {experts - 1} needs a slot; expert {missing[0]} has none" if missing else None


def _run(numbers: tuple[int, ...]) -> str:
    """`3 to 60`, or the numbers where they leave gaps."""
    if numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers))
