"""A fabric's screen and drawing: nothing is lost when parts are drawn as one, and damage is seen."""

import io
from collections import Counter

import pytest

from moesim.network import describe
from moesim.report.topology import draw, fabric_json, fabric_page, print_fabric
from moesim.report.topology_layout import MOST_BUNDLES, FabricParts, fabric_parts, fabric_picture
from moesim.scenario.cluster import Cluster, Pool
from moesim.scenario.cluster import Fabric as Section


def parts_of(nodes: int, *, gpu: str = "h200", gpus_per_node: int = 8, **keys: object) -> FabricParts:
    pool = Pool(gpu=gpu, nodes=nodes, gpus_per_node=gpus_per_node)
    return fabric_parts(Cluster(pools=(pool,), fabric=Section.model_validate(keys)))


DAMAGE = [{"node": 1, "factor": 0.25}, {"link": ["nic0", "leaf0.0"], "factor": 0}]
RING = [{"source": f"gpu{g}", "target": f"gpu{(g + 1) % 4}", "bandwidth": "10 GB/s"} for g in range(4)]
FABRICS = {
    "one node": parts_of(1, preset="nvlink_node"),
    "two nodes": parts_of(2),
    "damaged": parts_of(2, degraded=DAMAGE),
    "32 nodes": parts_of(32, preset="leaf_spine", oversubscription=2.0),
    "pods": parts_of(128, pod_nodes=16, oversubscription={"leaf": 2.0, "spine": 4.0}),
    "planes": parts_of(16, preset="multi_plane", planes=4),
    "nvl72": parts_of(36, gpu="gb200", gpus_per_node=4, preset="nvl72"),
    "ring": parts_of(1, gpus_per_node=4, preset="custom", links=RING),
}


@pytest.mark.parametrize("parts", FABRICS.values(), ids=FABRICS)
def test_the_picture_holds_every_gpu_and_all_bandwidth_between_what_it_shows(parts: FabricParts) -> None:
    picture = fabric_picture(parts)
    assert 0 < len(picture.bundles) <= MOST_BUNDLES
    assert max(Counter(vertex.y for vertex in picture.vertices.values()).values()) <= 80
    places = [(vertex.x, vertex.y) for vertex in picture.vertices.values()]
    assert len(set(places)) == len(places), "nothing covers anything else"
    for tier in ("leaf", "spine", "custom"):  # never drawn inside a box in these fabrics
        drawn = sum(bundle.up + bundle.down for bundle in picture.bundles if bundle.tier == tier)
        assert drawn == pytest.approx(sum(link.bandwidth for link in parts.links if link.tier == tier))
    links = sum(bundle.count for bundle in picture.bundles if bundle.tier == "nic")
    assert links == sum(name.startswith("nic") for name in parts.kind_of)


def test_few_gpus_are_drawn_one_by_one_and_many_together() -> None:
    kinds = {name: Counter(v.kind for v in fabric_picture(parts).vertices.values()) for name, parts in FABRICS.items()}
    assert kinds["two nodes"] == {"gpu": 16, "nvswitch": 2, "leaf": 8, "spine": 1}
    assert kinds["32 nodes"] == {"node": 32, "leaf": 8, "spine": 1}
    assert kinds["pods"]["node"] == 8
    assert kinds["nvl72"]["nvswitch"] == 2
    labels = [v.label for v in fabric_picture(FABRICS["pods"]).vertices.values() if v.kind == "node"]
    assert set(labels) == {"16 nodes, 128 GPUs"}


def test_damaged_links_stand_out() -> None:
    parts = FABRICS["damaged"]
    assert [link.name for link in parts.failed] == ["nic0 -> leaf0.0"]
    assert len(parts.degraded) == 8 * 2 * 3  # a node's NVLinks, and both legs of its NICs
    assert {link.factor for link in parts.degraded} == {0.25}
    assert parts.num_cut_off == 0
    picture = fabric_picture(parts)
    failed = [bundle for bundle in picture.bundles if bundle.failed]
    assert [(bundle.below, bundle.above, bundle.up, bundle.down) for bundle in failed] == [("gpu0", "leaf0.0", 0, 50e9)]
    assert {bundle.degraded for bundle in picture.bundles if bundle.below == "gpu9" or bundle.above == "gpu9"} == {2}
    assert {"degraded", "failed"} <= {trace.name for trace in draw(picture).data}


