"""The checks that need more than one section: what the schema of a single key cannot see.

Every check raises through `Report.user` (exit code 1) or `Report.infeasible` (exit code 2), naming the key to change.
The amount of work is one of them: single keys are bounded by the schema, their products here. What is refused would
take gigabytes of memory, or hours in which nothing is heard, before the first number.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moesim.errors import UserError
from moesim.scenario.base import MOST_GPUS
from moesim.scenario.check_layout import (
    Report,
    check_pipeline,
    check_recomputation,
    check_sharing,
    check_stages,
    either,
    nearest_divisors,
)
from moesim.scenario.check_placement import check_placement
from moesim.scenario.check_pools import check_batch, check_mixed
from moesim.scenario.check_software import (
    ExpertGroups,
    check_formats,
    check_recipe,
    dispatch_fault,
    require_supported_step,
)
from moesim.scenario.document import Path, dotted
from moesim.scenario.pools import ranked_cluster
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import (
    BalancednessRouting,
    GroupedRouter,
    PopularityRouting,
    Router,
    TrainRouting,
    UniformRouting,
    lowest_balancedness,
)
from moesim.scenario.schema import Scenario


def check_scenario(scenario: Scenario, *, where: Callable[[Path], str] = dotted) -> None:
    """Raises UserError or InfeasibleError for sections that contradict each other; `where` writes a key's place."""
    report = Report(where)
    check_gpus(scenario, report)
    _check_model(scenario, report)
    _check_cluster(scenario, report)
    _check_layout(scenario, report)
    check_mixed(scenario, report)
    check_batch(scenario, report)
    check_size(scenario, report)
    check_pipeline(scenario, report)
    check_recomputation(scenario, report)
    _check_routing(scenario, report)
    _check_dispatch(scenario, report)


def require_supported(scenario: Scenario, *, where: Callable[[Path], str] = dotted) -> None:
    """Raises UserError for a well-formed scenario that the simulation core cannot run, naming the key.

    The one place to relax when the core learns another way to train.
    """
    report = Report(where)
    require_supported_step(scenario, report)


def _check_model(scenario: Scenario, report: Report) -> None:
    model = scenario.model
    if model.heads % model.kv_heads:
        raise report.user("model.kv_heads", f"{model.kv_heads} does not divide heads = {model.heads}")
    if model.attention.kind == "mha" and model.kv_heads != model.heads:
        raise report.user(
            "model.kv_heads", f"mha needs kv_heads = heads = {model.heads}; or use attention: {{kind: gqa}}"
        )
    if model.experts == 0:
        for key in ("top_k", "shared_experts", "expert_intermediate"):
            if getattr(model, key):
                raise report.user(
                    f"model.{key}", "a model without experts has none; set model.experts, or drop this key"
                )
        if model.dense_layers != model.layers:
            what = f"{model.dense_layers} of {model.layers} layers, but a model without experts is dense in all"
            raise report.user("model.dense_layers", f"{what}; set model.dense_layers: {model.layers}")
    elif model.dense_at is not None and len(set(model.dense_at)) != model.dense_layers:
        num = len(set(model.dense_at))
        what = f"names {num} layers, but dense_layers says {model.dense_layers}; set model.dense_layers: {num}"
        raise report.user("model.dense_at", what)
    elif model.dense_layers >= model.layers:
        raise report.user("model.dense_layers", f"must be below layers = {model.layers}; or set model.experts: 0")
    elif not 1 <= model.top_k <= model.experts:
        raise report.user("model.top_k", f"{model.top_k} is not between 1 and experts = {model.experts}")
    elif model.expert_intermediate == 0:
        raise report.user("model.expert_intermediate", "missing; the width of one expert is required")
    for key, numbers in (("dense_at", model.dense_at), ("local.layers", model.local and model.local.layers)):
        if numbers and max(numbers) >= model.layers:
            what = f"there is no layer {max(numbers)}; name some of 0 to {model.layers - 1}"
            raise report.user(f"model.{key}", what)
    if model.dense_layers and model.dense_intermediate == 0:
        raise report.user("model.dense_intermediate", "missing; the width of the dense FFN is required")


