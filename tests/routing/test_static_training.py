"""The training that a CUDA graph can capture gives what the plain one gives: outputs, gradients, losses, counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_cases import shape_of, small_request
from static_training import StaticExperts, StaticTrainer, static_permutation, train_together

from moesim.routing.corpus import load_corpus
from moesim.routing.held_out import held_out_sequences
from moesim.routing.request import TrainingRequest
from moesim.routing.training import train_router
from moesim.routing.transformer import RoutedExperts
from moesim.scenario.routing import Balance, DeviceCapacity, ExpertCapacity, LossFree, NoCapacity

CPU = torch.device("cpu")
V2 = Balance(expert=0.003, device=0.05, communication=0.02)
CASES = {
    "deepseek_v2": {"capacity": DeviceCapacity(kind="device", factor=1.0, protected_share=0.3), "balance": V2},
    "deepseek_v3": {"capacity": NoCapacity(), "balance": Balance(sequence=1e-3, loss_free=LossFree(gamma=0.01))},
    "gshard": {"capacity": ExpertCapacity(kind="expert", factor=1.0, by="score"), "balance": Balance(expert=0.01)},
}


def request_of(kind: str, corpus: Path, **changes: Any) -> TrainingRequest:
    return small_request(corpus, router=shape_of(kind), **{**CASES[kind], **changes})


@pytest.mark.parametrize("kind", CASES)
def test_same_training_as_the_plain_trainer(kind: str, corpus: Path) -> None:
    request = request_of(kind, corpus)
    plain = train_router(request)
    text = load_corpus(str(corpus))
    trainer = StaticTrainer(request, text, device=CPU)
    steps: list[int] = []
    train_together([trainer], until=request.steps, progress=steps.append)
    sequences = held_out_sequences(
        text.held_out, num_sequences=request.recorded_sequences, length=request.sequence_length
    )
    evaluation = trainer.evaluate(sequences, tokens_per_forward=512)
    curves = trainer.curves()
    np.testing.assert_allclose(curves.train_loss, plain.curves.train_loss, rtol=1e-5)
    np.testing.assert_allclose(curves.imbalance, plain.curves.imbalance, rtol=1e-5)
    assert evaluation.loss == pytest.approx(plain.provenance["recorded_loss"], rel=1e-5)
    recorded = plain.final.expert_ids_LSTK
    for layer, counts_SE in enumerate(evaluation.counts_LSE):
        for sequence, count_E in enumerate(counts_SE):
            np.testing.assert_array_equal(count_E, np.bincount(recorded[layer, sequence].ravel(), minlength=16))
    assert sum(steps) == request.steps == evaluation.step
    dropped_P = trainer.dropped_share_P()
    assert (dropped_P > 0).any() == (kind != "deepseek_v3"), "those with a capacity drop rows of untrained routers"


def test_random_second_experts_are_drawn_as_by_the_plain_trainer(corpus: Path) -> None:
    request = request_of("gshard", corpus)
    request = replace(request, router=replace(request.router, random_second=True))
    trainer = StaticTrainer(request, load_corpus(str(corpus)), device=CPU)
    train_together([trainer], until=request.steps)
    np.testing.assert_allclose(trainer.curves().train_loss, train_router(request).curves.train_loss, rtol=1e-5)


def test_models_side_by_side_do_not_touch_each_other(corpus: Path) -> None:
    requests = [request_of("deepseek_v2", corpus, seed=seed) for seed in (0, 1)]
    text = load_corpus(str(corpus))
    together = [StaticTrainer(request, text, device=CPU) for request in requests]
    train_together(together, until=4)
    for request, trainer in zip(requests, together, strict=True):
        alone = StaticTrainer(request, text, device=CPU)
        train_together([alone], until=4)
        np.testing.assert_array_equal(alone.curves().train_loss, trainer.curves().train_loss)


def test_points_of_a_layout_start_from_the_same_weights(corpus: Path) -> None:
    text = load_corpus(str(corpus))
    one = request_of("deepseek_v2", corpus)
    other = replace(one, router=replace(one.router, group_limit=4), balance=Balance(), capacity=NoCapacity())
    first, second = (StaticTrainer(request, text, device=CPU).model.state_dict() for request in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_same_output_and_gradients_as_routed_experts(missing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, experts, top_k = 24, 16, 8, 3
    modules = [kind(hidden=hidden, num_experts=experts, width=8) for kind in (RoutedExperts, StaticExperts)]
    ids_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    keep_TK = torch.rand(tokens, top_k, generator=generator) >= missing
    ids_TK = ids_TK.masked_fill(torch.rand(tokens, top_k, generator=generator) < missing / 2, -1)
    keep_TK &= ids_TK >= 0
    input_TH, gate_TK = torch.randn(tokens, hidden, generator=generator), torch.rand(tokens, top_k, generator=generator)
    answers = []
    for module in modules:
        module.reset_parameters(torch.Generator().manual_seed(1))
        leaves = (input_TH.clone().requires_grad_(), gate_TK.clone().requires_grad_())
        output_TH = module(leaves[0], ids_TK, leaves[1], keep_TK)
        torch.autograd.backward((output_TH * torch.arange(hidden)).sum())
        answers.append([output_TH.detach(), *(leaf.grad for leaf in (*leaves, *module.parameters()))])
    for plain, static in zip(*answers, strict=True):
        torch.testing.assert_close(static, plain, rtol=1e-4, atol=1e-5)
    assert modules[1].kept_share == pytest.approx(float(keep_TK.float().mean()))


def test_permutation_is_by_expert_and_stable() -> None:
    ids_TK = torch.tensor([[2, 0], [1, 2], [0, 255]])
    order_R, place_TK, offsets_E = static_permutation(ids_TK, num_experts=256)
    assert order_R.tolist() == [1, 4, 2, 0, 3, 5]
    assert order_R[place_TK.flatten()].tolist() == list(range(6))
    assert offsets_E[:4].tolist() == [2, 3, 5, 5] and offsets_E[-2:].tolist() == [5, 6]
