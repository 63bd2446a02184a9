"""The placement section: what it accepts, files of maps, and one line for what does not fit."""

from pathlib import Path

import pytest

from moesim.errors import UserError
from moesim.scenario import load_scenario, load_scenario_text
from moesim.scenario.placement_file import read_placement, sglang_text, tensorrt_llm_text

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
        ("{kind: by_speed}", "placement.speeds: missing"),
        ("{kind: by_speed, speeds: [1.0, 0.5]}", "2 speeds for parallelism.expert = 4 ranks; give one per rank"),
        ("{kind: by_speed, speeds: [1.0, 0.5, 1.0, 0.0]}", "must be at least 1e-09"),
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


def test_files_of_both_kinds_hold_the_same_maps(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(sglang_text(IN_ORDER, moe_layers=(1, 2), num_layers=3), encoding="utf-8")
    (tmp_path / "b.yaml").write_text(tensorrt_llm_text(IN_ORDER, moe_layers=(1, 2)), encoding="utf-8")
    sglang, tensorrt = read_placement(tmp_path / "a.json"), read_placement(tmp_path / "b.yaml")
    assert len(sglang.slots) == 3 and tensorrt.numbers == (1, 2)  # SGLang counts dense layers, too
    for found in (sglang, tensorrt):
        assert found.num_slots == 12
        assert found.of_layers((1, 2), num_layers=3) == tuple(map(tuple, IN_ORDER))
    for name in ("a.json", "b.yaml"):
        scenario = load_scenario(write_scenario(tmp_path, (tmp_path / name).read_text(), name=name))
        assert scenario.slots_per_rank == 3


def test_a_prediction_layer_takes_the_last_map_where_the_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(tensorrt_llm_text(IN_ORDER, moe_layers=(1, 2)), encoding="utf-8")
    maps = read_placement(tmp_path / "b.yaml").of_layers((1, 2, 3), num_layers=3)
    assert maps == tuple(map(tuple, (*IN_ORDER, IN_ORDER[1])))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [1", "not valid YAML"),
        ("a.json", "[]", "expected a mapping with physical_to_logical_map or initial_global_assignments"),
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
            tensorrt_llm_text(IN_ORDER, moe_layers=(3, 4)),
            "maps layers 3 to 4, but the model has experts in layers 1 to 2",
        ),
        (
            "a.json",
            sglang_text([IN_ORDER[0]] * 9, moe_layers=range(1, 10), num_layers=10),
            "maps 10 layers, but the model has",
        ),
        (
            "a.yaml",
            tensorrt_llm_text([range(10)] * 2, moe_layers=(1, 2)),
            "has 10 slots, which parallelism.expert = 4 does not divide",
        ),
        ("a.yaml", tensorrt_llm_text([[*range(7), 0]] * 2, moe_layers=(1, 2)), "layer 1: .*; expert 7 has none"),
        (
            "a.yaml",
            tensorrt_llm_text([range(16)] * 2, moe_layers=(1, 2)),
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
    path = write_scenario(tmp_path, tensorrt_llm_text(IN_ORDER, moe_layers=(1, 2)), name="a.yaml", maps=maps)
    with pytest.raises(UserError, match=r"placement\.slots: conflicts with placement.file"):
        load_scenario(path)
