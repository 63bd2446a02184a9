"""From a file to a ServingScenario: the loader of scenarios with another schema, and the checks across sections."""

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

from moesim.errors import UserError
from moesim.scenario.check_software import ExpertGroups, dispatch_fault
from moesim.scenario.document import Node, Path, dotted, find, parse_yaml, read_yaml, refusal
from moesim.scenario.loader import accept_cluster_forms, accept_model_forms, finished_schema, validated
from moesim.scenario.model import Mla, Model
from moesim.scenario.short_forms import absolute_paths, apply_overrides, explicit_model, flat_cluster_to_pools
from moesim.serving.fleet import fleet_gpus, prefill_scenario
from moesim.serving.memory import key_layout, memory_of
from moesim.serving.schema import HOST_ELSEWHERE, ServingParallelism, ServingScenario
from moesim.serving.software import serving_software

_KIND = ("workload", "kind")


def load_serving(path: str | FilePath, overrides: Sequence[str] = ()) -> ServingScenario:
    """The serving scenario in the file `path` with `a.b=c` overrides applied.

    Raises UserError, one line with `file:line:column` or `--set a.b=c`.
    """
    path = FilePath(path)
    return _validated(read_yaml(path, what="scenario"), overrides, base=path.parent)


def load_serving_text(text: str, *, source: str = "serving", overrides: Sequence[str] = ()) -> ServingScenario:
    """As `load_serving`, from YAML text; paths are relative to the working directory."""
    return _validated(parse_yaml(text, source=source), overrides, base=FilePath())


