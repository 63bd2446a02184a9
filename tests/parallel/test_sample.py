"""Samples of a whole step: the right tokens, each counted once, relabelled per model layer, dropped per micro-batch."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.counts import count_blocks, device_keep_mask, expert_capacity, expert_keep_mask, ranks_of_rows
from moesim.parallel.traffic import stage_copies
from moesim.scenario import RouterShape, Scenario
from moesim.seeding import stream
from moesim.trace import RoutingTrace, popularity_trace, uniform_trace

Make = Callable[..., Scenario]
DEVICE = {"kind": "device", "factor": 1.0, "protected_share": 0.2}
SKEW = [8.0 if expert == 5 else 1.0 for expert in range(32)]


def make_trace(scenario: Scenario, *, layers: int = 2, sequences: int = 60, counts: list[float] | None = None):
    size = {"num_layers": layers, "num_sequences": sequences, "sequence_length": 16, "seed": 3}
    if counts is None:
        return uniform_trace(scenario.router_shape(), **size)
    return popularity_trace(scenario.router_shape(), counts=counts, **size)


def draw(scenario: Scenario, trace: RoutingTrace, *, seed: int = 0, bootstrap: bool = False) -> TrafficSample:
    return TrafficSampler(scenario, trace).draw(stream(seed, "test"), bootstrap=bootstrap)


def kept_ids(sample: TrafficSample, group: int, micro_batch: int, thin_layer: int) -> NDArray[np.int16]:
    """The ids that a group keeps in one micro-batch [R, U*T, K], put together plainly from the trace."""
    scenario, step = sample.sampler.scenario, sample.sampler.sequences.final
    ranks = scenario.parallelism.expert
    sequences_RU = sample.draw.sequences_BNU[micro_batch, group * ranks : (group + 1) * ranks]
    protected_RU = sample.protected_BNU[micro_batch, group * ranks : (group + 1) * ranks]
    ids = step.expert_ids_LSTK[thin_layer][sequences_RU]
    affinities = step.affinities_LSTK[thin_layer][sequences_RU]
    capacity, blocks = scenario.capacity, (ranks, -1, ids.shape[-1])
    keep = np.ones(ids.shape, dtype=bool)
    if capacity.kind == "device":
        keep = device_keep_mask(
            ranks_of_rows(ids, rank_of_expert_E=sample.placement.rank_of_expert_E, num_ranks=ranks),
            affinities,
            protected_S=protected_RU,
            num_ranks=ranks,
            factor=capacity.factor,
        )
    elif capacity.kind == "expert":
        tokens = scenario.tokens_per_micro_batch
        rows = expert_capacity(factor=capacity.factor, top_k=4, num_tokens=tokens, num_experts=32)
        keep = expert_keep_mask(
            ids.reshape(blocks), affinities.reshape(blocks), num_experts=32, capacity=rows, by=capacity.by
        ).reshape(ids.shape)
    return np.where(keep, ids, -1).reshape(blocks)


@pytest.mark.parametrize("expert", [1, 4, 8])
@pytest.mark.parametrize(
    "capacity",
    [
        {"kind": "none"},
        DEVICE,
        {"kind": "expert", "factor": 1.0, "by": "score"},
        {"kind": "expert", "factor": 0.7, "by": "position"},
    ],
)
def test_layers_count_the_kept_rows_of_the_drawn_sequences(
    make_scenario: Make, expert: int, capacity: dict[str, object]
) -> None:
    scenario = make_scenario(expert=expert, capacity=capacity, routing={"kind": "uniform"})
    sample = draw(scenario, make_trace(scenario, counts=SKEW))
    for group in range(8 // expert):
        layout = sample.sampler.layouts[0][group]
        for micro_batch, thin_layer in ((0, 0), (2, 1)):
            kept_RTK = kept_ids(sample, group, micro_batch, thin_layer)
            counts = count_blocks(
                kept_RTK,
                rank_of_expert_E=sample.placement.rank_of_expert_E,
                node_of_rank_D=layout.node_of_rank_R,
            )
            traffic = sample.thin_arrays(group, thin_layer)
            np.testing.assert_array_equal(traffic.rows_BRE[micro_batch], counts.rows_SE)
            np.testing.assert_array_equal(traffic.rank_copies_BRD[micro_batch], counts.rank_copies_SD)
            np.testing.assert_array_equal(traffic.node_copies_BRJ[micro_batch], counts.node_copies_SJ)
            routed, dropped = traffic.routed_rows_B[micro_batch], traffic.dropped_rows_B[micro_batch]
            assert routed == expert * scenario.tokens_per_micro_batch * 4
            assert dropped == routed - traffic.rows_BRE[micro_batch].sum()
            assert (dropped > 0) == (capacity["kind"] == "expert" or (expert > 1 and capacity is DEVICE))


def test_expert_capacity_counts_pieces_or_micro_batches_alike(make_scenario: Make) -> None:
    """With one sequence per rank and micro-batch drops are counted once per sequence; the direct way agrees."""
    work = {"kind": "training", "sequence_length": 32, "micro_batch": 1, "global_batch": 24}
    scenario = make_scenario(capacity={"kind": "expert", "factor": 0.8, "by": "score"}, workload=work)
    sample = draw(scenario, make_trace(scenario))
    assert sample.sampler.counts_add_up
    kept = kept_ids(sample, 0, 1, 1)
    rows = sample.thin_arrays(0, 1).rows_BRE[1]
    np.testing.assert_array_equal(rows.sum(axis=0), np.bincount(kept.reshape(-1) + 1, minlength=33)[1:])


@pytest.mark.parametrize("capacity", [{"kind": "none"}, DEVICE])
def test_model_layers_reindex_their_thin_layer(make_scenario: Make, capacity: dict[str, object]) -> None:
    scenario = make_scenario(capacity=capacity)
    sample = draw(scenario, make_trace(scenario, counts=SKEW))
    hottest = set()
    for layer in range(scenario.model.moe_layers):
        thin, model = sample.thin_arrays(0, layer % 2), sample.arrays(0, layer)
        relabelling = sample.sampler.relabellings[layer]
        kept = kept_ids(sample, 0, 1, layer % 2)
        new_number_of_E = np.append(np.argsort(relabelling.expert_from_E), -1)  # index -1 stays -1
        counts = count_blocks(
            new_number_of_E[kept],
            rank_of_expert_E=sample.placement.rank_of_expert_E,
            node_of_rank_D=sample.sampler.layouts[0][0].node_of_rank_R,
        )
        np.testing.assert_array_equal(model.rows_BRE[1], counts.rows_SE)
        np.testing.assert_array_equal(model.rank_copies_BRD[1], counts.rank_copies_SD)
        np.testing.assert_array_equal(model.node_copies_BRJ[1], counts.node_copies_SJ)
        for of_model, of_thin in (
            (model.routed_rows_B, thin.routed_rows_B),
            (model.dropped_rows_B, thin.dropped_rows_B),
        ):
            np.testing.assert_array_equal(of_model, of_thin)
        hottest.add(int(model.rows_BRE[1].sum(axis=0).argmax()))
    assert len(hottest) > 3  # one expert is hot in the trace, but not the same one in every model layer


def test_relabelling_belongs_to_the_model(make_scenario: Make) -> None:
    scenario = make_scenario(expert=4)
    trace = make_trace(scenario)
    first, second = (TrafficSampler(scenario, trace).relabellings for _ in range(2))
    np.testing.assert_array_equal(
        [relabelling.expert_from_E for relabelling in first], [relabelling.expert_from_E for relabelling in second]
    )
    other = TrafficSampler(make_scenario(expert=4, seed=1), trace).relabellings
    assert any((a.expert_from_E != b.expert_from_E).any() for a, b in zip(first, other, strict=True))
    whole = TrafficSampler(scenario, make_trace(scenario, layers=8)).relabellings
    assert all((relabelling.expert_from_E == np.arange(32)).all() for relabelling in whole)


def test_same_stream_same_sample_and_bootstrap_differs(make_scenario: Make) -> None:
    scenario = make_scenario(capacity=DEVICE)
    trace = make_trace(scenario)
    rows = [draw(scenario, trace, seed=seed).arrays(0, 3).rows_BRE for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()
    assert draw(scenario, trace).draw.num_distinct == 30  # 60 short sequences make 30 of the workload's length
    assert draw(scenario, trace, bootstrap=True).draw.num_distinct < 26


def test_tokens_are_split_over_context_and_tensor_ranks(make_scenario: Make) -> None:
    scenario = make_scenario(parallelism={"data": 2, "context": 2, "tensor": 2, "expert": 8})
    sample = draw(scenario, make_trace(scenario))
    ids_STK = sample.sampler.sequences.final.expert_ids_LSTK[0]
    arrays = sample.thin_arrays(0, 0)
    # Context rank 0 has the first and the last quarter of a sequence of 32 tokens, its tensor ranks one each.
    quarters = [0, 3, 1, 2]
    for rank in range(8):
        tokens = slice(8 * quarters[rank % 4], 8 * (quarters[rank % 4] + 1))
        mine = ids_STK[sample.draw.sequences_BNU[3, rank // 4], tokens]
        np.testing.assert_array_equal(arrays.rows_BRE[3, rank], np.bincount(mine.reshape(-1), minlength=32))


@pytest.mark.parametrize("capacity", [DEVICE, {"kind": "expert", "factor": 0.8, "by": "position"}])
def test_drops_of_ranks_with_two_pieces_of_a_sequence(make_scenario: Make, capacity: dict[str, object]) -> None:
    """A rank's tokens count as one block in token order, whichever pieces they come from."""
    scenario = make_scenario(parallelism={"data": 4, "context": 2, "expert": 8}, capacity=capacity)
    sample = draw(scenario, make_trace(scenario, counts=SKEW))
    assert not sample.sampler.counts_add_up
    step, held = sample.sampler.sequences.final, [[*range(8), *range(24, 32)], list(range(8, 24))]
    sequences_NU = sample.draw.sequences_BNU[2]
    blocks = [
        [array[1][sequences_NU[rank // 2]][:, held[rank % 2]].reshape(32, 4) for rank in range(8)]
        for array in (step.expert_ids_LSTK, step.affinities_LSTK)
    ]
    ids_RTK, affinities_RTK = map(np.stack, blocks)
    if capacity is DEVICE:
        keep_RTK = device_keep_mask(
            ranks_of_rows(ids_RTK, rank_of_expert_E=sample.placement.rank_of_expert_E, num_ranks=8).reshape(16, 16, 4),
            affinities_RTK.reshape(16, 16, 4),
            protected_S=sample.protected_BNU[2][np.arange(8) // 2].reshape(-1),
            num_ranks=8,
            factor=1.0,
        ).reshape(8, 32, 4)
    else:
        rows = expert_capacity(factor=0.8, top_k=4, num_tokens=32, num_experts=32)
        keep_RTK = expert_keep_mask(ids_RTK, affinities_RTK, num_experts=32, capacity=rows, by="position")
    for rank, rows_E in enumerate(sample.thin_arrays(0, 1).rows_BRE[2]):
        np.testing.assert_array_equal(rows_E, np.bincount(ids_RTK[rank][keep_RTK[rank]], minlength=32))


def test_folding_moves_tokens_but_routes_as_many_rows(make_scenario: Make) -> None:
    """The same world with attention shared by 1, 2 or 4 tensor ranks over the same expert groups."""
    totals = set()
    for tensor in (1, 2, 4):
        scenario = make_scenario(
            parallelism={"data": 8 // tensor, "tensor": tensor, "expert": 8}, uncertainty={"bank": 12}
        )
        arrays = draw(scenario, make_trace(scenario)).arrays(0, 3)
        assert len(arrays.rows_BRE) == 3 * tensor  # the batch is the same
        totals.add((int(arrays.rows_BRE.sum()), int(arrays.routed_rows_B.sum())))
    assert totals == {(48 * 32 * 4,) * 2}


def test_padding_and_stages(make_scenario: Make) -> None:
    capacity = {"kind": "expert", "factor": 1.0, "by": "position", "pad": True}
    scenario = make_scenario(capacity=capacity)
    traffic = draw(scenario, make_trace(scenario)).arrays(0, 0)
    assert (traffic.rows_BRE == 8).all()  # ceil(4 * 64 / 32)
    kept_B = traffic.routed_rows_B - traffic.dropped_rows_B
    assert (traffic.padded_rows_B == traffic.rows_BRE.sum(axis=(1, 2)) - kept_B).all()
    staged = make_scenario(parallelism={"data": 4, "pipeline": 2, "expert": 4})
    sample = draw(staged, make_trace(staged))
    np.testing.assert_array_equal(sample.arrays(0, 1, stage=0).rows_BRE, sample.arrays(0, 1, stage=1).rows_BRE)


def test_the_counterfactual_sends_equal_loads_in_every_layer(make_scenario: Make) -> None:
    scenario = make_scenario(capacity=DEVICE)
    sample = draw(scenario, make_trace(scenario, counts=SKEW))
    even = sample.balanced()
    for layer in range(scenario.model.moe_layers):
        rows_BE, even_rows_BE = sample.arrays(0, layer).rows_BRE.sum(axis=1), even.arrays(0, layer).rows_BRE.sum(axis=1)
        np.testing.assert_allclose(even_rows_BE.sum(axis=1), rows_BE.sum(axis=1))
        np.testing.assert_allclose(even_rows_BE, even_rows_BE.mean(axis=1, keepdims=True) * np.ones((1, 32)))
        assert rows_BE.std() > 0
        np.testing.assert_array_equal(even.slot_rows_BDP(0, layer), sample.slot_rows_BDP(0, layer))


def test_a_hot_rank_in_the_trace_changes_the_traffic(make_scenario: Make) -> None:
    """All tokens to rank 0's experts: they arrive there and nowhere else. Without the trace there is no traffic."""
    scenario = make_scenario(model={"layers": 2}, routing={"kind": "uniform"})
    trace = make_trace(scenario, layers=1)
    ids = np.broadcast_to(np.arange(4, dtype=np.int16), trace.final.expert_ids_LSTK.shape).copy()
    hot = replace(trace, steps=(replace(trace.final, expert_ids_LSTK=ids),))
    sample = draw(scenario, hot)
    received = stage_copies(sample.arrays(0, 0), sample.placement, "per_rank")[0][0].sum(axis=0)
    assert received[0] == 7 * scenario.tokens_per_micro_batch
    assert not received[1:].any()
    spread = draw(scenario, trace).arrays(0, 0)
    assert (spread.rank_copies_BRD[0].sum(axis=0) > 0).all()


def test_traces_that_do_not_fit_are_refused(make_scenario: Make) -> None:
    scenario = make_scenario(routing={"kind": "uniform"})
    size = {"num_layers": 1, "num_sequences": 20, "sequence_length": 32, "seed": 0}
    for router, fault in (
        (RouterShape(kind="uniform", num_experts=16, top_k=4), "4 of 16 experts, the model to 4 of 32"),
        (RouterShape(kind="uniform", num_experts=32, top_k=2), "2 of 32 experts"),
    ):
        with pytest.raises(UserError, match=fault):
            TrafficSampler(scenario, uniform_trace(router, **size))
    short = RouterShape(kind="uniform", num_experts=32, top_k=4)
    sampler = TrafficSampler(scenario, uniform_trace(short, **(size | {"num_sequences": 1, "sequence_length": 31})))
    with pytest.raises(UserError, match="31 tokens, less than one sequence of 32"):
        sampler.draw(stream(0, "x"))


def test_expert_choice_traces_give_tokens_any_number_of_rows(make_scenario: Make) -> None:
    scenario = make_scenario(routing={"kind": "uniform"}, capacity={"kind": "none"})
    trace = make_trace(scenario)
    ids = trace.final.expert_ids_LSTK.copy()
    ids[np.random.default_rng(0).random(ids.shape) < 0.4] = -1
    router = replace(trace.router, kind="expert_choice")
    sample = draw(scenario, replace(trace, router=router, steps=(replace(trace.final, expert_ids_LSTK=ids),)))
    arrays = sample.thin_arrays(0, 1)
    sequences = sample.sampler.sequences.final.expert_ids_LSTK[1][sample.draw.sequences_BNU]
    np.testing.assert_array_equal(arrays.routed_rows_B, (sequences >= 0).sum(axis=(1, 2, 3, 4)))
    assert not arrays.dropped_rows_B.any()
