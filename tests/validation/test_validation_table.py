"""Cases, tables of measured and predicted times, and what is refused."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moesim.errors import UserError
from moesim.scenario import scenario_from_mapping
from moesim.validation.cases import (
    GPU_TOKENS,
    MODELS,
    Case,
    build_case,
    check_runnable,
    scenario_case,
    standard_cases,
)
from moesim.validation.comparison import (
    Row,
    Table,
    load_table,
    print_table,
    recompute,
    save_table,
    shipped_table,
    validate_command,
)
from moesim.validation.prediction import predict


def rows_of(case: Case) -> list[Any]:
    sample = case.sample()
    assert sample is not None
    layers = range(case.scenario.model.moe_layers)
    return [[[sample.arrays(0, layer).rows_BRE[0, rank].tolist() for layer in layers]] for rank in range(case.gpus)]


def table_of(*cases: Case, slower: float = 1.0) -> Table:
    """Measurements made up from predictions, all `slower` times as long."""
    rows = []
    for case in cases:
        routed = rows_of(case)
        predicted = predict(case, routed)
        measured: dict[str, Any] = {
            "step": predicted["step"] * slower,
            "rows": routed,
            **{kind: {k: v * slower for k, v in predicted[kind].items()} for kind in ("parts", "layer_parts")},
        }
        rows.append(Row(case, measured, predicted))
    return Table({"name": "made up"}, tuple(rows))


@pytest.fixture(scope="module")
def pair() -> Table:
    cases = [build_case("coarse8", MODELS["coarse8"], gpus=2, tokens=4096, skew=s) for s in ("uniform", "skewed")]
    return table_of(*cases, slower=1.25)


def test_standard_cases_cover_models_sizes_and_skews() -> None:
    for gpus in (1, 2):
        cases = list(standard_cases("cuda", gpus))
        assert len({case.name for case in cases}) == len(cases) >= 3 * (2 * len(GPU_TOKENS) - 1)
        assert {case.tokens for case in cases} == set(GPU_TOKENS)
        for case in cases:
            check_runnable(case.scenario)
            assert case.gpus == gpus
    with pytest.raises(UserError, match="tpu"):
        list(standard_cases("tpu", 1))


def test_skew_makes_one_rank_hot() -> None:
    shares = {}
    for skew in ("uniform", "skewed"):
        rows_RBLE = np.array(rows_of(build_case("coarse8", MODELS["coarse8"], gpus=2, tokens=4096, skew=skew)))
        by_rank = rows_RBLE.sum(axis=(0, 1)).reshape(-1, 2, 4).sum(axis=2)
        shares[skew] = (by_rank[:, 0] / by_rank.sum(axis=1)).mean()
    assert abs(shares["uniform"] - 0.5) < 0.02 and shares["skewed"] > 0.65


def test_errors_and_slowdowns_follow_from_the_rows(pair: Table) -> None:
    assert [row.error for row in pair.rows] == pytest.approx([-0.2, -0.2])
    assert all(error == pytest.approx(-0.2) for error in pair.rows[0].part_errors().values())
    ((name, measured, predicted),) = pair.slowdowns()
    assert name == "coarse8-4096-skewed-2gpu" and measured == pytest.approx(predicted) and measured > 0.02
    assert pair.summary() == {
        "cases": 2.0, "median_error": pytest.approx(0.2), "worst_error": pytest.approx(0.2),
        "worst_skew_error": pytest.approx(0.0, abs=1e-9),
    }  # fmt: skip
    alone = Table(pair.device, pair.rows[:1])
    assert alone.slowdowns() == [] and alone.summary()["worst_skew_error"] is None


def test_a_table_survives_its_file(pair: Table, tmp_path: Path) -> None:
    save_table(pair, tmp_path / "t.json")
    loaded = load_table(tmp_path / "t.json")
    assert [row.case.scenario for row in loaded.rows] == [row.case.scenario for row in pair.rows]
    for ours, theirs in zip(recompute(loaded).rows, pair.rows, strict=True):
        assert ours.predicted["step"] == pytest.approx(theirs.predicted["step"], rel=1e-12)
        assert ours.measured["step"] == pytest.approx(theirs.measured["step"], rel=1e-5)


def test_recomputing_notices_a_changed_measurement_of_rows(pair: Table) -> None:
    """More rows on the hot rank must give a longer prediction: the table rests on what was recorded."""
    row = pair.rows[1]
    rows_RBLE = np.array(row.measured["rows"])
    rows_RBLE[..., 0] += rows_RBLE[..., 4:].sum(axis=-1)
    rows_RBLE[..., 4:] = 0
    hotter = dataclasses.replace(row, measured={**row.measured, "rows": rows_RBLE.tolist()})
    again = recompute(Table(pair.device, (hotter,))).rows[0]
    assert again.predicted["step"] > row.predicted["step"] * 1.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a whole"),
        ("{}", "not a whole"),
        ('{"schema_version": 99}', "schema version 99"),
        (None, "cannot read"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_table(path)


def test_the_terminal_shows_every_case_and_part(pair: Table) -> None:
    written = io.StringIO()
    print_table(pair, console=Console(width=200, file=written))
    text = written.getvalue()
    for word in ("coarse8-4096-uniform-2gpu", "reduction", "dispatch", "-20.0%", "Slowdown by skew", "goals"):
        assert word in text
    assert "nan" not in text


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"implementation": {"kind": "fused"}}, "torch_eager"),
    ({"capacity": {"kind": "expert", "factor": 1.0}}, "drops nothing"),
    ({"dispatch": {"deduplicate": "per_rank"}}, "per_expert"),
    ({"workload": {"kind": "training", "sequence_length": 64, "global_batch": 2}}, "bf16"),
    ({"parallelism": {"data": 2, "expert": 2, "zero": {"dense": 1}}}, "ZeRO"),
    ({"parallelism": {"data": 2, "expert": 2, "zero": {"dense": 3, "expert": 3}}}, "without expert ranks"),
    ({"parallelism": {"data": 1, "tensor": 2, "expert": 1}}, "without experts"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_scenarios_that_are_not_the_software_are_refused(change: dict[str, Any], message: str) -> None:
    scenario = build_case("coarse8", MODELS["coarse8"], gpus=2, tokens=1024, skew="uniform").scenario
    data = {**json.loads(scenario.model_dump_json(exclude_none=True)), **change}
    with pytest.raises(UserError, match=message):
        scenario_case(scenario_from_mapping(data), 2)


def test_wrong_calls_are_one_line() -> None:
    scenario = build_case("coarse8", MODELS["coarse8"], gpus=2, tokens=1024, skew="uniform").scenario
    with pytest.raises(UserError, match="uses 2 ranks"):
        scenario_case(scenario, 1)
    with pytest.raises(UserError, match="--gpus 0"):
        validate_command(gpus=0)
    with pytest.raises(UserError, match="no case's name contains"):
        validate_command(device="cpu", profile="here", only="nonesuch")
    with pytest.raises(UserError, match="moesim calibrate"):
        validate_command(device="cpu")
    with pytest.raises(UserError, match="nonesuch"):
        shipped_table("nonesuch")
