"""Plans of serving: which GPUs, how many, and in which instances, for a load of requests and its limits.

A plan file with `goal: {serve: ...}` holds the sections of a serving scenario but cluster, parallelism and fleet, which
the planner chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from moesim.errors import UserError
from moesim.planner.plan import MOST_VALUES, Offer, Plan, Sizes, is_serving_plan, plan_json_schema, validated_plan
from moesim.scenario import Compute, Dispatch, Fabric, Model, Network, Routing, UniformRouting, gpu_spec
from moesim.scenario.base import FileName, Gpus, Section, Seed, Text, Tokens
from moesim.scenario.catalogue import gpu_names
from moesim.scenario.document import Node, find, mapping_node, read_yaml, refusal
from moesim.scenario.loader import accept_model_forms, finished_schema, validated
from moesim.scenario.short_forms import absolute_paths, apply_overrides, explicit_model, named_implementation
from moesim.serving import ServingScenario, load_serving_text
from moesim.serving.schema import HOST_ELSEWHERE, Engine, Serving, ServingMemory

Ratio = Annotated[str, Field(pattern=r"^(none|[1-9][0-9]?:[1-9][0-9]?)$")]
CHOSEN = ("schema_version", "goal", "choices", "alternative")


class Serve(Section):
    """What is best among what answers the load within its limits."""

    best: Literal["usd", "gpus"] = Field(default="usd", description="Least USD per hour, or fewest GPUs.")


class ServingGoal(Section):
    """Answer `workload` within `workload.slo` on GPUs of one of the offers."""

    serve: Serve = Field(description="That this is a plan of serving, and what is best.")
    gpus: tuple[Offer, ...] = Field(min_length=1, max_length=MOST_VALUES, description="GPUs that can be rented.")


class ServingChoices(Section):
    """Values that the planner may take, one list per key; how many instances it finds itself."""

    data: Sizes = Field(default=(1,), description="Data groups of an instance.")
    tensor: Sizes = Field(default=(1,), description="Tensor-parallel sizes.")
    pipeline: Sizes = Field(default=(1,), description="Pipeline stages.")
    experts: Annotated[tuple[Literal["spread", "whole"], ...], Field(min_length=1)] = Field(
        default=("spread",),
        description="spread: over all ranks of a stage (expert parallelism); whole: each data group holds all.",
    )
    prefill_to_decode: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=100)] = Field(
        default=("none",),
        description='Prefill instances to decode instances of the same size, such as "3:1"; none: instances do both.',
    )
    token_budget: Annotated[tuple[Tokens, ...], Field(min_length=1)] | None = Field(
        default=None, description="Token budgets of a step; absent: as engine.token_budget."
    )


class Alternative(Section):
    """Another model under the same load, such as a distilled dense student: what it costs, not how well it answers."""

    model: Model = Field(description="The other model.")
    source: Text = Field(min_length=1, description="Why it may stand in, and what is not known of that.")


class ServingPlan(Section):
    """A whole plan file of serving."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = Field(
        default=1, description="Version of this format."
    )
    name: Annotated[FileName, Field(max_length=100)] = Field(description="Name of the plan and of its folder.")
    model: Model = Field(description="The language model: a preset, a config.json, or its architecture.")
    goal: ServingGoal = Field(description="What must be reached, and what may be rented for it.")
    choices: ServingChoices = Field(default=ServingChoices(), description="Values that the planner may take.")
    alternative: Alternative | None = Field(default=None, description="Another model to hold the plan against.")
    fabric: Fabric = Field(default=Fabric(), description="The fabric between nodes, as in a scenario's cluster.fabric.")
    routing: Routing = Field(default=UniformRouting(kind="uniform"), description="How tokens choose experts.")
    decode_routing: Routing | None = Field(default=None, description="How generated tokens do; absent: as routing.")
    workload: Serving = Field(description="The requests and their limits, as in a serving scenario.")
    engine: Engine = Field(default=Engine(), description="How batches are formed.")
    memory: ServingMemory = Field(default=ServingMemory(), description="Memory that is not there for pages.")
    dispatch: Dispatch = Field(default=Dispatch(), description="How tokens travel to experts and back.")
    network: Network = Field(default=Network(), description="Model of the network; ports if absent.")
    compute: Compute = Field(default=Compute(), description="Source of kernel durations.")
    seed: Seed = Field(default=0, description="Seed of all random draws.")
    most_instances: Gpus = Field(default=1_024, description="Instances, or sets of both kinds, at most.")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One combination: the smallest set of instances, which is repeated until it carries the load."""

    offer: int
    data: int
    tensor: int
    pipeline: int
    experts: str
    prefill_to_decode: str
    token_budget: int
    is_alternative: bool = False

    @property
    def instance_gpus(self) -> int:
        """GPUs of an instance."""
        return self.data * self.tensor * self.pipeline

    @property
    def ratio(self) -> tuple[int, int]:
        """Prefill and decode instances of a unit."""
        if self.prefill_to_decode == "none":
            return 0, 1
        prefill, decode = self.prefill_to_decode.split(":")
        return int(prefill), int(decode)

    @property
    def gpus(self) -> int:
        """GPUs of a unit."""
        return self.instance_gpus * sum(self.ratio)

    def words(self, plan: ServingPlan) -> str:
        """In short, such as `h100: ep8 dp8, 3:1`."""
        sizes = [("dp", self.data), ("tp", self.tensor), ("pp", self.pipeline)]
        ep = self.data * self.tensor if self.experts == "spread" else 1
        parts = [f"{name}{size}" for name, size in [("ep", ep), *sizes] if size > 1] or ["one GPU"]
        ratio = "" if self.prefill_to_decode == "none" else f", {self.prefill_to_decode} prefill:decode"
        budget = f", budget {self.token_budget}" if len(plan.choices.token_budget or ()) > 1 else ""
        return f"{plan.goal.gpus[self.offer].gpu}: {' '.join(parts)}{ratio}{budget}"


def load_any_plan(path: str | FilePath, overrides: Sequence[str] = ()) -> Plan | ServingPlan:
    """As `load_plan`, of whichever goal the file has: training, or serving with `goal: {serve: ...}`."""
    path = FilePath(path)
    return _any(read_yaml(path, what="plan"), overrides, base=path.parent)


def _any(root: Node, overrides: Sequence[str], *, base: FilePath) -> Plan | ServingPlan:
    changed = apply_overrides(named_implementation(root), overrides) if isinstance(root.value, dict) else root
    if is_serving_plan(changed):
        return serving_plan_of(changed, base=base)
    kind, reached = find(changed, ("workload", "kind"))
    if reached == ("workload", "kind") and kind.value == "serving":
        remedy = (
            "a plan of serving has goal: {serve: {best: usd}, gpus: [...]}; simulate a scenario with `moesim serve`"
        )
        raise UserError(f"{kind.where}: workload.kind: serving without goal.serve; {remedy}")
    return validated_plan(root, overrides, base=base)


def serving_plan_of(root: Node, *, base: FilePath) -> ServingPlan:
    """The plan of a document; paths are relative to `base`. Raises UserError, one line."""
    root = explicit_model(root, base=base)
    other = root.value.get("alternative")
    if other is not None and isinstance(other.value, dict):
        root = mapping_node({**root.value, "alternative": explicit_model(other, base=base)}, root)
    root = absolute_paths(root, base=base)
    plan = validated(root, ServingPlan, subject="plan")
    _check(plan, root)
    return plan


def serving_plan_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) of the sections, with the short forms of a model; `units` as in that of a scenario."""
    schema = ServingPlan.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    schema["$defs"]["Offer"]["properties"]["gpu"]["enum"] = list(gpu_names())
    return finished_schema(schema, title="moesim plan of serving", units=units)


