"""A sweep's folder: filled, completed by a rerun, and never mixed with another study's."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from sweep_cases import BASE

from moesim.errors import UserError
from moesim.results.definitions import NUMBERS
from moesim.study import PointsFile
from moesim.sweeper import SweepFolder, load_study, print_points, print_sweep, sweep
from moesim.sweeper.table import STANDARD, Mean, changes, mean_interval

STUDY = """
name: trial
base: small.yaml
axes:
  - {key: parallelism.expert, values: [1, 2, 3]}
  - {key: seed, values: [0, 1]}
plot: {kind: curves, x: parallelism.expert, y: [communication.copies_per_token]}
"""


@pytest.fixture
def trial(study):
    return load_study(study(STUDY))


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path / "out")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole sweep, made once."""
    path = tmp_path_factory.mktemp("once")
    (path / "small.yaml").write_text(BASE)
    (path / "study.yaml").write_text(STUDY)
    sweep(load_study(path / "study.yaml"), SweepFolder(path / "out"), workers=2)
    return path / "out"


@pytest.fixture
def finished(once: Path, folder: SweepFolder) -> SweepFolder:
    """A copy of the finished folder."""
    shutil.copytree(once, folder.path)
    return folder


def test_a_rerun_does_the_missing_points_and_no_other(trial, finished, lines):
    folder = finished
    whole = (folder.path / "points.jsonl").read_bytes()
    first = sweep(trial, folder, workers=2)
    assert (first.new, first.count("done"), first.count("infeasible"), first.exit_code) == (0, 4, 2, 0)
    assert (folder.path / "points.jsonl").read_bytes() == whole
    gone = next(line for line in lines(folder.path) if line["status"] == "done")
    kept = [line for line in whole.splitlines(keepends=True) if json.loads(line)["id"] != gone["id"]]
    (folder.path / "points.jsonl").write_bytes(b"".join(kept) + b'{"id": "half')
    again = sweep(trial, folder, workers=2)
    assert (again.new, again.torn) == (1, True)
    assert lines(folder.path)[-1]["result"] == gone["result"]
    assert len(lines(folder.path)) == 6


def test_the_folder_says_what_it_holds(finished):
    folder = finished
    held = json.loads((folder.path / "study.json").read_text())
    assert set(held) == {"schema_version", "kind", "name", "base", "axes", "num_points", "hash", "plot"}
    assert (held["kind"], held["num_points"], held["plot"]["kind"]) == ("sweep", 6, "curves")
    assert held["axes"][1] == {"keys": ["seed"], "values": [[0], [1]], "labels": None, "repeat": True}
    records = folder.records().values()
    assert {tuple(record.values) for record in records} == {("parallelism.expert", "seed")}
    for record in records:
        assert (record.status == "done") == (record.reason is None)
        assert record.pid > 0


def test_another_study_is_refused_before_anything_runs(finished, study, lines):
    folder = finished
    before = lines(folder.path)
    for text, complaint in (
        (STUDY.replace("[0, 1]", "[0, 1, 2]"), "holds this sweep as it was before"),
        (STUDY.replace("name: trial", "name: other").replace("[0, 1]", "[2, 3]"), "holds the sweep 'trial'"),
    ):
        with pytest.raises(UserError, match=complaint + ".*choose another --out"):
            sweep(load_study(study(text)), folder, workers=1)
    assert lines(folder.path) == before


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("result.json", "{}", "holds result.json and no sweep"),
        ("study.json", "{", "study.json is damaged"),
        ("study.json", "[]", "study.json is damaged"),
    ],
)
def test_a_folder_of_something_else_is_refused(trial, folder, file, content, complaint):
    folder.path.mkdir()
    (folder.path / file).write_text(content)
    with pytest.raises(UserError, match=complaint):
        sweep(trial, folder, workers=1)


def test_failed_points_are_tried_again_when_asked(trial, folder):
    with folder.opened(trial) as file:
        for point in trial.points:
            file.append(point.record("failed", pid=1, reason="killed"))
    kept = sweep(trial, folder, workers=1)
    assert (kept.count("failed"), kept.exit_code) == (4, 1)
    again = sweep(trial, folder, workers=2, retry=True)
    assert (again.new, again.count("failed"), again.count("done"), again.exit_code) == (4, 0, 4, 0)
    assert len(folder.records()) == 6


def test_two_sweeps_in_one_folder_are_refused(trial, folder):
    with (
        PointsFile.opened(folder.path / "points.jsonl"),
        pytest.raises(UserError, match=r"holds points\.jsonl and no sweep"),
    ):
        sweep(trial, folder, workers=1)
    (folder.path / "points.jsonl").unlink()
    with folder.opened(trial), pytest.raises(UserError, match="being written by another call"):
        sweep(trial, folder, workers=1)


