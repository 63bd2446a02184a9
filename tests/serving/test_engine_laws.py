"""Laws that every engine keeps, whatever features it combines: drawn deployments of a small model under drawn loads."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from moesim.errors import InfeasibleError
from moesim.serving import largest_load, load_serving_text, serve
from moesim.serving.batch import Chunk, Formed, Job
from moesim.serving.clock import Served
from moesim.serving.fleet import Deployment
from moesim.serving.requests import Requests
from moesim.serving.schema import ServingScenario
from moesim.strict_json import json_text

pytestmark = pytest.mark.usefixtures("few_draws")

MODEL = {"preset": "deepseek-moe-16b", "layers": 2, "mtp_layers": 1}
QUICK = settings(max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=200, suppress_health_check=list(HealthCheck))
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole prompts": {"engine": {"chunked_prefill": False}},
    "small chunks": {"engine": {"token_budget": 256}},
    "prefixes": {"workload": {"prefixes": {"number": 3, "tokens": 300, "share": 0.8}}, "engine": {"page": 16}},
    "swap": {"engine": {"preemption": "swap", "host_memory": "4 GB"}},
    "drafts": {"engine": {"speculation": {"draft": "mtp", "acceptance": [0.8, 0.5]}}},
    "classes": {"workload": {"priorities": {"shares": [0.3, 0.7], "patience": 0.5}}},
    "two batches": {"engine": {"two_batches": True}},
    "static": {"engine": {"batching": "static"}},
    "by length": {"engine": {"batching": "by_length"}},
    "copies": {"engine": {"redundant_experts": 8}},
    "dropping": {"engine": {"capacity_factor": 1.25}},
    "instances": {"fleet": {"replicas": 2}},
    "prefill apart": {"fleet": {"prefill": {"parallelism": {"data": 2, "expert": 2}, "token_budget": 512}}},
}
APART = (("static", "by length"), ("whole prompts", "small chunks"))  # which exclude each other
NEEDS_RANKS = ("two batches", "copies")


def scenario(names: tuple[str, ...], *, ranks: int = 2, share: float = 0.9, **load: Any) -> ServingScenario:
    """A deployment with all of the features; `share` of its memory for pages."""
    drawn: dict[str, Any] = {
        "schema_version": 1,
        "name": "drawn",
        "model": MODEL,
        "routing": {"kind": "uniform"},
        "cluster": {"gpu": "h100", "nodes": 2, "gpus_per_node": 8},
        "parallelism": {"data": ranks, "expert": ranks},
        "memory": {"share": share},
        "engine": {"running": 16, "page": 16, "token_budget": 2048},
        "seed": load.pop("seed", 0),
        "workload": {
            "kind": "serving",
            "requests": load.pop("requests", 40),
            "arrivals": {
                "kind": "poisson",
                "rate": load.pop("rate", 300.0),
                "input": {"kind": "log_normal", "mean": 300, "variation": 0.8, "most": 700},
                "output": {"kind": "log_normal", "mean": 30, "variation": 0.8, "most": 100},
            },
            **load,
        },
    }
    for name in names:
        for section, values in FEATURES[name].items():
            drawn[section] = {**drawn.get(section, {}), **values}
    return load_serving_text(json.dumps(drawn))


@st.composite
def deployments(draw: st.DrawFn) -> ServingScenario:
    """Some features together, on one to four ranks, with room for all pages or for few."""
    names = draw(st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, max_size=4, unique=True))
    for first, second in APART:
        if first in names and second in names:
            names.remove(second)
    ranks = draw(st.sampled_from([2, 4] if set(names) & set(NEEDS_RANKS) else [1, 2, 4]))
    return scenario(
        tuple(names),
        ranks=ranks,
        share=draw(st.sampled_from([0.9, 0.0004, 0.0004])),
        rate=draw(st.sampled_from([20.0, 300.0, 5000.0])),
        seed=draw(st.integers(0, 3)),
    )


def check(drawn: ServingScenario) -> None:
    deployment = Deployment(drawn)
    try:
        requests = deployment.requests(drawn.seed)
    except InfeasibleError:  # its longest request has no room: refused
        reject()
    served = deployment.serve(requests)
    # nobody starves, and time goes forwards
    assert np.all(requests.arrival_N < served.first_N) and np.all(served.first_N <= served.done_N)
    prompts = (served.earlier or (served,))[0]
    firsts = len(requests) if served is prompts else 0
    first_again = sum(each.count("preempted") - each.count("swapped") for each in (*served.earlier, served))
    # tokens are conserved: each request gets what it asked for, prompts are computed unless they were found
    asked = int(requests.output_N.sum()) - (len(requests) - firsts)
    missing = asked - firsts - served.count("given")
    assert 0 <= missing <= first_again and (missing == 0 or first_again > 0)
    computed = sum(each.count("rows") - each.count("padding") for each in (*served.earlier, served))
    answered = served.count("answered") * served.batches[0].rows
    admitted = sum(each.count("prompt_tokens") - each.count("found_tokens") for each in (*served.earlier, served))
    assert computed - answered <= admitted and (first_again > 0 or computed - answered == admitted)
    assert prompts.count("prompt_tokens") >= requests.input_N.sum()
    for pool, each in zip(deployment.pools, (*served.earlier, served), strict=True):
        check_pages(pool.memory.pages, each)
    check_little(served, requests, preempted=any(each.count("preempted") for each in (*served.earlier, served)))


def check_pages(pages: int, served: Served) -> None:
    """Keys and values never take more than there is, in any data group, and all is free in the end."""
    for _, held_D in served.step_held:
        assert held_D.max(initial=0) <= pages
    assert max(served.step_pages, default=0) <= pages * len(served.batches)
    for batch in served.batches:
        assert batch.is_idle and batch.used_pages == batch.cache.pages and batch._host_used == 0


def check_little(served: Served, requests: Requests, *, preempted: bool) -> None:
    """Requests being answered, over the time of steps, are what they took together (Little's law, not divided by T)."""
    seconds = float((np.array(served.step_generated) * np.array(served.step_seconds)).sum())
    took = float((served.done_N - served.first_N).sum())
    if preempted or served.earlier or served.batches[0].engine.batching != "continuous":
        assert seconds <= took * (1 + 1e-9)  # they wait, or are on their way, meanwhile
    else:
        assert seconds == pytest.approx(took, rel=1e-9)


@QUICK
@given(deployments())
def test_tokens_pages_and_times_are_conserved(drawn: ServingScenario) -> None:
    check(drawn)


@pytest.mark.slow
@LONG
@given(deployments())
def test_many_more_deployments(drawn: ServingScenario) -> None:
    check(drawn)


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_seed_gives_the_same_bytes_and_a_low_load_is_answered_as_it_comes(name: str) -> None:
    drawn = scenario((name,), rate=5.0, requests=15)
    found = serve(drawn)
    assert json_text(found) == json_text(serve(drawn))
    arrivals = Deployment(drawn).requests(0).arrival_N
    assert found["requests_per_second"] == pytest.approx(len(arrivals) / arrivals[-1], rel=0.05)


@pytest.mark.parametrize("name", FEATURES)
def test_the_first_token_of_one_request_takes_the_steps_of_its_prompt(name: str) -> None:
    """With what the parts of the prompt cost by themselves, beside ranks that compute a token for nothing.

    Keys are sent at its end: those that are sent beside it share its ports.
    """
    drawn = scenario((name,))
    if prefill := drawn.fleet.prefill:
        sent = drawn.fleet.model_copy(update={"prefill": prefill.model_copy(update={"transfer": "at_end"})})
        drawn = drawn.model_copy(update={"fleet": sent})
    deployment = Deployment(drawn)
    served = deployment.serve(Requests(arrival_N=np.zeros(1), input_N=np.array([900]), output_N=np.array([2])))
    pool = deployment.pools[0]
    engine, costs = pool.scenario.engine, pool.costs
    rows = 1 + (len(engine.speculation.acceptance) if engine.speculation else 0)
    idle = [Formed(0, rows, (0,), (), 0, 0)] * (pool.scenario.parallelism.data - 1)
    seconds = 0.0
    for before in range(0, 900, engine.token_budget):
        tokens = min(engine.token_budget, 900 - before)
        chunk = Formed(0, rows, (0,), (Chunk(Job(0, 900, 2), tokens, before),), 0, 0)
        seconds += costs.step([chunk, *idle]).total
    assert served.first_N[0] == pytest.approx(seconds)


SLO = {"slo": {"ttft": 0.1, "tpot": 0.003}, "requests": 150}


@pytest.mark.slow
def test_more_gpus_never_carry_less() -> None:
    """Beyond the noise of the search, whether ranks share experts, serve by themselves, or are other instances."""
    loads = [largest_load(scenario(("plain",), ranks=ranks, **SLO)) for ranks in (1, 2, 4)]
    loads.append(largest_load(scenario(("plain", "instances"), ranks=4, **SLO)))
    rates = [each["largest_requests_per_second"] for each in loads]
    assert all(more >= 0.95 * fewer for fewer, more in itertools.pairwise(rates)), rates
    assert [each["gpus"] for each in loads] == [1, 2, 4, 8]
