"""What Megatron-Core puts beside what: pairs of micro-batches, the experts' weight gradients, gathers of weights."""

from typing import Any

import pytest

import moesim

pytestmark = pytest.mark.usefixtures("few_tokens")

COMBINED = {"parallelism.schedule": {"kind": "combined_1f1b"}}
SLOW = {"cluster.nodes": 8, "cluster.gpus_per_node": 1}  # all exchanges over the network
EXCHANGED = ("dispatch_exposed", "combine_exposed", "imbalance_wait")


def run(**changes: Any) -> tuple[float, dict[str, float]]:
    """Seconds of a step of four micro-batches, and of its parts."""
    base = {
        "model": {"preset": "deepseek-moe-16b", "layers": 3},
        "routing": {"kind": "uniform"},
        "capacity": {"kind": "none"},
        "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 8, "jitter": False,
                    "fabric": {"preset": "rail_optimised", "nic": "400 Gbps"}},
        "parallelism": {"data": 8, "expert": 8, "zero": {"dense": 1, "expert": 1}},
        "workload": {"kind": "training", "sequence_length": 2048, "micro_batch": 1, "global_batch": 32},
        "implementation": {"kind": "megatron", "host": "free"},
        "uncertainty.samples": 1,
    }  # fmt: skip
    result = moesim.simulate(moesim.load_scenario("quickstart", base | changes)).result
    return result["step_time_s"], result["attribution_s"]


@pytest.mark.parametrize("network", [{}, SLOW], ids=["NVLink", "network"])
def test_pairs_take_less_than_one_after_the_other_and_no_less_than_either_alone(network: dict[str, Any]) -> None:
    in_turn, parts = run(**COMBINED, **network, **{"overlap.micro_batches": False})
    pairs, _ = run(**COMBINED, **network)
    exchanged = sum(parts.get(name, 0.0) for name in EXCHANGED)
    assert in_turn == pytest.approx(run(**network)[0], rel=1e-3)
    assert max(exchanged, in_turn - exchanged) < pairs < in_turn


def test_pairs_without_an_exchange_are_one_after_the_other() -> None:
    alone = {"parallelism.expert": 1}
    assert run(**COMBINED, **alone)[0] == pytest.approx(run(**alone)[0], rel=1e-9)


@pytest.mark.parametrize("schedule", [{}, COMBINED], ids=["in turn", "pairs"])
def test_weight_gradients_beside_the_way_back_hide_it_or_are_hidden(schedule: dict[str, Any]) -> None:
    beside = {"overlap.weight_gradients": True}
    plain, parts = run(**schedule, **SLOW)
    hidden, _ = run(**schedule, **SLOW, **beside)
    most = min(parts["experts"], sum(parts.get(name, 0.0) for name in EXCHANGED))
    assert plain - most < hidden < plain
    alone = {"parallelism.expert": 1}
    assert run(**alone, **beside)[0] == run(**alone)[0]


def test_weights_gathered_beside_the_first_forward_pass_hide_at_most_their_gather() -> None:
    plain, parts = run()
    hidden, of_hidden = run(**{"overlap.parameter_gather": True})
    whole, _ = run(**{"parallelism.zero": {"dense": 0, "expert": 0}})
    assert plain - parts["data_parallel"] < hidden < plain
    assert 0 < of_hidden["data_parallel"] < parts["data_parallel"]
    replicas = {"parallelism": {"data": 1, "zero": {"dense": 1, "expert": 1}}, "cluster.gpus_per_node": 1}
    alone = {**replicas, "workload.global_batch": 4}
    assert run(**alone, **{"overlap.parameter_gather": True})[0] == run(**alone)[0] < whole * 10


def test_gathers_beside_belong_to_the_first_stage_of_weights_in_shards() -> None:
    with pytest.raises(moesim.UserError, match="ZeRO 2 gathers behind the optimizer"):
        run(**{"overlap.parameter_gather": True, "parallelism.zero": {"dense": 2, "expert": 2}})
