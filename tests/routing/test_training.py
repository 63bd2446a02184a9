"""Training: it learns, it repeats to the bit, it resumes exactly, and the cache never trains twice."""

import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_cases import shape_of, small_request

from moesim.errors import UserError
from moesim.routing import cached_trace, trace_path
from moesim.routing.corpus import load_corpus
from moesim.routing.request import StepReport, TrainingRequest
from moesim.routing.training import Trainer, _reproducible, learning_rate, train_router
from moesim.scenario.routing import Balance, DeviceCapacity, ExpertCapacity, LossFree
from moesim.trace import RoutingTrace, check_trace, trace_hash


def trainer_of(request: TrainingRequest) -> Trainer:
    import torch

    return Trainer(request, load_corpus(request.corpus), torch.device("cpu"))


def without_provenance(trace: RoutingTrace) -> list[Any]:
    curves = trace.curves
    return [
        [
            (step.expert_ids_LSTK.tobytes(), step.affinities_LSTK.tobytes(), step.gates_LSTK.tobytes())
            for step in trace.steps
        ],
        [
            array.tobytes()
            for array in (curves.train_loss, curves.validation_loss, curves.validation_steps, curves.imbalance)
        ],
    ]


@pytest.mark.parametrize(
    "kind",
    [
        "switch",
        "gshard",
        "topk_softmax",
        "deepseek_moe",
        "deepseek_v2",
        "deepseek_v3",
        "expert_choice",
        "hash",
        "uniform",
    ],
)
def test_every_router_trains_and_gives_a_valid_trace(corpus: Path, kind: str) -> None:
    trace = train_router(small_request(corpus, router=shape_of(kind), steps=2))
    check_trace(trace)
    assert [step.step for step in trace.steps] == [0, 2]
    assert trace.final.expert_ids_LSTK.shape[:3] == (2, 8, 128)
    assert np.isfinite(trace.curves.train_loss).all() and (trace.curves.imbalance >= 1).all()
    assert trace.provenance["versions"].keys() == {"moesim", "torch", "python"}  # type: ignore[union-attr]


def test_the_loss_falls_and_held_out_loss_with_it(corpus: Path) -> None:
    trace = train_router(small_request(corpus, steps=40, balance=Balance(expert=0.01)))
    curves = trace.curves
    assert curves.train_loss[-5:].mean() < 0.6 * curves.train_loss[0]
    assert curves.validation_loss[-1] < 0.6 * curves.validation_loss[0]
    assert curves.validation_steps.tolist() == [0, 8, 16, 24, 32, 40]
    assert curves.steps.tolist() == list(range(1, 41))


def test_the_same_request_gives_the_same_trace_and_another_seed_another(corpus: Path) -> None:
    request = small_request(corpus, steps=3)
    first = train_router(request)
    assert trace_hash(first) == trace_hash(train_router(request))
    assert trace_hash(first) != trace_hash(train_router(small_request(corpus, steps=3, seed=1)))


@pytest.mark.parametrize("how", ["between steps", "signal in a step"])
def test_an_interrupted_run_resumes_to_the_same_bits(corpus: Path, tmp_path: Path, how: str) -> None:
    request = small_request(
        corpus,
        router=shape_of("deepseek_v3"),
        balance=Balance(sequence=1e-4, loss_free=LossFree(gamma=0.01)),
        capacity=DeviceCapacity(kind="device", factor=1.0),
        thin={"micro_batches": 2, "hash_warmup_share": 0.3},
    )

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            if how == "between steps":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_router(request, progress=interrupt, checkpoint_dir=tmp_path)
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1
    seen: list[int] = []
    resumed = train_router(request, progress=lambda report: seen.append(report.step), checkpoint_dir=tmp_path)
    assert seen == [4, 5, 6]
    assert without_provenance(resumed) == without_provenance(train_router(request))


