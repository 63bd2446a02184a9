"""Do ranks and links that change while a step runs slow it by what physics says, on a clock that moves?"""

from functools import cache

import numpy as np
import pytest
import simpy

from moesim.engine.conditions import Conditions
from moesim.errors import UserError
from moesim.program.step_program import Changes
from moesim.results import RunRecord
from moesim.run import simulate
from moesim.scenario import Scenario, load_scenario_text

pytestmark = pytest.mark.usefixtures("few_tokens")

TEXT = """
name: changes
model: {hidden: 512, layers: 2, heads: 8, kv_heads: 8, head_dim: 64, attention: {kind: mha}, vocab: 4096, experts: 16,
        top_k: 2, expert_intermediate: 512, shared_experts: 1, dense_layers: 1, dense_intermediate: 2048}
cluster: {gpu: h100, nodes: 2, gpus_per_node: 4}
workload: {sequence_length: 1024, global_batch: 16}
uncertainty: {samples: 2, bank: 2}
"""
FLAT = "parallelism={data: 8, expert: 8}"
PIPELINE = "parallelism={data: 4, pipeline: 2, expert: 4}"
SHARDED = "parallelism={data: 8, expert: 8, zero: {dense: 3, expert: 3}}"


def scenario(*overrides: str) -> Scenario:
    return load_scenario_text(TEXT, overrides=overrides)


@cache
def simulated(*overrides: str) -> RunRecord:
    """Several tests ask for the same, above all for what does not change."""
    return simulate(scenario(*overrides))


def steps(*overrides: str) -> np.ndarray:
    return simulated(*overrides).arrays["step_time_S"]


@pytest.mark.parametrize("layout", [FLAT, PIPELINE, SHARDED])
def test_a_change_of_nothing_changes_nothing(layout: str) -> None:
    plain = simulated(layout)
    for nothing in (
        "cluster.slowdowns=[{rank: 3, factor: 1.0, at: 1 ms}]",
        "cluster.fabric.changes=[{node: 0, factor: 1.0, at: 1 ms}]",
        "cluster.slowdowns=[{rank: 3, factor: 0.5, at: 1000 s}]",
    ):
        other = simulate(scenario(layout, nothing))
        assert other.arrays["step_time_S"] == pytest.approx(plain.arrays["step_time_S"], rel=1e-12)
        assert other.result["attribution_s"] == pytest.approx(plain.result["attribution_s"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("layout", [FLAT, PIPELINE, SHARDED])
def test_slow_from_the_start_is_slow_always(layout: str) -> None:
    """Of links those that cross the network to the last byte: fabrics with slower links may choose other algorithms."""
    alike = "cluster.jitter=false"  # speeds take the place of the chips' spread, changes do not
    always = steps(layout, alike, "cluster.speeds={ranks: [{rank: 3, factor: 0.5}]}")
    assert steps(layout, alike, "cluster.slowdowns=[{rank: 3, factor: 0.5}]") == pytest.approx(always, rel=1e-9)
    degraded = steps(layout, "cluster.fabric.degraded=[{node: 0, factor: 0.5}]")
    assert steps(layout, "cluster.fabric.changes=[{node: 0, factor: 0.5}]") == pytest.approx(degraded, rel=0.02)


@pytest.mark.parametrize("layout", [FLAT, PIPELINE])
@pytest.mark.parametrize("what", ["cluster.slowdowns=[{{rank: 1, factor: 0.5{}}}]",
                                  "cluster.fabric.changes=[{{node: 0, factor: 0.25{}}}]"])  # fmt: skip
def test_the_later_a_change_the_less_it_costs(layout: str, what: str) -> None:
    plain = float(steps(layout)[0])
    whens = ("", *(f", at: {share * plain!r} s" for share in (0.3, 0.6)), f", at: {plain!r} s")
    found = [float(steps(layout, what.format(when))[0]) for when in whens]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[-1] == pytest.approx(plain, rel=1e-12)
    flap = float(steps(layout, what.format(f", at: {0.3 * plain!r} s, until: {0.6 * plain!r} s"))[0])
    assert plain * (1 - 1e-12) <= flap <= found[1]  # links that nobody waits for then cost nothing
    assert flap > plain or "changes" in what


def test_a_change_is_in_the_steps_that_it_is_said_to_be_in() -> None:
    plain, always = steps(FLAT), steps(FLAT, "cluster.slowdowns=[{node: 1, factor: 0.5}]")
    later = steps(FLAT, "cluster.slowdowns=[{node: 1, factor: 0.5, from_step: 1}]")
    assert later == pytest.approx([plain[0], always[1]], rel=1e-12)
    link = "cluster.fabric.changes=[{node: 0, factor: 0.25}]"
    both = steps(FLAT, "cluster.slowdowns=[{node: 1, factor: 0.5, from_step: 1}]", link)
    assert both[0] == pytest.approx(steps(FLAT, link)[0], rel=1e-12) and both[0] > plain[0]
    many = [FLAT, "uncertainty.samples=12", "uncertainty.bank=1"]
    half = steps(*many, "cluster.slowdowns=[{node: 1, factor: 0.5, probability: 0.5}]")
    slow = half > steps(*many) * 1.01
    assert 0 < slow.sum() < 12
    again = simulate(scenario(*many, "cluster.slowdowns=[{node: 1, factor: 0.5, probability: 0.5}]"))
    assert (slow == (again.arrays["step_time_S"] > half.mean())).all()


def test_the_clock_comes_to_each_change_and_walks_are_taken_again() -> None:
    env = simpy.Environment()
    speed_KSW = np.array([1.0, 0.5, 1.0]).reshape(3, 1, 1)
    changes = Changes(
        instants_K=np.array([0.0, 2.0, 4.0]), speed_KSW=speed_KSW, state_KS=np.zeros((3, 1), dtype=np.int64)
    )
    conditions, seen, undone = Conditions(env, changes), [], []
    start_SR, work_NSR = np.array([[1.0]]), np.array([[[3.0]]])

    def walk() -> np.ndarray:
        seen.append((env.now, float(conditions.elapsed(start_SR, work_NSR, np.array([0]))[0, 0, 0])))
        return start_SR + seen[-1][1]

    env.process(conditions.settle(walk, lambda: undone.append(env.now)))
    env.run()
    assert seen == [(0.0, 3.0), (2.0, 5.0), (4.0, 4.0)]  # alone; at half speed from 2 on; and until 4 alone
    assert undone == [2.0, 4.0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("cluster.slowdowns=[{rank: 8, factor: 0.5}]", "rank 8 of ranks 0 to 7"),
        ("cluster.slowdowns=[{node: 2, factor: 0.5}]", "node 2 of nodes 0 to 1"),
        ("cluster.slowdowns=[{factor: 0.5}]", "names nothing"),
        ("cluster.slowdowns=[{rank: 1, factor: 0.0}]", "factor"),
        ("cluster.slowdowns=[{rank: 1, factor: 0.5, at: 2 s, until: 1 s}]", "until"),
        ("cluster.slowdowns=[{rank: 1, factor: 0.5, from_step: 2}]", "step 2 of the 2"),
        ("cluster.fabric.changes=[{node: 1, rail: 1, factor: 0.5}]", "node and rail"),
    ],
)
def test_a_mistake_is_told(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        scenario(FLAT, override)
