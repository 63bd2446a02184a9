"""Fleets: instances side by side, prompts on instances of their own, copies of experts, two batches."""

from dataclasses import replace

import numpy as np
import pytest
import simpy

from moesim.errors import UserError
from moesim.network import build_fabric, send_recv_seconds
from moesim.report.serving_view import rate, serving_page
from moesim.serving import largest_load, load_serving_text, serve
from moesim.serving.costs import shown_exchange
from moesim.serving.experts import UNREAD, ExpertSlots
from moesim.serving.fleet import Deployment, kv_bytes, run_fleet
from moesim.serving.ports import Port, Transfer
from moesim.serving.requests import Requests
from moesim.serving.schema import ServingScenario
from moesim.strict_json import json_text

pytestmark = pytest.mark.usefixtures("few_draws")

TWO_POOLS = """schema_version: 1
name: two-pools
model: {preset: deepseek-moe-16b, layers: 4}
routing: {kind: uniform}
cluster: {gpu: h100, nodes: 2, gpus_per_node: 8}
parallelism: {data: 4, expert: 4}
fleet:
  replicas: 2
  prefill: {replicas: 3, parallelism: {data: 2, expert: 2}, transfer: at_end}
workload:
  kind: serving
  requests: 100
  arrivals:
    kind: poisson
    rate: 150.0
    input: {kind: log_normal, mean: 500, variation: 0.8, most: 4000}
    output: {kind: log_normal, mean: 40, variation: 0.8, most: 300}
"""
ONE_POOL = TWO_POOLS.replace("  prefill: {replicas: 3, parallelism: {data: 2, expert: 2}, transfer: at_end}\n", "")


def two_pools(*overrides: str) -> ServingScenario:
    return load_serving_text(TWO_POOLS, overrides=overrides)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return Deployment(two_pools())


def test_every_token_crosses_once_and_its_bytes_are_those_stored(deployment: Deployment) -> None:
    requests = deployment.requests(0)
    served = deployment.serve(requests)
    moved, sent = served.transfers, requests.output_N > 1
    assert moved is not None and moved.tokens == requests.input_N[sent].sum()
    assert moved.bytes == sum(kv_bytes(deployment.pools[-1].scenario, int(each)) for each in requests.input_N[sent])
    model = deployment.scenario.model
    assert kv_bytes(deployment.scenario, 100) == 100 * model.layers * 2 * model.kv_heads * model.head_dim * 2
    (prompts,) = served.earlier
    assert prompts.count("rows") == requests.input_N.sum() and prompts.count("answered") == 0
    assert served.count("given") == (requests.output_N - 1).sum() and served.count("prompt_tokens") == 0
    assert all(batch.used_pages == 0 for batch in (*prompts.batches, *served.batches))


def test_with_links_that_take_no_time_the_halves_are_those_of_deployments_by_themselves() -> None:
    """One instance each: prompts as a deployment that gives one token, answers from when their keys have come."""
    whole = "{parallelism: {data: 2}, transfer: at_end}"  # with no exchange that transfers could slow
    deployment = Deployment(two_pools("fleet.replicas=1", f"fleet.prefill={whole}"))
    requests = deployment.requests(0)
    both = run_fleet(deployment.pools, requests, instant=True)
    alone = run_fleet(deployment.pools[:1], replace(requests, output_N=np.ones_like(requests.output_N)))
    assert np.array_equal(both.first_N, alone.done_N)
    slow = run_fleet(deployment.pools, requests)
    assert np.array_equal(slow.first_N, both.first_N)  # what decodes never slows prompts while there is room
    one = Requests(arrival_N=np.zeros(1), input_N=np.array([700]), output_N=np.array([3]))
    served = run_fleet(deployment.pools, one, instant=True)
    assert served.done_N[0] - served.first_N[0] == pytest.approx(sum(served.step_seconds))
    late = run_fleet(deployment.pools, one)
    assert late.transfers is not None
    assert late.done_N[0] - served.done_N[0] == pytest.approx(late.transfers.shown[0]) == late.transfers.seconds[0]


def test_sending_by_layer_shows_a_layers_share_of_a_transfer_that_is_faster_than_its_prompt() -> None:
    deployment = Deployment(two_pools("fleet.prefill.transfer=by_layer"))
    one = Requests(arrival_N=np.zeros(1), input_N=np.array([2000]), output_N=np.array([3]))
    moved = run_fleet(deployment.pools, one).transfers
    alone = run_fleet(Deployment(two_pools("fleet.prefill.transfer=at_end")).pools, one).transfers
    assert moved is not None and alone is not None and alone.shown == alone.seconds
    assert moved.shown[0] == pytest.approx(alone.seconds[0] / deployment.scenario.model.layers)
    assert moved.seconds[0] > alone.seconds[0], "beside the exchange of its prompt"