def test_damage_keeps_apart_when_nodes_are_drawn_as_one() -> None:
    picture = fabric_picture(parts_of(128, pod_nodes=16, degraded=[{"node": 5, "factor": 0.5}]))
    labels = Counter(vertex.label for vertex in picture.vertices.values() if vertex.kind == "node")
    assert labels == {"16 nodes, 128 GPUs": 7, "15 nodes, 120 GPUs": 1, "5": 1}


def test_a_cut_off_node_is_counted() -> None:
    parts = parts_of(2, degraded=[{"node": 1, "factor": 0}])
    assert parts.num_cut_off == 8
    assert "8 GPUs are cut off" in screen(parts, width=100)
    assert fabric_json(parts)["gpus_cut_off"] == 8
    assert len(fabric_json(parts)["failed"]) == len(parts.failed) == 48


def test_the_mouse_reads_bandwidth_and_latency_of_every_line() -> None:
    picture = fabric_picture(FABRICS["two nodes"])
    texts = {text for trace in draw(picture).data if trace.text is not None for text in trace.text}
    assert len(texts) == len(picture.bundles)
    wanted = next(text for text in texts if text.startswith("gpu3 - leaf0.3"))
    assert "50 GB/s each way" in wanted
    assert "latency 1.4 us" in wanted


def screen(parts: FabricParts, *, width: int) -> str:
    file = io.StringIO()
    print_fabric("some-name", parts, file=file, width=width)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("parts", FABRICS.values(), ids=FABRICS)
def test_the_numbers_fit_on_one_screen(parts: FabricParts, width: int) -> None:
    text, facts = screen(parts, width=width), describe(parts.fabric)
    assert f"{facts.num_gpus:,}" in text
    for tier, ratio in facts.oversubscription.items():
        assert f"oversubscription, {tier}" in text and f"{ratio:.3g} : 1" in text
    for group in facts.links:
        assert f"{group.count:,}" in text
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= width


def test_names_of_custom_links_are_text_and_nothing_else() -> None:
    name = "<script>alert(1)</script>"
    links = [{"source": f"gpu{g}", "target": name, "bandwidth": "10 GB/s"} for g in range(4)]
    parts = parts_of(1, gpus_per_node=4, preset="custom", links=links)
    assert name in screen(parts, width=120)
    page = fabric_page("x", parts)
    assert "alert(1)" in page
    assert name not in page.split("</script>", 1)[1]


def mesh_of(gpus: int, *, nodes: int) -> FabricParts:
    pairs = [(a, b) for a in range(gpus) for b in range(a)]
    links = [{"source": f"gpu{a}", "target": f"gpu{b}", "bandwidth": f"{1 + a + b} GB/s"} for a, b in pairs]
    return parts_of(nodes, gpus_per_node=gpus // nodes, preset="custom", links=links)


def test_links_between_two_nodes_are_one_line() -> None:
    parts = mesh_of(40, nodes=5)
    picture = fabric_picture(parts)
    pairs = {frozenset((bundle.below, bundle.above)) for bundle in picture.bundles}
    assert len(pairs) == len(picture.bundles) == 5 * 4 / 2
    between = [link for link in parts.links if parts.node_of[link.source] != parts.node_of[link.target]]
    assert sum(b.up + b.down for b in picture.bundles) == pytest.approx(sum(link.bandwidth for link in between))
    assert all(bundle.up == pytest.approx(bundle.down) for bundle in picture.bundles)


def test_more_links_than_a_drawing_bears_are_left_to_the_tables() -> None:
    parts = mesh_of(40, nodes=40)
    page = fabric_page("mesh", parts)
    assert "too many to draw" in page
    assert "fabric-plot" not in page.split("</script>")[-1]
