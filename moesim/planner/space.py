"""The combinations that a plan's choices allow, and the scenario that each of them is.

An axis is a name and the values it may take; a layout is one value of every axis. Many combinations are no candidates:
ranks that do not fill the GPUs, groups that do not divide, schedules that the scenario's checks refuse. Each says why.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from moesim.errors import UserError
from moesim.planner.plan import Choices, Plan
from moesim.reliability import check_failures
from moesim.scenario import (
    Capacity,
    Cluster,
    Dispatch,
    Fabric,
    GroupedRouter,
    Model,
    Parallelism,
    PipelineSchedule,
    Pool,
    Scenario,
    TraceRouting,
    Training,
    UniformRouting,
    Zero,
    check_scenario,
    require_supported,
)
from moesim.scenario.routing import Routing
from moesim.strict_json import json_text

LABEL_DIGITS = 6


class Discarded(Exception):
    """A combination that is no candidate: the stage that rejects it, the reason in short and whole."""

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.stage, self.reason, self.detail = stage, reason, detail or reason


class Layout(NamedTuple):
    """One value of every axis; sections are given by their index among the offers or choices."""

    gpu: int
    gpus: int
    fabric: int
    pipeline: int
    tensor: int
    context: int
    data: int | None
    expert: int
    expert_tensor: int
    schedule: int
    micro_batch: int
    recompute: int
    zero: int
    group_limit: int | None
    capacity: int
    dispatch: int


@dataclass(frozen=True)
class Space:
    """Every combination of `choices` for `model`; a dense model routes nothing."""

    plan: Plan
    model: Model
    choices: Choices

    @classmethod
    def of(cls, plan: Plan) -> "Space":
        """The space of the plan's own model."""
        return cls(plan, plan.model, plan.choices)

    @classmethod
    def of_baseline(cls, plan: Plan) -> "Space":
        """That of its dense baseline: its own choices, or the plan's without those of experts and routers."""
        assert plan.baseline is not None
        choices = plan.baseline.choices
        if choices is None:
            keys = ("expert", "expert_tensor", "group_limit", "capacity", "dispatch")
            choices = Choices(**{key: getattr(plan.choices, key) for key in Choices.model_fields if key not in keys})
        return cls(plan, plan.baseline.model, choices)

    @cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Values of every field of a Layout, in its order; sections by their number in the plan."""
        chosen = self.choices
        values: dict[str, tuple[Any, ...]] = {"gpu": tuple(range(len(self.plan.goal.gpus)))}
        for name in Layout._fields[1:]:
            given = getattr(chosen, name)
            if name in ("fabric", "schedule", "recompute", "zero", "capacity", "dispatch"):
                given = tuple(range(len(given)))
            values[name] = (None,) if given is None else given
        return values

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(map(len, self.axes.values()))

    def layouts(self) -> Iterator[Layout]:
        """All combinations, the last axis fastest."""
        return (Layout(*values) for values in itertools.product(*self.axes.values()))

    def layout(self, values: Mapping[str, Any]) -> Layout:
        """The combination of the given values of all axes."""
        return Layout(**values)

    def parallelism(self, layout: Layout) -> Parallelism:
        """Its mesh. Raises Discarded where the sizes do not fill the GPUs or a simpler layout is the same."""
        offer = self.plan.goal.gpus[layout.gpu]
        if layout.gpus > offer.at_most:
            raise Discarded("offer", "more GPUs than offered", f"{layout.gpus} of at most {offer.at_most} {offer.gpu}")
        sizes = layout.pipeline * layout.tensor * layout.context
        data = layout.gpus // sizes if layout.data is None else layout.data
        if data * sizes != layout.gpus:
            detail = f"pipeline {layout.pipeline} * tensor {layout.tensor} * context {layout.context} in {layout.gpus}"
            raise Discarded("sizes", "sizes do not multiply to the GPUs", detail)
        group = layout.expert * layout.expert_tensor
        if (layout.gpus // layout.pipeline) % group:
            detail = f"groups of {group} in the {layout.gpus // layout.pipeline} ranks of a stage"
            raise Discarded("sizes", "expert groups do not divide a stage", detail)
        schedule: PipelineSchedule = self.choices.schedule[layout.schedule]
        if layout.pipeline == 1:
            alike = [_on_one_rank(other) for other in self.choices.schedule]
            schedule = alike[layout.schedule]
            if alike.index(schedule) < layout.schedule:
                raise Discarded("same", "without a pipeline all schedules are alike")
        return Parallelism(
            data=data,
            context=layout.context,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
            zero=self.choices.zero[layout.zero],
            schedule=schedule,
        )

    def scenario(self, layout: Layout) -> Scenario:
        """The layout as a scenario that can be simulated. Raises Discarded."""
        mesh = self.parallelism(layout)
        self._check_places(layout)
        self._check_copies(mesh)
        plan, work = self.plan, self.plan.workload
        dense = self.model.experts == 0
        scenario = Scenario(
            name=self.label(layout, mesh),
            model=self.model,
            routing=UniformRouting(kind="uniform") if dense else self._routing(layout),
            capacity=self.choices.capacity[layout.capacity],
            placement=plan.placement,
            cluster=self._cluster(layout),
            parallelism=mesh,
            workload=Training(
                sequence_length=work.sequence_length,
                global_batch=work.global_batch,
                micro_batch=layout.micro_batch,
                train_tokens=plan.goal.tokens,
                precision=work.precision,
                recompute=self.choices.recompute[layout.recompute],
                gradient_clipping=work.gradient_clipping,
            ),
            dispatch=self.choices.dispatch[layout.dispatch],
            implementation=plan.implementation,
            overlap=plan.overlap,
            memory=plan.memory,
            network=plan.network,
            compute=plan.compute,
            uncertainty=plan.uncertainty,
            failures=plan.failures,
            seed=plan.seed,
        )
        _check(scenario)
        return scenario

    def _cluster(self, layout: Layout) -> Cluster:
        key = layout.gpu, layout.gpus, layout.fabric
        if key not in self._clusters:
            self._clusters[key] = self._new_cluster(layout)
        return self._clusters[key]

    @cached_property
    def _clusters(self) -> dict[tuple[int, int, int], Cluster]:
        """Those made so far: few are asked for again and again."""
        return {}

    def _new_cluster(self, layout: Layout) -> Cluster:
        offer = self.plan.goal.gpus[layout.gpu]
        per_node = min(layout.gpus, offer.gpus_per_node)
        if layout.gpus % per_node:
            raise Discarded("sizes", "GPUs do not fill whole nodes", f"{layout.gpus} GPUs on nodes of {per_node}")
        pool = Pool(
            gpu=offer.gpu,
            nodes=layout.gpus // per_node,
            gpus_per_node=per_node,
            price_per_gpu_hour=offer.usd_per_gpu_hour,
        )
        return Cluster(pools=(pool,), fabric=self.choices.fabric[layout.fabric])

    def _check_places(self, layout: Layout) -> None:
        kept, per_node = self.plan.constraints, self._cluster(layout).domain_sizes[0]
        groups = {
            "tensor group": (kept.tensor_in_node, layout.tensor),
            "expert group": (kept.expert_in_node, layout.expert * layout.expert_tensor),
        }
        for name, (inside, size) in groups.items():
            if inside and (size > per_node or per_node % size):
                raise Discarded("places", f"the {name} leaves its node", f"a {name} of {size} on nodes of {per_node}")

    def _check_copies(self, mesh: Parallelism) -> None:
        """ZeRO shards what several ranks hold; where there is one copy, a higher stage is the same layout again."""
        copies = {
            "dense": mesh.data * mesh.context,
            "expert": mesh.stage_ranks // (mesh.expert * mesh.expert_tensor) if self.model.experts else 1,
        }
        if mesh.schedule.facts.copies > 1:
            return
        for zero in self.choices.zero:
            if zero == mesh.zero:
                return
            if all(count == 1 or getattr(zero, part) == getattr(mesh.zero, part) for part, count in copies.items()):
                raise Discarded("same", "nothing to shard: the same as another ZeRO stage")

    def _routing(self, layout: Layout) -> Routing:
        routing = self.plan.routing
        if layout.group_limit is None:
            return routing
        assert not isinstance(routing, TraceRouting) and isinstance(routing.router, GroupedRouter), "checked on loading"
        key = "group_limit" if routing.router.device_limit is None else "device_limit"
        router = routing.router.model_copy(update={key: layout.group_limit})
        return routing.model_copy(update={"router": router})

    def label(self, layout: Layout, mesh: Parallelism) -> str:
        """A name that tells the layout from all others of the plan, e.g. `plan-h800x16-dp16-ep8-1a2b3c`."""
        sizes = (
            ("tp", mesh.tensor),
            ("cp", mesh.context),
            ("pp", mesh.pipeline),
            ("dp", mesh.data),
            ("ep", mesh.expert),
        )
        words = [f"{name}{size}" for name, size in sizes if size > 1]
        gpu = self.plan.goal.gpus[layout.gpu].gpu
        text = json_text(self.values(layout), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:LABEL_DIGITS]
        prefix = self.plan.name if self.model is self.plan.model else f"{self.plan.name}-baseline"
        return "-".join([prefix, f"{gpu}x{layout.gpus}", *words, digest])

    def values(self, layout: Layout) -> dict[str, Any]:
        """What the planner chose, by the keys of a scenario; sections as plain values, `gpus` their total number."""
        chosen, mesh = self.choices, self.parallelism(layout)
        values: dict[str, Any] = {
            "cluster.gpu": self.plan.goal.gpus[layout.gpu].gpu,
            "gpus": layout.gpus,
            "parallelism.data": mesh.data,
            "workload.micro_batch": layout.micro_batch,
        }
        values |= {
            f"parallelism.{name}": getattr(layout, name)
            for name in ("pipeline", "tensor", "context", "expert", "expert_tensor")
            if len(getattr(chosen, name)) > 1 or getattr(layout, name) > 1
        }
        if layout.group_limit is not None:
            values["routing.router.group_limit"] = layout.group_limit
        sections: dict[str, Fabric | PipelineSchedule | Zero | Capacity | Dispatch] = {
            "cluster.fabric": chosen.fabric[layout.fabric],
            "parallelism.schedule": mesh.schedule,
            "parallelism.zero": mesh.zero,
            "capacity": chosen.capacity[layout.capacity],
            "dispatch": chosen.dispatch[layout.dispatch],
        }
        for key, section in sections.items():
            if len(getattr(chosen, key.rpartition(".")[2])) > 1:
                values[key] = _words(section.model_dump(mode="json", exclude_defaults=True) | _kind(section))
        if len(chosen.recompute) > 1:
            recompute = chosen.recompute[layout.recompute]
            values["workload.recompute"] = recompute if isinstance(recompute, str) else list(recompute)
        return values


def _words(section: dict[str, Any]) -> dict[str, Any]:
    """Bandwidths in the unit in which networks are sold: `400 Gbps` for `50000000000.0 B/s`."""
    unit = " B/s"
    return {
        key: f"{8 * float(value.removesuffix(unit)) / 1e9:g} Gbps"
        if isinstance(value, str) and value.endswith(unit)
        else value
        for key, value in section.items()
    }


def _on_one_rank(schedule: PipelineSchedule) -> PipelineSchedule:
    """What a schedule is without a pipeline: its own where one rank pairs micro-batches, else as all others."""
    return PipelineSchedule(kind=schedule.kind) if schedule.facts.single else PipelineSchedule()


def _kind(section: Any) -> dict[str, str]:
    """The word that names a section, which may be its default."""
    if isinstance(section, Zero):
        return {"dense": section.dense, "expert": section.expert}  # type: ignore[dict-item]
    names = ("kind", "preset", "algorithm")
    return {name: getattr(section, name) for name in names if name in type(section).model_fields}


def _check(scenario: Scenario) -> None:
    """Raises Discarded for what the scenario's own checks refuse."""
    for stage, check in (("refused", check_scenario), ("refused", check_failures), ("unsupported", require_supported)):
        try:
            check(scenario)
        except UserError as error:
            key, _, message = str(error).partition(": ")
            raise Discarded(stage, key, f"{key}: {message}") from None