@pytest.mark.parametrize(("tensor", "transfer"), [(1, "at_end"), (1, "by_layer"), (2, "at_end")])
def test_a_transfer_takes_its_bytes_over_all_lanes_however_it_is_cut(tensor: int, transfer: str) -> None:
    mesh = f"{{data: 1, tensor: {tensor}}}"  # with nothing exchanged beside it
    prefill = f"{{replicas: 1, parallelism: {mesh}, transfer: {transfer}}}"
    scenario = two_pools(f"parallelism={mesh}", "fleet.replicas=1", f"fleet.prefill={prefill}")
    one = Requests(arrival_N=np.zeros(1), input_N=np.array([2000]), output_N=np.array([3]))
    moved = run_fleet(Deployment(scenario).pools, one).transfers
    assert moved is not None and scenario.fleet.prefill is not None
    size = kv_bytes(scenario, 2000) / tensor / scenario.fleet.prefill.nic_share
    alone = send_recv_seconds(build_fabric(scenario.cluster), 0, tensor, size).seconds
    assert moved.seconds == pytest.approx([alone], rel=1e-6)


def test_full_decode_instances_hold_prompts_back_and_nothing_is_lost() -> None:
    """The pages of a prompt stay taken where it was computed until its decode instance has begun with it."""
    crowd = ("engine.running=4", "workload.arrivals.rate=2000.0", "workload.requests=150")
    deployment = Deployment(two_pools("fleet.replicas=1", *crowd))
    requests = deployment.requests(0)
    prefill = replace(deployment.pools[0], memory=replace(deployment.pools[0].memory, pages=80))
    served = run_fleet((prefill, deployment.pools[-1]), requests)
    assert max(served.earlier[0].step_pages) <= 80 * 2
    free = deployment.serve(requests)
    assert served.first_N.mean() > 1.5 * free.first_N.mean()


def test_more_instances_carry_more() -> None:
    sizes = ("workload.arrivals.input={kind: fixed, tokens: 8000}", "workload.arrivals.output={kind: fixed, tokens: 2}")
    load = (*sizes, "parallelism={data: 1}", "workload.slo={ttft: 0.1}", "workload.requests=40")  # few show it
    loads = [
        largest_load(load_serving_text(ONE_POOL, overrides=(*load, f"fleet.replicas={replicas}")))
        for replicas in (1, 2)
    ]
    one, two = (each["largest_requests_per_second"] for each in loads)
    assert two > 1.3 * one and loads[1]["gpus"] == 2 * loads[0]["gpus"]


def test_copies_take_rows_in_turn_and_even_out_ranks() -> None:
    load_E = np.array([50.0, 10, 10, 10, 10, 5, 3, 2])
    slots = ExpertSlots(load_E, experts=8, slots=12, ranks=4)
    rng = np.random.default_rng(0)
    ids_NK = rng.choice(8, (4_000, 1), p=load_E / load_E.sum())
    ids_NK[:7] = -1
    found_NK = slots.of(ids_NK)
    assert np.array_equal(found_NK[:7], ids_NK[:7])
    rows_X = np.bincount(found_NK[7:, 0], minlength=12)
    for expert in range(8):
        copies = slots.slot_Z[slots.first_E[expert] :][: slots.copies_E[expert]]
        rows = (ids_NK == expert).sum()
        assert rows_X[copies].sum() == rows and np.ptp(rows_X[copies]) <= 1
    plain = np.bincount(ids_NK[7:, 0], minlength=8).reshape(4, 2).sum(axis=1)
    assert rows_X.reshape(4, 3).sum(axis=1).max() < 0.7 * plain.max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "other", "fleet": {"replicas": 2}, "memory": {"share": 0.5}},
        {"workload.requests": 7, "workload.slo": {"ttft": 0.1}, "workload.kv": "fp8", "workload.arrivals.rate": 9.0},
        {"workload.prefixes": {"number": 2, "tokens": 64}, "workload.priorities": {"shares": [0.5, 0.5]}},
        {"engine": {"batching": "static", "token_budget": 1024, "running": 9, "chunked_prefill": False, "page": 16}},
        {
            "engine": {
                "host": "1 ms",
                "sampling": "drawn",
                "preemption": "swap",
                "host_memory": "1 GB",
                "host_link": "9 GB/s",
            }
        },
        {"engine": {"prefix_cache": False, "balancing": "by_prefix", "two_batches": True, "sampling": "drawn"}},
        {"engine": {"speculation": {"draft": "lookup", "acceptance": [0.5]}}},
    ],
)
def test_deployments_draw_once_where_nothing_that_is_drawn_differs(changes: dict[str, object]) -> None:
    """Every key that the tables do not read is changed: their numbers are those of tables made anew."""
    sets = [f"{key}={json_text(value)}" for key, value in changes.items()]
    shared = Deployment(load_serving_text(ONE_POOL, overrides=sets)).costs.experts
    anew = Deployment(load_serving_text(ONE_POOL, overrides=sets)).costs.experts
    assert shared is not None and anew is not None and shared._drawn is anew._drawn
    anew._drawn = {}
    for total, share in ((64, 0.0), (3_000, 0.5), (20, 1.0)):
        with anew.pricing.noting() as sources:
            found = anew._of(total, share)
        assert np.array_equal(shared._of(total, share), found)
        assert shared._drawn[total, share].sources == sources


