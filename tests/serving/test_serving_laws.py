"""Serving: laws of the clock, of pages and of batches, and of what is answered."""

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.scenario import load_scenario_text
from moesim.serving import largest_load, load_serving, load_serving_text, serve, serve_seeds
from moesim.serving.answers import Deployment
from moesim.serving.batch import Batch, Job
from moesim.serving.clock import run_clock
from moesim.serving.requests import Requests
from moesim.serving.schema import Engine, ServingScenario
from moesim.shipped import names, resolve
from moesim.strict_json import json_text

SMALL = """schema_version: 1
name: small
model: {preset: deepseek-moe-16b, layers: 4}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 4}
parallelism: {data: 4, expert: 4}
workload:
  kind: serving
  requests: 300
  arrivals:
    kind: poisson
    rate: 200.0
    input: {kind: log_normal, mean: 500, variation: 0.8, most: 4000}
    output: {kind: log_normal, mean: 60, variation: 0.8, most: 500}
"""


def small(*overrides: str) -> ServingScenario:
    return load_serving_text(SMALL, overrides=overrides)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return Deployment(small())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pages", [100_000, 90])
@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_tokens_are_conserved_and_pages_never_exceed_memory(seed: int, pages: int, batching: str) -> None:
    """A batch by itself, step by step, beside a plain count of what each request has stored."""
    rng = np.random.default_rng(seed)
    engine = Engine(batching=batching, token_budget=512, running=32, page=16)
    batch = Batch(engine, pages=pages)
    sizes = [(int(rng.integers(1, 700)), int(rng.integers(1, 200))) for _ in range(60)]
    batch.waiting.extend(Job(number, *size) for number, size in enumerate(sizes))
    given, computed, ended = dict.fromkeys(range(60), 0), 0, []
    for _ in range(100_000):
        if batch.is_idle:
            break
        formed = batch.form()
        assert 0 < formed.tokens <= 512 and batch.running <= 32
        answered = {job.request for job in batch._order if not job.is_out and job.joined >= 0}
        stored = [batch.stored(job) for job in batch._order if not job.is_out and job.joined >= 0]
        assert formed.context == sum(stored) and formed.generated == len(stored)
        first, done = batch.finish(formed)
        for request in answered | {job.request for job in first}:
            given[request] += 1
        computed += formed.tokens
        ended += [job.request for job in done]
        live = [job for job in batch._order if not job.is_out]
        held = [batch.stored(job) if job.joined >= 0 else job.prompt for job in live]
        assert batch.used_pages == sum(-(-tokens // 16) for tokens in held) <= pages
    assert sorted(ended) == list(range(60)) and batch.used_pages == batch.context == batch.generating == 0
    assert given == {number: output for number, (_, output) in enumerate(sizes)}
    least = sum(prompt + output - 1 for prompt, output in sizes)
    assert computed == least if batch.preempted == 0 else computed > least
    assert (batch.preempted > 0) == (pages == 90 and batching == "continuous") or pages == 90


def test_one_request_alone_waits_for_its_prompt_and_then_for_steps_of_one_token(deployment: Deployment) -> None:
    one = Requests(arrival_N=np.array([0.0]), input_N=np.array([800]), output_N=np.array([3]))
    served = run_clock(deployment.costs, one, pages=10_000)
    costs = deployment.costs
    zeros = np.zeros(4, dtype=np.int64)
    first = costs.step(np.array([800, 0, 0, 0]), zeros, zeros, [(0, 800, 0)]).total
    ones = np.array([1, 0, 0, 0])
    later = sum(costs.step(ones, ones, np.array([keys, 0, 0, 0]), []).total for keys in (800, 801))
    assert served.first_N[0] == pytest.approx(first) and served.done_N[0] == pytest.approx(first + later)


def test_at_a_low_load_what_comes_goes_and_littles_law_holds() -> None:
    deployment = Deployment(small("workload.arrivals.rate=20.0", "workload.requests=600"))
    requests = deployment.requests(0)
    served = deployment.serve(requests)
    rate = len(requests) / served.done_N.max()
    assert rate == pytest.approx(20.0, rel=0.15)
    # L = lambda W of those that are being answered: their mean number over time beside rate times time
    seconds = np.array(served.step_seconds)
    number = (np.array(served.step_generated) * seconds).sum() / served.done_N.max()
    assert number == pytest.approx(rate * (served.done_N - served.first_N).mean(), rel=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not() -> None:
    texts = [json_text(serve(small(f"seed={seed}"))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_largest_load_meets_the_limits_and_grows_with_the_gpus() -> None:
    slo = ("workload.slo={ttft: 0.5, tpot: 0.004}", "workload.requests=1500")
    two = largest_load(small(*slo, "parallelism={data: 2, expert: 2}"))
    four = largest_load(small(*slo))
    assert two["good_share"] >= 0.9 and four["good_share"] >= 0.9
    assert four["largest_requests_per_second"] > 1.2 * two["largest_requests_per_second"]


def test_static_batches_wait_and_continuous_ones_do_not() -> None:
    static, continuous = (
        serve(small(f"engine.batching={kind}", "engine.running=16", "workload.arrivals.rate=400.0"))
        for kind in ("static", "continuous")
    )
    assert static["ttft_s"]["p90"] > 2 * continuous["ttft_s"]["p90"]
    assert static["output_tokens_per_second"] < continuous["output_tokens_per_second"]


def test_skewed_routing_costs_time_and_shows_as_imbalance(deployment: Deployment) -> None:
    """With many tokens; with few of them the bytes of weights count, and fewer experts are touched."""
    skewed = Deployment(small(f"routing={{kind: popularity, counts: {[20] * 4 + [1] * 60}}}")).costs
    even, most = deployment.costs, max(deployment.costs.imbalance)
    assert skewed.imbalance[most] > 1.5 > even.imbalance[most] > 1.0
    assert skewed.experts_G[-1] > 1.3 * even.experts_G[-1] and skewed.exchange_G[-1] > 1.1 * even.exchange_G[-1]


def test_narrow_weights_leave_more_room_and_steps_of_few_tokens_are_faster() -> None:
    wide, narrow = (serve(small(f"workload.weights={kind}", "workload.arrivals.rate=5.0")) for kind in ("bf16", "int4"))
    assert narrow["memory"]["weights"] < 0.6 * wide["memory"]["weights"]
    assert narrow["memory"]["kv_tokens"] > wide["memory"]["kv_tokens"]
    assert narrow["tpot_s"]["p50"] < wide["tpot_s"]["p50"]


def test_logs_of_requests_are_read(tmp_path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.2225670,879,55\n"
    )
    deployment = Deployment(small(f"workload.arrivals={{kind: trace, file: {azure}}}"))
    requests = deployment.requests(0)
    np.testing.assert_allclose(requests.arrival_N, [0.0, 4.314579, 4.541977], atol=1e-6)
    assert requests.input_N.tolist() == [374, 396, 879] and requests.output_N.tolist() == [44, 109, 55]
    burst = tmp_path / "burst.csv"
    burst.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,x\n")
    assert Deployment(small(f"workload.arrivals={{kind: trace, file: {burst}}}")).requests(0).input_N.tolist() == [472]
    head = "time,input,output\n"
    for text, fault in (("a,b\n1,2\n", "no column"), (head, "no request"), (head + "1,x,2\n", ":2: ")):
        azure.write_text(text)
        with pytest.raises(UserError, match=fault):
            Deployment(small(f"workload.arrivals={{kind: trace, file: {azure}}}")).requests(0)


@pytest.mark.parametrize(
    ("override", "fault", "error"),
    [
        ("parallelism.expert=2", "neither 1 nor all 4 ranks", UserError),
        ("parallelism.tensor=3", "12 ranks on 4 GPUs", UserError),
        ("workload.arrivals.rat=3", 'rat.*did you mean "rate"', UserError),
        ("model.layers=4000", "model.layers", UserError),
        ("workload.arrivals.input={kind: fixed, tokens: 9000000}", "does not fit into the", InfeasibleError),
        ("cluster.gpu={like: h100, name: tiny, memory: 6 GB}", "no page for keys and values is left", InfeasibleError),
    ],
)
def test_mistakes_are_one_line(override: str, fault: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=fault) as caught:
        serve(small(override))
    assert "\n" not in str(caught.value)


def test_a_largest_load_needs_limits_that_can_be_met() -> None:
    with pytest.raises(UserError, match=r"set workload\.slo\.ttft or workload\.slo\.tpot"):
        largest_load(small())
    with pytest.raises(InfeasibleError, match="missed even by requests that come alone"):
        largest_load(small("workload.slo={tpot: 0.000001}", "workload.requests=20"))


def test_every_number_of_an_answer_is_defined() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    answers = serve_seeds(small("workload.requests=20"), 2)
    answers |= largest_load(small("workload.requests=20", "workload.slo={ttft: 9.0}"))
    for key in answers:
        assert f"`{key}`" in page, key


@pytest.mark.parametrize("name", names("serving"))
def test_every_deployment_that_ships_is_served(name: str) -> None:
    scenario = load_serving(resolve(name, "serving"), ["workload.requests=40"])
    result = serve(scenario)
    assert result["output_tokens_per_second"] > 0 and 0 < result["kv_peak_share"] <= 1
    assert sum(result["time_s"].values()) == pytest.approx(result["steps"] * result["step_s"]["mean"])


def test_each_loader_names_the_verb_of_the_other() -> None:
    with pytest.raises(UserError, match=r"f\.yaml:8:9: workload\.kind: this is a serving scenario.*`moesim serve`"):
        load_scenario_text(SMALL, source="f.yaml")
    with pytest.raises(UserError, match=r"this is a training scenario; simulate it with `moesim run`"):
        load_serving(resolve("quickstart", "scenario"))
