"""Refuse what does not fit, and find the nearest change of the scenario that does: every suggestion is evaluated.

Changes that can lower memory stand in the order in which a user would rather make them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any, NamedTuple

from moesim.errors import InfeasibleError, UserError
from moesim.parallel.memory.rank import Recorded
from moesim.parallel.memory.report import MemoryReport, memory_report
from moesim.parallel.memory.rows import RoutedRows, RowsOf, no_rows
from moesim.scenario import Contiguous, Scenario, dump_scenario, load_scenario_text, require_supported
from moesim.scenario.routing import ExpertCapacity
from moesim.schedules import PLAIN
from moesim.units import format_bytes

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


# The key that a user would look at first, by the largest part.
KEYS = {
    "weights": "parallelism",
    "cast_weights": "parallelism",
    "gathered": "parallelism.zero",
    "gradients": "parallelism.zero",
    "master": "parallelism.zero",
    "optimizer": "parallelism.zero",
    "reduction": "parallelism.zero",
    "workspace": "memory.reserved",
    "dispatch_library": "dispatch.algorithm",
    "communicators": "parallelism",
    "reserved": "memory.reserved",
}
MUCH_PADDING = 0.5  # of the computed rows: then they are the cause
NOTHING_FITS = (
    "no one or two changes make it fit, nor does any layout on up to 8 times the nodes; use GPUs with more memory, a "
    "smaller model or shorter sequences"
)


def check_memory(scenario: Scenario, rows_of: RowsOf, *, recorded: Recorded | None = None) -> MemoryReport:
    """The memory of the scenario, when at least one routing sample fits or `memory.check` is `warn`.

    `rows_of(scenario)` gives the rows of a scenario; it is called again for changes that move rows (micro-batch,
    capacity, placement and mesh), so it should draw the same samples each time. `recorded`: of `memory_report`. Raises
    InfeasibleError when no sample fits, naming the largest part and the smallest change, of one key or of two, with
    which every sample fits and which can be simulated.
    """
    rows = rows_of(scenario)
    report = memory_report(scenario, rows, recorded=recorded)
    if report.fits_share > 0 or scenario.memory.check == "warn":
        return report
    rank = report.fullest
    part, size = report.largest_part
    needed, capacity = report.peak_SP[:, rank].min(), report.capacity_P[rank]
    key, cause = _key(scenario, part, rows, rows_of)
    raise InfeasibleError(
        f"{key}: pipeline rank {rank} needs at least {format_bytes(float(needed))} of the "
        f"{format_bytes(float(capacity))} of a GPU ({report.gpus[rank]}); its largest part is {part} "
        f"({format_bytes(size)}){cause}; {_remedy(scenario, rows_of, recorded)}"
    )


def _key(scenario: Scenario, part: str, rows: RoutedRows, rows_of: RowsOf) -> tuple[str, str]:
    """The key that a user would look at first, and what to say of the cause."""
    kind = part.partition(".")[0]
    if kind in KEYS:
        return KEYS[kind], ""
    bare = _Variants(scenario).changed(Change(("capacity.pad=false",))) if pads(scenario) else None
    if bare is not None:
        padding = 1.0 - float(rows_of(bare).rows_SLBW.sum() / rows.rows_SLBW.sum())
        if padding > MUCH_PADDING:
            return "capacity.pad", f", and {padding:.0%} of the rows are padding"
    return "workload.micro_batch" if scenario.workload.micro_batch > 1 else "workload.recompute", ""


def _remedy(scenario: Scenario, rows_of: RowsOf, recorded: Recorded | None) -> str:
    found = nearest_change(scenario, rows_of, recorded=recorded)
    if found is None:
        return NOTHING_FITS
    change, report = found
    return f"set {change}, which needs {format_bytes(report.peak_bytes)}"


def nearest_change(
    scenario: Scenario, rows_of: RowsOf, *, recorded: Recorded | None = None
) -> tuple[Change, MemoryReport] | None:
    """The first change, or else pair of changes, with which every sample fits.

    Changes that leave the training what it is come before those that alter it; more GPUs come last.
    """
    trials = _Trials(scenario, rows_of, recorded)
    for change in _in_order(scenario):
        report = trials.report(change)
        if report is not None and report.fits_share == 1.0:
            return change, report
    return None


def _in_order(scenario: Scenario) -> Iterator[Change]:
    layout, training = list(layout_changes(scenario)), list(training_changes(scenario))
    yield from layout
    yield from _joined(combinations(layout, 2))
    yield from training
    yield from _joined(product(training, layout))
    yield from _joined(combinations(training, 2))
    yield from more_gpus(scenario)


def _joined(pairs: Iterator[tuple[Change, ...]]) -> Iterator[Change]:
    """Both changes of each pair that touches no key twice."""
    for one, two in pairs:
        if not one.keys & two.keys:
            yield Change(one.overrides + two.overrides)


@dataclass(frozen=True)
class _Trials:
    """Memory under changes; variants that differ in no key that moves rows share them."""

    scenario: Scenario
    rows_of: RowsOf
    recorded: Recorded | None
    _known: dict[Any, RoutedRows | None] = field(init=False, default_factory=dict)

    @cached_property
    def variants(self) -> "_Variants":
        """Of the scenario."""
        return _Variants(self.scenario)

    def report(self, change: Change) -> MemoryReport | None:
        """The memory of the changed scenario; None where the change is refused, or where no routing could fit."""
        changed = self.variants.changed(change)
        if changed is None or memory_report(changed, no_rows(changed), recorded=self.recorded).fits_share == 0.0:
            return None
        rows = self._rows(changed)
        return None if rows is None else memory_report(changed, rows, recorded=self.recorded)

    def _rows(self, changed: Scenario) -> RoutedRows | None:
        """None where the trace does not go with the changed mesh."""
        mesh = changed.parallelism
        axes = mesh.data, mesh.context, mesh.tensor, mesh.pipeline, mesh.expert, mesh.expert_tensor
        moves = (changed.workload.micro_batch, changed.capacity, changed.placement, changed.dispatch.deduplicate, axes)
        if moves not in self._known:
            try:
                self._known[moves] = self.rows_of(changed)
            except UserError:
                self._known[moves] = None
        return self._known[moves]


class _Variants:
    """A scenario as text, which is written once for all changes to it."""

    def __init__(self, scenario: Scenario) -> None:
        self._text = dump_scenario(scenario)
        try:
            require_supported(scenario)
        except UserError:
            self._is_supported = False
        else:
            self._is_supported = True

    def changed(self, change: Change) -> Scenario | None:
        """The changed scenario, None where it is refused, or where only the change makes it impossible to simulate."""
        try:
            changed = load_scenario_text(self._text, overrides=change.overrides)
            if self._is_supported:
                require_supported(changed)
        except UserError:
            return None
        return changed
