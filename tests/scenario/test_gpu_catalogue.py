"""A GPU is an entry of the catalogue: a new one is loaded, priced, scaled and simulated, and nothing else names it."""

from types import MappingProxyType

import pytest

from moesim.errors import UserError
from moesim.run import simulate
from moesim.scenario import catalogue


def test_a_gpu_is_added_in_one_place(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 with twice of everything, and no profile of its own."""
    gpus = {name: dict(entry) for name, entry in catalogue.catalogue("gpus").items()}
    doubled = ("price_per_gpu_hour", "clock_hz", "memory_bandwidth", "memory_bytes")
    new = gpus["h200"] | {"like": "h200", "source": "a test"} | {key: 2 * gpus["h200"][key] for key in doubled}
    new["peak_flops"] = {name: 2 * peak for name, peak in gpus["h200"]["peak_flops"].items()}

    def scenario(name):
        return small(
            {"cluster": {"gpu": name, "nodes": 1, "gpus_per_node": 4}, "compute": {}, "uncertainty.samples": 1}
        )

    with pytest.raises(UserError, match='unknown GPU "h900"'):
        scenario("h900")
    files, read = {"gpus": MappingProxyType(gpus | {"h900": new})}, catalogue.catalogue
    monkeypatch.setattr(catalogue, "catalogue", lambda name: files.get(name) or read(name))
    plain, other = (simulate(scenario(name)).result for name in ("h200", "h900"))
    for part in ("experts", "attention", "permute", "embedding_head"):
        assert other["attribution_s"][part] < plain["attribution_s"][part]
    rent, double = (result["cost"]["usd_per_step"] / result["step_time_s"] for result in (plain, other))
    assert double == pytest.approx(2 * rent)
    capacities = [result["memory"]["capacity_bytes_by_pipeline_rank"][0] for result in (plain, other)]
    assert capacities[1] == 2 * capacities[0]
    assert "scaled" in other["estimate_sources"] and "scaled" not in plain["estimate_sources"]
