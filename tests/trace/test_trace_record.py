"""Invariants of a trace, cutting its tokens into other sequences, and draws of sequences."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.trace import RoutingTrace, TraceStep, TrainingCurves, check_trace, uniform_trace
from moesim.trace.check import has_duplicates
from moesim.trace.metrics import distinct_domains, imbalance, uniform_floor
from moesim.trace.record import choose_protected, draw_sequences, group_of_expert

ROUTER = RouterShape(kind="deepseek_v2", num_experts=16, top_k=3, num_groups=4, group_limit=2)


def trace(**changes: object) -> RoutingTrace:
    made = uniform_trace(ROUTER, num_layers=2, num_sequences=6, sequence_length=10, seed=1)
    return replace(made, steps=(replace(made.final, **changes),))


def with_ids(*, token: tuple[int, ...], ids: list[int]) -> RoutingTrace:
    made = trace()
    ids_LSTK = made.final.expert_ids_LSTK.copy()
    ids_LSTK[token] = ids
    return replace(made, steps=(replace(made.final, expert_ids_LSTK=ids_LSTK),))


def test_a_sound_trace_passes() -> None:
    check_trace(trace())
    assert (trace().num_layers, trace().num_sequences, trace().sequence_length) == (2, 6, 10)


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([0, 1, 16], "outside 0..15"),
        ([0, 1, -2], "outside 0..15"),
        ([0, 1, -1], "top_k = 3"),
        ([5, 0, 5], "twice"),
        ([0, 4, 8], "3 groups, over the limit 2"),
    ],
)
def test_broken_selections_are_named(ids: list[int], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        check_trace(with_ids(token=(1, 5, 9), ids=ids))


def test_shapes_types_and_values_are_checked() -> None:
    final = trace().final
    with pytest.raises(UserError, match="shapes"):
        check_trace(trace(gates_LSTK=final.gates_LSTK[:, :-1]))
    with pytest.raises(UserError, match="types"):
        check_trace(trace(expert_ids_LSTK=final.expert_ids_LSTK.astype(np.int64)))
    with pytest.raises(UserError, match="not finite"):
        check_trace(trace(affinities_LSTK=np.full_like(final.affinities_LSTK, np.nan)))


def test_steps_ascend_and_curves_are_lists() -> None:
    made = trace()
    with pytest.raises(UserError, match="ascending"):
        check_trace(replace(made, steps=(made.final, made.final)))
    with pytest.raises(UserError, match="curve train_loss is no list"):
        check_trace(replace(made, curves=TrainingCurves(train_loss=np.zeros((2, 2)))))


def expert_choice_step() -> TraceStep:
    ids = np.array([[3, -1, -1, -1], [0, 2, -1, 1], [-1, -1, -1, -1]], dtype=np.int16).reshape(1, 1, 3, 4)
    values = np.where(ids >= 0, 0.5, 0.0).astype(np.float32)
    return TraceStep(step=0, expert_ids_LSTK=ids, affinities_LSTK=values, gates_LSTK=values)


def test_expert_choice_may_give_a_token_any_number_of_experts() -> None:
    router = RouterShape(kind="expert_choice", num_experts=4, top_k=2)
    check_trace(RoutingTrace(router=router, steps=(expert_choice_step(),)))
    assert distinct_domains(expert_choice_step().expert_ids_LSTK, domain_of_expert_E=np.arange(4)).tolist() == [
        [[1, 3, 0]]
    ]


def test_only_a_random_second_expert_may_be_missing_in_top_k_routing() -> None:
    ids = np.array([[3, -1], [0, 2]], dtype=np.int16).reshape(1, 1, 2, 2)
    values = np.where(ids >= 0, 0.5, 0.0).astype(np.float32)
    step = TraceStep(step=0, expert_ids_LSTK=ids, affinities_LSTK=values, gates_LSTK=values)
    router = RouterShape(kind="gshard", num_experts=4, top_k=2, random_second=True)
    check_trace(RoutingTrace(router=router, steps=(step,)))
    with pytest.raises(UserError, match="top_k = 2"):
        check_trace(RoutingTrace(router=replace(router, random_second=False), steps=(step,)))


def test_resequence_keeps_the_order_of_tokens() -> None:
    made = trace()
    joined = made.resequence(25)
    assert joined.final.expert_ids_LSTK.shape == (2, 2, 25, 3)
    flat = made.final.expert_ids_LSTK.reshape(2, 60, 3)
    np.testing.assert_array_equal(joined.final.expert_ids_LSTK.reshape(2, 50, 3), flat[:, :50])
    np.testing.assert_array_equal(made.resequence(5).final.gates_LSTK.reshape(2, 60, 3).shape, flat.shape)
    assert made.resequence(10) is made


def test_resequence_leaves_out_short_early_steps_and_refuses_a_short_trace() -> None:
    made = trace()
    early = replace(made.final.resequence(10), step=-1, expert_ids_LSTK=made.final.expert_ids_LSTK[:, :1])
    early = replace(early, affinities_LSTK=early.affinities_LSTK[:, :1], gates_LSTK=early.gates_LSTK[:, :1])
    both = replace(made, steps=(early, made.final))
    assert [step.step for step in both.resequence(5).steps] == [-1, 0]
    assert [step.step for step in both.resequence(30).steps] == [0]
    with pytest.raises(UserError, match="60 tokens, less than one sequence of 61"):
        both.resequence(61)


@pytest.mark.parametrize("columns", [3, 20])
def test_duplicates_are_found_in_short_and_long_rows(columns: int) -> None:
    ids_TK = np.argsort(np.random.default_rng(0).random((50, 40)), axis=1)[:, :columns].astype(np.int16)
    ids_TK[3, :2] = -1
    assert not has_duplicates(ids_TK)
    ids_TK[49, 0] = ids_TK[49, columns - 1]
    assert has_duplicates(ids_TK)


def test_distinct_domains_against_sets() -> None:
    router = RouterShape(kind="x", num_experts=160, top_k=5, num_groups=80, group_limit=80)
    ids_TK = np.random.default_rng(2).integers(-1, 160, (200, 5)).astype(np.int16)
    expected = [len({expert // 2 for expert in row if expert >= 0}) for row in ids_TK.tolist()]
    counted = distinct_domains(ids_TK, domain_of_expert_E=group_of_expert(router))
    assert counted.tolist() == expected


def draw(num_trace: int, micro_batches: int, ranks: int, size: int, *, seed: int = 0, bootstrap: bool = False):
    return draw_sequences(
        num_trace,
        num_micro_batches=micro_batches,
        num_data_ranks=ranks,
        micro_batch=size,
        rng=np.random.default_rng(seed),
        bootstrap=bootstrap,
    )


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5))
def test_sequences_repeat_as_little_as_possible(trace: int, micro: int, ranks: int, size: int, seed: int) -> None:
    drawn = draw(trace, micro, ranks, size, seed=seed)
    slots = micro * ranks * size
    uses = np.bincount(drawn.sequences_BNU.reshape(-1), minlength=trace)
    assert uses.max() - uses.min() <= 1
    assert drawn.num_distinct == min(trace, slots)
    assert drawn.reused_share == pytest.approx(1 - min(trace, slots) / slots)
    if trace >= ranks * size:
        for hand in drawn.sequences_BNU:
            assert len(np.unique(hand)) == ranks * size


def test_bootstrap_resamples_the_trace() -> None:
    distinct = [draw(200, 10, 5, 4, seed=seed, bootstrap=True).num_distinct for seed in range(30)]
    assert np.mean(distinct) == pytest.approx(200 * (1 - np.exp(-1)), rel=0.03)
    assert draw(200, 10, 5, 4).num_distinct == 200


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_micro_batches_hold_sequences_of_one_phase_each_in_turn(size, phases, micro, bootstrap, seed) -> None:
    drawn = draw_sequences(
        size * phases,
        num_micro_batches=micro,
        num_data_ranks=3,
        micro_batch=2,
        rng=np.random.default_rng(seed),
        bootstrap=bootstrap,
        num_phases=phases,
    )
    phase_BNU = drawn.sequences_BNU // size
    assert (phase_BNU == phase_BNU[:, :1, :1]).all()
    assert (np.diff(phase_BNU[:, 0, 0]) % phases == 1 % phases).all()


def test_protected_sequences_are_an_exact_share() -> None:
    protected = choose_protected((8, 8, 1), share=0.1, rng=np.random.default_rng(0))
    assert protected.sum() == 6
    assert protected.shape == (8, 8, 1)
    assert choose_protected((4, 5), share=1.0, rng=np.random.default_rng(0)).all()


def test_imbalance_is_max_over_mean() -> None:
    np.testing.assert_allclose(imbalance(np.array([[1, 1, 4], [2, 2, 2], [0, 0, 0]])), [2.0, 1.0, 1.0])


# The two floors that the spec states, for the expert layouts of DeepSeekMoE-16B (6 of 64) and DeepSeek-V3 (8 of 256).
@pytest.mark.parametrize(("experts", "top_k", "floor"), [(64, 6, 1.12), (256, 8, 1.25)])
def test_floor_of_a_uniform_router(experts: int, top_k: int, floor: float) -> None:
    assert uniform_floor(experts, top_k=top_k, tokens=4096) == pytest.approx(floor, abs=0.006)


def test_floor_against_the_normal_approximation() -> None:
    """Loads are nearly normal with the variance of drawing without replacement; their expected maximum is simulated."""
    experts, top_k, tokens = 32, 4, 8192
    share = top_k / experts
    deviates = np.random.default_rng(0).standard_normal((4000, experts))
    deviates = (deviates - deviates.mean(axis=1, keepdims=True)) * np.sqrt(experts / (experts - 1))
    expected = 1 + deviates.max(axis=1).mean() * np.sqrt(tokens * share * (1 - share)) / (tokens * share)
    assert uniform_floor(experts, top_k=top_k, tokens=tokens) == pytest.approx(expected, abs=0.004)


def test_floor_falls_with_tokens_and_rises_with_the_group_limit_for_ranks() -> None:
    few, many = (uniform_floor(64, top_k=6, tokens=tokens, num_bins=8) for tokens in (1024, 16384))
    assert 1.0 < many < few
    limited = uniform_floor(64, top_k=6, tokens=1024, num_groups=8, group_limit=3, num_bins=8)
    assert limited > few  # several choices of one token land on the same rank
