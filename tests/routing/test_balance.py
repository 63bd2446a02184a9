"""Every balance loss against its formula written plainly, at perfect balance, and without gradient through f."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from moe_cases import router_inputs, shape_of

from moesim.routing.balance import BALANCE_LOSSES, balance_loss, load_imbalance, loss_free_update, routing_sums
from moesim.routing.routers import LearnedRouter, Routing, build_router, top_ids
from moesim.scenario.routing import Balance, RouterShape

SEQUENCES, LENGTH = 3, 20
T = SEQUENCES * LENGTH


def random_routing(shape: RouterShape, seed: int, *, sigmoid: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(T, shape.num_experts, generator=generator)
    scores_TE = (logits_TE.sigmoid() if sigmoid else logits_TE.softmax(1)).requires_grad_()
    ids_TK = top_ids(scores_TE, shape.top_k)
    affinities_TK = scores_TE.gather(1, ids_TK)
    return Routing(ids_TK, affinities_TK, affinities_TK, scores_TE)


def plain_f(chosen_TE: np.ndarray, shape: RouterShape) -> np.ndarray:
    return shape.num_experts / (shape.top_k * len(chosen_TE)) * chosen_TE.sum(0)


def plain_expert(chosen: np.ndarray, s: np.ndarray, shape: RouterShape) -> float:
    return sum(plain_f(chosen, shape)[i] * s[:, i].mean() for i in range(shape.num_experts))


def plain_device(chosen: np.ndarray, s: np.ndarray, shape: RouterShape) -> float:
    total = 0.0
    for members in np.arange(shape.num_experts).reshape(shape.num_devices, -1):
        total += np.mean([plain_f(chosen, shape)[j] for j in members]) * sum(s[:, j].mean() for j in members)
    return total


def plain_communication(chosen: np.ndarray, s: np.ndarray, shape: RouterShape) -> float:
    total = 0.0
    for members in np.arange(shape.num_experts).reshape(shape.num_devices, -1):
        sent = sum(1 for token in chosen if token[members].any())
        total += shape.num_devices / (shape.group_limit * len(s)) * sent * sum(s[:, j].mean() for j in members)
    return total


def plain_variance(chosen: np.ndarray, s: np.ndarray, shape: RouterShape) -> float:
    return sum((s[:, i].mean() - 1 / shape.num_experts) ** 2 for i in range(shape.num_experts))


def plain_sequence(chosen: np.ndarray, s: np.ndarray, shape: RouterShape) -> float:
    values = []
    for start in range(0, len(s), LENGTH):
        values.append(plain_expert(chosen[start : start + LENGTH], s[start : start + LENGTH], shape))
    return float(np.mean(values))


PLAIN: dict[str, Callable[[np.ndarray, np.ndarray, RouterShape], float]] = {
    "expert": plain_expert,
    "device": plain_device,
    "communication": plain_communication,
    "variance": plain_variance,
    "sequence": plain_sequence,
}


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_losses_equal_their_formulas(name: str, sigmoid: bool) -> None:
    shape = shape_of("deepseek_v3" if sigmoid else "deepseek_v2")
    for seed in range(3):
        routing = random_routing(shape, seed, sigmoid=sigmoid)
        assert routing.probabilities_TE is not None
        scores = routing.probabilities_TE.detach().double().numpy()
        scores /= scores.sum(1, keepdims=True)
        chosen = np.zeros((T, shape.num_experts))
        np.put_along_axis(chosen, routing.expert_ids_TK.numpy(), 1.0, axis=1)
        sums = routing_sums(routing, shape=shape, num_sequences=SEQUENCES)
        got = BALANCE_LOSSES[name](sums, shape=shape).item()
        assert got == pytest.approx(PLAIN[name](chosen, scores, shape), rel=1e-5, abs=1e-9)


def loss_and_gradient(name: str, shape: RouterShape, *, shift: float) -> tuple[float, torch.Tensor]:
    """A loss of the router's own routing of logits of which the largest is near 0, all shifted, and its gradient."""
    logits_TE = 2 * torch.randn(T, shape.num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    chosen_TK = top_ids(logits_TE, shape.top_k)
    logits_TE = (logits_TE - 8 + shift).requires_grad_()
    router = build_router(shape, hidden=8, generator=torch.Generator())
    assert isinstance(router, LearnedRouter)
    routing = router.route(logits_TE, router_inputs(T))._replace(expert_ids_TK=chosen_TK)
    loss = BALANCE_LOSSES[name](routing_sums(routing, shape=shape, num_sequences=SEQUENCES), shape=shape)
    loss.backward()
    assert logits_TE.grad is not None
    return loss.item(), logits_TE.grad


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("shift", [-20.0, -55.0, -80.0, -110.0, -1e4])
def test_a_shift_of_all_sigmoid_logits_changes_no_loss(name: str, shift: float) -> None:
    """While s = e^logit, also where s is 0 in float32, the losses are those of a softmax but for rounding."""
    loss, gradient_TE = loss_and_gradient(name, shape_of("deepseek_v3"), shift=shift)
    wanted, wanted_TE = loss_and_gradient(name, shape_of("deepseek_v2"), shift=0.0)
    tolerance = 1e-6 * (1 + abs(shift))  # of the shifted logits themselves
    assert loss == pytest.approx(wanted, rel=tolerance)
    torch.testing.assert_close(gradient_TE, wanted_TE, rtol=tolerance, atol=float(tolerance * wanted_TE.abs().max()))
    assert gradient_TE.abs().max() > 0


@pytest.mark.parametrize("name", ["expert", "device", "sequence"])
@pytest.mark.parametrize("shift", [-200.0, -20.0, 0.0, 8.0, 30.0])
def test_at_equal_loads_no_size_of_the_sigmoids_lowers_a_loss(name: str, shift: float) -> None:
    shape = shape_of("deepseek_v3")
    logits_TE = 2 * torch.randn(SEQUENCES * 16, 16, generator=torch.Generator().manual_seed(0)) + shift
    router = build_router(shape, hidden=8, generator=torch.Generator())
    assert isinstance(router, LearnedRouter)
    ids_TK = (torch.arange(SEQUENCES * 16).unsqueeze(1) + torch.tensor([0, 1, 8, 9])) % 16
    routing = router.route(logits_TE, router_inputs(len(ids_TK)))._replace(expert_ids_TK=ids_TK)
    sums = routing_sums(routing, shape=shape, num_sequences=SEQUENCES)
    assert BALANCE_LOSSES[name](sums, shape=shape).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("offset", [-60.0, -90.0, -110.0])
def test_scores_that_are_all_zero_give_finite_losses(offset: float) -> None:
    """Sigmoids that somebody else hands over, without the logits."""
    shape = shape_of("deepseek_v3")
    logits_TE = (torch.randn(T, 16, generator=torch.Generator().manual_seed(0)) + offset).requires_grad_()
    scores_TE = logits_TE.sigmoid()
    ids_TK = top_ids(logits_TE, 4)
    routing = Routing(ids_TK, scores_TE.gather(1, ids_TK), scores_TE.gather(1, ids_TK), scores_TE)
    sums = routing_sums(routing, shape=shape, num_sequences=SEQUENCES)
    everything = torch.stack([form(sums, shape=shape) for form in BALANCE_LOSSES.values()])
    everything.sum().backward()
    assert logits_TE.grad is not None
    assert everything.isfinite().all() and logits_TE.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "wanted"), [("expert", 1.0), ("device", 1.0), ("sequence", 1.0), ("variance", 0.0), ("communication", 1.0)]
)
def test_values_at_perfect_balance(name: str, wanted: float) -> None:
    """Every expert equally often, s uniform; each token uses two devices, the limit, so communication gives 2/2."""
    shape = shape_of("deepseek_v2")
    pairs_T = torch.arange(SEQUENCES * 16) // 2 * 2 % 16
    ids_TK = (pairs_T.unsqueeze(1) + torch.tensor([0, 1, 8, 9])) % 16  # two pairs, each within a device of four
    uniform_TE = torch.full((len(ids_TK), 16), 1 / 16)
    routing = Routing(ids_TK, uniform_TE[:, :4], uniform_TE[:, :4], uniform_TE)
    sums = routing_sums(routing, shape=shape, num_sequences=SEQUENCES)
    assert load_imbalance(sums.count_E) == 1.0
    assert BALANCE_LOSSES[name](sums, shape=shape).item() == pytest.approx(wanted, abs=1e-6)


