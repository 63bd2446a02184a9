"""A volume study: what it refuses, and that screen, page and JSON show the points that were counted."""

import io
import re

import pytest

from moesim.errors import UserError
from moesim.report.volume import VolumeStudy, study_volume
from moesim.report.volume_view import print_volume, volume_figure, volume_json, volume_page
from moesim.scenario import Scenario, scenario_from_mapping
from moesim.trace import save_trace, uniform_trace


def scenario(**sections: object) -> Scenario:
    model = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "experts": 32, "top_k": 4,
             "expert_intermediate": 32, "vocab": 100}  # fmt: skip
    data = {
        "name": "small-volume",
        "model": model,
        "routing": {"kind": "uniform"},
        "cluster": {"gpu": "h800", "nodes": 1, "gpus_per_node": 4},
        "parallelism": {"data": 4, "expert": 4},
        "workload": {"sequence_length": 64, "global_batch": 4},
    }
    return scenario_from_mapping(data | sections)


@pytest.fixture(scope="module")
def study() -> VolumeStudy:
    return study_volume(scenario(dispatch={"deduplicate": "per_rank"}), devices=[8, 4, 16], limits=[1, 2, None])


def test_a_limit_that_holds_too_few_experts_is_left_open(study: VolumeStudy) -> None:
    assert study.devices == (4, 8, 16)
    assert study.find(8, 1) is not None  # one group of 4 experts holds top-4
    assert study.find(16, 1) is None
    assert study.find(16, 2) is not None


def test_per_expert_sends_k_copies(study: VolumeStudy) -> None:
    plain = study_volume(scenario(dispatch={"deduplicate": "per_expert"}), devices=[4, 8], limits=[None])
    assert [point.copies for point in plain.points] == pytest.approx([4.0, 4.0])
    for point in plain.points:
        assert plain.bytes_of(point) > study.bytes_of(next(p for p in study.points if p.devices == point.devices))


def test_tiers_add_up_and_one_node_has_no_network(study: VolumeStudy) -> None:
    one_node = study.find(4, None)
    two_nodes = study.find(8, None)
    assert one_node is not None and two_nodes is not None
    assert one_node.inter_node_bytes == 0 < one_node.intra_node_bytes
    assert 0 < two_nodes.intra_node_bytes < two_nodes.inter_node_bytes
    assert study.bytes_of(two_nodes) == two_nodes.intra_node_bytes + two_nodes.inter_node_bytes


def test_drops_are_not_sent() -> None:
    dropless = study_volume(scenario(), devices=[4], limits=[None]).points[0]
    tight = study_volume(scenario(capacity={"kind": "expert", "factor": 0.5}), devices=[4], limits=[None]).points[0]
    assert tight.copies < 0.8 * dropless.copies


def test_a_recorded_router_keeps_its_limit(tmp_path) -> None:
    shape = scenario(routing={"kind": "uniform", "router": {"kind": "deepseek_v2", "device_limit": 2}}).router_shape()
    path = tmp_path / "trace.npz"
    save_trace(uniform_trace(shape, num_layers=2, num_sequences=64, sequence_length=64, seed=1), path)
    recorded = scenario(routing={"kind": "trace", "file": str(path)}, dispatch={"deduplicate": "per_rank"})
    study = study_volume(recorded, devices=[4, 16])
    assert [point.limit for point in study.points] == [None, None]
    first = study.find(4, None)
    assert first is not None and 1.9 < first.copies <= 2.0
    assert "at most 2 of 4 groups" in study.source
    assert "as recorded" in printed(study)
    with pytest.raises(UserError, match="--limits"):
        study_volume(recorded, limits=[1])


@pytest.mark.parametrize(
    ("devices", "dispatch", "said"),
    [
        ([5], {"deduplicate": "per_rank"}, "divisors of 32"),
        ([2], {"deduplicate": "per_node", "algorithm": "hierarchical"}, "multiples of 4"),
    ],
)
def test_sizes_that_cannot_be_are_named(devices: list[int], dispatch: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        study_volume(scenario(dispatch=dispatch), devices=devices)


def printed(study: VolumeStudy) -> str:
    file = io.StringIO()
    print_volume(study, file=file, width=100)
    return file.getvalue()


def test_screen_page_and_json_show_every_point(study: VolumeStudy) -> None:
    text, page, points = printed(study), volume_page(study), volume_json(study)["points"]
    assert len(points) == len(study.points) == 8
    for point in study.points:
        assert f"{point.copies:.2f}" in text
        assert f"{point.copies:.2f}" in page
    assert re.search(r"^ *16 +- ", text, re.MULTILINE)
    assert {(point["devices"], point["limit"]) for point in points} == {(p.devices, p.limit) for p in study.points}
    assert max(map(len, text.splitlines())) <= 100


def test_the_plot_holds_a_line_per_limit(study: VolumeStudy) -> None:
    lines = {line.name: line for line in volume_figure(study).data}
    assert set(lines) == {"M = 1", "M = 2", "unlimited"}
    assert list(lines["M = 2"].x) == [4, 8, 16]
    assert list(lines["M = 2"].y) == [study.bytes_of(p) / 1e3 for p in study.points if p.limit == 2]


def test_nodes_of_two_sizes_are_refused() -> None:
    pools = [{"name": "a", "gpu": "h100", "nodes": 1}, {"name": "b", "gpu": "h100", "nodes": 1, "gpus_per_node": 4}]
    with pytest.raises(UserError, match="nodes of 8 and 4 GPUs; a volume needs nodes of one size"):
        study_volume(scenario(cluster={"pools": pools}), devices=[8])
