"""All routing samples of a scenario through the engine: in lockstep, as many at once as memory allows.

Legend: S routing samples, W ranks of the world, C categories, P pipeline ranks, R ranks of a group.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.engine.step import sum_step
from moesim.kernels import KernelModel
from moesim.network import Fabric
from moesim.parallel import Mesh, TrafficSample
from moesim.program import StepProgram, build_program
from moesim.program.changes import changes_in, with_changes
from moesim.program.host import FREE_HOST
from moesim.program.scenario_fabric import scenario_fabric
from moesim.program.software import kernel_list
from moesim.results import CATEGORIES
from moesim.results.critical_path import path_facts
from moesim.results.outcome import Outcome
from moesim.results.waits import Waits, waits
from moesim.scenario import Scenario

SPAN_MEMORY = 400e6  # bytes of spans simulated at once: more samples than fit run in several passes
BYTES_PER_SPAN = 20
SPANS_PER_LAYER = 70  # about, both directions
MERGED_SPAN_MEMORY = 900e6  # the same where a single sample is larger: kernels are merged, and pairs go together
MERGED_SPANS_PER_LAYER = 22


def simulate_samples(
    scenario: Scenario, fabric: Fabric, kernels: KernelModel, samples: Sequence[TrafficSample]
) -> Outcome:
    """Simulate the samples in lockstep, as many at once as memory allows."""
    runs = scenario.num_micro_batches * scenario.parallelism.world_size // scenario.parallelism.pipeline
    bytes_per_sample = scenario.model.layers * SPANS_PER_LAYER * runs * BYTES_PER_SPAN
    merge = bytes_per_sample > SPAN_MEMORY
    at_once = max(1, int(SPAN_MEMORY / bytes_per_sample))
    if merge:
        least = 2 if _spans_go(scenario, fabric, kernels) else 1  # a sample and its counterfactual
        at_once = max(least, int(MERGED_SPAN_MEMORY / (bytes_per_sample * MERGED_SPANS_PER_LAYER / SPANS_PER_LAYER)))
    parts = []
    for start in range(0, max(1, len(samples)), at_once):
        some = samples[start : start + at_once]
        steps_S = [(start + index) % scenario.uncertainty.samples for index in range(max(1, len(some)))]
        found = changes_in(scenario, steps_S)
        if found is None:
            program = build_program(
                scenario, fabric=fabric, kernels=kernels, samples=some, merge=merge, equal_groups=True
            )
        else:
            changes, states = found
            fabrics = [fabric, *(scenario_fabric(state, kernels) for state in states[1:])]
            programs = [
                build_program(state, fabric=links, kernels=kernels, samples=some, merge=merge)
                for state, links in zip(states, fabrics, strict=True)
            ]
            program = with_changes(programs, changes)
        parts.append(_simulate_program(program, first=start == 0))
        del program  # before the next one is built: each takes a gigabyte on 16,384 ranks
    return Outcome.joined(parts)


def _spans_go(scenario: Scenario, fabric: Fabric, kernels: KernelModel) -> bool:
    """Whether a large step will pass its spans on (`StepProgram.passes_spans_on`), and holds little but its kernels."""
    is_free = kernel_list(scenario).host_model(kernels) == FREE_HOST
    cluster = scenario.cluster
    changes = len(fabric.common_links_X) or cluster.slowdowns or cluster.fabric.changes
    return is_free and not changes and not Mesh(scenario.parallelism, cluster).shards_by_layer


def _simulate_program(program: StepProgram, *, first: bool) -> Outcome:
    """`first`: sample 0 is among the samples, whose spans and critical path are kept."""
    step = sum_step(program, first=first)
    groups = program.groups
    places = [group.pipeline_rank for group in groups]
    world = sum(group.all_ranks_TR.size for group in groups)
    attribution_CSW = np.zeros((len(CATEGORIES), program.samples, world))
    compute_time_SW, jitter_SW = (np.zeros((program.samples, world)) for _ in range(2))
    busy_SP = np.zeros((program.samples, 1 + max(places)))
    count = sum(len(group.all_ranks_TR) for group in groups if group.pipeline_rank == places[0])
    busy_gS: dict[tuple[int, int], NDArray[np.float64]] = {}
    for group, sums in zip(groups, step.sums, strict=True):
        ranks_TR = group.all_ranks_TR
        attribution_CSW[:, :, ranks_TR] = sums.attribution_CSR[:, :, None]
        compute_time_SW[:, ranks_TR] = sums.compute_SR[:, None]
        busy_S = sums.busy_SR.mean(axis=1) / count
        busy_gS |= {(group.pipeline_rank, int(first)): busy_S for first in ranks_TR[:, 0]}
    for group, late_SR in zip(groups, step.late_gSR, strict=bool(step.late_gSR)):
        jitter_SW[:, group.all_ranks_TR] = late_SR[:, None]
    for (place, _), busy_S in sorted(busy_gS.items(), key=lambda item: item[0]):  # summed in the order of the ranks
        busy_SP[:, place] += busy_S
    collectives = [(each.name, each.members) for each in (*program.reductions, *program.gathers)]
    waits_of_groups = [sums.waits for sums in step.sums if sums.waits is not None]
    return Outcome(
        step_S=step.step_S,
        attribution_CSW=attribution_CSW,
        jitter_SW=np.minimum(jitter_SW, attribution_CSW[CATEGORIES.index("imbalance_wait")]),
        compute_time_SW=compute_time_SW,
        busy_SP=busy_SP,
        source_seconds=program.source_seconds,
        tensor_bytes=program.tensor_bytes,
        transfer_sources=program.transfer_sources,
        spans=tuple(table.first_sample() for group, table in zip(groups, step.tables, strict=True) if group.number == 0)
        if first
        else (),
        critical_path=path_facts(step.tables, pipeline_ranks=places, whole=step.whole) if first else {},
        shared_links=len(program.contention.capacity_L) if program.contention else 0,
        waits=waits(waits_of_groups, [group.place for group in groups], collectives) if first else Waits.none(),
    )
