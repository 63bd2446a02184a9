"""Volume laws on simulated routing: a limit of M groups bounds what a token sends, whatever the size of the group."""

import math
from pathlib import Path

import numpy as np
import pytest

from moesim.network import build_fabric, prepare_dispatch
from moesim.parallel import TrafficSampler
from moesim.parallel.traffic import stage_copies, tier_copies
from moesim.report.volume import VolumeStudy, study_volume
from moesim.run import obtain_trace
from moesim.scenario import Scenario, load_scenario
from moesim.seeding import stream
from moesim.trace.metrics import distinct_domains

SCENARIOS = Path(__file__).parents[2] / "scenarios"
# Smaller than what ships, with the same K: 128 experts on nodes of 2.
SMALL = ("model.experts=128", "model.hidden=64", "cluster.gpus_per_node=2", "workload.sequence_length=512")
LAYOUT = ("cluster.nodes=8", "parallelism={data: 16, expert: 16}", "workload.global_batch=16")
UNITS = (2, 4, 8, 16)
LIMITS = (1, 2, 3, None)
NOISE = 0.02  # of a mean over 65,536 tokens whose copies spread by about 1


def load(kind: str, *changes: str) -> Scenario:
    return load_scenario(SCENARIOS / f"volume-{kind.replace('_', '-')}.yaml", [*SMALL, *LAYOUT, *changes])


@pytest.fixture(scope="module", params=["per_rank", "per_node"])
def study(request: pytest.FixtureRequest) -> VolumeStudy:
    unit = 2 if request.param == "per_node" else 1
    return study_volume(load(request.param), devices=[unit * count for count in UNITS], limits=LIMITS)


def copies_sent(study: VolumeStudy, limit: int | None) -> list[float]:
    """Copies that travel by the law's way, per size of the group, smallest first."""
    points = [point for point in study.points if point.limit == limit]
    assert [point.devices for point in points] == list(study.devices)
    return [study.bytes_of(point) / study.copy_bytes for point in points]


def test_no_token_sends_more_than_m_copies(study: VolumeStudy) -> None:
    for point in study.points:
        if point.limit is not None:
            assert study.bytes_of(point) / study.copy_bytes <= point.copies <= point.limit


def test_limited_volume_saturates(study: VolumeStudy) -> None:
    """With M = 1 a token leaves its unit with probability 1 - 1/D, which is all that growth can add."""
    for count, sent in zip(UNITS, copies_sent(study, 1), strict=True):
        assert sent == pytest.approx(1 - 1 / count, abs=NOISE)
    for limit in (1, 2, 3):
        sent = np.array(copies_sent(study, limit))
        assert (np.diff(sent) > -NOISE).all()
        assert sent[-1] - sent[-2] < 0.1 * sent[-2]
        assert sent[-1] > 0.85 * limit


def test_unlimited_volume_grows_towards_k(study: VolumeStudy) -> None:
    top_k, experts = study.scenario.model.top_k, study.scenario.model.experts
    sent = np.array(copies_sent(study, None))
    assert (np.diff(sent) > NOISE).all()
    for count, value in zip(UNITS, sent, strict=True):
        # K of N experts miss one of D units with probability C(N - N/D, K) / C(N, K); the token's own unit is free.
        missed = math.comb(experts - experts // count, top_k) / math.comb(experts, top_k)
        assert value == pytest.approx((count - 1) * (1 - missed), abs=NOISE)
        assert value <= min(top_k, count)
    assert sent[-1] > 2 * copies_sent(study, 2)[-1]


def test_a_looser_limit_never_sends_less(study: VolumeStudy) -> None:
    by_limit = np.array([copies_sent(study, limit) for limit in LIMITS])
    assert (np.diff(by_limit, axis=0) > -NOISE).all()


@pytest.mark.parametrize(("kind", "limit"), [("per_rank", 3), ("per_node", 2)])
def test_every_single_token_keeps_the_limit_and_the_network_carries_what_is_counted(kind: str, limit: int) -> None:
    groups = 8 if kind == "per_node" else 16
    scenario = load(kind, f"routing.router={{kind: deepseek_v2, groups: {groups}, group_limit: {limit}}}")
    trace = obtain_trace(scenario)
    assert trace is not None
    sampler = TrafficSampler(scenario, trace)
    sample = sampler.draw(stream(0, "test"))
    layout, placement = sampler.layouts[0][0], sampler.placement
    unit_of_rank = layout.node_of_rank_R if kind == "per_node" else np.arange(layout.num_ranks)
    reached = distinct_domains(trace.final.expert_ids_LSTK, domain_of_expert_E=unit_of_rank[placement.rank_of_expert_E])
    assert reached.min() >= 1 and reached.max() == limit
    traffic = sample.arrays(0, 0)
    transfer = prepare_dispatch(
        build_fabric(scenario.cluster),
        [stage_BRD[0] for stage_BRD in stage_copies(traffic, placement, kind)],
        token_bytes=128.0,
        algorithm=scenario.dispatch.algorithm,
    )
    counted = tier_copies(traffic, placement, kind)
    assert transfer.traffic.inter_node_bytes == pytest.approx(128.0 * counted.inter_node)
    assert transfer.traffic.intra_node_bytes == pytest.approx(128.0 * counted.intra_node)
    tokens = scenario.tokens_per_step
    assert counted.inter_node <= limit * tokens
