"""The plots as data: fronts, lines, bands and cells hold what the points say, and mistakes are one line."""

import json
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plot_cases import (
    GPU,
    LIMIT,
    NODES,
    STAGES,
    axis,
    clusters,
    limits,
    plan_about,
    point,
    result_of,
    write_run,
    write_study,
)

from moesim.errors import UserError
from moesim.report.plots import PlotRequest, plot_page
from moesim.report.plots.comparison import Side, changes, differences, sides, verdict, waterfall
from moesim.report.plots.curves import curves, heat_map
from moesim.report.plots.drawing import Drawing, choose
from moesim.report.plots.groups import Collection, collect
from moesim.report.plots.looks import colours, log_ticks
from moesim.report.plots.metrics import metric
from moesim.report.plots.plot_page import _large
from moesim.report.plots.scatter import cost_performance, dots, suits_dots
from moesim.report.plots.sources import read_sources, with_values
from moesim.study.points import pareto_front

HOSTILE = "<b>bold</b><script>alert(1)</script>\"'&amp;"
numbers = st.floats(0.0, 10.0).map(lambda value: round(value, 1))


def drawn(folder: Path, asked: PlotRequest) -> tuple[Collection, Drawing]:
    sources = read_sources([folder])
    collection = collect(sources, with_values(sources))
    return collection, choose(collection, asked)


