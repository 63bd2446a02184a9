"""What `moesim plot` reads: folders in any state, axes and seeds, means with intervals, and one line for mistakes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from plot_cases import (
    GPU,
    LIMIT,
    NODES,
    SEED,
    TOO_SMALL,
    axis,
    clusters,
    limits,
    point,
    result_of,
    write_run,
    write_study,
)

from moesim.errors import UserError
from moesim.report.plots.groups import Collection, collect, mean_and_interval, own_range
from moesim.report.plots.metrics import metric, paths_of, short_names, text_of
from moesim.report.plots.sources import read_sources, with_values
from moesim.study.points import T_95


def collection_of(*folders: Path, split: bool = False) -> Collection:
    sources = read_sources(folders)
    return collect(sources, with_values(sources), split=split)


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    found = collection_of(limits(tmp_path / "limits"))
    assert [shown.name for shown in found.axes] == ["device limit"]
    assert found.axes[0].texts == ("1", "2", "3", "4", "no limit")
    assert [len(group.results) for group in found.groups] == [3] * 5
    step = found.groups[1].estimate(metric("step_time_s"))
    assert step is not None and step.count == 3
    assert step.mean == pytest.approx(1.1 * 1.01)
    half = T_95[1] * 1.1 * 0.01 / math.sqrt(3)
    assert (step.low, step.high) == pytest.approx((step.mean - half, step.mean + half))


def test_intervals_hold_the_truth_in_nine_of_ten_cases() -> None:
    draws = np.random.default_rng(0).normal(3.0, 1.0, size=(4000, 3))
    intervals = [mean_and_interval(row) for row in draws.tolist()]
    assert np.mean([e.low <= 3.0 <= e.high for e in intervals]) == pytest.approx(0.9, abs=0.015)


def test_a_single_run_brings_its_own_range_and_what_follows_from_it(tmp_path: Path) -> None:
    result = result_of(2.0)
    values = {"routing.steps": 1}
    folder = write_study(tmp_path / "one", [point(1, values, result)], axes=[axis("routing.steps", [1])])
    (group,) = collection_of(folder).groups
    step, rate, price, imbalance = (
        group.estimate(metric(path))
        for path in ("step_time_s", "tokens_per_second", "cost.usd_per_million_tokens", "imbalance.expert")
    )
    assert step and rate and price and imbalance
    assert (step.low, step.high) == pytest.approx((1.96, 2.06))
    assert (rate.low, rate.high) == pytest.approx((rate.mean * 2 / 2.06, rate.mean * 2 / 1.96))
    assert price.high == pytest.approx(price.mean * 1.03)
    assert (imbalance.low, imbalance.high) == (None, None)
    assert own_range(metric("step_time_s"), result | {"step_time_range_s": [2.0, 2.0]}) == (None, None), "one sample"


def test_zipped_keys_stay_one_axis(tmp_path: Path) -> None:
    rows = [(1, 8), (2, 16), (4, 32)]
    points = [point(i, {NODES: n, "parallelism.data": d}, result_of(1.0 + i)) for i, (n, d) in enumerate(rows)]
    folder = write_study(tmp_path / "zipped", points, axes=[axis([NODES, "parallelism.data"], rows)])
    (together,) = collection_of(folder).axes
    assert together.texts == ("1", "2", "4"), "the first key tells the places apart"
    assert collection_of(folder, split=True).axes == (together,)


def test_a_place_that_leaves_a_key_alone_is_a_value(tmp_path: Path) -> None:
    """Points of a list may set different keys; study.json has null there, points.jsonl nothing."""
    points = [point(1, {NODES: 1}, result_of(1.0)), point(2, {GPU: "h100"}, result_of(2.0))]
    folder = write_study(tmp_path / "list", points, axes=[axis([NODES, GPU], [(1, None), (None, "h100")])])
    found = collection_of(folder, split=True)
    assert [one.texts for one in found.axes] == [("1", "none"), ("none", "h100")]
    assert [group.at for group in found.groups] == [(0, 0), (1, 1)]


def test_runs_differ_in_the_keys_of_their_scenarios(tmp_path: Path) -> None:
    text = "name: {name}\ncluster: {{pools: [{{gpu: {gpu}, nodes: 1}}]}}\nseed: {seed}\n"
    folders = [
        write_run(tmp_path / name, result_of(1.0), text.format(name=name, gpu=gpu, seed=seed))
        for name, gpu, seed in (("a", "h100", 0), ("b", "h100", 1), ("c", "h200", 0))
    ]
    found = collection_of(*folders)
    assert [one.keys for one in found.axes] == [("cluster.pools.0.gpu",)]
    assert [one.keys for one in found.repeats] == [(SEED,)]
    assert [[p.folder for p in group.points] for group in found.groups] == [["a", "b"], ["c"]]


def test_runs_of_different_models_and_kinds_are_told_apart_by_what_all_have(tmp_path: Path) -> None:
    form = (
        "model: {{preset: {0}, layers: {1}}}\nrouting: {{{2}}}\nparallelism: {{expert: {1}, zero: {{expert: {1}}}}}\n"
    )
    texts = (form.format("a", 4, "kind: uniform"), form.format("b", 6, "kind: hash, steps: 5"))
    folders = [write_run(tmp_path / str(i), result_of(1.0), text) for i, text in enumerate(texts)]
    assert [one.name for one in collection_of(*folders).axes] == [
        "model preset", "routing kind", "expert parallel", "zero expert"
    ]  # fmt: skip


def test_a_run_beside_a_sweep_is_placed_on_its_axes(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "mine", result_of(0.4), "cluster: {pools: [{gpu: h200, nodes: 4}]}\nparallelism: {pipeline: 2}\n"
    )
    found = collection_of(clusters(tmp_path / "sweep", kind="sweep"), run)
    last = found.groups[-1].points[0]
    assert last.values == {"folder": "mine", GPU: "h200", NODES: 4, "parallelism.pipeline": 2}
    assert [one.name for one in found.axes] == ["folder", "gpu", "nodes", "pipeline parallel"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = limits(tmp_path / "limits", num_points=20)
    with (folder / "points.jsonl").open("a") as file:
        file.write('{"id": "torn')
    (source,) = read_sources([folder])
    assert len(source.points) == 15
    assert "5 of 20 points have not been run" in " ".join(source.notices)
    assert "cut off" in " ".join(source.notices)


def test_a_rerun_replaces_the_point_that_failed(tmp_path: Path) -> None:
    again = [point(1, {LIMIT: 1}, None), point(2, {LIMIT: 2}, result_of(2.0)), point(1, {LIMIT: 1}, result_of(1.0))]
    (source,) = read_sources([write_study(tmp_path / "again", again, axes=[axis(LIMIT, [1, 2])], num_points=2)])
    assert [(p.number, p.status) for p in source.points] == [(1, "done"), (2, "done")]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", result_of(1.0), "seed: 0\n") for name in ("old", "new")]
    assert [source.folder for source in read_sources(folders)] == ["old/run", "new/run"]


def test_numbers_of_a_result_are_found_by_their_path() -> None:
    paths = paths_of([result_of(1.0)])
    assert {"step_time_s", "imbalance.expert", "memory.peak_bytes", "derived.waiting_share"} <= set(paths)
    assert "router.kind" not in paths and "cost.usd_total" not in paths
    result = result_of(2.0)
    assert metric("derived.waiting_share").of(result) == pytest.approx(0.05)
    assert metric("derived.communication_share").of(result) == pytest.approx(0.15)
    assert metric("derived.bytes_per_token").of(result) == pytest.approx(4e11 / 262_144)


def test_names_are_as_short_as_they_stay_clear() -> None:
    names = short_names(
        ["cluster.nodes", "model.layers", "routing.thin.layers", "capacity.kind", "parallelism.expert", "$m"]
    )
    assert list(names.values()) == ["nodes", "model layers", "thin layers", "capacity kind", "expert parallel", "m"]
    assert text_of({"kind": "device", "factor": 1.25}) == "device, factor 1.25"
    assert text_of("library:" + "x" * 60).startswith("…") and len(text_of("y" * 99)) == 40


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "points.jsonl").write_text(""), "no finished point yet"),
        (lambda folder: (folder / "points.jsonl").unlink(), "points.jsonl: missing"),
        (lambda folder: (folder / "points.jsonl").write_text("{}\n"), "points.jsonl:1"),
        (lambda folder: (folder / "study.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "study.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "study.json").write_text('{"schema_version": 9}'), "schema_version 9"),
        (lambda folder: (folder / "study.json").unlink(), "no finished run, sweep or plan"),
        (lambda folder: (folder / "points.jsonl").write_text(json.dumps(point(1, {LIMIT: 1}, None)) + "\n"), TOO_SMALL),
    ],
)
def test_folders_that_hold_nothing_to_draw(tmp_path: Path, break_it, said: str) -> None:
    folder = limits(tmp_path / "limits")
    break_it(folder)
    with pytest.raises(UserError) as error:
        read_sources([folder])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_paths_that_are_no_folders_and_results_that_are_not_alike(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a", result_of(1.0), "seed: 0\n")
    other = write_run(tmp_path / "runs" / "b", result_of(1.0) | {"kind": "inference"}, "seed: 0\n")
    for paths, said in (
        ([tmp_path / "nothing"], "no such folder"),
        ([run / "scenario.yaml"], "not a folder"),
        ([tmp_path / "runs"], "holds 2 folders of runs; name them"),
        ([run, other], "inference, training"),
    ):
        with pytest.raises(UserError, match=said):
            read_sources(paths)
    assert read_sources([run / "result.json"])[0].kind == "run", "one of its own files names a folder"