def test_a_model_is_trained_once_whatever_is_recorded_of_it(corpus: Path, tmp_path: Path) -> None:
    request = small_request(
        corpus, steps=2, sequence_length=256, recorded_sequences=64, thin={"layers": 1, "hidden": 16}
    )
    steps: list[StepReport] = []
    cached_trace(request, tmp_path, progress=steps.append)
    more = replace(request, recorded_sequences=70)
    recorded = cached_trace(more, tmp_path, progress=steps.append)
    assert len(steps) == 2
    assert recorded.final.expert_ids_LSTK.shape[1] == 70
    assert recorded.provenance["content_hash"] == more.content_hash()
    assert without_provenance(recorded) == without_provenance(train_router(more))


def test_what_plays_no_part_in_training_is_no_other_router(small) -> None:
    """Devices count for the losses and the capacity that look at them, a micro-batch for expert choice."""

    def hashes(router: str, changes: dict[str, Any]) -> tuple[set[str], set[str]]:
        requests = [
            TrainingRequest.from_scenario(
                small(
                    {"routing": {"kind": "train", "router": {"kind": router}}, **changes}
                    | {"parallelism": {"data": 4, "expert": expert}, "workload.micro_batch": micro}
                )
            )
            for expert in (2, 4)
            for micro in (1, 2)
        ]
        return {each.training_hash() for each in requests}, {each.content_hash() for each in requests}

    assert tuple(map(len, hashes("deepseek_v2", {}))) == (1, 1)
    assert len(hashes("expert_choice", {})[0]) == 2
    assert len(hashes("deepseek_v2", {"routing.balance": {"device": 0.01}})[0]) == 2
    assert len(hashes("deepseek_v2", {"capacity": {"kind": "device", "factor": 1.0}})[0]) == 2


def test_devices_that_play_no_part_change_no_bit(corpus: Path) -> None:
    one, four = (
        small_request(corpus, steps=2, router=shape_of("deepseek_v2", num_devices=devices), balance=Balance(expert=0.1))
        for devices in (1, 4)
    )
    assert without_provenance(train_router(one)) == without_provenance(train_router(four))