def test_every_metric_is_a_number_of_a_result(finished):
    done = [record for record in finished.records().values() if record.status == "done"]
    of_training = {"router.train_loss", "router.validation_loss"}
    of_budget = {"cost.usd_total", "cost.days"}
    of_some = ("placement.replacing.", "placement.rank_rows_by_speed", "estimate_sources.")
    for path in {path for path in NUMBERS if not path.startswith(of_some)} - of_training - of_budget:
        assert isinstance(done[0].metric(path), int | float), path
    for path in of_training | of_budget:
        *groups, name = path.split(".")
        assert name in done[0].metric(".".join(groups))
    assert {column.path for column in STANDARD} <= set(NUMBERS)


def shown(trial, outcome) -> str:
    file = StringIO()
    print_sweep(trial, outcome, file=file, width=160)
    return file.getvalue()


def test_the_table_averages_repetitions_and_marks_the_best(trial, finished):
    outcome = sweep(trial, finished)
    text = shown(trial, outcome)
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])}
    assert set(rows) == {"1", "2", "3"}
    steps = {}
    for record in outcome.records:
        if record.status == "done":
            steps.setdefault(str(record.values["parallelism.expert"]), []).append(record.result["step_time_s"])
    means = {key: sum(values) / len(values) for key, values in steps.items()}
    best = min(means, key=means.get)
    for key, mean in means.items():
        assert ("*" if key == best else " ") + f"{mean:.5g}" in rows[key]
    assert "infeasible" in rows["3"]
    assert "infeasible (2 points, first 5): " in text
    assert "3 does not divide experts = 8" in text
    assert "copies_per_token" in text
    assert "held-out loss" not in text  # nothing was trained


def test_a_price_by_kept_rows_stands_beside_drops_and_only_there(study, folder):
    values = "[{kind: none}, {kind: expert, factor: 0.5}]"
    trial = load_study(study(f"name: t\nbase: small.yaml\naxes:\n- {{key: capacity, values: {values}}}\n"))
    outcome = sweep(trial, folder, workers=2)
    whole, half = (record.result for record in outcome.records)
    assert half["cost"]["usd_per_million_tokens"] < whole["cost"]["usd_per_million_tokens"]
    text = shown(trial, outcome)
    assert "USD/M kept" in text
    assert f"*{whole['effective']['usd_per_million_tokens']:.4g}" in text  # the best of that column drops nothing
    one = load_study(study("name: t\nbase: small.yaml\naxes:\n- {key: seed, values: [0]}\n"))
    assert "USD/M kept" not in shown(one, sweep(one, SweepFolder(folder.path / "one")))


def test_changes_are_taken_pair_by_pair(study, folder) -> None:
    """Seeds that share an offset leave no spread in the change between two places."""
    trial = load_study(study(STUDY.replace("plot:", "reference: {parallelism.expert: 1}\nplot:")))
    with folder.opened(trial) as file:
        for point in trial.points:
            expert, seed = point.values["parallelism.expert"], point.values["seed"]
            result = {"step_time_s": (1.0 + seed) * expert, "router": {"validation_loss": 2.0 + seed - 0.25 * expert}}
            file.append(point.record("done", pid=1, result=result))
    records = tuple(folder.records().values())
    change = next(row for row in changes(trial, records, STANDARD) if row.labels == ("2",))
    assert change.means["step_time_s"] == Mean(1.0, 0.0)
    assert change.means["router.validation_loss"] == Mean(-0.25, 0.0)
    text = shown(trial, sweep(trial, folder))
    assert "change against expert = 1" in text
    assert "+100.00 ± 0 %" in text
    assert "-0.2500 ± 0" in text


def test_a_zipped_axis_with_labels_is_one_column(study, folder):
    text = "name: t\nbase: small.yaml\naxes:\n- {keys: [seed, model.top_k], values: [[0, 1], [1, 2]], labels: [a, b]}\n"
    trial = load_study(study(text))
    lines_of = [line.split() for line in shown(trial, sweep(trial, folder, workers=2)).splitlines()]
    assert [words[0] for words in lines_of if words and words[0] in ("a", "b")] == ["a", "b"]


def test_intervals_are_those_of_student() -> None:
    alone = mean_interval([2.0])
    assert (alone.value, alone.half_width) == (2.0, None)
    three = mean_interval([1.0, 2.0, 3.0])
    assert three.value == 2.0
    assert three.half_width == pytest.approx(2.920 / 3**0.5, rel=1e-3)  # t(0.95, 2) from any table


def test_points_are_listed_with_what_is_known(trial):
    file = StringIO()
    done = replace(trial.points[0].record("failed", pid=1, reason="killed"))
    print_points(trial, {done.id: done}, file=file)
    text = file.getvalue()
    assert text.count("to do") == 3
    assert text.count("failed") == 1
    assert "5: study.yaml" in text.replace(str(Path.cwd()) + "/", "")


def test_the_list_of_points_is_not_as_wide_as_a_list_of_counts(capsys):
    study = load_study(Path(__file__).parents[2] / "scenarios/studies/routing-deepseek-moe-16b.yaml")
    print_points(study, {})
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) < 100
    assert any("popularity" in line for line in lines)
