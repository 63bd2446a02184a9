"""The placement section: what it accepts, files of maps, and one line for what does not fit."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.layouts import SERVERS
from moesim.errors import UserError
from moesim.scenario import load_scenario, load_scenario_text
from moesim.scenario.placement_files import WRITERS, Layers, read_placement, sglang_text, tensorrt_llm_text

# 3 layers, the first dense, 8 experts on 4 ranks.
SMALL = """\
name: s
model: {layers: 3, hidden: 64, heads: 2, kv_heads: 2, head_dim: 32, dense_layers: 1, dense_intermediate: 64,
        experts: 8, top_k: 2, expert_intermediate: 32, vocab: 64}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 1, gpus_per_node: 4}
parallelism: {data: 4, expert: 4}
workload: {sequence_length: 64, global_batch: 4}
"""


def layers(numbers: Sequence[int], num_layers: int = 3) -> Layers:
    return Layers(moe_layers=numbers, num_layers=num_layers, num_ranks=4)


IN_ORDER = [[*range(8), 0, 1, 2, 3], [*range(8), 4, 5, 6, 7]]


def place(text: str, *overrides: str) -> None:
    load_scenario_text(SMALL + f"placement: {text}\n", source="f.yaml", overrides=overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: eplb, redundant_experts: 5}", "8 experts and 5 copies do not spread over .* 4 ranks; use 4 or 8"),
        (
            "{kind: contiguous, redundant_experts: 1}",
            "placement.redundant_experts: 8 experts and 1 copies .* use 0 or 4",
        ),
        ("{kind: eplb, redundant_experts: 40000}", "must be at most 32,767"),
        ("{kind: eplb, redundant_experts: 32764}", r"placement: 32,772 slots of 4 ranks; at most 32,767"),
        ("{kind: epbl}", '"epbl" is unknown; .*eplb'),
        ("{kind: eplb, redundant: 4}", "placement.redundant: unknown key; .*redundant_experts"),
        ("{kind: eplb, split: near}", "placement.split: .*nearest"),
        ("{kind: by_speed, speeds: [1.0, 0.5]}", "2 speeds for parallelism.expert = 4 ranks; give one per rank"),
        ("{kind: by_speed, speeds: [1.0, 0.5, 1.0, 0.0]}", "must be at least 1e-09"),
        ("{kind: contiguous, split: weighted}", "weighted needs weights, which contiguous .* use an explicit map"),
        ("{kind: explicit, slots: [[0,1],[2,3],[4,5],[6,7]], split: weighted}", "weighted needs weights"),
        (
            "{kind: explicit, slots: [[0,1],[2,3],[4,5],[6,7]], weights: [[1.0]]}",
            "placement.weights: are of no account without split: weighted",
        ),
        (
            "{kind: explicit, slots: [[0,1],[2,3],[4,5],[6,7]], split: weighted, weights: [[1,1],[1,1],[1,1],[1]]}",
            "placement.weights: must be lists as long as those of slots",
        ),
        (
            "{kind: explicit, slots: [[0,1],[2,3],[4,5],[6,7]], split: weighted, weights: [[1,1],[1,1],[0,1],[1,1]]}",
            "placement.weights: expert 4 has no weight in any slot",
        ),
        ("{kind: explicit}", "placement.slots: missing; give one of slots and file"),
        ("{kind: explicit, slots: [[0, 1], [2, 3], [4, 5], [6]]}", "expert 7 has none"),
        ("{kind: explicit, slots: [[0, 1], [2, 3], [4, 5], [6, 7, 8]]}", "expert 8 is none of experts 0 to 7"),
        ("{kind: explicit, slots: [[0, 1, 2, 3], [4, 5, 6, 7], [], [0]]}", "placement.slots.2: rank 2 has no slot"),
        ("{kind: explicit, slots: [[0, 1]]}", "placement.slots: 1 lists for parallelism.expert = 4 ranks"),
        ("{kind: explicit, file: none.json}", 'placement.file: "none.json" does not exist'),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        place(text)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("f.yaml:8:")


def test_what_is_not_modelled_with_copies_is_refused() -> None:
    with pytest.raises(UserError, match="torch_eager holds every expert once"):
        place("{kind: eplb}", "implementation.kind=torch_eager")
    with pytest.raises(UserError, match=r"capacity\.pad: rows of experts with copies are not padded"):
        place("{kind: eplb, redundant_experts: 4}", "capacity={kind: expert, factor: 2.0, by: score, pad: true}")
    with pytest.raises(UserError, match="a balancedness is that of ranks which hold every expert once"):
        place("{kind: eplb}", "routing={kind: balancedness, value: 0.8}")
    place("{kind: round_robin}", "routing={kind: balancedness, value: 0.8}")
    grouped = "routing={kind: uniform, router: {kind: deepseek_v2, groups: 4, group_limit: 2}}"
    place("{kind: round_robin}", grouped)
    with pytest.raises(UserError, match="round_robin splits the router's 4 groups of 2 experts over ranks"):
        place("{kind: round_robin}", grouped, "implementation.kind=torch_eager")


def test_copies_count_in_the_slots_of_a_rank() -> None:
    for text, slots in (
        ("{kind: contiguous}", 2),
        ("{kind: eplb, redundant_experts: 4}", 3),
        ("{kind: explicit, slots: [[0, 1, 2, 3], [4, 5], [6], [7]]}", 4),
    ):
        assert load_scenario_text(SMALL + f"placement: {text}\n").slots_per_rank == slots


def write_scenario(folder: Path, text: str, *, name: str, maps: str = "{kind: explicit, file: %s}") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    path = folder / "s.yaml"
    path.write_text(SMALL + f"placement: {maps % name}\n", encoding="utf-8")
    return path


MAPS = [[5, 0, 1, 2, 2, 3, 5, 6, 7, 4, 5, 1], [*range(8), 7, 7, 0, 3]]  # of 8 experts in 12 slots, not in order


def test_the_command_line_offers_every_writer() -> None:
    assert tuple(WRITERS) == SERVERS


@pytest.mark.parametrize("software", WRITERS)
def test_a_file_of_every_software_gives_its_map_back(tmp_path: Path, software: str) -> None:
    _, ending, write = WRITERS[software]
    name = f"a{ending}"
    scenario = load_scenario(write_scenario(tmp_path, write(MAPS, layers((1, 2))), name=name))
    found = read_placement(tmp_path / name)
    assert found.num_slots == 12 and scenario.slots_per_rank == 3
    assert found.of_layers((1, 2), num_layers=3) == tuple(map(tuple, MAPS))


def test_files_count_layers_as_their_readers_do(tmp_path: Path) -> None:
    texts = {software: write(MAPS, layers((1, 2))) for software, (_, _, write) in WRITERS.items()}
    assert len(json.loads(texts["sglang"])["physical_to_logical_map"]) == 3  # dense layers, too
    vllm, ascend = json.loads(texts["vllm"]), json.loads(texts["vllm-ascend"])
    assert vllm["physical_to_logical_map"] == MAPS
    assert np.shape(vllm["logical_to_physical_map"]) == (2, 8, 12 - 8 + 1)
    for layer, slots in enumerate(MAPS):
        for expert in range(8):
            held = [slot for slot in vllm["logical_to_physical_map"][layer][expert] if slot != -1]
            assert [slots[slot] for slot in held] == [expert] * vllm["logical_replica_count"][layer][expert]
    assert [layer["layer_id"] for layer in ascend["layer_list"]] == [0, 1] and ascend["moe_layer_count"] == 2
    assert [len(rank["device_expert"]) for rank in ascend["layer_list"][0]["device_list"]] == [3] * 4


def test_maps_as_vllm_documents_them(tmp_path: Path) -> None:
    """The example of vllm/distributed/eplb/eplb_state.py: 2 layers, 4 experts in 6 slots of 3 ranks."""
    slots = [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]
    text = WRITERS["vllm"][2](slots, Layers(moe_layers=(0, 1), num_layers=2, num_ranks=3))
    assert json.loads(text) == {
        "physical_to_logical_map": slots,
        "logical_to_physical_map": [
            [[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]],
            [[0, 2, 4], [3, -1, -1], [1, -1, -1], [5, -1, -1]],
        ],
        "logical_replica_count": [[2, 2, 1, 1], [3, 1, 1, 1]],
    }
    for name, bare in (("one.json", slots[0]), ("each.json", slots)):
        (tmp_path / name).write_text(json.dumps(bare))
        found = read_placement(tmp_path / name).of_layers((3, 4), num_layers=9)
        assert found == tuple(map(tuple, [slots[0]] * 2 if name == "one.json" else slots))


def test_a_prediction_layer_takes_the_last_map_where_the_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(tensorrt_llm_text(IN_ORDER, layers((1, 2))), encoding="utf-8")
    maps = read_placement(tmp_path / "b.yaml").of_layers((1, 2, 3), num_layers=3)
    assert maps == tuple(map(tuple, (*IN_ORDER, IN_ORDER[1])))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [1", "not valid YAML"),
        ("a.json", "[]", "expected a mapping with physical_to_logical_map .*, or a list per layer"),
        ("a.json", "[[0, 1], 2]", "layer 1 must be a list of whole numbers"),
        ("a.json", '{"physical_to_logical_map": [[0, -1]]}', "layer 0 has expert -1; slots may not be empty"),
        (
            "a.json",
            '{"physical_to_logical_map": [[0, 1]], "logical_replica_count": [[2, 1]]}',
            "logical_replica_count: layer 0 is not what physical_to_logical_map says",
        ),
        (
            "a.json",
            '{"physical_to_logical_map": [[0, 1]], "logical_to_physical_map": [[[1], [0]]]}',
            "logical_to_physical_map: layer 0 is not what",
        ),
        ("a.json", '{"layer_list": [{"devices": []}]}', "layer_list: every layer needs a device_list"),
        (
            "a.json",
            '{"layer_list": [{"device_list": [{"device_expert": [0, 1]}, {"device_expert": [2]}]}]}',
            "ranks of layer 0 hold different numbers",
        ),
        ("a.json", "{}", "holds no placement; it needs"),
        ("a.json", '{"physical_to_logical_map": 3}', "must be a list of lists"),
        ("a.json", '{"physical_to_logical_map": [[0, "a"]]}', "layer 0 must be a list of whole numbers"),
        ("a.json", '{"physical_to_logical_map": [[0, 1], [0]]}', "layer 1 has 1 slots, the first 2"),
        (
            "a.yaml",
            "initial_global_assignments: {1: [0, 1], 2: [0, 1]}\nnum_slots: 3\n",
            "num_slots = 3, but the lists hold 2",
        ),
        ("a.yaml", "initial_global_assignments: {a: [0, 1]}\n", "must have numbers of layers as keys"),
        (
            "a.yaml",
            tensorrt_llm_text(IN_ORDER, layers((3, 4))),
            "maps layers 3 to 4, but the model has experts in layers 1 to 2",
        ),
        (
            "a.json",
            sglang_text([IN_ORDER[0]] * 9, layers(range(1, 10), 10)),
            "maps 10 layers, but the model has",
        ),
        (
            "a.yaml",
            tensorrt_llm_text([range(10)] * 2, layers((1, 2))),
            "has 10 slots, which parallelism.expert = 4 does not divide",
        ),
        ("a.yaml", tensorrt_llm_text([[*range(7), 0]] * 2, layers((1, 2))), "layer 1: .*; expert 7 has none"),
        (
            "a.yaml",
            tensorrt_llm_text([range(16)] * 2, layers((1, 2))),
            "layer 1: expert 15 is none of experts 0 to 7",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write_scenario(tmp_path, text, name=name)
    with pytest.raises(UserError, match=message) as caught:
        load_scenario(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}:8:")


def test_slots_and_file_conflict(tmp_path: Path) -> None:
    maps = "{kind: explicit, file: %s, slots: [[0, 1], [2, 3], [4, 5], [6, 7]]}"
    path = write_scenario(tmp_path, tensorrt_llm_text(IN_ORDER, layers((1, 2))), name="a.yaml", maps=maps)
    with pytest.raises(UserError, match=r"placement\.slots: conflicts with placement.file"):
        load_scenario(path)
