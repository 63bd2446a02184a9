"""Every router of the table is one: recorder, expert-parallel path and codec weigh alike; a new one is a new entry."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from moe_cases import small_request

from moesim.errors import UserError
from moesim.kernels import kernel_model
from moesim.program.moe import router_part
from moesim.program.stage import step_sizes
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part
from moesim.routing.routers import RouterInputs, Routing, build_router
from moesim.routing.sharded_model import ShardedGate
from moesim.routing.training import train_router
from moesim.scenario import scenario_from_mapping
from moesim.scenario.routers import DEEPSEEK_MOE, ROUTERS, RouterFacts, facts_in_training
from moesim.scenario.routing import (
    Balance,
    ExpertChoiceRouter,
    GroupedRouter,
    GshardRouter,
    LossFree,
    PlainRouter,
    RouterShape,
    TrainRouting,
)
from moesim.trace import load_trace, save_trace
from moesim.trace.check import gates_of

TOKENS = 64
ROUTED = [kind for kind, facts in ROUTERS.items() if facts.module]
SHARDED = [kind for kind, facts in ROUTERS.items() if facts.learned and not facts.by_experts]
SCENARIO = {
    "schema_version": 1,
    "name": "small",
    "model": {
        "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "dense_layers": 1,
        "dense_intermediate": 128, "experts": 16, "top_k": 4, "expert_intermediate": 32, "vocab": 100,
    },
    "routing": {"kind": "uniform"},
    "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 1},
    "workload": {"sequence_length": 64, "micro_batch": 1, "global_batch": 1},
    "implementation": {"kind": "torch_eager"},
}  # fmt: skip
NEW = RouterFacts(name="plain_sigmoid", affinity="sigmoid", scaled=True, biased=True)


def shape_of(facts: RouterFacts, *, groups: bool = False) -> RouterShape:
    limits = {"num_groups": 4, "group_limit": 2} if groups and facts.grouped else {}
    return RouterShape(kind=facts.name, num_experts=16, top_k=facts.fixed_k or 4, routed_scaling_factor=2.5, **limits)


def recorded(shape: RouterShape) -> tuple[torch.nn.Module, torch.Tensor, Routing]:
    """A fresh router with a bias where it has one, hidden states, and how it routes them."""
    generator = torch.Generator().manual_seed(1)
    drawn = [1.0 + expert for expert in range(16)] if ROUTERS[shape.kind].drawn else None
    router = build_router(shape, hidden=8, generator=generator, popularity_E=drawn)
    if ROUTERS[shape.kind].biased:
        router.bias_E.normal_(std=0.3, generator=generator)
    hidden_TH = 2 * torch.randn(TOKENS, 8, generator=generator)
    return router, hidden_TH, router(hidden_TH, RouterInputs(torch.arange(TOKENS), generator))


def gates_agree(facts: RouterFacts) -> None:
    """Recorder and codec; and the expert-parallel path, where tokens choose by what is learned."""
    shape = shape_of(facts, groups=True)
    _, _, routing = recorded(shape)
    codec = gates_of(shape, routing.expert_ids_TK.numpy(), routing.affinities_TK.detach().numpy())
    np.testing.assert_allclose(codec, routing.gates_TK.detach().numpy(), rtol=1e-5, atol=1e-7)
    if not facts.learned or facts.by_experts:
        return
    router, hidden_TH, routing = recorded(shape_of(facts))
    gate = ShardedGate(8, shape_of(facts))
    gate.load_state_dict(router.state_dict())
    sharded = gate(hidden_TH)
    assert torch.equal(sharded.expert_ids_TK, routing.expert_ids_TK)
    torch.testing.assert_close(sharded.gates_TK, routing.gates_TK, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ROUTED)
def test_recorder_expert_parallel_path_and_codec_give_the_same_gates(kind: str) -> None:
    gates_agree(ROUTERS[kind])


@pytest.mark.parametrize("kind", SHARDED)
def test_probabilities_sum_to_one_where_the_facts_say_so(kind: str) -> None:
    _, _, routing = recorded(shape_of(ROUTERS[kind], groups=True))
    sums_T = routing.probabilities_TE.detach().sum(dim=1)
    assert bool(((sums_T - 1).abs() < 1e-5).all()) == ROUTERS[kind].sums_to_one


@pytest.mark.parametrize("kind", ROUTED)
def test_probabilities_are_there_for_what_has_affinities(kind: str) -> None:
    _, _, routing = recorded(shape_of(ROUTERS[kind]))
    assert (routing.probabilities_TE is None) == (ROUTERS[kind].affinity == "none")


def test_every_router_that_a_scenario_can_name_has_facts() -> None:
    named = {
        section: get_args(section.model_fields["kind"].annotation)
        for section in (PlainRouter, GshardRouter, GroupedRouter, ExpertChoiceRouter)
    }
    assert {kind for kinds in named.values() for kind in kinds} == set(ROUTED) - {
        kind for kind in ROUTED if ROUTERS[kind].drawn
    }
    assert set(named[GroupedRouter]) == {kind for kind, facts in ROUTERS.items() if facts.grouped}
    assert set(named[GshardRouter]) == {kind for kind, facts in ROUTERS.items() if facts.random_second}
    assert set(named[ExpertChoiceRouter]) == {kind for kind, facts in ROUTERS.items() if facts.by_experts}


def test_routing_that_is_only_given_is_trained_with_a_softmax() -> None:
    for kind in ("uniform", "popularity", "hash", "recorded", "trace"):
        assert facts_in_training(kind) is DEEPSEEK_MOE


def test_a_sigmoid_router_is_added_in_one_place(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its name in the schema, without which a scenario that asks for it is refused."""
    monkeypatch.setitem(ROUTERS, NEW.name, NEW)
    gates_agree(NEW)
    router = RouterShape(kind=NEW.name, num_experts=16, top_k=4, routed_scaling_factor=2.5)
    balance = Balance(expert=0.01, loss_free=LossFree(gamma=0.01))
    trace = train_router(small_request(corpus, router=router, balance=balance))
    save_trace(trace, tmp_path / "new.npz")  # and loading checks gates against affinities
    assert np.array_equal(load_trace(tmp_path / "new.npz").final.gates_LSTK, trace.final.gates_LSTK)
    with pytest.raises(UserError, match="gates that plain_sigmoid does not make"):
        monkeypatch.setitem(ROUTERS, NEW.name, replace(NEW, normalised=True))
        load_trace(tmp_path / "new.npz")
    monkeypatch.setitem(ROUTERS, NEW.name, NEW)
    names = router_kernels(NEW.name)
    assert {"router.sigmoid", "router.bias", "router.scale"} <= names
    assert not {"router.softmax", "router.normalise"} & names


def router_kernels(kind: str) -> set[str]:
    """Names of the kernels of a plain torch trainer's step whose router is of that kind."""
    scenario = scenario_from_mapping(SCENARIO)
    router = PlainRouter.model_construct(kind=kind)
    scenario = scenario.model_copy(update={"routing": TrainRouting.model_construct(kind="train", router=router)})
    writer = KernelWriter(kernel_model(scenario.cluster.pools[0].spec, "roofline"), dtype="bf16", part=Part.ROUTER)
    passes = router_part(writer, step_sizes(scenario, None))
    return {operation.label.name for operations in passes for operation in operations}


def test_the_kernels_of_a_router_are_those_of_its_gate() -> None:
    assert {"router.softmax"} < router_kernels("deepseek_moe")
    assert not {"router.bias", "router.normalise", "router.scale"} & router_kernels("deepseek_moe")
    assert {"router.softmax", "router.normalise"} < router_kernels("topk_softmax")
    assert {"router.softmax", "router.scale"} < router_kernels("deepseek_v2")
    assert {"router.sigmoid", "router.bias", "router.normalise"} < router_kernels("deepseek_v3")
