"""Every schedule of the table is alike to checks, memory, screen and simulation; a new one needs no other line."""

from dataclasses import replace
from functools import cache

import pytest

from moesim.errors import UserError
from moesim.planner.screen import Screen
from moesim.run import obtain_trace, simulate
from moesim.scenario import Contiguous, dump_scenario, load_scenario_text
from moesim.schedules import PLAIN, SCHEDULES, SPLIT, Action, Pass, ScheduleFacts, Work

pytestmark = pytest.mark.usefixtures("few_tokens")

CLOSE = 0.05  # of the simulated step


def pipelined(small, kind, *, ranks, rounds):
    """A small step on `ranks` pipeline ranks with `rounds` micro-batches for each.

    Stages of 4 layers, as many as the screen's parts have: fewer hide less of each other in an overlapped pair (with 2
    the screen of dualpipe is 6 % short).
    """
    virtual = {"virtual": 2} if SCHEDULES[kind].virtual else {}
    return small(
        {
            "model.layers": 4 * ranks * virtual.get("virtual", 1),
            "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 2 * ranks},
            "parallelism": {"data": 2, "expert": 2, "pipeline": ranks, "schedule": {"kind": kind, **virtual}},
            "workload.global_batch": 2 * ranks * rounds,
            "workload.micro_batch": 1,
            "uncertainty.samples": 1,
        }
    )


def screened_as_simulated(scenario):
    screen, result = Screen(obtain_trace), simulate(scenario).result
    assert screen.step_seconds(scenario) == pytest.approx(result["step_time_s"], rel=CLOSE)
    assert screen.memory(scenario)[0] == pytest.approx(result["memory"]["peak_bytes"], rel=0.02)
    return result


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_the_screen_follows_every_schedule(small, kind, shape):
    ranks, rounds = shape
    screened_as_simulated(pipelined(small, kind, ranks=ranks, rounds=rounds))


def test_the_screen_sums_the_gradients_of_copies(small):
    """Large experts with few tokens, each of them twice: their sums are a good part of the step."""
    scenario = pipelined(small, PLAIN.name, ranks=2, rounds=2)
    model = scenario.model.model_copy(update={"expert_intermediate": 4096})
    work = scenario.workload.model_copy(update={"sequence_length": 256})
    copies = Contiguous(redundant_experts=model.experts)
    copied = scenario.model_copy(update={"placement": copies, "model": model, "workload": work})
    result = screened_as_simulated(copied)
    assert result["attribution_s"]["data_parallel"] > 2 * CLOSE * result["step_time_s"]


def split_at_once(num_ranks, num_micro_batches, virtual):
    """1F1B whose backward passes are split, the gradient of the weights right behind that of the input."""
    plain = PLAIN.order(num_ranks, num_micro_batches, virtual)

    def split(action):
        (work,) = action.works
        if work.kind is not Pass.BACKWARD:
            return (action,)
        return tuple(Action((Work(kind, work.micro_batch, work.chunk),)) for kind in (Pass.INPUT, Pass.WEIGHT))

    actions = tuple(tuple(part for action in actions for part in split(action)) for actions in plain.actions)
    return replace(plain, kind="split_at_once", actions=actions)


def both_in_turn(num_ranks, num_micro_batches, virtual):
    """The same where every second micro-batch has a whole backward pass."""
    whole = PLAIN.order(num_ranks, num_micro_batches, virtual)
    split = split_at_once(num_ranks, num_micro_batches, virtual)

    def chosen(rank):
        mixed = [a for a in split.actions[rank] if a.works[0].micro_batch % 2 or a.works[0].kind is Pass.FORWARD]
        wholes = [a for a in whole.actions[rank] if not a.works[0].micro_batch % 2 and a.works[0].kind is Pass.BACKWARD]
        order = {a.works[0]: index for index, a in enumerate(whole.actions[rank])}

        def place(action):
            work = action.works[0]
            known = work if work in order else Work(Pass.BACKWARD, work.micro_batch, work.chunk)
            return order[known], work.kind is Pass.WEIGHT

        return tuple(sorted([*mixed, *wholes], key=place))

    return replace(whole, kind="both_in_turn", actions=tuple(map(chosen, range(num_ranks))))


NEW = [
    ScheduleFacts(name="split_at_once", order=split_at_once, full_backward=False, split_backward=True),
    ScheduleFacts(name="both_in_turn", order=both_in_turn, split_backward=True, even=True),
]


@cache
def _result_of(scenario_text):
    return simulate(load_scenario_text(scenario_text)).result


@pytest.mark.parametrize("facts", NEW, ids=lambda facts: facts.name)
def test_a_split_backward_schedule_is_added_in_one_place(small, monkeypatch, facts):
    with pytest.raises(UserError, match=f"{facts.name}.* is not allowed"):
        small({"parallelism.schedule": {"kind": facts.name}})
    monkeypatch.setitem(SCHEDULES, facts.name, facts)
    added = screened_as_simulated(pipelined(small, facts.name, ranks=4, rounds=4))
    plain, zero_bubble = (
        _result_of(dump_scenario(pipelined(small, one.name, ranks=4, rounds=4))) for one in (PLAIN, SPLIT)
    )
    assert zero_bubble["step_time_s"] < added["step_time_s"] < plain["step_time_s"]
    assert added["memory"]["peak_bytes"] == pytest.approx(plain["memory"]["peak_bytes"], rel=0.02)
    if facts.even:
        with pytest.raises(UserError, match=f"{facts.name} needs an even number of ranks"):
            pipelined(small, facts.name, ranks=3, rounds=4)