def test_what_is_drawn_is_not_shared_beyond_that() -> None:
    files = "routing={kind: trace, file: 'library:64x6/published'}"
    changes = ("", "seed=1", "engine.redundant_experts=4", "engine.capacity_factor=1.0", "workload.gemm=fp8", files)
    tables = [
        Deployment(load_serving_text(ONE_POOL, overrides=[each] if each else [])).costs.experts for each in changes
    ]
    assert len({id(each._drawn) for each in tables if each is not None}) == len(changes)
    again = Deployment(load_serving_text(ONE_POOL, overrides=[files])).costs.experts
    assert again is not None and tables[-1] is not None and again._drawn is not tables[-1]._drawn, "a file may change"


def test_every_key_is_read_by_the_draws_or_named_as_unread() -> None:
    """A new key is thought of before deployments share what they draw."""
    unread = {name for name, keys in UNREAD.items() if keys is True}
    assert set(ServingScenario.model_fields) - unread == {
        "schema_version", "model", "routing", "decode_routing", "cluster", "parallelism", "workload", "engine",
        "dispatch", "network", "compute", "seed",
    }  # fmt: skip
    for name, read in (
        ("workload", {"kind", "weights", "gemm"}),
        ("engine", {"software", "expert_placement", "redundant_experts", "capacity_factor"}),
    ):
        section = ServingScenario.model_fields[name].annotation
        assert section is not None and set(section.model_fields) - UNREAD[name] == read


def test_redundant_experts_take_memory_and_lower_the_imbalance() -> None:
    skewed = f"routing={{kind: popularity, counts: {[30] * 2 + [4] * 62}}}"
    plain, copied = (
        Deployment(load_serving_text(ONE_POOL, overrides=(skewed, f"engine.redundant_experts={copies}")))
        for copies in (0, 8)
    )
    assert copied.memory.weights > plain.memory.weights and copied.memory.kv < plain.memory.kv
    tables = plain.costs.experts, copied.costs.experts
    assert tables[0] is not None and tables[1] is not None
    assert tables[1].at(8_000, 8_000).imbalance < 0.9 * tables[0].at(8_000, 8_000).imbalance


def test_two_batches_hide_what_is_shorter_and_pay_for_the_sms_of_the_exchange() -> None:
    assert shown_exchange(10.0, 4.0, layers=10**9, taken=0.0) == pytest.approx(0.0, abs=1e-6)
    assert shown_exchange(10.0, 4.0, layers=10**9, taken=0.25) == pytest.approx(1.0)
    assert shown_exchange(4.0, 10.0, layers=10**9, taken=0.0) == pytest.approx(6.0)
    assert shown_exchange(4.0, 4.0, layers=2, taken=0.0) == pytest.approx(1.0)
    one, two = (
        serve(load_serving_text(ONE_POOL, overrides=("workload.arrivals.rate=3000.0", f"engine.two_batches={two}")))
        for two in ("false", "true")
    )
    assert two["time_s"]["exchange"] < one["time_s"]["exchange"]
    assert two["time_s"]["projections"] + two["time_s"]["experts"] > one["time_s"]["projections"]


def test_transfers_through_the_nics_of_an_exchange_make_it_longer_and_no_more_than_their_bytes() -> None:
    wide = "{replicas: 1, parallelism: {data: 8, expert: 8}, transfer: at_end}"
    sets = ("cluster.nodes=4", "cluster.gpus_per_node=4", "parallelism={data: 8, expert: 8}", "fleet.replicas=1")
    deployment = Deployment(two_pools(*sets, f"fleet.prefill={wide}", "workload.arrivals.rate=2000.0"))
    requests = deployment.requests(0)
    both, free = (run_fleet(deployment.pools, requests, instant=each) for each in (False, True))
    assert both.transfers is not None and both.earlier[0].parts["exchange"] > free.earlier[0].parts["exchange"]
    assert both.earlier[0].parts["exchange"] - free.earlier[0].parts["exchange"] < sum(both.transfers.seconds)


