"""Do the failures of a job on several kinds of GPU come from the records of its own GPUs?"""

import pytest

import moesim
from moesim.reliability.job import job_causes, num_nodes, recorded_parts
from moesim.scenario import Scenario
from moesim.scenario.failures import FAILURE_RECORDS

KINDS = [record.kinds[0] for record in FAILURE_RECORDS.values() if record.kinds and record.causes][:2]


def job(*gpus: str) -> Scenario:
    pools = [{"name": f"p{number}", "gpu": gpu, "nodes": 4 // len(gpus)} for number, gpu in enumerate(gpus)]
    mesh = {"data": 32, "expert": 8} | ({"across_pools": "data"} if len(gpus) > 1 else {})
    changes = {"cluster": {"pools": pools}, "parallelism": mesh, "workload.global_batch": 64}
    return moesim.load_scenario("uniform-dropless", changes)


def rates(scenario: Scenario) -> dict[str, float]:
    return {cause.name: cause.per_second for cause in job_causes(scenario)}


def test_two_equal_pools_fail_as_one() -> None:
    assert job_causes(job("h100", "h100")) == job_causes(job("h100"))
    assert num_nodes(job("h100", "h100")) == 4


def test_every_pool_fails_as_its_own_kind() -> None:
    first, second = KINDS
    both = job(first, second)
    assert [parts.kinds for parts in recorded_parts(both)] == [(first,), (second,)]
    alone, other, mixed = rates(job(first)), rates(job(second)), rates(both)
    for name in alone | other:
        assert mixed[name] == pytest.approx((alone.get(name, 0.0) + other.get(name, 0.0)) / 2)
