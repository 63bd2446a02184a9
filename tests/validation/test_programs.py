"""The programs of a real run are the same training: ZeRO 1, FSDP2 and tensor ranks beside whole states on one rank."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from moesim.scenario import Scenario, scenario_from_mapping
from moesim.seeding import stream
from moesim.validation.cases import CPU_MODEL, Case, case_data, check_runnable, is_held_out, node_cases
from moesim.validation.prediction import predict
from moesim.validation.programs import build_trainer

TINY = {**CPU_MODEL, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "expert_intermediate": 16, "vocab": 64}
DENSE = {
    "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "dense_intermediate": 64, "vocab": 64,
}  # fmt: skip
STEPS = 2


def scenario(model: dict[str, Any], mesh: dict[str, Any]) -> Scenario:
    data = case_data("tiny", model, 1, 32, {"kind": "uniform"}, "h200")
    data["parallelism"] = {"data": 1, **mesh}
    ranks = data["parallelism"]["data"] * mesh.get("tensor", 1)
    data["cluster"]["gpus_per_node"] = ranks
    data["workload"]["global_batch"] = data["parallelism"]["data"]
    if "experts" not in model:
        del data["routing"]
    if "tensor" in mesh:
        data["implementation"] |= {"sequence_parallel": False, "loss": "parallel"}
    return scenario_from_mapping(data)


def train(case: Scenario, rank: int, batches: int) -> list[float]:
    """Losses of some steps, of this rank's sequences of `batches`."""
    mesh = case.parallelism
    trainer = build_trainer(case, rank=rank, device=torch.device("cpu"))
    tokens = torch.from_numpy(stream(0, "tokens").integers(0, 64, size=(batches, 33)))
    mine = tokens.chunk(mesh.data)[rank // mesh.tensor]
    losses = []
    for _ in range(STEPS):
        loss = trainer.forward(mine[:, :-1], mine[:, 1:])
        trainer.backward(loss)
        trainer.reduce()
        trainer.optimize()
        losses.append(float(loss.detach()) / trainer.share)
    return losses


def process(rank: int, case: Scenario, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    losses: list[Any] = [None, None]
    dist.all_gather_object(losses, train(case, rank, 2))
    if rank == 0:
        np.save(f"{folder}/losses.npy", np.array(losses))
    dist.barrier()
    os._exit(0)  # gloo's threads, torn down beside the other rank's, end one process in some by a signal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (TINY, {"data": 2, "expert": 2}),
        (TINY, {"data": 2, "zero": {"dense": 1, "expert": 1}}),
        (TINY, {"data": 2, "zero": {"dense": 3, "expert": 3}}),
        (DENSE, {"data": 2, "zero": {"dense": 3, "expert": 3}}),
        (DENSE, {"tensor": 2}),
    ],
)
def test_every_program_trains_as_one_rank_does(tmp_path: Path, model: dict[str, Any], mesh: dict[str, Any]) -> None:
    case = scenario(model, mesh)
    check_runnable(case)
    start_processes(process, (case, str(tmp_path)), nprocs=2, start_method="spawn")  # type: ignore[no-untyped-call]
    losses_RN = np.load(tmp_path / "losses.npy")
    alone = train(scenario(model, {}), 0, 2)
    assert losses_RN.mean(axis=0) == pytest.approx(alone, rel=1e-4)
    assert alone[1] < alone[0]


def test_cases_of_a_node_are_runnable_distinct_and_half_of_them_is_kept_out() -> None:
    for gpus in (2, 8):
        cases = list(node_cases(gpus))
        names = [case.name for case in cases]
        assert len(set(names)) == len(names) and {case.gpus for case in cases} == {gpus}
        for case in cases:
            check_runnable(case.scenario)
        assert 0.4 < np.mean([is_held_out(name) for name in names]) < 0.6


@pytest.mark.parametrize("mesh", [{"data": 2, "zero": {"dense": 3, "expert": 3}}, {"tensor": 2}])
def test_parts_of_a_step_add_up_where_collectives_overlap(mesh: dict[str, Any]) -> None:
    predicted = predict(Case("dense", scenario(DENSE, mesh)), [[[]]] * 2)
    assert sum(predicted["parts"].values()) == pytest.approx(predicted["step"], rel=1e-9)