@pytest.mark.parametrize(("share", "transfer"), [(1.0, "by_layer"), (0.3, "by_layer"), (0.3, "at_end")])
@pytest.mark.parametrize(
    "places",
    [
        ("cluster.nodes=4", "cluster.gpus_per_node=4"),  # exchanges and transfers over NICs
        ("cluster.nodes=4", "cluster.gpus_per_node=4", "cluster.fabric={nics_per_node: 2}"),
        ("cluster.nodes=1", "cluster.gpus_per_node=16"),  # both over NVLink
        ("cluster.nodes=2", "cluster.gpus_per_node=8", "engine.two_batches=true"),  # one over NVLink, one over NICs
    ],
)
def test_no_port_passes_more_than_its_capacity(places: tuple[str, ...], share: float, transfer: str) -> None:
    wide = f"{{parallelism: {{data: 8, expert: 8}}, transfer: {transfer}, nic_share: {share}}}"
    sets = (*places, "parallelism={data: 8, expert: 8}", "fleet.replicas=1", f"fleet.prefill={wide}")
    scenario = two_pools(*sets, "workload.arrivals.rate=3000.0", "workload.requests=30")
    result = serve(scenario)
    moved = result["transfer"]
    assert moved is not None and moved["tokens"] > 0
    assert 0.0 <= moved["fullest_port"] <= 1.0 + 1e-9
    if "cluster.nodes=2" not in places:
        assert moved["fullest_port"] > 0.05, "both went through one port"


def test_a_port_that_is_shared_passes_both_in_the_time_of_both() -> None:
    env = simpy.Environment()
    out, into = Port(env, 1.0), Port(env, 1.0)
    sent = Transfer(env, (out, into))
    sent.ask(10.0)
    process = env.process(sent.run())

    def steps():
        while sent.left_now > 0.0:
            grown = out.lengthened(1.0, 4.0)  # a step of 4 s, a second of it exchange
            out.take("step", 1.0, 4.0 + grown)
            yield env.timeout(4.0 + grown)
            out.release("step")

    env.process(steps())
    env.run(process)
    # Whole steps pass 4 s of the transfer in 5 s; of the third, with 2 s of transfer at its beginning, half is shared.
    assert env.now == pytest.approx(10.0 + 2.0 / (3.5 / 4.5))
    assert out.fullest == pytest.approx(1.0) and sent.taken == env.now


def test_a_page_shows_rates_and_little_shares_of_any_size_and_no_line_of_nothing() -> None:
    assert [rate(each) for each in (0.55771, 48.28, 2080.0, 13_224.2)] == ["0.5577", "48.28", "2,080", "13,224"]
    result = serve(two_pools("workload.requests=10"))
    assert all(pool["kv_peak_share"] < 0.005 for pool in result["pools"]), "which 0% would not tell from none"
    page = serving_page(result)
    assert ">0%<" not in page
    assert page.count('"name":"tokens generated"') == 1 < page.count('"name":"tokens of a step"') == 2


def test_prompts_may_travel_by_kernels_of_their_own() -> None:
    own = "{replicas: 3, parallelism: {data: 2, expert: 2}, dispatch: {algorithm: hierarchical, deduplicate: per_node}}"
    (plain, decode), (other, same) = Deployment(two_pools()).pools, Deployment(two_pools(f"fleet.prefill={own}")).pools
    assert other.scenario.dispatch != plain.scenario.dispatch and same.scenario.dispatch == decode.scenario.dispatch


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("fleet.replicas=9", "42 GPUs in all instances, 16 in the cluster"),
        ("fleet.prefill.parallelism={data: 2, expert: 4}", "neither 1 nor all 2"),
        ("engine.redundant_experts=3", "do not spread evenly"),
        ("fleet.prefill.redundant_experts=3", "do not spread evenly"),
        ("fleet.prefil={}", "prefill"),
        ("fleet.prefill={parallelism: {data: 2, expert: 1}, two_batches: true}", "nothing is dispatched"),
    ],
)
def test_mistakes_are_named(override: str, what: str) -> None:
    with pytest.raises(UserError) as error:
        two_pools(override)
    assert what in str(error.value) and "\n" not in str(error.value)