def traces(figure: go.Figure, role: str) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.meta and trace.meta.get("role") == role]


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=25),
    st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
)
def test_no_point_beats_the_front_and_every_other_is_beaten(points, better) -> None:
    def beats(one, other) -> bool:
        gains = [side * (a - b) for side, a, b in zip(better, one, other, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    front = pareto_front(points, better=better)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
    for index, found in enumerate(points):
        is_beaten = any(beats(other, found) for other in points)
        assert (index in front) <= (not is_beaten)
        assert index in front or is_beaten or found in [points[i] for i in front]


def test_the_front_runs_through_points_and_says_which(tmp_path: Path) -> None:
    collection, drawing = drawn(clusters(tmp_path / "plan"), PlotRequest())
    figure = cost_performance(collection, drawing)
    (front,) = traces(figure, "front")
    shown = {(x, y) for trace in traces(figure, "points") for x, y in zip(trace.x, trace.y, strict=True)}
    assert set(zip(front.x, front.y, strict=True)) <= shown
    assert len(shown) == 23, "the point that does not fit is not drawn"
    assert front.line.shape == "vh"
    assert [trace.name for trace in traces(figure, "points")] == ["h100", "h200", "b200"]
    assert set(front.text) <= {f"{nodes}, {stages}" for nodes in (1, 2, 4, 8) for stages in (1, 2)}


def test_the_pointer_brings_up_the_whole_layout(tmp_path: Path) -> None:
    collection, drawing = drawn(clusters(tmp_path / "plan"), PlotRequest())
    text = traces(cost_performance(collection, drawing), "points")[0].customdata[0]
    for part in (
        "gpu: h100",
        "nodes: 1",
        "pipeline parallel: 2",
        "step time: 1.398 s (1.370 s to 1.440 s)",
        "MFU of the GEMMs' peak (causal attention): 28.62 %",
        "peak memory: 60 GB",
        "80 % interpolated, 20 % network",
    ):
        assert part in text


def test_curves_show_means_and_bands_over_seeds(tmp_path: Path) -> None:
    asked = PlotRequest(kind="curves", x=LIMIT, ys=("router.validation_loss", "step_time_s"))
    collection, drawing = drawn(limits(tmp_path / "limits"), asked)
    figure = curves(collection, drawing)
    loss, step = traces(figure, "points")
    band, _ = traces(figure, "band")
    assert list(loss.y) == pytest.approx([2.6 - 0.03 * size + 0.01 for size in (1, 2, 3, 4, 6)])
    assert list(loss.x) == [0, 1, 2, 3, 4], "an axis with `no limit` on it is no number"
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "3", "4", "no limit"]
    assert max(band.y[:5]) > max(loss.y) and min(band.y[5:]) < min(loss.y)
    assert band.meta["groups"] == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert list(step.y) == pytest.approx([1.01 * (1 + 0.05 * size) for size in (1, 2, 3, 4, 6)])


def test_a_metric_may_lie_on_x(tmp_path: Path) -> None:
    asked = PlotRequest(kind="curves", x="validation_loss", ys=("step_time_s",))
    collection, drawing = drawn(limits(tmp_path / "limits"), asked)
    (line,) = traces(curves(collection, drawing), "points")
    assert list(line.text) == ["1", "2", "3", "4", "no limit"]
    assert all(half > 0 for half in line.error_x.array) and all(half > 0 for half in line.error_y.array)


def test_long_names_beside_points_become_numbers_with_a_key(tmp_path: Path) -> None:
    names = ["published/seed0", "expert-coefficient-x10", "loss-free"]
    points = [point(i, {"$setting": name}, result_of(1.0 + i, loss=2.4 - 0.1 * i)) for i, name in enumerate(names)]
    folder = write_study(tmp_path / "balance", points, axes=[axis("$setting", names)])
    asked = PlotRequest(kind="curves", x="router.validation_loss", ys=("step_time_s",))
    (trace,) = traces(curves(*drawn(folder, asked)), "points")
    assert (list(trace.text), trace.mode) == (["1", "2", "3"], "markers+text"), "settings have no order to join them in"
    page = plot_page([folder], asked)
    assert "Each setting, by its number" in page and "2  expert-coefficient-x10" in page


def test_the_first_point_of_a_study_is_drawn(tmp_path: Path) -> None:
    points = [point(1, {NODES: 1}, result_of(1.0))]
    folder = write_study(tmp_path / "first", points, axes=[axis(NODES, [1, 2])], num_points=2)
    (trace,) = traces(curves(*drawn(folder, PlotRequest(kind="curves", x=NODES))), "points")
    assert list(trace.x) == [1.0]
    assert "1 of 2 points have not been run yet" in plot_page([folder], PlotRequest())


def test_a_line_with_a_point_missing_says_so_in_its_legend(tmp_path: Path) -> None:
    points = [point(1, {NODES: 1}, result_of(1.0)), point(2, {NODES: 2}, None)]
    figure = curves(*drawn(write_study(tmp_path / "gap", points, axes=[axis(NODES, [1, 2])]), PlotRequest()))
    (missing,) = traces(figure, "missing")
    assert figure.layout.showlegend and missing.showlegend and list(missing.x) == [2.0]


def test_long_names_on_x_become_rows(tmp_path: Path) -> None:
    collection, drawing = drawn(
        clusters(tmp_path / "sweep", kind="sweep"), PlotRequest(kind="curves", x=GPU, ys=("mfu.causal",))
    )
    assert not suits_dots(drawing)
    names = [f"a rather long name {i}" for i in range(3)]
    points = [point(i, {"$setting": name}, result_of(1.0 + i)) for i, name in enumerate(names)]
    folder = write_study(tmp_path / "rows", points, axes=[axis("$setting", names)])
    collection, drawing = drawn(folder, PlotRequest(kind="curves", x="$setting", ys=("step_time_s", "mfu.causal")))
    assert suits_dots(drawing)
    figure = dots(collection, drawing)
    step, mfu = traces(figure, "points")
    assert list(step.x) == [1.0, 2.0, 3.0] and list(mfu.x) == pytest.approx([40.0, 20.0, 40 / 3])
    assert list(figure.layout.yaxis.ticktext) == names and list(step.y) == [0, 1, 2]
    assert step.error_x.array[0] == pytest.approx(0.03)


def test_axes_begin_at_zero_only_where_values_come_near_it(tmp_path: Path) -> None:
    asked = PlotRequest(kind="curves", x=NODES, ys=("tokens_per_second", "mfu.causal"))
    figure = curves(*drawn(clusters(tmp_path / "sweep", kind="sweep"), asked))
    assert figure.layout.yaxis.rangemode == "tozero"
    assert figure.layout.yaxis.type is None and figure.layout.xaxis.type == "log"


def test_every_combination_is_a_line_of_its_own(tmp_path: Path) -> None:
    collection, drawing = drawn(
        clusters(tmp_path / "sweep", kind="sweep"), PlotRequest(kind="curves", x=NODES, colour=GPU)
    )
    lines = traces(curves(collection, drawing), "points")[:6]
    assert len({(line.line.color, line.line.dash) for line in lines}) == 6
    assert [len(line.x) for line in lines] == [3, 4, 4, 4, 4, 4]
    (missing,) = traces(curves(collection, drawing), "missing")
    assert "needs 92.3 GB" in missing.customdata[0]


def test_a_heat_map_shows_one_value_of_every_other_axis(tmp_path: Path) -> None:
    asked = PlotRequest(kind="heat_map", x=NODES, ys=(GPU, "mfu.causal"))
    collection, drawing = drawn(clusters(tmp_path / "sweep", kind="sweep"), asked)
    figure = heat_map(collection, drawing, metric("mfu.causal"))
    cells = figure.data[0].meta["cells"]
    assert len(cells["groups"]) == 23
    assert figure.data[0].z[0][0] is None, "the H100 node that does not hold the model"
    assert figure.data[0].z[1][2] == pytest.approx(100 * 0.4 / (1.3 / (4**0.9 * 1.12)))
    assert not figure.data[0].reversescale, "light is better"


def test_what_is_drawn_without_being_asked(tmp_path: Path) -> None:
    section = {"kind": "curves", "x": LIMIT, "y": ["step_time_s"]}
    _, drawing = drawn(limits(tmp_path / "told", plot=section), PlotRequest())
    assert (drawing.kind, drawing.ys) == ("curves", (metric("step_time_s"),))
    _, drawing = drawn(limits(tmp_path / "told2", plot=section), PlotRequest(ys=("dropped_share",)))
    assert drawing.ys == (metric("dropped_share"),), "flags come first"
    _, drawing = drawn(limits(tmp_path / "untold"), PlotRequest())
    assert [y.path for y in drawing.metrics] == ["step_time_s", "router.validation_loss"], (
        "what does not vary is left out"
    )
    _, drawing = drawn(clusters(tmp_path / "plan"), PlotRequest())
    assert drawing.kind == "cost_performance" and drawing.colour is not None and drawing.colour.keys == (GPU,)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (PlotRequest(ys=("step_tme_s",)), "did you mean 'step_time_s'"),
        (PlotRequest(ys=("valdation_loss",)), "did you mean 'router.validation_loss'"),
        (PlotRequest(kind="curves", x="router.kind"), "--x: 'router.kind' is neither a metric"),
        (PlotRequest(kind="curves", x="seed"), "is a repetition"),
        (PlotRequest(kind="curves", ys=(LIMIT,)), "a curve needs a metric"),
        (PlotRequest(kind="heat_map"), "needs two axes"),
        (PlotRequest(colour="step_time_s"), "colours need an axis"),
        (PlotRequest(kind="cost_performance", x=LIMIT), "use --kind curves"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, asked: PlotRequest, said: str) -> None:
    with pytest.raises(UserError) as error:
        drawn(limits(tmp_path / "limits"), asked)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_curves_of_folders_that_know_nothing_of_each_other_are_refused(tmp_path: Path) -> None:
    folders = [limits(tmp_path / "limits"), clusters(tmp_path / "plan")]
    with pytest.raises(UserError, match=r"has no cluster\.nodes"):
        plot_page(folders, PlotRequest(kind="curves", x=NODES))
    assert "A sweep and a plan. Varied: folder (2)" in plot_page(folders, PlotRequest())


SETTINGS = "name: {name}\nrouting: {{kind: uniform}}\ncluster: {{pools: [{{gpu: {gpu}, nodes: 1}}]}}\nseed: 0\n"


def two_runs(folder: Path) -> list[Path]:
    slower = result_of(1.3)
    slower["attribution_s"]["dispatch_exposed"] += 0.05
    slower["attribution_s"]["optimizer"] += 0.0001
    slower["step_time_s"] = sum(slower["attribution_s"].values())
    return [
        write_run(folder / "fast", result_of(1.0), SETTINGS.format(name="fast", gpu="h200")),
        write_run(folder / "slow", slower, SETTINGS.format(name="slow", gpu="h100")),
    ]


def test_a_comparison_accounts_for_all_of_the_difference(tmp_path: Path) -> None:
    first, second = sides(read_sources(two_runs(tmp_path)), None)
    assert differences(first, second) == [("cluster.pools.0.gpu", "h200", "h100")]
    parts = changes(first, second)
    assert sum(value for _, value in parts) == pytest.approx(0.3501)
    assert [part.key for part, _ in parts if part] == [
        "attention", "experts", "dispatch_exposed", "combine_exposed", "imbalance_wait", "optimizer"
    ]  # fmt: skip
    bars = waterfall(first, second).data[0]
    assert bars.x[0] + sum(bars.x[1:-1]) == pytest.approx(bars.x[-1])
    assert "35.0 % longer" in verdict(first, second) and "do not overlap" in verdict(first, second)


def test_runs_on_one_gpu_are_told_apart_by_routing_and_on_two_by_their_kernels_too() -> None:
    """1 s and 1.1 s, 1 % of routing each; their kernels are known to a fifth."""

    def side(name: str, step_s: float, kernels: str) -> Side:
        ranges = {
            "step_time_range_s": [0.8 * step_s, 1.2 * step_s],
            "step_time_routing_range_s": [0.99 * step_s, 1.01 * step_s],
        }
        return Side(name, {}, result_of(step_s) | ranges | {"kernels": kernels})

    first, again, other = side("a", 1.0, "h200"), side("b", 1.1, "h200"), side("c", 1.1, "b200")
    assert "of the routing do not overlap" in verdict(first, again)
    assert "of routing and kernels overlap" in verdict(first, other)


def test_small_changes_are_summed_up_and_not_lost(tmp_path: Path) -> None:
    one, other = result_of(1.0), result_of(1.0)
    other["attribution_s"] |= {"attention": 0.251, "experts": 0.4495}
    folders = [write_run(tmp_path / name, found, "seed: 0\n") for name, found in (("one", one), ("other", other))]
    first, second = sides(read_sources(folders), None)
    ((part, value),) = changes(first, second)
    assert part is None and value == pytest.approx(0.0005)
    assert "take 1.000 s" in verdict(first, second) and "overlap" in verdict(first, second)


def test_two_points_of_a_sweep_are_compared(tmp_path: Path) -> None:
    folder = clusters(tmp_path / "plan")
    first, second = sides(read_sources([folder]), (3, 4))
    assert differences(first, second) == [(STAGES, "1", "2")]
    page = plot_page([folder], PlotRequest(), points=(3, 4))
    assert "point 3 and point 4" in page and "Metric by metric" in page
    for numbers, said in (((3, 99), "has no point 99"), ((1, 2), "needs 92.3 GB"), ((3, 3), "both sides")):
        with pytest.raises(UserError, match=said):
            plot_page([folder], PlotRequest(), points=numbers)
    with pytest.raises(UserError, match="needs two runs, not 24"):
        plot_page([folder], PlotRequest(kind="comparison"))


def test_different_models_are_said_to_be_different(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"run-{name}", result_of(1.0), f"model: {{preset: {name}, layers: 4}}\n") for name in "abc"
    ]
    assert "a token of one is not a token of another" in plot_page(folders, PlotRequest())
    assert "The models differ" in plot_page(folders[:2], PlotRequest())


