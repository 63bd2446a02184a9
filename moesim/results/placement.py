"""What a placement of experts did, and what placing them anew every n training steps costs and brings.

A placement's facts are its slots and copies, and the load of ranks beside that of neighbouring experts.

For placing anew the step is simulated with experts placed at several times before, by the rows recorded then. Of two
placements alike one may fit the simulated tokens better by chance; that an older one is no better in the mean is taken
for known: through the simulated steps goes the nearest curve that never falls. An interval of n steps then costs, per
step, one of the age that a placement has in the mean, and an n-th of moving the experts, which takes place between two
steps with nothing beside it.

Legend: L model layers with a router, D ranks of expert group 0, P slots of a rank, E experts, S samples, A ages of a
placement in training steps, N intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, crowded, prepare_dispatch
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.balancers import speeds_of_group
from moesim.parallel.expert_map import copy_gradient_bytes_DD, layers_of_stages
from moesim.parallel.layer_maps import LayerMaps
from moesim.parallel.memory.parameters import expert_slice_parameters
from moesim.parallel.placement import EMPTY_SLOT
from moesim.parallel.replacing import moves_DD, recorded_ages, renumbered
from moesim.results.metrics import TrafficFacts
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.placement import Contiguous, MadeFromCounts, MadeFromRows
from moesim.schedules import build_schedule

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


StepSeconds = Callable[[Scenario, float], float]  # of a scenario with experts placed so many steps ago

MOST_AGES = 6  # recorded ones that are simulated
YOUNG = (1 / 16, 1 / 4, 1 / 2)  # of the youngest recorded age: simulated as well, where short intervals lie
MOVES = 10  # intervals whose moving is worked out; between them it is interpolated


def expert_state_bytes(scenario: Scenario, sampler: TrafficSampler) -> float:
    """What moves with an expert on one rank: weights, master copy and both moments; between steps no gradient."""
    precision, zero = scenario.workload.precision, scenario.parallelism.zero.expert
    shards = len(sampler.mesh.expert_gradient_groups()[0]) * scenario.parallelism.schedule.facts.copies
    weights = BYTES_PER_ELEMENT[precision.weights] / (shards if zero >= 3 else 1)
    states = 2 * BYTES_PER_ELEMENT[precision.optimizer] + BYTES_PER_ELEMENT["fp32"] * (precision.master == "fp32")
    return expert_slice_parameters(scenario) * (weights + states / (shards if zero else 1))


def moving(sampler: TrafficSampler, fabric: Fabric, before: LayerMaps, after: LayerMaps) -> tuple[float, float]:
    """Bytes that all ranks send, and the seconds of the pipeline rank that takes longest, with nothing beside it.

    The ranks of a node are renumbered so that experts stay where they may.
    """
    scenario, mesh = sampler.scenario, sampler.mesh
    parallelism, size = scenario.parallelism, expert_state_bytes(scenario, sampler)
    schedule = build_schedule(
        parallelism.schedule.kind,
        num_ranks=parallelism.pipeline,
        num_micro_batches=scenario.num_micro_batches,
        virtual=parallelism.schedule.virtual,
    )
    node_of_rank_D = sampler.layouts[0][0].node_of_rank_R
    moved, longest = 0.0, 0.0
    for rank, stages in enumerate(schedule.stages_of_rank):
        moves = np.zeros((parallelism.expert,) * 2, dtype=np.int64)
        for layer in layers_of_stages(scenario, stages):
            order = sampler.relabellings[layer].expert_from_E
            thin = sampler.counted_layer(layer)
            old, new = before.maps[thin].reordered(order), after.maps[thin].reordered(order)
            moves += moves_DD(old, renumbered(old, new, node_of_rank_D), node_of_rank_D)
        members = mesh.expert_groups(rank)
        moved += float(moves.sum()) * size * len(members)
        if moves.any():
            sent = prepare_dispatch(crowded(fabric, members), [moves], token_bytes=size, ranks=members[0])
            longest = max(longest, float(sent.alone_R.max()))
    return moved, longest


def never_falling(seconds_A: FloatArray) -> FloatArray:
    """The values that never fall and are nearest to these, in squares: neighbours that fall take their mean."""
    means: list[float] = []
    counts: list[int] = []
    for value in seconds_A.tolist():
        mean, count = value, 1
        while means and means[-1] >= mean:
            mean = (mean * count + means[-1] * counts[-1]) / (count + counts[-1])
            count += counts.pop()
            means.pop()
        means.append(mean)
        counts.append(count)
    return np.repeat(np.array(means), counts)


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """What every interval n up to the longest costs, in seconds per step.

    age_A, seconds_A: steps by the age of their placement, ascending. interval_N, moving_N: seconds of moving experts
    that were placed so long before. Between both, values go evenly from one to the next.
    """

    age_A: FloatArray
    seconds_A: FloatArray
    interval_N: FloatArray
    moving_N: FloatArray

    def seconds(self, every: NDArray[Any]) -> FloatArray:
        """Mean step, moving included: placements are 1 to n steps old."""
        step = np.interp((every + 1) / 2, self.age_A, self.seconds_A)
        return np.asarray(step + np.interp(every, self.interval_N, self.moving_N) / every)

    def best(self) -> tuple[int, float]:
        """The interval in whole steps at which that is least, and how much it is."""
        every = np.arange(1, int(self.interval_N[-1]) + 1)
        seconds = self.seconds(every)
        return int(every[seconds.argmin()]), float(seconds.min())

    def first_below(self, seconds: float) -> int | None:
        """The shortest interval that costs less than `seconds` per step."""
        every = np.arange(1, int(self.interval_N[-1]) + 1)
        below = every[self.seconds(every) < seconds]
        return int(below[0]) if len(below) else None


def replacing_facts(
    sampler: TrafficSampler, fabric: Fabric, *, step_s: float, seconds: StepSeconds
) -> dict[str, Any] | None:
    """The numbers of `placement.replacing`; None where experts are placed once.

    `step_s`: the step as it was simulated, with a placement of its mean age.
    """
    scenario, placement = sampler.scenario, sampler.scenario.placement
    if not isinstance(placement, MadeFromCounts) or placement.every is None:
        return None
    simulated = _simulated(sampler, step_s=step_s, seconds=seconds)
    longest = recorded_ages(sampler.trace)[-1]
    wanted = np.unique(np.append(np.geomspace(1, longest, MOVES).round(), float(placement.every)))
    newest = _maps(sampler, 0.0)
    moves = {int(every): moving(sampler, fabric, _maps(sampler, every), newest) for every in wanted}
    age_A = np.array(sorted(simulated))
    curve = Intervals(
        age_A=age_A,
        seconds_A=never_falling(np.array([simulated[age] for age in age_A])),
        interval_N=wanted,
        moving_N=np.array([moves[int(every)][1] for every in wanted]),
    )
    moved_bytes, moving_s = moves[placement.every]
    fresh_s, never_s = float(curve.seconds_A[0]), float(curve.seconds_A[-1])
    best, best_s = curve.best()
    per_rank = scenario.model.experts % scenario.parallelism.expert == 0
    in_order = Contiguous(judged_on="later" if placement.held_back else "all")
    plain = scenario.model_copy(update={"placement": in_order})
    return {
        "every": placement.every,
        "mean_age": placement.steps_ago,
        "moved_bytes": moved_bytes,
        "moving_s": moving_s,
        "moving_per_step_s": moving_s / placement.every,
        "step_time_s": float(curve.seconds(np.array([placement.every]))[0]),
        "fresh_step_time_s": fresh_s,
        "never_age": longest,
        "never_step_time_s": never_s,
        "contiguous_step_time_s": seconds(plain, 0.0) if per_rank else None,
        "best_every": best if best_s < never_s else None,
        "best_step_time_s": min(best_s, never_s),
        "pays_from": curve.first_below(never_s),
        "ages": [
            {"age": age, "step_time_s": simulated[age], "mean_step_time_s": mean_s}
            for age, mean_s in zip(age_A.tolist(), curve.seconds_A.tolist(), strict=True)
        ],
        "intervals": [
            {"every": every, "moved_bytes": moves[every][0], "moving_s": moves[every][1],
             "step_time_s": float(curve.seconds(np.array([every]))[0])}
            for every in sorted(moves)
        ],
    }  # fmt: skip


def _simulated(sampler: TrafficSampler, *, step_s: float, seconds: StepSeconds) -> Mapping[float, float]:
    """Step time by the age of the placement: fresh, young, at recorded steps, and of the mean age."""
    recorded = recorded_ages(sampler.trace)
    chosen = np.unique(np.linspace(0, len(recorded) - 1, MOST_AGES).round().astype(int))
    ages = {float(recorded[index]) for index in chosen} | {share * recorded[1] for share in YOUNG}
    others = sorted(ages - {sampler.steps_ago})
    return {age: seconds(sampler.scenario, age) for age in others} | {sampler.steps_ago: step_s}


def _maps(sampler: TrafficSampler, age: float) -> LayerMaps:
    maps = TrafficSampler(sampler.scenario, sampler.trace, placed_ago=age).maps
    assert maps is not None, "the placement is made from rows"
    return maps


def replacing_warnings(facts: Mapping[str, Any] | None) -> list[str]:
    """What the step time leaves out."""
    if facts is None:
        return []
    share = facts["moving_per_step_s"] / facts["step_time_s"]
    found = [
        f"the step is one with experts placed {facts['mean_age']:g} steps ago; moving them every {facts['every']:,} "
        f"steps adds {1e3 * facts['moving_per_step_s']:.3g} ms ({share:.1%}) per step: placement.replacing"
    ]
    if facts["step_time_s"] >= facts["never_step_time_s"]:
        found.append("placing experts anew costs more than it brings here: moving them takes longer than steps gain")
    if facts["contiguous_step_time_s"] is not None and facts["contiguous_step_time_s"] <= facts["step_time_s"]:
        found.append("neighbouring experts (placement: {kind: contiguous}) are as fast or faster, and need no moving")
    return found