def test_gradient_flows_through_p_alone() -> None:
    shape = shape_of("deepseek_v2")
    routing = random_routing(shape, 0)
    assert routing.probabilities_TE is not None
    sums = routing_sums(routing, shape=shape, num_sequences=SEQUENCES)
    BALANCE_LOSSES["expert"](sums, shape=shape).backward()
    frequency_E = sums.count_E * shape.num_experts / (shape.top_k * T)
    assert not sums.count_E.requires_grad and not sums.reach_D.requires_grad
    torch.testing.assert_close(routing.probabilities_TE.grad, (frequency_E / T).expand(T, -1))


def test_global_batch_sums_equal_those_of_all_tokens_at_once() -> None:
    shape = shape_of("deepseek_v2")
    whole = random_routing(shape, 0)
    parts = [Routing(*(field[i * LENGTH : (i + 1) * LENGTH] for field in whole)) for i in range(SEQUENCES)]
    one = routing_sums(whole, shape=shape, num_sequences=SEQUENCES)
    first, *others = [routing_sums(part, shape=shape, num_sequences=1) for part in parts]
    total = first
    for other in others:
        total = total + other
    everything = Balance(expert=0.3, device=0.2, communication=0.1, variance=5.0, sequence=0.7)
    both = [balance_loss(sums, shape=shape, balance=everything) for sums in (one, total)]
    torch.testing.assert_close(both[0], both[1])
    wanted = sum(getattr(everything, name) * BALANCE_LOSSES[name](one, shape=shape).item() for name in BALANCE_LOSSES)
    assert both[0].item() == pytest.approx(wanted)


def test_missing_selections_count_for_nothing() -> None:
    shape = shape_of("deepseek_v2")
    routing = random_routing(shape, 0)
    ids_TK = routing.expert_ids_TK.clone()
    ids_TK[:, -1] = -1
    sums = routing_sums(routing._replace(expert_ids_TK=ids_TK), shape=shape, num_sequences=1)
    assert int(sums.count_E.sum()) == T * (shape.top_k - 1)


def test_loss_free_moves_towards_the_mean_by_the_sign() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.5, 0.0])
    loss_free_update(bias_E, torch.tensor([10.0, 2.0, 4.0, 4.0]) + torch.tensor([0.0, 0.0, 1.0, 0.0]), gamma=0.01)
    torch.testing.assert_close(bias_E, torch.tensor([0.49, 0.01, -0.49, 0.01]))
    balanced_E = torch.zeros(3)
    loss_free_update(balanced_E, torch.tensor([7.0, 7.0, 7.0]), gamma=0.01)
    assert (balanced_E == 0).all()
