"""How many layouts the screen looks at per second. Prints; run with -m benchmark -s."""

import os
import time
from pathlib import Path

import pytest

from moesim.planner.plan import load_plan
from moesim.planner.screen import Screen
from moesim.planner.search import EvaluationPool, Evaluator, Traces, enumerate_space, opened_pool
from moesim.planner.space import Space

PLANS = Path(__file__).parents[2] / "scenarios" / "plans"
LAYOUTS_PER_SECOND = 50  # of processor time of one idle core, combinations that are no layouts left out
IDLE_PACE = (
    0.6  # seconds that an idle core needs for the loop below; a core shared with others needs several times that
)


def pace() -> float:
    """Processor seconds of ten million additions: how fast this core is just now."""
    start, total = time.process_time(), 0
    for number in range(10**7):
        total += number
    assert total
    return time.process_time() - start


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["deepseek-moe-16b", "mixtral-8x22b"])
def test_the_screen_looks_at_fifty_layouts_a_second_on_each_core(name):
    plan = load_plan(PLANS / f"{name}.yaml")
    evaluator = Evaluator(Space.of(plan), Screen(Traces(None).of))
    before = pace()
    start = time.process_time()
    enumerate_space(EvaluationPool(evaluator))
    seconds = time.process_time() - start
    slowed = max(1.0, (before + pace()) / 2 / IDLE_PACE)
    layouts = len(evaluator.fitting) + evaluator.rejections.count("memory")
    print(f"\n{name}: {layouts} layouts of {evaluator.space.size} combinations in {seconds:.1f} s of processor time,")
    print(f"{layouts / seconds:.0f} per second, {1e3 * seconds / layouts:.1f} ms each,")
    print(f"on a core {slowed:.1f} times slower than an idle one")
    assert layouts / seconds * slowed > LAYOUTS_PER_SECOND

    together = Evaluator(Space.of(plan), Screen(Traces(None).of))
    start = time.perf_counter()
    with opened_pool(together, workers=2, cache_dir=None, expected=together.space.size) as pool:
        assert pool.place is not None
        enumerate_space(pool)
    wall = time.perf_counter() - start
    print(f"two processes: {layouts / wall:.0f} per second of wall clock, at a load of {os.getloadavg()[0]:.1f}")
    assert together.fitting == evaluator.fitting
