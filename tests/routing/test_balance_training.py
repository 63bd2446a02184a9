"""What balance losses are for: trained with one, a router balances what the loss names, the more the larger it is."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from moe_cases import shape_of, small_request

from moesim.routing.request import TrainingRequest
from moesim.routing.training import train_router
from moesim.scenario import load_scenario
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import Balance, RouterShape
from moesim.trace import RoutingTrace, TraceStep
from moesim.trace.metrics import imbalance

COEFFICIENTS = {
    "expert": (0.0, 0.1, 1.0),
    "device": (0.0, 0.1, 1.0),
    "communication": (0.0, 0.1, 1.0),
    "sequence": (0.0, 0.1, 1.0),
    "variance": (0.0, 1.0, 100.0),
}
CHANCE = 1.1  # what little of it 60 steps and 2048 held-out tokens leave

SIGMOIDS_WITH_V2_LOSSES = """
schema_version: 1
name: sigmoids
model: {preset: deepseek-moe-16b}
routing:
  kind: train
  router: {kind: deepseek_v3, groups: 8, group_limit: 3}
  balance: {expert: 0.003, device: 0.05, communication: 0.02}
  steps: 150
cluster: {gpu: h200, nodes: 1, gpus_per_node: 8}
parallelism: {data: 8, expert: 8}
workload: {kind: training, sequence_length: 4096, micro_batch: 1, global_batch: 64}
"""


@cache
def trained(corpus: Path, kind: str, loss: str, coefficient: float) -> RoutingTrace:
    balance = Balance(**{loss: coefficient})
    return train_router(small_request(corpus, router=shape_of(kind), steps=60, balance=balance))


def load_of(loss: str, step: TraceStep, router: RouterShape) -> float:
    """max / mean, over the layers, of what the loss balances: rows of experts, rows of devices, tokens of devices."""
    experts_LE = step.load_LE(num_experts=router.num_experts)
    if loss not in ("device", "communication"):
        return float(imbalance(experts_LE).mean())
    devices = router.num_devices
    if loss == "device":
        return float(imbalance(experts_LE.reshape(len(experts_LE), devices, -1).sum(axis=2)).mean())
    ids = step.expert_ids_LSTK
    device_of = np.where(ids < 0, -1, ids // (router.num_experts // devices))
    reached_LD = np.stack([(device_of == device).any(axis=-1).sum(axis=(1, 2)) for device in range(devices)], axis=1)
    return float(imbalance(reached_LD).mean())


@pytest.mark.slow
@pytest.mark.parametrize("loss", COEFFICIENTS)
@pytest.mark.parametrize("kind", [kind for kind, facts in ROUTERS.items() if facts.learned])
def test_a_larger_coefficient_never_ends_with_more_imbalance(corpus: Path, kind: str, loss: str) -> None:
    router = shape_of(kind)
    ends = [
        load_of(loss, trained(corpus, kind, loss if coefficient else "expert", coefficient).final, router)
        for coefficient in COEFFICIENTS[loss]
    ]
    assert all(larger <= CHANCE * smaller for smaller, larger in pairwise(ends)), ends
    if kind != "expert_choice":  # whose experts are equally loaded by themselves
        assert ends[-1] < 0.9 * ends[0], f"the loss does something: {ends}"


@pytest.mark.slow
def test_sigmoids_are_balanced_by_the_losses_of_deepseek_v2(tmp_path: Path) -> None:
    path = tmp_path / "sigmoids.yaml"
    path.write_text(SIGMOIDS_WITH_V2_LOSSES)
    trace = train_router(TrainingRequest.from_scenario(load_scenario(path)))
    first, last = (imbalance(step.load_LE(num_experts=64)) for step in (trace.steps[0], trace.final))
    assert (last < first).all(), f"{last} after training, {first} before"
    assert trace.curves.validation_loss[-1] < 2.5, "raw sigmoids end at 2.56 nats per byte"
