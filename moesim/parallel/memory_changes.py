"""Changes of a scenario that can lower memory, in the order in which a user would rather make them."""

from collections.abc import Iterator
from typing import NamedTuple

from moesim.scenario import Contiguous, Scenario
from moesim.scenario.routing import ExpertCapacity
from moesim.schedules import PLAIN

CAPACITY_FACTORS = (4.0, 2.0, 1.5, 1.25, 1.0)  # those of published trainings
FACTORS = (2, 4, 8)


class Change(NamedTuple):
    """Overrides of a scenario, `key=value`."""

    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(override.replace("=", ": ", 1) for override in self.overrides)

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it sets."""
        return frozenset(override.partition("=")[0] for override in self.overrides)


def pads(scenario: Scenario) -> bool:
    """Whether experts compute their capacity whatever they are sent."""
    return isinstance(scenario.capacity, ExpertCapacity) and scenario.capacity.pad


def layout_changes(scenario: Scenario) -> Iterator[Change]:
    """Changes that leave the training what it is, cheapest first: a smaller micro-batch costs little, a mesh much."""
    if pads(scenario):
        yield Change(("capacity.pad=false",))
    size = scenario.workload.micro_batch // 2
    while size:
        yield Change((f"workload.micro_batch={size}",))
        size //= 2
    yield from _kept(scenario)
    yield from _placed(scenario)
    yield from _split(scenario)


def _kept(scenario: Scenario) -> Iterator[Change]:
    """What each rank keeps: shards of states, fewer activations."""
    work, mesh = scenario.workload, scenario.parallelism
    for part in ("dense", "expert"):
        for stage in range(getattr(mesh.zero, part) + 1, 4):
            yield Change((f"parallelism.zero.{part}={stage}",))
    for recompute in ("selective", "full"):
        if work.recompute != recompute and work.recompute != "full":
            yield Change((f"workload.recompute={recompute}",))


def _placed(scenario: Scenario) -> Iterator[Change]:
    """What lies where: experts, copies of tokens, stages and their order."""
    mesh = scenario.parallelism
    if scenario.placement != Contiguous():
        yield Change(("placement={kind: contiguous}",))
    if scenario.dispatch.deduplicate == "per_expert":
        yield Change(("dispatch.deduplicate=per_rank",))
    if mesh.stages is not None:
        yield Change(("parallelism.stages=null",))
    if mesh.schedule.kind != PLAIN.name:
        # The lengths of stages that were given belong to the other schedule's number of stages.
        stages = ("parallelism.stages=null",) if mesh.stages is not None and mesh.schedule.virtual > 1 else ()
        yield Change((f"parallelism.schedule={{kind: {PLAIN.name}}}", *stages))


def _split(scenario: Scenario) -> Iterator[Change]:
    """More ranks that share experts, matrices, sequences or layers."""
    mesh = scenario.parallelism
    expert = 2 * mesh.expert
    while expert <= min(scenario.model.experts, mesh.stage_ranks):
        yield Change((f"parallelism.expert={expert}",))
        expert *= 2
    for factor in FACTORS:
        if mesh.expert * mesh.expert_tensor * factor <= mesh.stage_ranks and scenario.model.experts:
            yield Change((f"parallelism.expert_tensor={mesh.expert_tensor * factor}",))
    smallest_node = min(scenario.cluster.domain_sizes)
    for axis, size, largest in (("tensor", mesh.tensor, smallest_node), ("context", mesh.context, mesh.stage_ranks)):
        for factor in FACTORS:
            if mesh.data % factor == 0 and size * factor <= largest:
                yield Change((f"parallelism.{axis}={size * factor}", f"parallelism.data={mesh.data // factor}"))
    stages = ("parallelism.stages=null",) if mesh.stages is not None else ()
    for factor in FACTORS:
        if mesh.data % factor == 0:
            changed = f"parallelism.pipeline={mesh.pipeline * factor}", f"parallelism.data={mesh.data // factor}"
            yield Change((*changed, *stages))


def training_changes(scenario: Scenario) -> Iterator[Change]:
    """Changes that alter what is trained, too: coarser numbers, or more dropped rows."""
    precision, capacity = scenario.workload.precision, scenario.capacity
    for key in ("gradients", "optimizer"):
        if getattr(precision, key) == "fp32":
            yield Change((f"workload.precision.{key}=bf16",))
    if capacity.kind != "none":
        for factor in CAPACITY_FACTORS:
            if factor < capacity.factor:
                yield Change((f"capacity.factor={factor:g}",))


def more_gpus(scenario: Scenario) -> Iterator[Change]:
    """More nodes of every pool for more expert or pipeline ranks."""
    mesh = scenario.parallelism
    stages = ("parallelism.stages=null",) if mesh.stages is not None else ()
    frugal = [f"parallelism.zero.{part}=1" for part in ("dense", "expert") if not getattr(mesh.zero, part)]
    if scenario.workload.recompute != "full":
        frugal.append("workload.recompute=full")
    if pads(scenario):
        frugal.append("capacity.pad=false")
    for factor in FACTORS:
        nodes = [
            f"cluster.pools.{number}.nodes={pool.nodes * factor}" for number, pool in enumerate(scenario.cluster.pools)
        ]
        for way in (
            (f"parallelism.data={mesh.data * factor}", f"parallelism.expert={mesh.expert * factor}"),
            (f"parallelism.pipeline={mesh.pipeline * factor}", *stages),
        ):
            yield Change((*nodes, *way))
            if frugal:
                yield Change((*nodes, *way, *frugal))
