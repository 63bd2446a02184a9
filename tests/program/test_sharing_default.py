"""Which model of sharing answers when the scenario names none."""

import numpy as np
import pytest

from moesim import simulate
from moesim.network import build_fabric
from moesim.program.scenario_fabric import sharing_model

BLOCKING = {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 4.0}


@pytest.mark.parametrize(
    ("fabric", "ranks", "model"),
    [
        ({}, 8, "ports"),
        (BLOCKING, 8, "fluid"),
        (BLOCKING, 4, "ports"),  # one node: NVLink alone
        (BLOCKING, 4096, "ports"),  # too many pairs; a run warns
        ({"nics_per_node": 2}, 8, "fluid"),
    ],
)
def test_fluid_answers_where_links_that_gpus_share_can_block(small, fabric, ranks, model) -> None:
    scenario = small({"cluster.nodes": 2, "cluster.fabric": fabric})
    ranks_R = np.arange(ranks) % 8
    assert sharing_model(scenario, build_fabric(scenario.cluster), ranks_R) == model
    named = small({"cluster.nodes": 2, "cluster.fabric": fabric, "network.model": "exact"})
    assert sharing_model(named, build_fabric(named.cluster), ranks_R) == "exact"


def test_the_default_is_the_named_model_to_the_bit(small) -> None:
    """On two nodes whose core blocks: as `fluid`, not as `ports`, and without the warning that `ports` brings."""
    changes = {"cluster.nodes": 2, "parallelism": {"data": 8, "expert": 8}, "cluster.fabric": BLOCKING}
    default, fluid, ports = (
        simulate(small({**changes, **named})).result
        for named in ({}, {"network.model": "fluid"}, {"network.model": "ports"})
    )
    assert default["step_time_s"] == fluid["step_time_s"] != ports["step_time_s"]
    assert not any("network.model" in text for text in default["warnings"])
    assert any("network.model: ports" in text for text in ports["warnings"])
