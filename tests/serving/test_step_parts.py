"""Parts of a step by hand: halves of it, prompts again, where requests go, sends between stages, dropped rows."""

from types import SimpleNamespace

import numpy as np
import pytest

from moesim.serving import load_serving_text
from moesim.serving.batch import Batch, Chunk, Formed, Job
from moesim.serving.clock import SLACK, SLACK_REQUESTS, by_prefix
from moesim.serving.costs import halves
from moesim.serving.experts import ExpertTables
from moesim.serving.fleet import Deployment
from moesim.serving.memory import KeyLayout, LayerKeys
from moesim.serving.schema import Engine

pytestmark = pytest.mark.usefixtures("few_draws")

LAYOUT = KeyLayout(kinds=(LayerKeys(layers=1),), page=16)


@pytest.mark.parametrize(("generated", "sizes"), [(8, (100,)), (7, (33, 1)), (0, (512,)), (1, ())])
def test_halves_of_a_step_are_the_whole_and_the_second_begins_where_the_first_ends(generated, sizes) -> None:
    chunks = tuple(Chunk(Job(number, 600, 1), size, 64 * number) for number, size in enumerate(sizes))
    whole = Formed(generated, 2, (generated * 100,), chunks, 5, 3)
    (lower,), (upper,) = halves([whole])
    assert lower.tokens + upper.tokens == whole.tokens and abs(lower.generated - upper.generated) <= 1
    assert abs(sum(lower.keys) + sum(upper.keys) - sum(whole.keys)) <= 1
    for chunk in chunks:
        parts = [each for half in (lower, upper) for each in half.chunks if each.job is chunk.job]
        assert sum(part.tokens for part in parts) == chunk.tokens and parts[0].before == chunk.before
        assert all(part.before == chunk.before + parts[0].tokens for part in parts[1:])


@pytest.mark.parametrize("steps", [1, 4])
def test_a_preempted_request_computes_its_prompt_and_all_tokens_that_it_was_given(steps: int) -> None:
    batch = Batch(Engine(token_budget=512, running=8, page=16), layout=LAYOUT, pages=1_000)
    job = Job(0, 100, 20)
    batch.add(job)
    for _ in range(steps):  # the first one computes the prompt, and each gives a token
        batch.finish(batch.form())
    batch._preempt(job)
    assert (job.prompt, job.done, job.left) == (100 + steps, 0, 20 - steps)
    step = batch.form()
    assert [chunk.tokens for chunk in step.chunks] == [100 + steps]


def test_a_request_goes_to_its_prefix_unless_many_more_stand_there() -> None:
    def going(load: int, emptiest: int) -> int:
        batches = [SimpleNamespace(load=emptiest, knows=lambda _: False), SimpleNamespace(load=load, knows=bool)]
        return by_prefix(batches, Job(0, 100, 1, prefix=7))  # type: ignore[arg-type]

    for emptiest in (0, 3):
        most = int(SLACK * emptiest + SLACK_REQUESTS)
        assert going(most, emptiest) == 1 and going(most + 1, emptiest) == 0


TEXT = """schema_version: 1
name: staged
model: {preset: deepseek-moe-16b, layers: 4}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 4}
workload:
  kind: serving
  requests: 1
  arrivals: {kind: poisson, rate: 1.0, input: {kind: fixed, tokens: 500}, output: {kind: fixed, tokens: 9}}
"""


def test_a_step_through_stages_pays_one_send_between_each() -> None:
    for stages in (1, 2, 4):
        costs = Deployment(load_serving_text(TEXT, overrides=[f"parallelism={{data: 1, pipeline: {stages}}}"])).costs
        found = costs.step([Formed(64, 1, (64 * 500,), (), 0, 0)]).exchange
        assert found == pytest.approx((stages - 1) * costs.send.of(64)) and (found > 0) == (stages > 1)


def test_no_expert_keeps_more_rows_than_its_capacity_and_none_below_it_loses_any() -> None:
    engine = SimpleNamespace(capacity_factor=1.25)
    tables = SimpleNamespace(scenario=SimpleNamespace(engine=engine), model=SimpleNamespace(experts=8))
    ids_NK = np.random.default_rng(0).zipf(1.6, (200, 2)) % 8
    before_E, most = np.bincount(ids_NK.reshape(-1), minlength=8), int(np.ceil(1.25 * 400 / 8))
    share = ExpertTables._drop(tables, ids_NK)  # type: ignore[arg-type]
    kept_E = np.bincount(ids_NK[ids_NK >= 0], minlength=8)
    np.testing.assert_array_equal(kept_E, np.minimum(before_E, most))
    assert share == (before_E - kept_E).sum() / 400 > 0
