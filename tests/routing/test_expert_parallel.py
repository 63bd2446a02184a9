"""Expert parallelism over two ranks of gloo computes what one process with all experts computes."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from moesim.routing.sharded_model import (
    ExpertGroup,
    ExpertParallelMoE,
    ShardedGate,
    ShardedTrainer,
    build_sharded_model,
    unsupported,
)
from moesim.scenario.model import Gqa, LocalGlobal, Mla, Model
from moesim.scenario.routing import RouterShape

MODEL = Model(
    layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, attention=Gqa(kind="gqa"), dense_layers=1,
    dense_intermediate=48, experts=4, top_k=2, shared_experts=1, expert_intermediate=16, vocab=40,
)  # fmt: skip
SHAPE = RouterShape(kind="deepseek_moe", num_experts=4, top_k=2)
CPU = torch.device("cpu")
SEQUENCES, LENGTH = 4, 8


def batch() -> torch.Tensor:
    return torch.randint(MODEL.vocab, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def skewed_ids(tokens: int) -> torch.Tensor:
    """Every token to expert 0, and in turn to one of the others: rank 1 gets few rows, expert 3 none."""
    others = 1 + torch.arange(tokens) % 2
    return torch.stack([torch.zeros(tokens, dtype=torch.int64), others], dim=1)


def train(group: ExpertGroup, tokens: torch.Tensor, forced: bool) -> tuple[float, dict[str, Any]]:
    """One step on this rank's sequences; the loss of the whole batch, and the gradients."""
    torch.set_num_threads(1)
    model = build_sharded_model(MODEL, SHAPE, group=group, device=CPU, seed=1)
    trainer = ShardedTrainer(model, world=group.size, dense_group=group.handle, learning_rate=1e-2)
    if forced:
        trainer.force_routing([skewed_ids(tokens[:, 1:].numel())])
    loss = trainer.forward(tokens[:, :-1], tokens[:, 1:])
    trainer.backward(loss)
    trainer.reduce()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    total = loss.detach().clone()
    if group.size > 1:
        dist.all_reduce(total, group=group.handle)
    return float(total), gradients


@pytest.fixture(scope="module")
def two_ranks() -> list[list[Any]]:
    """What each of two ranks trained, with the router's own ids and with forced ones: two threads that talk over gloo
    as processes do, which would each import torch."""
    store, tokens = dist.HashStore(), batch().chunk(2)

    def trained(rank: int) -> list[Any]:
        gloo, handle = dist.ProcessGroup.BackendType.GLOO, dist.ProcessGroup(store, rank, 2)
        handle._set_default_backend(gloo)
        handle._register_backend(CPU, gloo, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=120)))
        return [train(ExpertGroup(rank, 2, handle), tokens[rank], forced) for forced in (False, True)]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(trained, range(2)))


@pytest.mark.parametrize("forced", [False, True])
def test_two_ranks_train_as_one(two_ranks: list[list[Any]], forced: bool) -> None:
    loss, gradients = train(ExpertGroup(), batch(), forced)
    parts = [trained[forced] for trained in two_ranks]
    for rank, (other_loss, others) in enumerate(parts):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            mine = gradient.chunk(2)[rank] if ".experts." in name else gradient
            other = others.get(name, torch.zeros_like(mine))
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6)
    assert any(name.endswith("experts.w2_EIH") for name in gradients)


def test_micro_batches_add_up_to_one_batch() -> None:
    tokens = batch()
    _, whole = train(ExpertGroup(), tokens, forced=False)
    model = build_sharded_model(MODEL, SHAPE, group=ExpertGroup(), device=CPU, seed=1)
    trainer = ShardedTrainer(model, micro_batches=2)
    for half in tokens.chunk(2):
        trainer.backward(trainer.forward(half[:, :-1], half[:, 1:]))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_the_layer_is_the_sum_over_selected_experts() -> None:
    layer = ExpertParallelMoE(SHAPE, hidden=16, width=8, shared_experts=0, group=ExpertGroup())
    generator = torch.Generator().manual_seed(5)
    layer.router.reset_parameters(generator)
    layer.experts.reset_parameters(generator)
    hidden_TH = torch.randn(6, 16, generator=generator)
    routing = layer.router(hidden_TH)
    expected_TH = torch.zeros(6, 16)
    for token in range(6):
        for expert, gate in zip(routing.expert_ids_TK[token].tolist(), routing.gates_TK[token], strict=True):
            first, second = (hidden_TH[token] @ layer.experts.w13_EHF[expert]).chunk(2)
            expected_TH[token] += gate * ((functional.silu(first) * second) @ layer.experts.w2_EIH[expert])
    torch.testing.assert_close(layer(hidden_TH), expected_TH, rtol=1e-4, atol=1e-6)
    assert layer.last_count_E is not None and int(layer.last_count_E.sum()) == 12


def test_forced_ids_take_the_place_of_the_selection() -> None:
    gate = ShardedGate(8, RouterShape(kind="deepseek_v3", num_experts=16, top_k=3, routed_scaling_factor=2.5))
    gate.reset_parameters(torch.Generator().manual_seed(2))
    gate.forced_ids_TK = torch.tensor([[3, 1, 2]]).expand(50, 3)
    routing = gate(torch.randn(50, 8, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(routing.expert_ids_TK, gate.forced_ids_TK)
    torch.testing.assert_close(routing.gates_TK.sum(dim=1), torch.full((50,), 2.5))


def test_a_rank_without_rows_still_answers() -> None:
    layer = ExpertParallelMoE(SHAPE, hidden=16, width=8, shared_experts=1, group=ExpertGroup())
    assert layer.experts.compute(torch.zeros(0, 16), torch.zeros(4, dtype=torch.int32)).shape == (0, 16)


def test_mla_and_tied_embeddings_train() -> None:
    mla = Mla(kind="mla", q_lora_rank=12, kv_lora_rank=8, rope_head_dim=4)
    model_shape = MODEL.model_copy(update={"attention": mla, "tied_embeddings": True})
    model = build_sharded_model(model_shape, SHAPE, group=ExpertGroup(), device=CPU, seed=1)
    trainer = ShardedTrainer(model, learning_rate=1e-2)
    tokens, losses = batch(), []
    for _ in range(6):
        loss = trainer.forward(tokens[:, :-1], tokens[:, 1:])
        losses.append(float(loss.detach()))
        trainer.backward(loss)
        trainer.optimize()
    assert losses[-1] < losses[0]


def test_what_the_software_cannot_run_is_named() -> None:
    assert unsupported(MODEL) is None
    local = MODEL.model_copy(update={"attention": LocalGlobal(kind="local_global")})
    assert "local_global" in str(unsupported(local))
    assert "mtp_layers" in str(unsupported(MODEL.model_copy(update={"mtp_layers": 1})))
    free = Mla(kind="mla", kv_lora_rank=8, rope_head_dim=4)
    assert "q_lora_rank" in str(unsupported(MODEL.model_copy(update={"attention": free})))