def test_one_run_alone_is_no_plot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open its report\.html"):
        plot_page(two_runs(tmp_path)[:1], PlotRequest())


def test_the_page_counts_what_has_no_result_and_lists_every_point(tmp_path: Path) -> None:
    page = plot_page([clusters(tmp_path / "plan")], PlotRequest())
    assert "Without a result: 1 of 24 points (1 infeasible)" in page
    assert "needs 92.3 GB of 80 GB" in page
    assert page.count("<tr data-group=") == 24
    data = json.loads(page.split('id="plot-data">')[1].split("</script>")[0])
    assert sum(data["done"]) == 23 and len(data["sort"]) == len(data["at"]) == 24
    assert len(page.encode()) < 6_000_000, "plotly once and little else"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    values = [{"routing.file": HOSTILE}, {"routing.file": "b"}]
    points = [point(i, value, result_of(1.0 + i)) for i, value in enumerate(values)]
    points.append(point(2, {"routing.file": "c"}, None, reason=HOSTILE))
    page = plot_page([write_study(tmp_path / "hostile", points, kind="plan", name=HOSTILE)], PlotRequest())
    own = page.split("</script>", 1)[1]
    assert "<b>bold" not in own and "<script>alert" not in own
    assert page.count("<script") == page.count("</script>")


