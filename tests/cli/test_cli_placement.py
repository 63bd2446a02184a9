"""`moesim placement`: what it shows, the files it writes, and what comes of taking them back in."""

import json
from pathlib import Path

import pytest
import yaml

COPIES = "placement={kind: eplb, redundant_experts: 8}"


def test_both_files_hold_the_map_that_is_shown(scenario: Path, moesim, tmp_path: Path) -> None:
    shown = json.loads(moesim("placement", scenario, "--set", COPIES, "--json").out)
    sglang, tensorrt = tmp_path / "map.json", tmp_path / "map.yaml"
    for path in (sglang, tensorrt):
        answer = moesim("placement", scenario, "--set", COPIES, "--out", path)
        assert answer.code == 0 and f"written to {path}" in answer.out and "as placed" in answer.out
    maps, layers = shown["physical_to_logical_map"], shown["layers"]
    held = json.loads(sglang.read_text())
    assert list(held) == ["physical_to_logical_map"]  # SGLang passes every key on as an argument
    assert [held["physical_to_logical_map"][layer] for layer in layers] == maps
    assert yaml.safe_load(tensorrt.read_text()) == {
        "initial_global_assignments": dict(zip(layers, maps, strict=True)),
        "num_slots": shown["slots"],
        "layer_updates_per_iter": 0,
    }
    for slots in maps:
        assert set(slots) == set(range(shown["experts"])) and len(slots) == shown["experts"] + 8


def test_a_map_that_is_taken_back_in_balances_as_well(scenario: Path, moesim, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    same = "placement={kind: eplb, redundant_experts: 8, made_on: same}"
    placed = json.loads(moesim("placement", scenario, "--set", same, "--out", path, "--json").out)
    back = f"placement={{kind: explicit, file: {path}}}"
    again = json.loads(moesim("placement", scenario, "--set", back, "--json").out)
    assert again["physical_to_logical_map"] == placed["physical_to_logical_map"]
    assert again["rank_rows"] == pytest.approx(placed["rank_rows"], rel=0.05)
    result = json.loads(moesim("run", scenario, "--set", back, "--json").out)
    assert result["placement"]["kind"] == "explicit"
    assert result["placement"]["slots"] == placed["slots"]


def test_nothing_is_replaced_unasked_and_mistakes_are_one_line(scenario: Path, moesim, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text("mine")
    for arguments, words in (
        (["--out", path], "exists; choose another --out, or --force"),
        (["--out", tmp_path / "map.txt"], "the ending says whose file it is"),
        (
            ["--out", tmp_path],
            f"is a folder; --out is one file: {tmp_path}/map.json for SGLang or",
        ),
        (["--out", tmp_path / "new", "--for", "sglang"], "new has no ending; --out is one file"),
        (["--set", "placement.kind=epbl"], '"epbl" is unknown'),
    ):
        answer = moesim("placement", scenario, *arguments)
        assert answer.code == 1 and words in answer.err and answer.err.count("\n") == 1
    assert path.read_text() == "mine"
    for arguments, words in (
        (["--for", "vllm"], "add --out FILE"),
        (["--for", "vllm", "--out", tmp_path / "a.yaml"], "vLLM reads .json; change the ending or --for"),
    ):
        answer = moesim("placement", scenario, *arguments)
        assert answer.code == 1 and words in answer.err and answer.err.count("\n") == 1
    vllm = tmp_path / "vllm.json"
    assert moesim("placement", scenario, "--set", COPIES, "--out", vllm, "--for", "vllm").out.endswith("for vLLM\n")
    assert set(json.loads(vllm.read_text())) > {"logical_replica_count"}
    assert moesim("placement", scenario, "--out", path, "--force", "--quiet").out == ""
    assert "physical_to_logical_map" in path.read_text()


def test_ranks_with_different_numbers_of_slots_have_no_file(scenario: Path, moesim) -> None:
    experts = json.loads(moesim("placement", scenario, "--json").out)
    ranks = experts["ranks"]
    rows = [list(range(rank, experts["experts"], ranks)) for rank in range(ranks)]
    rows[0] = [*rows[0], 1]
    answer = moesim("placement", scenario, "--set", f"placement={{kind: explicit, slots: {rows}}}")
    assert answer.code == 1 and "ranks have different numbers of slots" in answer.err


def test_placements_age_as_the_router_trains(scenario: Path, moesim) -> None:
    library = ("routing={kind: trace, file: 'library:64x6/no-balance'}", "model.experts=64", "model.top_k=6")
    sets = [word for text in (*library, COPIES, "workload.sequence_length=512") for word in ("--set", text)]
    answer = moesim("placement", scenario, *sets, "--over-training", "--json")
    aged = json.loads(answer.out)["over_training"]
    assert len(aged) == 7
    for each in aged:
        assert each["anew"] < each["previous"] and each["anew"] < each["contiguous"]
        assert each["moved_bytes"] > 0 and each["moving_s"] > 0
    assert aged[-1]["previous"] < aged[-1]["first"]
    assert "one record ago" in moesim("placement", scenario, *sets, "--over-training").out
    for text, words in (
        ("placement.kind=contiguous", "places by no rows"),
        (COPIES, "the trace has one recorded step"),
    ):
        refused = moesim("placement", scenario, "--set", text, "--over-training")
        assert refused.code == 1 and words in refused.err