def any_plan_json_schema() -> dict[str, Any]:
    """JSON Schema of a plan file of either goal: the keys of one or of the other."""
    forms = {"Plan": plan_json_schema(), "ServingPlan": serving_plan_json_schema()}
    definitions: dict[str, Any] = {}
    for name, form in forms.items():
        own = form.pop("$defs")
        for key, section in own.items():
            known = definitions.setdefault(key, section)
            assert known == section, f"{key} is another section in the other plan"
        definitions[name] = {key: value for key, value in form.items() if key not in ("$schema", "title")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moesim plan",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in forms],
        "$defs": definitions,
    }


def _check(plan: ServingPlan, root: Node) -> None:
    def refuse(what: str, *path: str | int) -> UserError:
        return refusal(root, path, what)

    for index, offer in enumerate(plan.goal.gpus):
        try:
            gpu_spec(offer.gpu)
        except UserError as unknown:
            raise refuse(str(unknown), "goal", "gpus", index, "gpu") from None
    if plan.compute.host_factor != 1:
        raise refuse(HOST_ELSEWHERE, "compute", "host_factor")
    if plan.workload.slo.ttft is None and plan.workload.slo.tpot is None:
        raise refuse("a plan needs a limit; set slo: {ttft: ...} or {tpot: ...} (seconds)", "workload")
    if not plan.model.moe_layers and plan.choices.experts != ("whole",):
        raise refuse("a model without experts spreads none; write experts: [whole]", "choices")