def test_a_damaged_checkpoint_is_reported_and_training_starts_over(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = small_request(corpus, steps=2)
    (tmp_path / f"{request.training_hash()[:32]}.checkpoint").write_bytes(b"not a checkpoint")
    trace = train_router(request, checkpoint_dir=tmp_path)
    assert "checkpoint not used" in capsys.readouterr().err
    assert trace_hash(trace) == trace_hash(train_router(request))


def test_an_equal_request_never_trains_twice(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = small_request(corpus, steps=2)
    steps: list[StepReport] = []
    first = cached_trace(request, tmp_path, progress=steps.append)
    again = cached_trace(small_request(corpus, steps=2), tmp_path, progress=steps.append)
    assert len(steps) == 2 and trace_hash(first) == trace_hash(again)
    path = trace_path(request, tmp_path)
    assert sorted(tmp_path.rglob("*.npz")) == [path]
    path.write_bytes(path.read_bytes()[:-100])
    repaired = cached_trace(request, tmp_path, progress=steps.append)
    assert len(steps) == 2 and trace_hash(repaired) == trace_hash(first)  # recorded again, not trained again
    assert "cached trace not used" in capsys.readouterr().err


def test_micro_batches_with_global_scope_equal_one_large_batch(corpus: Path) -> None:
    """f and P over the whole step: splitting it into micro-batches changes neither loss nor gradient."""
    gradients = []
    for micro_batches in (1, 2):
        request = small_request(
            corpus,
            balance=Balance(expert=0.5, device=0.3, communication=0.2, variance=3.0, scope="global_batch"),
            thin={"micro_batches": micro_batches},
        )
        trainer = trainer_of(request)
        whole = trainer_of(small_request(corpus))
        windows, protected = whole._batch(0, 0)
        size = len(windows) // micro_batches
        parts = [(windows[i * size : (i + 1) * size], protected) for i in range(micro_batches)]
        trainer._batch = lambda step, micro, parts=parts: parts[micro]  # type: ignore[method-assign]
        loss, counts_LE = trainer._backward(0)
        gradients.append((loss, counts_LE, [p.grad for p in trainer.model.parameters() if p.grad is not None]))
    (loss, counts, grads), (split_loss, split_counts, split_grads) = gradients
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert all((a == b).all() for a, b in zip(counts, split_counts, strict=True))
    for a, b in zip(grads, split_grads, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-5)


def test_capacity_drops_in_training_and_not_in_evaluation(corpus: Path) -> None:
    tight = small_request(corpus, capacity=ExpertCapacity(kind="expert", factor=0.25), steps=1)
    free = small_request(corpus, steps=1)
    dropped, kept = train_router(tight), train_router(free)
    assert dropped.curves.train_loss[0] != kept.curves.train_loss[0]
    assert dropped.steps[0].expert_ids_LSTK.tobytes() == kept.steps[0].expert_ids_LSTK.tobytes()
    assert dropped.curves.validation_loss[0] == kept.curves.validation_loss[0]


def test_protected_sequences_have_the_wanted_share_on_average(corpus: Path) -> None:
    request = small_request(corpus, capacity=DeviceCapacity(kind="device", factor=1.0, protected_share=0.3))
    trainer = trainer_of(request)
    shares = [trainer._batch(step, 0)[1].float().mean().item() for step in range(300)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert len({round(share * 8) for share in shares}) == 2


def test_hash_warm_up_routes_by_keys_alone(corpus: Path) -> None:
    trainer = trainer_of(small_request(corpus, thin={"hash_warmup_share": 0.5}, steps=4))
    trainer.step = 1
    trainer.advance()
    assert all(layer.router.get_parameter("centroids_EH").grad is None for layer in trainer.model.moe_layers)
    trainer.advance()
    assert all(layer.router.get_parameter("centroids_EH").grad is not None for layer in trainer.model.moe_layers)


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, num_steps=100, peak=1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:])) and 0.1 <= rates[-1] < 0.11


def test_divergence_and_a_missing_device_are_one_line(corpus: Path) -> None:
    with pytest.raises(UserError, match=r"diverged.*learning_rate"):
        request = small_request(corpus)
        train_router(replace(request, thin=request.thin.model_copy(update={"learning_rate": 1e30})))
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            train_router(small_request(corpus, thin={"device": "cuda"}))


def test_settings_of_torch_come_back() -> None:
    import torch

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), _reproducible(torch.device("cpu")):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "topk_softmax", "expert_choice"])
def test_cuda_trains_repeats_and_routes_within_the_limits(kind: str) -> None:
    request = small_request(
        Path("stdlib"),
        router=shape_of(kind),
        capacity=DeviceCapacity(kind="device", factor=1.0),
        thin={"hidden": 64, "device": "cuda", "attention": "mla"},
        steps=30,
    )
    first = train_router(request)
    check_trace(first)
    assert trace_hash(first) == trace_hash(train_router(request))
    assert first.curves.train_loss[-1] < 0.75 * first.curves.train_loss[0]
    assert first.provenance["device"] != "cpu"


@pytest.mark.slow
def test_a_larger_expert_coefficient_balances_better() -> None:
    """On the same held-out text, with real training text."""
    imbalance = []
    for coefficient in (0.0, 0.003, 0.1):
        trace = train_router(
            small_request(
                Path("stdlib"),
                router=shape_of("deepseek_moe"),
                steps=150,
                balance=Balance(expert=coefficient),
                thin={"hidden": 64, "tokens_per_step": 1024},
                recorded_sequences=64,
            )
        )
        loads_LE = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in trace.final.expert_ids_LSTK])
        imbalance.append(float((loads_LE.max(1) / loads_LE.mean(1)).mean()))
    assert imbalance[0] > imbalance[1] > imbalance[2]
    assert imbalance[2] < 1.5
