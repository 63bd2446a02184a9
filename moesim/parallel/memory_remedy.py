"""Refuse what does not fit, and find the nearest change of the scenario that does: every suggestion is evaluated."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from moesim.errors import InfeasibleError, UserError
from moesim.parallel.memory import MemoryReport, memory_report
from moesim.parallel.memory_changes import Change, layout_changes, more_gpus, pads, training_changes
from moesim.parallel.memory_rows import RoutedRows, RowsOf, no_rows
from moesim.scenario import Scenario, dump_scenario, load_scenario_text, require_supported
from moesim.units import format_bytes

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
    "reserved": "memory.reserved",
}
MUCH_PADDING = 0.5  # of the computed rows: then they are the cause
NOTHING_FITS = (
    "no one or two changes make it fit, nor does any layout on up to 8 times the nodes; use GPUs with more memory, a "
    "smaller model or shorter sequences"
)


def check_memory(scenario: Scenario, rows_of: RowsOf) -> MemoryReport:
    """The memory of the scenario, when at least one routing sample fits or `memory.check` is `warn`.

    `rows_of(scenario)` gives the rows of a scenario; it is called again for changes that move rows (micro-batch,
    capacity, placement and mesh), so it should draw the same samples each time. Raises InfeasibleError when no sample
    fits, naming the largest part and the smallest change, of one key or of two, with which every sample fits and which
    can be simulated.
    """
    rows = rows_of(scenario)
    report = memory_report(scenario, rows)
    if report.fits_share > 0 or scenario.memory.check == "warn":
        return report
    rank = report.fullest
    part, size = report.largest_part
    needed, capacity = report.peak_SP[:, rank].min(), report.capacity_P[rank]
    key, cause = _key(scenario, part, rows, rows_of)
    raise InfeasibleError(
        f"{key}: pipeline rank {rank} needs at least {format_bytes(float(needed))} of the "
        f"{format_bytes(float(capacity))} of a GPU ({report.gpus[rank]}); its largest part is {part} "
        f"({format_bytes(size)}){cause}; {_remedy(scenario, rows_of)}"
    )


def _key(scenario: Scenario, part: str, rows: RoutedRows, rows_of: RowsOf) -> tuple[str, str]:
    """The key that a user would look at first, and what to say of the cause."""
    kind = part.partition(".")[0]
    if kind in KEYS:
        return KEYS[kind], ""
    bare = _applied(scenario, Change(("capacity.pad=false",))) if pads(scenario) else None
    if bare is not None:
        padding = 1.0 - float(rows_of(bare).rows_SLBW.sum() / rows.rows_SLBW.sum())
        if padding > MUCH_PADDING:
            return "capacity.pad", f", and {padding:.0%} of the rows are padding"
    return "workload.micro_batch" if scenario.workload.micro_batch > 1 else "workload.recompute", ""


def _remedy(scenario: Scenario, rows_of: RowsOf) -> str:
    found = nearest_change(scenario, rows_of)
    if found is None:
        return NOTHING_FITS
    change, report = found
    return f"set {change}, which needs {format_bytes(report.peak_bytes)}"


def nearest_change(scenario: Scenario, rows_of: RowsOf) -> tuple[Change, MemoryReport] | None:
    """The first change, or else pair of changes, with which every sample fits.

    Changes that leave the training what it is come before those that alter it; more GPUs come last.
    """
    trials = _Trials(scenario, rows_of)
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
    _known: dict[Any, RoutedRows | None] = field(init=False, default_factory=dict)

    def report(self, change: Change) -> MemoryReport | None:
        """The memory of the changed scenario; None where the change is refused, or where no routing could fit."""
        changed = _applied(self.scenario, change)
        if changed is None or memory_report(changed, no_rows(changed)).fits_share == 0.0:
            return None
        rows = self._rows(changed)
        return None if rows is None else memory_report(changed, rows)

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


def _applied(scenario: Scenario, change: Change) -> Scenario | None:
    """The changed scenario, or None where it is refused, or where only the change makes it impossible to simulate."""
    try:
        changed = load_scenario_text(dump_scenario(scenario), overrides=change.overrides)
        if _is_supported(scenario):
            require_supported(changed)
    except UserError:
        return None
    return changed


def _is_supported(scenario: Scenario) -> bool:
    try:
        require_supported(scenario)
    except UserError:
        return False
    return True