def _spreads(plan: ServingPlan) -> bool:
    return plan.alternative is not None and plan.alternative.model.moe_layers > 0


def units_of(plan: ServingPlan) -> list[Unit]:
    """Every combination of the choices, offer by offer; of the alternative, which spreads no experts, too."""
    choices = plan.choices
    budgets = choices.token_budget or (plan.engine.token_budget,)
    found: list[Unit] = []
    for other in (False, True) if plan.alternative else (False,):
        experts: tuple[str, ...] = ("whole",) if other and not _spreads(plan) else choices.experts
        parts = product(choices.data, choices.tensor, choices.pipeline)
        ways = list(product(experts, choices.prefill_to_decode, budgets))
        for offer, (data, tensor, pipeline) in product(range(len(plan.goal.gpus)), parts):
            for spread, ratio, budget in ways:
                unit = Unit(
                    offer=offer, data=data, tensor=tensor, pipeline=pipeline,
                    experts="whole" if data * tensor == 1 else spread,  # on one rank both are the same
                    prefill_to_decode=ratio, token_budget=budget, is_alternative=other,
                )  # fmt: skip
                if unit not in found:
                    found.append(unit)
    return found


def scenario_text(plan: ServingPlan, unit: Unit, *, units: int, requests: int | None = None) -> str:
    """The serving scenario of so many units as YAML; `requests` of them where it is not the plan's number."""
    offer, (prefill, decode) = plan.goal.gpus[unit.offer], unit.ratio
    gpus = unit.gpus * units
    nodes = _nodes(gpus, instance=unit.data * unit.tensor * unit.pipeline, most=offer.gpus_per_node)
    spread = unit.data * unit.tensor if unit.experts == "spread" else 1
    mesh = {"data": unit.data, "tensor": unit.tensor, "pipeline": unit.pipeline, "expert": spread}
    settings: dict[str, Any] = plan.model_dump(mode="json", exclude_none=True, exclude={*CHOSEN, "fabric", "name"})
    settings.pop("most_instances")
    settings["workload"]["requests"] = requests or plan.workload.requests
    if unit.is_alternative:
        assert plan.alternative is not None
        settings["model"] = plan.alternative.model.model_dump(mode="json", exclude_none=True)
        if not _spreads(plan):
            settings["routing"] = {"kind": "uniform"}
            settings.pop("decode_routing", None)
            for key in ("redundant_experts", "expert_placement", "two_batches", "capacity_factor"):
                settings["engine"].pop(key, None)
    settings["engine"]["token_budget"] = unit.token_budget
    fleet: dict[str, Any] = {"replicas": decode * units}
    if prefill:
        fleet["prefill"] = {"replicas": prefill * units, "parallelism": mesh, "token_budget": unit.token_budget}
    cluster = {
        "gpu": offer.gpu, "nodes": nodes, "gpus_per_node": -(-gpus // nodes),
        "price_per_gpu_hour": offer.usd_per_gpu_hour, "fabric": plan.fabric.model_dump(mode="json", exclude_none=True),
    }  # fmt: skip
    head = {"schema_version": 1, "name": plan.name, "cluster": cluster, "parallelism": mesh, "fleet": fleet}
    return yaml.safe_dump({**head, **settings}, sort_keys=False, width=110)


def _nodes(gpus: int, *, instance: int, most: int) -> int:
    """Over how many equal nodes so many GPUs are rented, `most` of a node, without idle ones and with whole instances
    in a node where these fit; where there is no such number the last node is not full.
    """
    least = -(-gpus // most)
    for nodes in range(least, gpus // min(instance, most) + 1):
        if gpus % nodes == 0 and (gpus // nodes % instance == 0 or gpus // nodes == most):
            return nodes
    return least


def scenario_of(plan: ServingPlan, unit: Unit, *, units: int) -> ServingScenario:
    """The same, checked. Raises UserError for sizes that a scenario may not have."""
    return load_serving_text(scenario_text(plan, unit, units=units), source=plan.name)


def values_of(unit: Unit, plan: ServingPlan) -> Mapping[str, Any]:
    """What was chosen."""
    return {
        "gpu": plan.goal.gpus[unit.offer].gpu, "data": unit.data, "tensor": unit.tensor, "pipeline": unit.pipeline,
        "experts": unit.experts, "prefill_to_decode": unit.prefill_to_decode, "token_budget": unit.token_budget,
        "model": "alternative" if unit.is_alternative else "model",
    }  # fmt: skip