def serving_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) of the sections, with the short forms of a model; `units` as in that of a scenario."""
    schema = ServingScenario.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_cluster_forms(schema["$defs"])
    return finished_schema(schema, title="moesim serving", units=units)


def _validated(root: Node, overrides: Sequence[str], *, base: FilePath) -> ServingScenario:
    if not isinstance(root.value, dict):
        raise UserError(f"{root.where}: expected a mapping of sections; write name: ..., model: ..., workload: ...")
    kind, path = find(root, _KIND)
    if "workload" in root.value and (path != _KIND or kind.value == "training"):
        what = "this is a training scenario; simulate it with `moesim run`, or name one of serving"
        raise UserError(f"{kind.where}: workload: {what} (`moesim scenarios` lists those that ship)")
    root = apply_overrides(flat_cluster_to_pools(root), overrides)
    root = absolute_paths(explicit_model(flat_cluster_to_pools(root), base=base), base=base)
    scenario = validated(root, ServingScenario, shown=_dotted)
    _check(scenario, root)
    return scenario


def _dotted(path: Path) -> str:
    return dotted(path).replace("cluster.pools.0.", "cluster.")


def _check(scenario: ServingScenario, root: Node) -> None:
    mesh, model, prefill = scenario.parallelism, scenario.model, scenario.fleet.prefill

    def refuse(path: Path, what: str) -> UserError:
        return refusal(root, path, what, shown=_dotted)

    if mesh.world_size > scenario.cluster.num_gpus:
        what = (
            f"{mesh.world_size} ranks on {scenario.cluster.num_gpus} GPUs; lower data, tensor or pipeline, or add nodes"
        )
        raise refuse(("parallelism",), what)
    _check_mesh(mesh, model, ("parallelism",), refuse)
    if prefill is not None:
        _check_mesh(prefill.parallelism, model, ("fleet", "prefill", "parallelism"), refuse)
    if isinstance(model.attention, Mla) and model.attention.indexer is not None:
        raise refuse(("model", "attention"), "sparse attention by an indexer is not modelled in serving; leave it out")
    if len(scenario.cluster.pools) > 1:
        raise refuse(("cluster",), "serving is modelled on GPUs of one pool; name one")
    if scenario.decode_routing is not None and not model.moe_layers:
        raise refuse(("decode_routing",), "a model without experts has no routing; leave it out")
    if scenario.compute.host_factor != 1:
        raise refuse(("compute", "host_factor"), HOST_ELSEWHERE)
    _check_fleet(scenario, refuse)
    _check_workload(scenario, refuse)
    if serving_software()[scenario.engine.software].paged and (unknown := _unknown_where_copied(scenario)):
        what = f"{scenario.engine.software} copies keys out of their pages, which is not known with {unknown}"
        raise refuse(("engine", "software"), f"{what}; use fused, or leave that out")
    engine = scenario.engine
    if not engine.chunked_prefill and engine.token_budget < 1_024:
        what = f"{engine.token_budget} tokens never hold a long prompt whole; allow chunked_prefill, or raise it"
        raise refuse(("engine", "token_budget"), what)
    if engine.preemption == "swap" and not memory_of(scenario).host_pages:
        what = "holds no page of keys and values, so that nothing could be moved there"
        raise refuse(("engine", "host_memory"), f"{what}; raise it, or use preemption: recompute")
    speculation = engine.speculation
    if speculation is not None and speculation.draft == "mtp" and not model.mtp_layers:
        what = "the model has no layer of multi-token prediction; set model.mtp_layers: 1, or draft: lookup"
        raise refuse(("engine", "speculation", "draft"), what)
    if speculation is not None and engine.token_budget <= len(speculation.acceptance):
        what = f"{engine.token_budget} rows hold no request with its drafted tokens; raise it"
        raise refuse(("engine", "token_budget"), what)
    if engine.capacity_factor is not None and not model.moe_layers:
        raise refuse(("engine", "capacity_factor"), "a model without experts drops nothing; leave it out")


def _check_mesh(mesh: ServingParallelism, model: Model, where: Path, refuse: Callable[[Path, str], UserError]) -> None:
    """That of instances, or that of those for prompts."""
    if mesh.expert not in (1, mesh.stage_size):
        what = f"{mesh.expert} is neither 1 nor all {mesh.stage_size} ranks of a stage, which is what is modelled"
        raise refuse((*where, "expert"), f"{what}; use one of them")
    if model.heads % mesh.tensor:
        what = f"{mesh.tensor} does not divide the {model.heads} heads; use a divisor"
        raise refuse((*where, "tensor"), what)
    if mesh.pipeline > model.layers:
        raise refuse((*where, "pipeline"), f"{mesh.pipeline} stages for {model.layers} layers; use at most as many")


def _unknown_where_copied(scenario: ServingScenario) -> str | None:
    """What attention that copies keys out of their pages was not measured with; None for what it was."""
    if scenario.parallelism.world_size > 1:
        return "several ranks"
    if isinstance(scenario.model.attention, Mla):
        return "latent attention"
    kinds = key_layout(scenario.model, page=scenario.engine.page).kinds
    if len(kinds) > 1 or kinds[0].window:
        return "windows"
    return None if scenario.workload.kv == "bf16" else f"keys and values in {scenario.workload.kv}"


def _check_fleet(scenario: ServingScenario, refuse: Callable[[Path, str], UserError]) -> None:
    gpus, prefill = fleet_gpus(scenario), scenario.fleet.prefill
    if gpus > scenario.cluster.num_gpus:
        what = f"{gpus} GPUs in all instances, {scenario.cluster.num_gpus} in the cluster; lower replicas or add nodes"
        raise refuse(("fleet",), what)
    parts: list[tuple[ServingScenario, Path]] = [(scenario, ("engine",))]
    if prefill is not None:
        parts.append((prefill_scenario(scenario), ("fleet", "prefill")))
    for part, section in parts:
        _check_dispatch(part, section, refuse)
        _check_overlap(part, (*section, "two_batches"), refuse)
        place = (*section, "redundant_experts")
        slots, ranks = scenario.model.experts + part.engine.redundant_experts, part.parallelism.expert
        if part.engine.redundant_experts and ranks == 1:
            raise refuse(place, "a rank that holds all experts needs no copies; spread them, or leave it out")
        if slots % ranks:
            least = -scenario.model.experts % ranks
            what = f"{slots} experts with their copies do not spread evenly over {ranks} ranks"
            raise refuse(place, f"{what}; use {least}, or {ranks} more")


def _check_dispatch(scenario: ServingScenario, section: Path, refuse: Callable[[Path, str], UserError]) -> None:
    cluster, mesh = scenario.cluster, scenario.parallelism
    domains, ranks = cluster.domain_sizes, mesh.world_size
    groups = ExpertGroups(cluster, mesh.expert, mesh.expert, ranks, domains, divisible=False)
    if mesh.expert > 1 and (fault := dispatch_fault(scenario.dispatch, groups)) is not None:
        prefill = scenario.fleet.prefill
        own = section if section[0] == "fleet" and prefill is not None and prefill.dispatch is not None else ()
        raise refuse((*own, "dispatch", fault.key), fault.message)


def _check_overlap(part: ServingScenario, place: Path, refuse: Callable[[Path, str], UserError]) -> None:
    if part.engine.two_batches and part.parallelism.expert == 1:
        raise refuse(place, "nothing is dispatched that could be hidden; spread experts, or use false")
    if part.engine.two_batches and part.parallelism.pipeline > 1:
        raise refuse(place, "not modelled with pipeline stages; use one stage, or false")


def _check_workload(scenario: ServingScenario, refuse: Callable[[Path, str], UserError]) -> None:
    priorities = scenario.workload.priorities
    if priorities is not None and abs(sum(priorities.shares) - 1.0) > 1e-6:
        what = f"the shares add up to {sum(priorities.shares):g}; make them 1"
        raise refuse(("workload", "priorities", "shares"), what)
