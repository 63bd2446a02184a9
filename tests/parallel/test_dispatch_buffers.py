"""Buffers of dispatch libraries and communicators: hand-counted sizes, and what a scenario's memory holds of them."""

import gzip

import pytest
from fused_peak_table import DATA

import moesim
from moesim.parallel.memory.libraries import COMMUNICATOR_BYTES, OF_MESSAGES_BYTES
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.scenario.dispatch import BufferSizes, deepep_buffers, hybrid_ep_buffers
from moesim.strict_json import parse_json

NEAR = BufferSizes(tokens=4096, width=7168, dispatched=1.0, ranks=8, domain=8, experts=256, sms=20)
V3 = BufferSizes(tokens=4096, width=7168, dispatched=1.0, ranks=64, domain=8, experts=256, sms=20)
HEAP_STEP = 2**29


def test_deepep_has_room_for_the_chunks_of_every_channel_and_a_heap_in_steps() -> None:
    """10 channels of two SMs; a token is 14,336 bytes, where it came from, 128 ids, gates and scales."""
    token = 14336 + 8 + 128 * 12 + 512
    inside = deepep_buffers(
        BufferSizes(tokens=4096, width=7168, dispatched=1.0, ranks=8, domain=8, experts=256, sms=20)
    )
    assert inside == 10 * 8 * 256 * token
    assert deepep_buffers(V3) == 10 * 8 * 288 * token + HEAP_STEP
    many = BufferSizes(tokens=4096, width=7168, dispatched=1.0, ranks=128, domain=8, experts=256, sms=20)
    assert deepep_buffers(many) == 10 * 8 * 560 * token + 2 * HEAP_STEP


def test_hybrid_ep_has_room_for_all_tokens_of_all_ranks() -> None:
    one = BufferSizes(tokens=1024, width=2048, dispatched=2.0, ranks=8, domain=8, experts=64, sms=16)
    assert hybrid_ep_buffers(one) == 1024 * 8 * (2 * 2048 + 4 * 64)
    two = BufferSizes(tokens=1024, width=2048, dispatched=1.0, ranks=16, domain=8, experts=64, sms=16)
    there, back = 2048 + 4 * 32, 2 * 2048 + 4 * 32
    assert hybrid_ep_buffers(two) == 1024 * 16 * (there + back) + 1024 * (there + 2 * back)


@pytest.mark.parametrize(("algorithm", "has"), [("direct", False), ("hierarchical", True), ("hybrid_ep", True)])
def test_a_scenario_holds_those_of_its_algorithm(algorithm: str, has: bool) -> None:
    dispatch = {"algorithm": algorithm, "deduplicate": "per_rank" if algorithm == "direct" else "per_node"}
    scenario = moesim.load_scenario("two-nodes-hierarchical", {"dispatch": dispatch})
    report = memory_report(scenario, even_rows(scenario))
    assert ("dispatch_library" in report.parts[0]) is has
    assert sum(report.parts[0].values()) == pytest.approx(report.peak_bytes)
    alone = moesim.load_scenario(
        "two-nodes-hierarchical", {"dispatch": dispatch, "parallelism.expert": 1, "memory.check": "warn"}
    )
    assert "dispatch_library" not in memory_report(alone, even_rows(alone)).parts[0]


def test_a_communicator_takes_what_was_measured() -> None:
    """A new group, and what its first collective makes."""
    found = parse_json(gzip.decompress(DATA.read_bytes()))["libraries"]["found"]
    after = [size for _, size in found]
    for number, (name, size) in enumerate(found):
        if name.startswith("one more communicator, "):
            of_messages = name.endswith(("all_to_all", "p2p"))
            expected = OF_MESSAGES_BYTES if of_messages else COMMUNICATOR_BYTES
            assert size - after[number - 2] == pytest.approx(expected, rel=0.02), name


def test_layouts_with_many_sets_of_ranks_have_more_communicators() -> None:
    """Mixtral on 128 GPUs: two reductions, all-to-alls and stages; with tensor ranks one more."""
    four = moesim.load_scenario("mixtral-8x22b-128xh100")
    assert "communicators" not in memory_report(four, even_rows(four)).parts[0]
    five = moesim.load_scenario("mixtral-8x22b-tp-folding")
    assert memory_report(five, even_rows(five)).parts[0]["communicators"] == OF_MESSAGES_BYTES
    dispatch = {"algorithm": "low_latency_nvlink", "deduplicate": "per_expert"}
    own = moesim.load_scenario("mixtral-8x22b-tp-folding", {"dispatch": dispatch})
    assert "communicators" not in memory_report(own, even_rows(own)).parts[0], "its exchanges need none of NCCL"
