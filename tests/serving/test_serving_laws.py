"""Serving: laws of the clock, of pages and of batches, and of what is answered."""

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.report.serving_view import serving_page
from moesim.scenario import TraceRouting, gpu_spec, load_scenario_text
from moesim.serving import largest_load, load_serving, load_serving_text, serve, serve_seeds
from moesim.serving.batch import Batch, Chunk, Formed, Job
from moesim.serving.clock import BALANCING
from moesim.serving.costs import StepCosts
from moesim.serving.decode_kernels import small_all_reduce
from moesim.serving.fleet import Deployment
from moesim.serving.memory import KeyLayout, LayerKeys
from moesim.serving.requests import Requests
from moesim.serving.schema import Engine, ServingScenario
from moesim.shipped import names, resolve
from moesim.strict_json import json_text

pytestmark = pytest.mark.usefixtures("few_draws")

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
    output: {kind: log_normal, mean: 30, variation: 0.8, most: 250}
"""

LARGE = 32  # GPUs; exchanges of more ranks take longer than a quick test may
# Short answers on one GPU and a short wait: few requests show a steady load.
FEW = ("parallelism={data: 1}", "workload.arrivals.output={kind: fixed, tokens: 2}", "workload.requests=40")


def small(*overrides: str) -> ServingScenario:
    return load_serving_text(SMALL, overrides=overrides)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return Deployment(small())


ENGINES = {
    "continuous": {},
    "static": {"batching": "static"},
    "by_length": {"batching": "by_length"},
    "swap": {"preemption": "swap"},
    "speculation": {"speculation": {"draft": "lookup", "acceptance": (0.8, 0.5)}},
}
LAYOUTS = {
    "all": KeyLayout(kinds=(LayerKeys(layers=1),), page=16),
    "windows": KeyLayout(kinds=(LayerKeys(layers=2, window=100), LayerKeys(layers=1)), page=16),
}


MANY = 40  # requests: more than run at a time


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pages", [100_000, 180])
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_conserved_and_pages_never_exceed_memory(seed: int, pages: int, kind: str, layout: str) -> None:
    """A batch by itself, step by step, with shared prefixes and classes, beside a plain count of tokens."""
    rng = np.random.default_rng(seed)
    engine = Engine.model_validate({"token_budget": 512, "running": 32, "page": 16, **ENGINES[kind]})
    batch = Batch(engine, layout=LAYOUTS[layout], pages=pages, host_pages=500, rng=rng)
    sizes = [(int(rng.integers(60, 700)), int(rng.integers(1, 120))) for _ in range(MANY)]
    for number, size in enumerate(sizes):
        urgency = int(rng.integers(2))
        prefix = int(rng.integers(-1, 3))
        batch.add(Job(number, *size, turn=number + 20 * urgency, urgency=urgency, prefix=prefix, prefix_tokens=50))
    given, rows, ended = 0, 0, []
    for _ in range(100_000):
        if batch.is_idle:
            break
        formed = batch.form()
        assert 0 < formed.tokens - formed.padding <= 512 and batch.running <= 32 and batch.used_pages <= pages
        assert formed.generated == len(batch.stored_S) and formed.rows == batch.rows
        first, done = batch.finish(formed)
        given += len(first)
        rows += formed.tokens
        ended += [job.request for job in done]
        assert batch.used_pages <= pages
    assert sorted(ended) == list(range(MANY)) and batch.generating == 0 and not any(batch._expected.values())
    assert batch.used_pages == batch.cache.pages and batch.counts.found_tokens > 0
    outputs = sum(output for _, output in sizes)
    assert given + batch.counts.given == outputs
    computed = rows - batch.counts.padding - batch.counts.answered * batch.rows
    admitted = batch.counts.prompt_tokens - batch.counts.found_tokens
    assert computed == admitted if batch.counts.preempted == 0 else computed <= admitted
    assert batch.counts.prompt_tokens >= sum(prompt for prompt, _ in sizes)
    assert (batch.counts.swapped > 0) == (kind == "swap" and batch.counts.preempted > 0)
    assert (batch.counts.preempted > 0) == (pages == 180 and kind != "by_length")


def formed(costs: StepCosts, *groups: tuple[int, int, tuple[int, int] | None]) -> list[Formed]:
    """(generated, keys, (tokens, before) of a part of a prompt) of each group."""
    return [
        Formed(generated, 1, (keys,), (Chunk(Job(0, 1, 1), *chunk),) if chunk else (), 0, 0)
        for generated, keys, chunk in groups
    ]


def test_one_request_alone_waits_for_its_prompt_and_then_for_steps_of_one_token(deployment: Deployment) -> None:
    one = Requests(arrival_N=np.array([0.0]), input_N=np.array([800]), output_N=np.array([3]))
    served, costs, idle = deployment.serve(one), deployment.costs, (0, 0, None)
    first = costs.step(formed(costs, (0, 0, (800, 0)), idle, idle, idle)).total
    later = sum(costs.step(formed(costs, (1, keys, None), idle, idle, idle)).total for keys in (800, 801))
    assert served.first_N[0] == pytest.approx(first) and served.done_N[0] == pytest.approx(first + later)


def test_at_a_low_load_what_comes_goes_and_littles_law_holds() -> None:
    deployment = Deployment(small("workload.arrivals.rate=20.0", "workload.requests=150"))
    requests = deployment.requests(0)
    served = deployment.serve(requests)
    rate = len(requests) / served.done_N.max()
    assert rate == pytest.approx(20.0, rel=0.15)
    # L = lambda W of those that are being answered: their mean number over time beside rate times time
    seconds = np.array(served.step_seconds)
    number = (np.array(served.step_generated) * seconds).sum() / served.done_N.max()
    assert number == pytest.approx(rate * (served.done_N - served.first_N).mean(), rel=1e-6)
    # nobody overtakes: with one class, first tokens of a group come in the order of arrivals
    assert np.all(np.diff(served.first_N[np.argsort(requests.arrival_N)]) > -1.0)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not() -> None:
    texts = [json_text(serve(small(f"seed={seed}", "workload.requests=20"))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_largest_load_meets_the_limits_and_grows_with_the_gpus() -> None:
    limits = "workload.slo={ttft: 0.1, tpot: 0.1}"
    two, four = (
        largest_load(small(*PROMPTS, limits, "workload.requests=40", f"parallelism={{data: {ranks}, expert: {ranks}}}"))
        for ranks in (2, 4)
    )
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
    """With many tokens; with few of them the bytes of weights count, and fewer experts are touched.

    The exchange has fewer copies then, and the hot rank mostly receives: it does not take longer.
    """
    skewed = Deployment(small(f"routing={{kind: popularity, counts: {[20] * 4 + [1] * 60}}}")).costs.experts
    even = deployment.costs.experts
    assert even is not None and skewed is not None
    most, least = skewed.at(30_000, 0), even.at(30_000, 0)
    assert most.imbalance > 1.5 > least.imbalance > 1.0
    assert most.seconds > 1.3 * least.seconds and 0.7 < most.exchange / least.exchange < 1.3
    flops = 30_000 * 6 / 4 * 2 * 3 * 2048 * 1408  # of a rank's rows, more than are drawn
    assert flops / 989e12 < least.seconds < 3 * flops / 989e12


def test_prefixes_are_found_again_and_spare_their_steps() -> None:
    load = (
        "workload.prefixes={number: 4, tokens: 2000, share: 0.9}",
        "workload.arrivals.rate=50.0",
        "workload.requests=80",
    )
    kept, lost = (serve(small(*load, f"engine.prefix_cache={cache}")) for cache in ("true", "false"))
    most = 0.9 * 2000 / (0.9 * 2000 + 500)
    assert lost["prefix_hit_share"] == 0.0 and 0.5 * most < kept["prefix_hit_share"] < most + 0.05
    assert kept["ttft_s"]["p50"] < lost["ttft_s"]["p50"] and kept["input_tokens"] == lost["input_tokens"]


def test_requests_that_go_where_their_prefix_is_find_more_of_it() -> None:
    load = (
        "workload.prefixes={number: 40, tokens: 2000, skew: 0.5}",
        "workload.arrivals.rate=60.0",
        "workload.requests=150",
    )
    apart, together = (serve(small(*load, f"engine.balancing={kind}")) for kind in BALANCING)
    assert together["prefix_hit_share"] > 1.15 * apart["prefix_hit_share"]
    assert together["time_s"]["projections"] < apart["time_s"]["projections"]


def test_what_is_swapped_is_not_computed_again() -> None:
    tight = (
        "memory.share=0.002",
        "workload.arrivals.rate=700.0",
        "workload.arrivals.output={kind: log_normal, mean: 60, variation: 0.8, most: 500}",
        "engine.host_memory=8 GB",
        "engine.host_link=25 GB/s",
    )
    again, moved = (Deployment(small(*tight, f"engine.preemption={kind}")) for kind in ("recompute", "swap"))
    requests = again.requests(0)
    computed, swapped = again.serve(requests), moved.serve(requests)
    assert computed.count("preempted") > 10 < swapped.count("swapped") and computed.count("swapped") == 0
    assert swapped.count("prompt_tokens") == requests.input_N.sum() < computed.count("prompt_tokens")
    assert swapped.parts["swap"] > 0.0 == computed.parts["swap"]
    assert max(swapped.step_pages) <= 4 * moved.memory.pages


def test_urgent_requests_come_first_and_others_are_not_forgotten() -> None:
    load = (
        "workload.arrivals.rate=2000.0",
        "engine.running=8",
        "workload.priorities={shares: [0.2, 0.8], patience: 1.0}",
    )
    deployment = Deployment(small(*load))
    requests = deployment.requests(0)
    served = deployment.serve(requests)
    waited_N, urgent_N = served.first_N - requests.arrival_N, requests.class_N == 0
    assert waited_N[urgent_N].mean() < 0.6 * waited_N[~urgent_N].mean()
    behind_N = requests.arrival_N + np.where(urgent_N, 0.0, 1.0)
    for number in np.flatnonzero(~urgent_N)[:50]:  # nobody who came a second later was begun before
        assert served.first_N[behind_N > behind_N[number] + 0.2].min(initial=np.inf) >= served.first_N[number] - 0.5


def test_drafted_tokens_are_accepted_as_stated_and_cost_their_rows() -> None:
    drafts = "engine.speculation={draft: lookup, acceptance: [0.8, 0.5]}"
    load = (
        "workload.arrivals.output={kind: fixed, tokens: 200}",
        "workload.arrivals.rate=1000.0",  # together, in few steps
        "workload.requests=15",
    )
    plain, drafted = serve(small(*load)), serve(small(*load, drafts))
    assert plain["tokens_per_request_step"] == 1.0
    assert drafted["tokens_per_request_step"] == pytest.approx(1 + 0.8 + 0.8 * 0.5, rel=0.02)
    assert drafted["output_tokens"] == plain["output_tokens"] and drafted["tpot_s"]["p50"] < plain["tpot_s"]["p50"]
    mtp = serve(small(*load, "model.mtp_layers=1", drafts.replace("lookup", "mtp")))
    assert mtp["time_s"]["draft"] > 0 and mtp["memory"]["weights"] > plain["memory"]["weights"]
    assert drafted["tpot_s"]["p50"] < mtp["tpot_s"]["p50"]


def test_dropping_bounds_the_fullest_expert_and_says_what_it_dropped() -> None:
    skewed = f"routing={{kind: popularity, counts: {[20] * 4 + [1] * 60}}}"
    kept, dropped = (
        serve(small(skewed, "workload.requests=60", *more)) for more in ((), ("engine.capacity_factor=1.25",))
    )
    assert kept["dropped_share"] == 0.0 < dropped["dropped_share"] < 0.6
    assert dropped["rank_rows_imbalance"] < kept["rank_rows_imbalance"]
    assert dropped["time_s"]["experts"] < kept["time_s"]["experts"]


def test_windows_store_and_read_less() -> None:
    local = "model.attention={kind: local_global, window: 64, global_every: 32}"
    prompts = ("workload.arrivals.input={kind: fixed, tokens: 4000}", "workload.requests=40")
    load = (*prompts, "workload.arrivals.rate=20.0", "model.kv_heads=16")
    full, windowed = serve(small(*load)), serve(small(*load, local))
    assert windowed["time_s"]["attention"] < 0.6 * full["time_s"]["attention"]
    assert windowed["kv_peak_share"] < 0.3 * full["kv_peak_share"]
    for kind in (LayerKeys(layers=1, window=64, every=32), LayerKeys(layers=1, window=64, is_chunked=True)):
        seen = [int(kind.seen(token)) for token in range(1, 600)]
        assert kind.seen_by_part(300, 299) == sum(seen[299:599]) and kind.seen_by_part(40, 0) == sum(seen[:40])


def test_stages_answer_as_much_with_less_memory_each() -> None:
    one, two = (
        serve(small(mesh, "workload.arrivals.rate=20.0", "workload.requests=50"))
        for mesh in ("parallelism={data: 2, expert: 2}", "parallelism={data: 2, expert: 2, pipeline: 2}")
    )
    for result, groups in ((one, 2), (two, 2)):
        share_MD = np.array(result["kv_share_over_time"]["share"])
        assert share_MD.shape == (200, groups) and 0.5 * result["kv_peak_share"] < share_MD.max() <= 1.0
    assert two["gpus"] == 4 and two["memory"]["weights"] < 0.75 * one["memory"]["weights"]
    assert two["memory"]["kv_tokens"] > 1.5 * one["memory"]["kv_tokens"]
    assert one["tpot_s"]["p50"] == pytest.approx(two["tpot_s"]["p50"], rel=0.3)


def test_ranks_that_share_matrices_are_faster_and_pay_two_all_reduces_a_layer() -> None:
    one, two, four = (
        Deployment(small(f"parallelism={{data: 1, tensor: {ranks}}}", "model.kv_heads=16")) for ranks in (1, 2, 4)
    )
    steps = [each.costs.step(formed(each.costs, (64, 64 * 1000, None))) for each in (one, two, four)]
    assert steps[0].exchange == 0.0 < steps[1].exchange < steps[2].exchange
    assert steps[0].attention > 1.6 * steps[1].attention > 1.6 * 1.4 * steps[2].attention
    assert one.memory.weights > 1.9 * two.memory.weights and one.memory.kv_per_token == 2 * two.memory.kv_per_token
    layers, width = 4, 64 * 2048 * 2
    own = small_all_reduce(gpu_spec("h100"), 2, width)
    assert own is not None and steps[1].exchange <= 2 * layers * own * 1.001  # NCCL where that is faster


def test_batches_of_like_length_hold_the_oldest_and_its_neighbours_padded_to_the_longest() -> None:
    rng, budget = np.random.default_rng(0), 4096
    engine = Engine(batching="by_length", token_budget=budget, page=16)
    batch = Batch(engine, layout=LAYOUTS["all"], pages=100_000)
    lengths = rng.integers(20, 900, 80).tolist()
    for number, length in enumerate(lengths):
        batch.add(Job(number, length, 5, turn=number))
    step = batch.form()
    chosen = [chunk.job.prompt for chunk in step.chunks]
    apart = sorted(abs(length - lengths[0]) for length in lengths)
    assert step.chunks[0].job.request == 0
    assert max(abs(length - lengths[0]) for length in chosen) == apart[len(chosen) - 1]
    assert step.tokens == len(chosen) * max(chosen) <= budget < (len(chosen) + 1) * (lengths[0] + apart[len(chosen)])
    batch.finish(step)
    assert batch.form().chunks == ()  # to its end first


def test_steps_without_graphs_last_as_long_as_the_host_launches() -> None:
    names = ("fused_sync", "fused", "torch_eager")
    waiting, hidden, eager = (Deployment(small(f"engine.software={name}")).costs for name in names)
    few = formed(eager, (1, 100, None), (1, 100, None), (1, 100, None), (1, 100, None))
    launching = eager.num_kernels * eager.pricing.software.launch
    assert eager.step(few).total == pytest.approx(launching + eager.pricing.software.step)
    software = waiting.pricing.software
    assert waiting.step(few).host == software.step + software.request and waiting.step(few).total < 0.3 * launching
    assert hidden.step(few).host == 0.0


def test_generated_tokens_may_choose_otherwise_than_prompts(deployment: Deployment) -> None:
    apart = Deployment(small(f"decode_routing={{kind: popularity, counts: {[20] * 4 + [1] * 60}}}")).costs.experts
    even = deployment.costs.experts
    assert apart is not None and even is not None
    none, half, all_of_them = (apart.at(30_000, generated).imbalance for generated in (0, 15_000, 30_000))
    assert none == even.at(30_000, 0).imbalance < half < all_of_them


def test_generated_tokens_have_a_trace_of_their_own_beside_the_file_or_one_that_ships(tmp_path: Path) -> None:
    shipped = small('decode_routing={kind: trace, file: "library:64x6/published"}').decode_routing
    assert isinstance(shipped, TraceRouting) and shipped.file == "library:64x6/published"
    (tmp_path / "own.routing").touch()
    file = tmp_path / "small.yaml"
    file.write_text(SMALL + "decode_routing: {kind: trace, file: own.routing}\n")
    own = load_serving(file).decode_routing
    assert isinstance(own, TraceRouting) and own.file == str(tmp_path / "own.routing")


def test_between_places_of_a_table_costs_are_in_proportion_and_beyond_it_to_the_tokens(deployment: Deployment) -> None:
    tables, layer = deployment.costs.experts, deployment.costs.layer
    assert tables is not None
    low, high = tables.total_G[9:11]
    for one, other, middle in (
        ((low, 0), (high, 0), ((low + high) / 2, 0)),
        ((high, 0), (high, 0.5 * high), (high, 0.25 * high)),
        ((high, 0.5 * high), (high, high), (high, 0.75 * high)),
    ):
        assert tables.at(*one) != tables.at(*other)
        assert tables.at(*middle) == pytest.approx(np.mean([tables.at(*one), tables.at(*other)], axis=0))
    most = int(layer.tokens_G[-1])
    assert layer.at(np.array([0, most, 3 * most])) == pytest.approx(layer.seconds_G[-1] * np.array([0, 1, 3]))
    half = int(layer.tokens_G[-3:-1].mean())
    assert layer.seconds_G[-3] <= layer.at(np.array([half]))[0] <= layer.seconds_G[-2]


def test_narrow_weights_leave_more_room_and_steps_of_few_tokens_are_faster() -> None:
    load = ("workload.arrivals.rate=5.0", "workload.requests=20")
    wide, narrow = (serve(small(f"workload.weights={kind}", *load)) for kind in ("bf16", "int4"))
    assert narrow["memory"]["weights"] < 0.6 * wide["memory"]["weights"]
    assert narrow["memory"]["kv_tokens"] > wide["memory"]["kv_tokens"]
    assert narrow["tpot_s"]["p50"] < wide["tpot_s"]["p50"]


@pytest.mark.parametrize(
    ("override", "fault", "error"),
    [
        ("parallelism.expert=2", "neither 1 nor all 4 ranks", UserError),
        ("engine.speculation={acceptance: [0.8]}", "no layer of multi-token prediction", UserError),
        ("workload.priorities={shares: [0.5, 0.4]}", "add up to 0.9", UserError),
        ("parallelism.tensor=3", "12 ranks on 4 GPUs", UserError),
        ("workload.arrivals.rat=3", 'rat.*did you mean "rate"', UserError),
        ("model.layers=4000", "model.layers", UserError),
        (
            "workload.arrivals.input={kind: fixed, tokens: 9000000}",
            "cannot hold a request of 9,000,194",
            InfeasibleError,
        ),
        ("cluster.gpu={like: h100, name: tiny, memory: 6 GB}", "0 tokens fit", InfeasibleError),
        ("engine={preemption: swap, host_memory: 0 GB}", "engine.host_memory: holds no page", UserError),
        ("memory.share=0.0", "memory.share", UserError),
        ("workload.arrivals={kind: trace, file: no.csv}", "name a file that is there", UserError),
    ],
)
def test_mistakes_are_one_line(override: str, fault: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=fault) as caught:
        serve(small(override))
    assert "\n" not in str(caught.value)


ON_TWO = "fleet={prefill: {replicas: 2, parallelism: {data: 1, expert: 1}}}"


@pytest.mark.parametrize(
    ("pool", "overrides"),
    [
        ("a GPU", ("cluster.gpu={like: h100, name: tiny, memory: 8 GB}", "engine.token_budget=65536")),
        ("a GPU", ("cluster.gpu={like: h100, name: tiny, memory: 5 GB}", "workload.weights=fp8")),
        ("a GPU of the prefill pool", ("cluster.gpu={like: h100, name: tiny, memory: 6 GB}", ON_TWO)),
        ("a GPU of the decode pool", ("cluster.gpu={like: h100, name: tiny, memory: 6 GB}", ON_TWO, "parallelism={}")),
    ],
)
def test_what_does_not_fit_names_its_pool_and_changes_that_make_room(pool: str, overrides: tuple[str, ...]) -> None:
    """Every change that is named is made, on as many nodes as it needs: the pool is not refused again."""
    load = ("workload.requests=5", "workload.arrivals.input={kind: fixed, tokens: 500}", "cluster.nodes=4", *overrides)
    if pool.endswith("decode pool"):
        load = (*load, "fleet.prefill.parallelism={data: 4, expert: 4}", "fleet.prefill.token_budget=512")
    with pytest.raises(InfeasibleError, match=f"memory: {pool} cannot hold") as caught:
        Deployment(small(*load)).requests(0)
    changes = str(caught.value).rpartition("; use ")[2].split(" or ")
    assert changes[0].count(": ") and len(str(caught.value)) < 400
    for change in changes:
        key, _, value = change.partition(" (")[0].partition(": ")
        try:
            Deployment(small(*load, "cluster.nodes=80", f"{key}={value}")).requests(0)
        except InfeasibleError as other:
            assert f"memory: {pool} cannot" not in str(other)  # the other pool may be too small as well


PROMPTS = (
    "model.layers=2",
    "parallelism={data: 1}",
    "workload.slo={ttft: 0.1}",
    "workload.arrivals.output={kind: fixed, tokens: 2}",
    "workload.arrivals.input={kind: fixed, tokens: 8000}",
)


def test_a_short_scenario_and_a_long_one_have_the_same_largest_load() -> None:
    """The requests of the scenario are those that are simulated at least."""
    short, long = (largest_load(small(*PROMPTS, f"workload.requests={number}")) for number in (20, 300))
    assert 20 < short["requests"] < 300 == long["requests"]
    rates = [each["largest_requests_per_second"] for each in (short, long)]
    assert rates[0] == pytest.approx(rates[1], rel=0.1)


@pytest.mark.slow
def test_as_many_instances_carry_as_many_times_the_load() -> None:
    one, eight = (largest_load(small(*PROMPTS, "cluster.nodes=2", f"fleet.replicas={each}")) for each in (1, 8))
    rates = [each["largest_requests_per_second"] for each in (one, eight)]
    assert rates[1] == pytest.approx(8 * rates[0], rel=0.1)


def test_without_a_limit_of_the_first_token_a_largest_load_is_what_goes() -> None:
    """Requests that wait outside keep the time per token short: it is no load that is carried."""
    sizes = "workload.arrivals.output={kind: fixed, tokens: 3}"
    mesh = ("model.layers=2", "parallelism={data: 1}", "engine.running=8")
    base = (*mesh, "workload.requests=60", "workload.slo={tpot: 1.0}", sizes)
    found = largest_load(small(*base))
    rate = found["largest_requests_per_second"]
    assert rate == pytest.approx(found["requests_per_second"], rel=0.1)
    crowd = serve(small(*base, f"workload.arrivals.rate={1.5 * rate}", "workload.requests=400"))
    assert crowd["good_share"] == 1.0 and crowd["requests_per_second"] == pytest.approx(rate, rel=0.15)
    assert any("more comes than goes" in warning for warning in crowd["warnings"])
    assert serve(small(*base, f"workload.arrivals.rate={0.5 * rate}"))["warnings"] == []


def test_a_static_batch_larger_than_a_budget_computes_its_prompts_in_parts() -> None:
    engine = Engine(batching="static", token_budget=512, running=8, page=16)
    batch = Batch(engine, layout=LAYOUTS["all"], pages=100_000)
    for number in range(10):
        batch.add(Job(number, 300, 5, turn=number))
    begun, steps, served = set[int](), list[int](), list[int]()
    while not batch.is_idle:
        step = batch.form()
        assert 0 < step.tokens <= 512
        begun |= {chunk.job.request for chunk in step.chunks}
        served += [job.request for job in batch.finish(step)[1]]
        steps.append(step.tokens)
        if len(served) < 8:
            assert begun <= set(range(8)), "nobody joins a static batch"
    assert sorted(served[:8]) == list(range(8)) and sorted(served) == list(range(10))
    assert sum(steps) == 10 * (300 + 4) and max(steps[:5]) == 512


def test_a_largest_load_of_several_draws_holds_for_their_mean_or_for_each() -> None:
    scenario = small(*PROMPTS, "workload.requests=40", "workload.slo={ttft: 0.05, share: 0.9}")
    mean, worst = (largest_load(scenario, seeds=3, worst=each) for each in (False, True))
    assert worst["largest_requests_per_second"] <= mean["largest_requests_per_second"] * 1.001
    assert worst["ranges"]["good_share"][0] >= 0.9
    assert mean["ranges"]["good_share"][0] <= worst["ranges"]["good_share"][0] or worst == mean
    assert mean["ranges"]["good_share"][1] >= 0.9 and mean["seeds"] == 3
    assert "USD / M prompt tokens not cached" in serving_page(mean)


def test_a_largest_load_needs_limits_that_can_be_met() -> None:
    with pytest.raises(UserError, match=r"set workload\.slo\.ttft or workload\.slo\.tpot"):
        largest_load(small())
    with pytest.raises(InfeasibleError, match="missed even by requests that come alone"):
        largest_load(small("workload.slo={tpot: 0.000001}", *FEW))


def test_classes_have_latencies_of_their_own_and_all_requests() -> None:
    classes = serve(small("workload.priorities={shares: [0.3, 0.7], patience: 1.0}", "workload.requests=60"))["classes"]
    assert [each["class"] for each in classes] == [0, 1]
    assert sum(each["requests"] for each in classes) == 60
    assert serve(small("workload.requests=10"))["classes"] == []


def test_the_rent_is_split_and_what_was_cached_is_told_apart() -> None:
    load = ("workload.prefixes={number: 4, tokens: 2000, share: 0.9}", "workload.requests=60")
    found = serve(small(*load))
    rent = found["usd_per_million_tokens"] * (found["input_tokens"] + found["output_tokens"])
    prompts = found["usd_per_million_input_tokens"] * found["input_tokens"]
    assert prompts + found["usd_per_million_generated_tokens"] * found["output_tokens"] == pytest.approx(rent)
    new = found["input_tokens"] - found["cached_input_tokens"]
    assert 0 < new < found["input_tokens"] and found["usd_per_million_new_input_tokens"] * new == pytest.approx(prompts)


def test_idle_gpus_of_a_cluster_are_paid_for_and_told() -> None:
    whole = serve(small("parallelism={data: 4}", "workload.requests=20"))
    part = serve(small("parallelism={data: 1}", "workload.requests=20"))
    assert (whole["gpus"], whole["cluster_gpus"], part["gpus"], part["cluster_gpus"]) == (4, 4, 1, 4)
    rent = part["usd_per_million_output_tokens"] * part["output_tokens_per_second"]
    assert rent == pytest.approx(whole["usd_per_million_output_tokens"] * whole["output_tokens_per_second"])
    assert "served on 1 of 4 GPUs" in serving_page(part)
    assert "served on 4 GPUs" in serving_page(whole)


def test_ranges_hold_what_the_first_seed_gave() -> None:
    found = serve_seeds(small("workload.requests=40", "workload.slo={ttft: 0.02}"), 3)
    for key, (least, most) in found["ranges"].items():
        name, _, share = key.partition(".")
        assert least <= (found[name][share] if share else found[name]) <= most, key
    assert {"good_share", "good_requests_per_second", "usd_per_million_input_tokens"} <= found["ranges"].keys()


def test_rows_over_time_have_their_mean_and_the_imbalance_of_steps() -> None:
    found = serve(small("workload.requests=60"))["pools"][0]
    rows = found["expert_rows_over_time"]
    times = np.array(rows["times_mean"])
    assert rows["of"] == "rank" and times.shape == (len(rows["seconds"]), 4)
    assert np.allclose(times.mean(axis=1), 1.0, atol=0.01) and times.max() > 1.0


def test_every_number_of_an_answer_is_defined() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    answers = serve_seeds(small("workload.requests=20"), 2)
    answers |= largest_load(small(*FEW, "workload.slo={ttft: 0.02}"))
    for key in answers:
        assert f"`{key}`" in page, key


def _deployments() -> list:
    large = {name for name in names("serving") if load_serving(resolve(name, "serving")).cluster.num_gpus > LARGE}
    return [pytest.param(name, marks=[pytest.mark.slow] if name in large else []) for name in names("serving")]


@pytest.mark.parametrize("name", _deployments())
def test_every_deployment_that_ships_is_served(name: str) -> None:
    scenario = load_serving(resolve(name, "serving"), ["workload.requests=6"])
    result = serve(scenario)
    assert result["output_tokens_per_second"] > 0 and 0 < result["kv_peak_share"] <= 1
    busy = sum(pool["steps"] * pool["step_s"]["mean"] for pool in result["pools"])
    assert sum(result["time_s"].values()) == pytest.approx(busy)


def test_copies_let_experts_spread_over_ranks_that_do_not_divide_them() -> None:
    scenario = load_serving(resolve("deepseek-v3-prefill-ep32-decode-ep144-h800", "serving"))
    assert scenario.model.experts % scenario.parallelism.expert
    assert (scenario.model.experts + scenario.engine.redundant_experts) % scenario.parallelism.expert == 0


def test_each_loader_names_the_verb_of_the_other() -> None:
    with pytest.raises(UserError, match=r"f\.yaml:8:9: workload\.kind: this is a serving scenario.*`moesim serve`"):
        load_scenario_text(SMALL, source="f.yaml")
    with pytest.raises(UserError, match=r"this is a training scenario; simulate it with `moesim run`"):
        load_serving(resolve("quickstart", "scenario"))


DENSE = {  # elements of a layer's weights on a rank, by hand from the published architectures
    "qwen3-30b-one-h100": {
        "layers": 48,
        "projections": 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048,
        "key": 2 * 4 * 128,
    },
    "mixtral-8x7b-two-h100": {
        "layers": 32,
        "projections": (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096) / 2,
        "key": 8 * 128,
    },
}
EXPERTS = {"qwen3-30b-one-h100": (128, 8, 3 * 2048 * 768), "mixtral-8x7b-two-h100": (8, 2, 3 * 4096 * 14336 / 2)}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("requests", [32, 128])
def test_parts_of_a_step_lie_between_their_roofline_and_thrice_that(name: str, requests: int) -> None:
    """Bytes of weights and keys over the data sheet's 3.35 TB/s; experts that so many uniform tokens touch at most."""
    bandwidth, keys, sizes = 3.35e12, 2000, DENSE[name]
    costs = StepCosts(load_serving(resolve(name, "serving")))
    step = costs.step([Formed(requests, 1, (requests * keys,), (), 0, 0)])
    experts, chosen, width = EXPERTS[name]
    touched = experts * (1.0 - (1.0 - chosen / experts) ** requests)
    floors = {
        "projections": sizes["layers"] * sizes["projections"] * 2 / bandwidth,
        "attention": sizes["layers"] * requests * keys * sizes["key"] * 2 / bandwidth,
        "experts": sizes["layers"] * touched * width * 2 / bandwidth,
    }
    for part, floor in floors.items():
        assert 0.95 * floor < getattr(step, part) < 3.0 * floor, part
