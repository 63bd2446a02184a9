"""The critical path: it tiles the step, and it goes through whoever the others waited for.

Who waited for whom: the matrix adds up to the waits of the attribution and names the rank that came last.
"""

import numpy as np
import pytest

import moesim
from moesim.report.report import render
from moesim.results import CATEGORIES, ActionRows, Label, SpanTable, Stream, attribute, waited_for
from moesim.results.critical_path import critical_path, path_seconds
from moesim.run import simulate

ATTENTION = Label("attention", "attention", Stream.COMPUTE, 0)
EXPERTS = Label("experts", "experts", Stream.COMPUTE, 0)
DISPATCH = Label("dispatch", "dispatch_exposed", Stream.COMMUNICATION, 0)
ACTIVATION = Label("activation", "pipeline", Stream.PIPELINE, -1, 0)
REDUCE = Label("all_reduce.dense", "data_parallel", Stream.REDUCTION, -1)


def table(rows: list[tuple[Label, list[float], list[float], list[float]]], *, ranks: list[int], step: float):
    """Rows of (label, start, finish, own) per rank."""
    labels = tuple(dict.fromkeys(row[0] for row in rows))
    start, finish, own = (np.array([row[column] for row in rows])[:, None] for column in (1, 2, 3))
    return SpanTable(
        labels=labels,
        ranks_R=np.array(ranks),
        label_N=np.array([labels.index(row[0]) for row in rows], np.int32),
        micro_batch_N=np.zeros(len(rows), np.int32),
        start_NSR=start,
        finish_NSR=finish,
        own_NSR=own.astype(np.float32),
        step_S=np.array([step]),
        actions=(ActionRows(("forward",), (0,), 0, len(rows)),),
    )


def test_a_rank_that_waited_hands_over_to_the_one_that_came_last() -> None:
    """Rank 1's attention takes 3 s; both dispatch at 3; rank 0's experts end the step."""
    rows = [
        (ATTENTION, [0.0, 0.0], [1.0, 3.0], [1.0, 3.0]),
        (DISPATCH, [1.0, 3.0], [3.5, 3.5], [0.5, 0.5]),
        (EXPERTS, [3.5, 3.5], [5.5, 4.0], [2.0, 0.5]),
    ]
    pieces = critical_path([table(rows, ranks=[4, 5], step=5.5)], pipeline_ranks=[0])
    assert [(piece.category, piece.rank) for piece in pieces] == [
        ("experts", 4), ("dispatch_exposed", 4), ("attention", 5),
    ]  # fmt: skip
    found = path_seconds(pieces)
    assert {name: value for name, value in found.items() if value} == {
        "experts": 2.0, "dispatch_exposed": 0.5, "attention": 3.0,
    }  # fmt: skip


def test_a_hand_off_leads_to_its_sender_and_idle_time_is_bubble() -> None:
    first = [(ATTENTION, [0.0], [2.0], [2.0])]
    second = [
        (ACTIVATION, [2.0], [2.25], [0.25]),
        (ATTENTION, [2.25], [4.0], [1.75]),
        (EXPERTS, [4.5], [6.0], [1.5]),
    ]
    tables = [table(first, ranks=[0], step=6.0), table(second, ranks=[1], step=6.0)]
    found = path_seconds(critical_path(tables, pipeline_ranks=[0, 1]))
    assert found["pipeline"] == 0.25
    assert found["attention"] == 3.75
    assert found["bubble"] == 0.5
    assert sum(found.values()) == 6.0


def test_a_collective_leads_to_the_group_that_came_last() -> None:
    slow = [(EXPERTS, [0.0], [4.0], [4.0]), (REDUCE, [4.0], [5.0], [1.0])]
    fast = [(ATTENTION, [0.0], [1.0], [1.0]), (REDUCE, [1.0], [5.0], [1.0])]
    tables = [table(fast, ranks=[0], step=5.0), table(slow, ranks=[1], step=5.0)]
    found = path_seconds(critical_path(tables, pipeline_ranks=[0, 0]))
    assert (found["experts"], found["data_parallel"], found["attention"]) == (4.0, 1.0, 0.0)


def test_a_collective_beside_the_backward_pass_leads_to_the_last_gradient() -> None:
    """Its first bucket is ready at 1, but the last gradient only at 4: 0.5 s of the collective are behind that."""
    rows = [(EXPERTS, [0.0], [4.0], [4.0]), (REDUCE, [1.0], [4.5], [1.0])]
    found = path_seconds(critical_path([table(rows, ranks=[0], step=4.5)], pipeline_ranks=[0]))
    assert (found["experts"], found["data_parallel"]) == (4.0, 0.5)


PIPELINE = {
    "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 4},
    "parallelism": {"data": 2, "pipeline": 2, "expert": 2},
    "workload": {"sequence_length": 1024, "micro_batch": 1, "global_batch": 8},
}


@pytest.mark.parametrize("changes", [{}, PIPELINE, {"implementation": {"kind": "torch_eager"}}])
def test_the_path_of_a_simulated_step_adds_up_to_it(small, changes) -> None:
    result = simulate(small(changes)).result
    path = result["critical_path"]
    assert sum(path["seconds"].values()) == pytest.approx(path["step_time_s"], rel=1e-9)
    assert path["seconds"]["imbalance_wait"] == 0.0, "the path is where the work is"
    assert 0 <= path["last_rank"] < result["world_size"]


def test_the_path_goes_through_the_experts_of_hot_ranks(small) -> None:
    """Four experts get nearly all rows; the mean over ranks hides how long theirs compute."""
    result = simulate(small({"routing.counts": [40, 40, 40, 40] + [1] * 12})).result
    assert result["critical_path"]["seconds"]["experts"] > 1.5 * result["attribution_s"]["experts"]
    assert len(result["critical_path"]["seconds_by_rank"]) > 1


WAIT = CATEGORIES.index("imbalance_wait")
SMALL = {"workload.global_batch": 8, "uncertainty.samples": 1, "compute.profile": "roofline"}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("name", ["stress-hot-rank", "stress-skewed"])
def test_the_matrix_adds_up_to_the_waits(name: str) -> None:
    record = moesim.simulate(moesim.load_scenario(name, SMALL | {"workload.micro_batch": 1}))
    (table,) = record.pipeline_spans
    assert "Exposed waiting, by who came last" in render(record)
    waits_RR = waited_for(table)
    np.testing.assert_allclose(waits_RR.sum(axis=1), attribute(table)[WAIT, 0], atol=1e-9)
    assert (waits_RR >= 0).all() and not np.diag(waits_RR).any()
    # Whoever is last in a transfer of all ranks is the one that they wait for.
    rows_N = table.rows(Stream.COMMUNICATION)
    last = np.bincount(table.start_NSR[rows_N, 0].argmax(axis=1), minlength=len(waits_RR)) > 0
    assert not waits_RR[:, :-1][:, ~last].any()
    assert waits_RR.sum() > 0


@pytest.mark.usefixtures("few_tokens")
def test_equal_ranks_wait_for_nobody() -> None:
    (table,) = moesim.simulate(moesim.load_scenario("stress-balanced", SMALL)).pipeline_spans
    assert waited_for(table)[:, :-1].sum() < 1e-3 * float(table.step_S[0])
