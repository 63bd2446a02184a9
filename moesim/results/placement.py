"""What a placement of experts did: its slots and copies, and the load of ranks beside that of neighbouring experts.

Legend: L model layers with a router, D ranks of expert group 0, P slots of a rank, E experts, S samples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel import TrafficSample
from moesim.parallel.by_speed import speeds_of_group
from moesim.parallel.copies import copy_gradient_bytes_DD
from moesim.parallel.memory_parameters import expert_slice_parameters
from moesim.parallel.placement import EMPTY_SLOT
from moesim.results.metrics import TrafficFacts
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.placement import Contiguous, MadeFromRows

FloatArray = NDArray[np.float64]


def placement_facts(scenario: Scenario, samples: Sequence[TrafficSample], facts: TrafficFacts) -> dict[str, Any]:
    """Slots, copies, what the placement was made from, and max / mean rows of ranks beside contiguous experts.

    `rank_rows_by_speed`: rows over speed likewise, where ranks have speeds. `rank_rows_contiguous`: of the same kept
    rows if each rank had neighbouring experts without copies; None where they do not spread evenly.
    `copy_gradient_bytes`: that ranks of all groups send each other for copies in one step.
    """
    placement, experts, sampler = scenario.placement, scenario.model.experts, samples[0].sampler
    slot_LDP = slots_of_layers(samples[0], facts.num_layers)
    copies_LE = np.array([np.bincount(slots[slots != EMPTY_SLOT], minlength=experts) for slots in slot_LDP])
    return {
        "kind": placement.kind,
        "split": placement.split,
        "experts": experts,
        "slots": int(copies_LE[0].sum()),
        "slots_per_rank": scenario.slots_per_rank,
        "most_copies": int(copies_LE.max()),
        "made_on": getattr(placement, "made_on", None),
        "placing_sequences": sampler.placing_sequences[1] - sampler.placing_sequences[0],
        "simulated_sequences": sampler.sequences.num_sequences,
        "rank_rows_contiguous": facts.contiguous_rank_rows,
        "rank_rows_by_speed": _by_speed(scenario, facts),
        "copy_gradient_bytes": _copy_gradient_bytes(scenario, samples[0]),
    }


def _by_speed(scenario: Scenario, facts: TrafficFacts) -> float | None:
    """max / mean of rows / speed, the mean weighted by speed: 1 where rows are in proportion to speed."""
    speed_D = speeds_of_group(scenario)
    if speed_D is None:
        return None
    rows_L1 = facts.rank_load_LR.sum(axis=1, keepdims=True)
    share_LD = facts.rank_load_LR / np.where(rows_L1 > 0, rows_L1, 1.0)  # all rows of a layer may be dropped
    return float((share_LD / (speed_D / speed_D.sum())).max(axis=1).mean())


def placement_warnings(scenario: Scenario) -> list[str]:
    """What a placement assumes that the step does not have."""
    placement = scenario.placement
    if not isinstance(placement, MadeFromRows) or placement.rank_speeds is None:
        return []
    what = "placement.speeds decide which rank gets how many rows"
    return [f"{what}, but ranks are simulated as fast as cluster.speeds and their GPUs say"]


def placement_arrays(
    scenario: Scenario, samples: Sequence[TrafficSample], facts: TrafficFacts
) -> dict[str, FloatArray]:
    """The experts of all slots, and the load of ranks with contiguous experts, where the placement is another one."""
    if scenario.placement == Contiguous():
        return {}
    arrays = {"placement_LDP": slots_of_layers(samples[0], facts.num_layers).astype(np.float64)}
    if facts.contiguous_load_LR is not None:
        arrays["rank_load_contiguous_LR"] = facts.contiguous_load_LR
    return arrays


def slots_of_layers(sample: TrafficSample, num_layers: int) -> NDArray[np.int64]:
    """The expert in every slot of the first `num_layers` layers with a router, [L, D, P], -1 for an empty slot."""
    maps = [sample.map_of(layer) for layer in range(num_layers)]
    return np.stack([sample.placement.slot_experts_DP if held is None else held.slot_experts_DP for held in maps])


def _copy_gradient_bytes(scenario: Scenario, sample: TrafficSample) -> float:
    model, mesh = scenario.model, sample.sampler.mesh
    shards = len(mesh.expert_gradient_groups()[0]) * scenario.parallelism.schedule.facts.copies
    if not scenario.parallelism.zero.expert:
        shards = 1
    size = BYTES_PER_ELEMENT[scenario.workload.precision.gradients] * expert_slice_parameters(scenario) / shards
    bytes_DD = copy_gradient_bytes_DD(
        [sample.map_of(layer) for layer in range(model.moe_layers + model.mtp_layers)],
        expert_bytes=size,
        num_ranks=scenario.parallelism.expert,
    )
    groups = mesh.num_expert_groups * scenario.parallelism.schedule.facts.copies
    return 2 * float(bytes_DD.sum()) * groups
