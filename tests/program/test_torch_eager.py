"""The list of eager kernels against the software that it describes, and its laws."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moesim.engine import simulate_step
from moesim.engine.step import StepOutcome
from moesim.kernels import Roofline
from moesim.network import build_fabric
from moesim.program import StepProgram, build_program
from moesim.program.operations import Kind, Operation
from moesim.routing.sharded_model import ExpertGroup, ShardedTrainer, build_sharded_model
from moesim.run import draw_samples, obtain_trace
from moesim.scenario import Scenario, gpu_spec, scenario_from_mapping

MODEL: dict[str, Any] = {
    "layers": 3, "dense_layers": 1, "dense_intermediate": 64, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
    "attention": {"kind": "gqa"}, "experts": 8, "top_k": 2, "shared_experts": 1, "expert_intermediate": 16, "vocab": 64,
}  # fmt: skip
INSIDES = ("aten::_grouped_mm", "aten::scaled_dot_product_attention")
MLA = {"kind": "mla", "q_lora_rank": 16, "kv_lora_rank": 8, "rope_head_dim": 4}


def scenario(gpus: int = 1, *, model: dict[str, Any] | None = None, batch: int = 1, **changes: Any) -> Scenario:
    data: dict[str, Any] = {
        "schema_version": 1,
        "name": "eager",
        "model": {**MODEL, **(model or {})},
        "routing": {"kind": "uniform"},
        "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": gpus},
        "parallelism": {"data": gpus, "expert": gpus},
        "workload": {"kind": "training", "sequence_length": 64, "global_batch": gpus * batch,
                     "precision": {"optimizer": "bf16"}},
        "dispatch": {"deduplicate": "per_expert"},
        "implementation": {"kind": "torch_eager"},
        "uncertainty": {"samples": 1},
    }  # fmt: skip
    return scenario_from_mapping({**data, **changes})


class Host(Roofline):
    """A GPU of the catalogue with a host of given speed."""

    def __init__(self, launch: float) -> None:
        super().__init__(gpu_spec("h200"))
        self.host = replace(self.host, launch=launch, backward_launch=launch)


def program(case: Scenario, kernels: Any = None) -> StepProgram:
    plain, _ = draw_samples(case, obtain_trace(case))
    kernels = kernels or Host(1e-5)
    return build_program(case, fabric=build_fabric(case.cluster), kernels=kernels, samples=plain)


def operations(case: Scenario) -> list[Operation]:
    return [
        operation for task in program(case).groups[0].tasks for run in task.runs for operation in run.block.operations
    ]


def run(case: Scenario, kernels: Any = None) -> StepOutcome:
    return simulate_step(program(case, kernels))


def executed(case: Scenario) -> Counter[str]:
    """Operations of one real step on the CPU, by torch's name; grouped GEMMs and attention count as one."""
    torch.set_num_threads(1)
    shape = case.router_shape()
    model = build_sharded_model(case.model, shape, group=ExpertGroup(), device=torch.device("cpu"), seed=0)
    trainer = ShardedTrainer(model)
    tokens = torch.randint(64, (1, 65), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        trainer.backward(trainer.forward(tokens[:, :-1], tokens[:, 1:]))
    found: Counter[str] = Counter()
    for event in profiler.events():
        parent = event.cpu_parent
        while parent is not None and parent.name not in INSIDES:
            parent = parent.cpu_parent
        if parent is None:
            found[event.name] += 1
    return found


@pytest.mark.parametrize(
    "model", [{}, {"attention": {"kind": "mha"}, "kv_heads": 4}, {"attention": MLA, "kv_heads": 4}]
)
def test_the_list_holds_the_gemms_and_sorts_of_the_software(model: dict[str, Any]) -> None:
    case = scenario(model=model)
    real = executed(case)
    names = [operation.label.name for operation in operations(case)]
    grouped = [name for name in names if name.split(".")[:2] in (["experts", "w13"], ["experts", "w2"])]
    gemms = ("q", "k", "v", "q_down", "q_up", "kv_down", "kv_up", "attention_out", "router.gate", "head", "ffn.w13",
                "ffn.w2", "shared.w13", "shared.w2")  # fmt: skip
    dense = [name for name in names if name.removesuffix(".dgrad").removesuffix(".wgrad") in gemms]
    assert len(dense) == real["aten::mm"]
    assert len(grouped) == real["aten::_grouped_mm"] == 12
    assert names.count("permute.sort") == real["aten::sort"] == 2
    assert names.count("router.topk") == real["aten::topk"] == 2
    assert names.count("router.softmax") == real["aten::_softmax"] == 2
    norms = [name for name in names if name.endswith("_norm")]
    assert len(norms) == real["aten::rms_norm"]


def test_backward_mirrors_forward() -> None:
    names = [operation.label.name for operation in operations(scenario(2))]
    forward = [name for name in names if name.endswith((".w13", ".w2"))]
    wgrads = [name.removesuffix(".wgrad") for name in names if name.endswith((".w13.wgrad", ".w2.wgrad"))]
    assert wgrads == forward[::-1]


def test_one_rank_exchanges_nothing_and_never_waits_for_its_host() -> None:
    kinds = {operation.kind for operation in operations(scenario(1))}
    assert kinds == {Kind.COMPUTE}
    assert program(scenario(1)).reductions == ()


def test_two_ranks_exchange_counts_read_them_and_then_send_rows() -> None:
    case = scenario(2)
    listed = [operation for operation in operations(case) if operation.kind is not Kind.COMPUTE]
    first = [operation.label.name for operation in listed[:4]]
    assert first == ["dispatch.counts", "dispatch.readback", "dispatch", "combine"]
    assert sum(operation.kind is Kind.READBACK for operation in listed) == case.model.moe_layers
    assert [reduction.name for reduction in program(case).reductions] == ["all_reduce.dense"]
    names = [operation.label.name for operation in program(case).groups[0].optimizer.operations]
    assert names == ["gradients.unflatten", "adamw"]


def test_a_slow_host_sets_the_step() -> None:
    """With a host a thousand times slower than the device, the step is the host's launches."""
    case = scenario(1)
    slow, slower = (float(run(case, Host(launch)).step_S[0]) for launch in (1e-3, 2e-3))
    launches = sum(operation.launches for operation in operations(case)) + 1
    assert slow == pytest.approx(launches * 1e-3, rel=0.05)
    assert slower == pytest.approx(2 * slow, rel=0.01)
    free = float(run(case, Host(0.0)).step_S[0])
    busy = sum(
        float(operation.seconds_MSR.sum()) for operation in operations(case) if operation.seconds_MSR is not None
    )
    optimizer = program(case).groups[0].optimizer.operations[0].seconds_MSR
    assert optimizer is not None and free == pytest.approx(busy + float(optimizer.sum()), rel=1e-9)


def test_further_micro_batches_add_to_the_gradients() -> None:
    names = [operation.label.name for operation in operations(scenario(1, batch=3))]
    assert names.count("gradients.add") == 2
    assert names.count("head") == 3


def test_sigmoid_routers_normalise_their_gates() -> None:
    routing = {
        "kind": "popularity",
        "counts": [1.0] * 8,
        "router": {"kind": "deepseek_v3", "groups": 1, "group_limit": 1},
    }
    trained = {"kind": "train", "router": {"kind": "deepseek_v3", "groups": 1, "group_limit": 1}}
    assert scenario(routing=trained).router_shape().kind == "deepseek_v3"
    popular = [operation.label.name for operation in operations(scenario(routing=routing))]
    assert "router.softmax" in popular and "router.normalise" not in popular
