"""Checks of the `placement` section: every expert has a slot, and slots are spread as they are said to be."""

from moesim.errors import UserError
from moesim.scenario.base import MOST_EXPERTS
from moesim.scenario.check_layout import Report, either, nearest_divisors
from moesim.scenario.placement import Explicit, MadeFromRows, keeps_groups
from moesim.scenario.routing import ExpertCapacity
from moesim.scenario.schema import Scenario
from moesim.scenario.software import FUSED


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