def _check_cluster(scenario: Scenario, report: Report) -> None:
    precision, dispatch = scenario.workload.precision, scenario.dispatch
    check_recipe(precision, report)
    for index, pool in enumerate(scenario.cluster.pools):
        try:
            spec = pool.spec
        except UserError as error:
            place = report.place(f"cluster.pools.{index}.gpu")
            raise UserError(f"{place}: {error}") from None  # no conflict: nothing else could make it known
        check_formats(precision, spec, report)
    names = [pool.name for pool in scenario.cluster.pools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise report.user(f"cluster.pools.{index}.name", f'"{name}" names an earlier pool; give each its own name')
    if dispatch.combine_dtype == "fp8" and dispatch.dtype != "fp8":
        raise report.user(
            "dispatch.combine_dtype", "fp8 needs dispatch.dtype: fp8 (combine sums, so it is the wider one)"
        )


def _check_layout(scenario: Scenario, report: Report) -> None:
    model, mesh = scenario.model, scenario.parallelism
    group = mesh.expert * mesh.expert_tensor
    check_placement(scenario, report)
    if model.experts == 0 and group > 1:
        raise report.user("parallelism.expert", "a model without experts has no expert parallelism; use 1")
    if mesh.stage_ranks % group:
        fits = either(nearest_divisors(mesh.stage_ranks, group, multiple_of=mesh.expert_tensor))
        what = f"groups of {group} ranks do not fit into the {mesh.stage_ranks} ranks of a stage"
        remedy = f"use groups of {fits}, or change parallelism.data" if fits else "change parallelism.data"
        raise report.user("parallelism.expert", f"{what}; {remedy}")
    check_sharing(scenario, report)
    check_stages(scenario, report)
    if scenario.idle_gpus < 0:
        axes = f"data {mesh.data} * context {mesh.context} * tensor {mesh.tensor} * pipeline {mesh.pipeline}"
        what = f"{mesh.world_size} ranks ({axes}) need more than the {scenario.cluster.num_gpus} GPUs of the cluster"
        raise report.infeasible("parallelism", f"{what}; add nodes or lower parallelism.data")


def _check_routing(scenario: Scenario, report: Report) -> None:
    routing, model = scenario.routing, scenario.model
    if model.experts == 0:
        if not isinstance(routing, UniformRouting):
            raise report.user("routing", "a model without experts has no router; leave routing out")
        return
    if isinstance(routing, PopularityRouting):
        _check_counts(scenario, routing, report)
    if isinstance(routing, BalancednessRouting):
        _check_balancedness(scenario, routing, report)
    if routing.router is not None:
        _check_router(scenario, routing.router, report)
    _check_groups(scenario, report)


def _check_balancedness(scenario: Scenario, routing: BalancednessRouting, report: Report) -> None:
    """The ranks are those of one placement without copies, and as uneven as asked for."""
    model, ranks = scenario.model, scenario.parallelism.expert
    slots = scenario.placement.fixed_slots(num_experts=model.experts, num_ranks=ranks)
    if slots is None or sum(map(len, slots)) > model.experts:
        what = "a balancedness is that of ranks which hold every expert once, at the same place in all layers"
        raise report.user("placement", f"{what}; leave placement out, or use another kind of routing")
    lowest = lowest_balancedness([len(experts) for experts in slots], top_k=model.top_k)
    if routing.value >= lowest * (1 - 1e-9):
        return
    fewest, asked = min(map(len, slots)), f"balancedness {routing.value:g}"
    if lowest > 1:
        what = f"a rank of {fewest} experts never has the rows of the others with top_k = {model.top_k}"
        raise report.user("routing.value", f"{asked}: {what}; give ranks more equal numbers of experts")
    what = f"{ranks} ranks of {fewest} experts and top_k = {model.top_k} are never below {lowest:.4g}"
    remedy = f"use {_rounded_up(lowest)} to 1"
    if ranks == 1:
        what, remedy = "parallelism.expert = 1 rank is always balanced", "use 1"
    raise report.user("routing.value", f"{asked}: {what}; {remedy}, or change parallelism.expert")


def _rounded_up(value: float) -> str:
    """Four digits of a number, never below it."""
    return f"{math.ceil(value * 1e4 - 1e-6) / 1e4:g}"


def _check_counts(scenario: Scenario, routing: PopularityRouting, report: Report) -> None:
    model = scenario.model
    nested = isinstance(routing.counts[0], tuple)
    lists = routing.counts if nested else (routing.counts,)
    for index, counts in enumerate(lists):
        assert isinstance(counts, tuple)
        key = f"routing.counts.{index}" if nested else "routing.counts"
        if len(counts) != model.experts:
            raise report.user(key, f"{len(counts)} counts for experts = {model.experts}; give one per expert")
        positive = sum(count > 0 for count in counts if not isinstance(count, tuple))
        if positive < model.top_k:
            raise report.user(key, f"{positive} experts have a count above 0, fewer than top_k = {model.top_k}")
        if positive < len(counts) and scenario.router_shape().num_groups > 1:
            what = f"{positive} of {len(counts)} counts are above 0; any choice of groups must hold top_k experts"
            raise report.user(key, f"{what}: add 1 to each count")


def _check_router(scenario: Scenario, router: Router, report: Report) -> None:
    top_k = scenario.model.top_k
    facts = ROUTERS[router.kind]
    if (fixed_k := facts.fixed_k) is not None and top_k != fixed_k:
        experts = "1 expert" if fixed_k == 1 else f"{fixed_k} experts"
        what = f"{facts.name} selects {experts}, but top_k = {top_k}; set model.top_k: {fixed_k}"
        raise report.user("routing.router.kind", what)
    if isinstance(router, GroupedRouter):
        _check_limit(scenario, router, report)
    elif facts.by_experts and scenario.capacity.kind != "none":
        message = f"{facts.name} fills its experts exactly (router.capacity_factor); use capacity: {{kind: none}}"
        raise report.user("capacity.kind", message)


def _check_limit(scenario: Scenario, router: GroupedRouter, report: Report) -> None:
    """A limit has groups: the router's, those that device_limit stands for, or the model's."""
    given = [key for key in ("groups", "group_limit") if getattr(router, key) is not None]
    if router.device_limit is not None and given:
        message = f"conflicts with {given[0]}; device_limit M is short for groups = parallelism.expert, group_limit = M"
        raise report.user("routing.router.device_limit", message)
    if given == ["groups"] or (given == ["group_limit"] and scenario.model.router_groups == 1):
        missing = "group_limit" if given == ["groups"] else "groups"
        raise report.user(f"routing.router.{given[0]}", f"needs {missing} beside it")


def _check_groups(scenario: Scenario, report: Report) -> None:
    """The groups that hold divide the experts, and the limit leaves enough of them."""
    router, shape = scenario.routing.router, scenario.router_shape()
    experts, top_k = shape.num_experts, shape.top_k
    by_device = isinstance(router, GroupedRouter) and router.device_limit is not None
    of_router = isinstance(router, GroupedRouter) and router.group_limit is not None
    groups_key = "routing.router.groups" if by_device or of_router else "model.router_groups"
    limit_key = "routing.router.group_limit" if of_router else "model.router_group_limit"
    if by_device:
        limit_key = "routing.router.device_limit"
    groups_name = "parallelism.expert" if by_device else "groups"
    if experts % shape.num_groups:
        fits = either(nearest_divisors(experts, shape.num_groups))
        raise report.user(groups_key, f"{shape.num_groups} does not divide experts = {experts}; use {fits}")
    if shape.group_limit > shape.num_groups:
        raise report.user(limit_key, f"{shape.group_limit} is more than {groups_name} = {shape.num_groups}")
    per_group = experts // shape.num_groups
    if shape.group_limit * per_group < top_k:
        what = f"{shape.group_limit} groups of {per_group} experts hold fewer than top_k = {top_k}"
        raise report.user(limit_key, f"{what}; use at least {-(-top_k // per_group)}, or fewer groups")
    facts = ROUTERS[router.kind] if isinstance(router, GroupedRouter) else None
    if facts is not None and per_group < facts.best_of and shape.group_limit < shape.num_groups:
        key = limit_key if by_device else groups_key
        best = "two best experts" if facts.best_of == 2 else f"{facts.best_of} best experts"
        what = f"{facts.name} scores a group by its {best}; use groups of at least {facts.best_of} experts"
        raise report.user(key, what)


def _check_dispatch(scenario: Scenario, report: Report) -> None:
    cluster, mesh = scenario.cluster, scenario.parallelism
    if cluster.fabric.multipath and scenario.network.model == "ports":
        what = "ports looks at one route of each pair and cluster.fabric.multipath takes all; use fluid, or exact"
        raise report.user("network.model", what)
    domains = ranked_cluster(cluster, mesh).domain_sizes
    groups = ExpertGroups(cluster, mesh.expert, mesh.expert * mesh.expert_tensor, mesh.world_size, domains)
    if (fault := dispatch_fault(scenario.dispatch, groups)) is not None:
        raise report.user(f"dispatch.{fault.key}", fault.message)


LEAST_TOKENS, THIN_LAYERS = 2**18, 2  # of a synthetic trace, about
MOST_TOKENS = 2**26  # of a step on one rank group
MOST_ROWS = 2**27  # a trace holds 12 bytes for each, and as many again while it is drawn
MOST_COUNTS = 2**28  # of 8 bytes
MOST_PAIRS = {"ports": 2**24, "fluid": 2**22, "exact": 2**14}  # flows of one transfer
MOST_RUNS = 10**7  # the largest published trainings have a million; a million takes ten seconds a sample
MOST_SAMPLED_RUNS = 10**8
MOST_PARAMETERS = 10**9  # of the thin model; sixteen bytes each in training


class _Size(NamedTuple):
    number: int
    most: int
    key: str
    what: str
    remedy: str


def check_gpus(scenario: Scenario, report: Report) -> None:
    """Raises UserError for a cluster whose fabric cannot be built in seconds."""
    _check(_Size(scenario.cluster.num_gpus, MOST_GPUS, "cluster", "GPUs", "name fewer nodes"), report)


def check_size(scenario: Scenario, report: Report) -> None:
    """Raises UserError for a scenario that is too much work, naming the key that makes it so."""
    for size in (*_step_sizes(scenario), *(_routing_sizes(scenario) if scenario.model.experts else ())):
        _check(size, report)


def _check(size: _Size, report: Report) -> None:
    if size.number > size.most:
        raise report.user(size.key, f"{size.number:,} {size.what}; at most {size.most:,} are simulated: {size.remedy}")


def _step_sizes(scenario: Scenario) -> Iterator[_Size]:
    mesh = scenario.parallelism
    layers = scenario.model.layers + scenario.model.mtp_layers
    runs = layers * scenario.num_micro_batches * mesh.stage_ranks
    what = f"passes through a layer ({layers} layers, {scenario.num_micro_batches:,} micro-batches, all ranks)"
    yield _Size(runs, MOST_RUNS, "workload.global_batch", what, "lower it, or raise workload.micro_batch")
    sampled = runs * (scenario.uncertainty.samples if scenario.model.experts else 1)
    yield _Size(sampled, MOST_SAMPLED_RUNS, "uncertainty.samples", "passes through a layer in all samples", "lower it")


def _routing_sizes(scenario: Scenario) -> Iterator[_Size]:
    model, mesh, work, routing = scenario.model, scenario.parallelism, scenario.workload, scenario.routing
    layers = THIN_LAYERS
    if isinstance(routing, TrainRouting):
        layers = routing.thin.layers
    elif isinstance(routing, PopularityRouting) and isinstance(routing.counts[0], tuple):
        layers = len(routing.counts)
    asked = routing.tokens or 0 if isinstance(routing, TrainRouting) else 0
    window = mesh.expert * work.micro_batch * work.sequence_length
    yield _Size(window, MOST_TOKENS, "workload.micro_batch", "tokens of an expert group's micro-batch", "lower it")
    tokens = max(window, LEAST_TOKENS, asked)
    rows = tokens * model.top_k * layers
    yield _Size(rows, MOST_ROWS, "routing", "rows (tokens * top_k * layers) of a trace", "lower model.top_k or layers")
    ranks = mesh.expert
    columns = ranks * (scenario.slots_per_rank + 2)
    pieces = -(-tokens // work.sequence_length) * mesh.tensor * mesh.context * 2
    counts = pieces * columns * layers
    yield _Size(counts, MOST_COUNTS, "model.experts", "counts (parts of sequences * experts * layers)", "lower it")
    groups = mesh.stage_ranks // ranks
    counts = min(scenario.num_micro_batches, scenario.uncertainty.bank) * groups * ranks * columns * layers
    counts *= scenario.uncertainty.samples
    what = "counts (samples * micro-batches * ranks * experts * layers)"
    yield _Size(counts, MOST_COUNTS, "uncertainty.samples", what, "lower it, or uncertainty.bank")
    model_of_sharing = scenario.network.model or "ports"  # what is left of the larger groups when it is absent
    most = MOST_PAIRS[model_of_sharing]
    what = f"pairs of ranks in an expert group under network.model: {model_of_sharing}"
    yield _Size(ranks * ranks, most, "parallelism.expert", what, "lower it, or use network.model: ports")
    if isinstance(routing, TrainRouting):
        thin = routing.thin
        weights = thin.layers * (model.experts * (3 * thin.expert_intermediate + 1) + 8 * thin.hidden) * thin.hidden
        what = "parameters of the thin model"
        yield _Size(weights, MOST_PARAMETERS, "routing.thin.hidden", what, "lower it, or thin.expert_intermediate")
