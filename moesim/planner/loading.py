"""From a plan file to a Plan: the loader of scenarios with another schema, and the checks across sections."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from moesim.errors import UserError
from moesim.planner.plan import Choices, Plan
from moesim.planner.serving_plan import ServingPlan, is_serving_plan, serving_plan_json_schema, serving_plan_of
from moesim.scenario import GroupedRouter, TraceRouting, gpu_spec
from moesim.scenario.catalogue import gpu_names
from moesim.scenario.document import Node, Path, find, mapping_node, read_yaml, refusal
from moesim.scenario.loader import accept_model_forms, accept_named_implementation, finished_schema
from moesim.scenario.messages import validated
from moesim.scenario.short_forms import (
    absolute_paths,
    apply_overrides,
    default_routing,
    explicit_model,
    named_implementation,
)


def load_plan(path: str | FilePath, overrides: Sequence[str] = ()) -> Plan:
    """The plan in the file `path` with `a.b=c` overrides applied; models explicit, paths absolute.

    Raises UserError, one line with `file:line:column` or `--set a.b=c`.
    """
    path = FilePath(path)
    return _validated(read_yaml(path, what="plan"), overrides, base=path.parent)


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
    return _validated(root, overrides, base=base)


def plan_from_mapping(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """A plan from nested dicts in any form that a file may have; paths are relative to the working directory."""
    return _validated(_node_of(data), overrides, base=FilePath())


def _node_of(value: Any) -> Node:
    if isinstance(value, Mapping):
        return Node({str(key): _node_of(child) for key, child in value.items()}, "plan", "plan")
    if isinstance(value, list | tuple):
        return Node([_node_of(child) for child in value], "plan", "plan")
    return Node(value, "plan", "plan")


def _validated(root: Node, overrides: Sequence[str], *, base: FilePath) -> Plan:
    if not isinstance(root.value, dict):
        raise UserError(f"{root.where}: expected a mapping of sections; write name: ..., model: ..., goal: ...")
    root = named_implementation(apply_overrides(named_implementation(root), overrides))
    if is_serving_plan(root):
        where = find(root, ("goal", "serve"))[0].where
        raise UserError(f"{where}: goal.serve: this is a plan of serving; make it with `moesim plan`")
    root = absolute_paths(_explicit_models(root, base=base), base=base)
    plan = validated(root, Plan, subject="plan")
    _check(plan, root)
    return plan


def _explicit_models(root: Node, *, base: FilePath) -> Node:
    """Presets and configurations written out, in the plan and in its baseline, and the routing of the plan's model."""
    root = default_routing(explicit_model(root, base=base))
    baseline = root.value.get("baseline")
    if baseline is None or not isinstance(baseline.value, dict):
        return root
    return mapping_node({**root.value, "baseline": explicit_model(baseline, base=base)}, root)


def _check(plan: Plan, root: Node) -> None:
    def error(message: str, *path: str | int) -> UserError:
        return refusal(root, path, message)

    kinds = [offer.gpu for offer in plan.goal.gpus]
    for index, offer in enumerate(plan.goal.gpus):
        try:
            gpu_spec(offer.gpu)
        except UserError as unknown:
            raise error(str(unknown), "goal", "gpus", index, "gpu") from None
        if offer.gpu in kinds[:index]:
            raise error(f'"{offer.gpu}" is offered twice; keep one offer per kind', "goal", "gpus", index, "gpu")
    for index, objective in enumerate(plan.objectives):
        if objective in plan.objectives[:index]:
            raise error(f'"{objective}" is listed twice', "objectives", index)
    if plan.choices.group_limit is not None:
        _check_group_limit(plan, error_of=lambda message: error(message, "choices", "group_limit"))
    _check_repeats(plan.choices, root, ("choices",))
    if plan.baseline is not None:
        if plan.baseline.model.experts:
            raise error("has experts; name a dense model", "baseline", "model")
        if plan.baseline.choices is not None:
            _check_repeats(plan.baseline.choices, root, ("baseline", "choices"))


def _check_group_limit(plan: Plan, *, error_of: Any) -> None:
    routing = plan.routing
    if isinstance(routing, TraceRouting):
        raise error_of("a recorded trace brings its router's limit; drop this key, or use another kind of routing")
    if not isinstance(routing.router, GroupedRouter):
        raise error_of("routing.router has no groups; use kind deepseek_v2 or deepseek_v3, or drop this key")


def _check_repeats(choices: Choices, root: Node, where: Path) -> None:
    for key in type(choices).model_fields:
        values = getattr(choices, key)
        for index, value in enumerate(values or ()):
            if value in values[:index]:
                raise refusal(root, (*where, key, index), "listed twice; keep one")


def plan_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) that accepts every form that `load_plan` accepts at the level of single sections.

    `units`: as in the schema of a scenario.
    """
    schema = Plan.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_named_implementation(schema)
    schema["$defs"]["Offer"]["properties"]["gpu"]["enum"] = list(gpu_names())
    return finished_schema(schema, title="moesim plan", units=units)


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