def test_a_plan_says_why_its_winner_wins_and_what_would_alter_that(tmp_path: Path) -> None:
    values = [{GPU: "h200", STAGES: 1}, {GPU: "h200", STAGES: 2}, {GPU: "b200", STAGES: 1}]
    points = [point(i, value, result_of(1.0 + 0.1 * i)) for i, value in enumerate(values)]
    points.append(point(3, {GPU: "h100", STAGES: 1}, result_of(0.5)))
    about = plan_about({points[0]["id"]: {}, points[1]["id"]: {}})
    folder = write_study(tmp_path / "plan", points, kind="plan", **about)
    page = plot_page([folder], PlotRequest())
    for words in (
        "costs $40,000 for the goal; the other, 8 h200 pp2 mb1, $41,000",
        "bandwidth of all links x2",
        "another layout wins",
        "b200 would win below $2.50",
        "Of 1,440 combinations 321 passed and 14 were simulated",
        "0.12 % off in the median of 6 layouts drawn at random, 0.19 % at worst",
        "143.6 GB of 85.5 GB",
        "front of the layouts that meet the goal",
    ):
        assert words in page
    assert '"x":[40000.0,900.0,150.0,-52.0,2.0,41000.0]' in page.replace("\\u002f", "/")
    (front,) = traces(cost_performance(*drawn(folder, PlotRequest())), "front")
    assert list(front.text) == ["rank 1"], "the fastest and cheapest layout misses the goal"


def test_ticks_are_round_and_colours_differ(tmp_path: Path) -> None:
    assert log_ticks(2e5, 9e6) == [2e5, 5e5, 1e6, 2e6, 5e6, 1e7]
    assert len(log_ticks(1.0, 7.0)) >= 4
    collection, _ = drawn(clusters(tmp_path / "sweep", kind="sweep"), PlotRequest())
    for varied in collection.axes:
        assert len(set(colours(varied))) == len(varied.values)


def test_what_rounding_leaves_of_small_parts_is_no_bar() -> None:
    def parts(small: float) -> list[dict[str, object]]:
        return [{"part": "attention", "usd_difference": 1.0}, {"part": "router", "usd_difference": small}]

    assert [label for label, _ in _large(parts(1e-16))] == ["attention"]
    assert [label for label, _ in _large(parts(-1e-3))] == ["attention", "smaller changes"]
