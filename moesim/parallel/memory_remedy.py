"""Refuse what does not fit, and find the nearest change of the scenario that does: every suggestion is evaluated."""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from moesim.errors import InfeasibleError, UserError
from moesim.parallel.memory import MemoryReport, memory_report
from moesim.parallel.memory_rows import RoutedRows, RowsOf
from moesim.scenario import Scenario, dump_scenario, load_scenario_text, require_supported
from moesim.units import format_bytes

# The key that a user would look at first, by the largest part.
KEYS = {
    "weights": "parallelism",
    "gathered": "parallelism.zero",
    "gradients": "parallelism.zero",
    "master": "parallelism.zero",
    "optimizer": "parallelism.zero",
    "reserved": "memory.reserved",
}


class Change(NamedTuple):
    """Overrides of a scenario, `key=value`."""

    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(override.replace("=", ": ") for override in self.overrides)


def check_memory(scenario: Scenario, rows_of: RowsOf) -> MemoryReport:
    """The memory of the scenario, when at least one routing sample fits.

    `rows_of(scenario)` gives the rows of a scenario; it is called again for changes that move rows (micro-batch and
    mesh), so it should draw the same samples each time. Raises InfeasibleError when no sample fits, naming the largest
    part and the smallest change, of one key or of two, with which every sample fits and which can be simulated.
    """
    report = memory_report(scenario, rows_of(scenario))
    if report.fits_share > 0:
        return report
    rank = report.fullest
    part, size = report.largest_part
    key = "workload.micro_batch" if scenario.workload.micro_batch > 1 else "workload.recompute"
    needed, capacity = report.peak_SP[:, rank].min(), report.capacity_P[rank]
    raise InfeasibleError(
        f"{KEYS.get(part.partition('.')[0], key)}: pipeline rank {rank} needs at least "
        f"{format_bytes(float(needed))} of the {format_bytes(float(capacity))} of a GPU ({report.gpus[rank]}); its "
        f"largest part is {part} ({format_bytes(size)}); {_remedy(scenario, rows_of)}"
    )


def _remedy(scenario: Scenario, rows_of: RowsOf) -> str:
    found = nearest_change(scenario, rows_of)
    if found is None:
        return "no change of one or two keys makes it fit; use more GPUs, a smaller model or shorter sequences"
    change, report = found
    return f"set {change}, which needs {format_bytes(report.peak_bytes)}"


def nearest_change(scenario: Scenario, rows_of: RowsOf) -> tuple[Change, MemoryReport] | None:
    """The first change of `changes`, or else of pairs of them, with which every sample fits."""
    known: dict[str, RoutedRows] = {}
    single = list(changes(scenario))
    pairs = (Change(one.overrides + two.overrides) for one, two in combinations(single, 2) if _independent(one, two))
    for change in (*single, *pairs):
        changed = _applied(scenario, change)
        if changed is None:
            continue
        key = f"{changed.workload.micro_batch} {_layout(changed)}"
        try:
            if key not in known:
                known[key] = rows_of(changed)
        except UserError:
            continue  # the trace does not go with the changed mesh
        report = memory_report(changed, known[key])
        if report.fits_share == 1.0:
            return change, report
    return None


def changes(scenario: Scenario) -> Iterator[Change]:
    """Changes that lower memory, cheapest first: a smaller micro-batch costs little, another mesh much."""
    work, mesh = scenario.workload, scenario.parallelism
    size = work.micro_batch // 2
    while size:
        yield Change((f"workload.micro_batch={size}",))
        size //= 2
    for part in ("dense", "expert"):
        for stage in range(getattr(mesh.zero, part) + 1, 4):
            yield Change((f"parallelism.zero.{part}={stage}",))
    for recompute in ("selective", "full"):
        if work.recompute != recompute and work.recompute != "full":
            yield Change((f"workload.recompute={recompute}",))
    expert = 2 * mesh.expert
    while expert <= min(scenario.model.experts, mesh.stage_ranks):
        yield Change((f"parallelism.expert={expert}",))
        expert *= 2
    smallest_node = min(pool.gpus_per_node for pool in scenario.cluster.pools)
    for axis, size, largest in (("tensor", mesh.tensor, smallest_node), ("context", mesh.context, mesh.stage_ranks)):
        for factor in (2, 4, 8):
            if mesh.data % factor == 0 and size * factor <= largest:
                yield Change((f"parallelism.{axis}={size * factor}", f"parallelism.data={mesh.data // factor}"))
    for factor in (2, 4, 8):
        if mesh.data % factor == 0:
            yield Change((f"parallelism.pipeline={mesh.pipeline * factor}", f"parallelism.data={mesh.data // factor}"))


def _independent(one: Change, two: Change) -> bool:
    keys = [{override.partition("=")[0] for override in change.overrides} for change in (one, two)]
    return not keys[0] & keys[1]


def _layout(scenario: Scenario) -> str:
    mesh = scenario.parallelism
    return f"{mesh.data} {mesh.context} {mesh.tensor} {mesh.pipeline} {mesh.expert} {mesh.expert_tensor}"


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
