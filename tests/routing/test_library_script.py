"""The script that remakes the library, rehearsed on a CPU with a tiny model."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import remake_library as library
from library_points import SEEDS, library_points

from moesim.trace.library import find_entry, library_entries, load_library


@pytest.fixture(autouse=True)
def _little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "EVALUATED_SEQUENCES", 4)  # in this process; the script's own have all 64
    monkeypatch.setattr(library, "EVALUATED_AT", (0, 1 / 3, 1))


def test_points_vary_one_axis_at_a_time() -> None:
    points = {point.name: point for point in library_points()}
    assert len(points) == len(library_points())
    for layout in ("64x6", "160x6", "256x8"):
        published = points[f"{layout}/published/seed0"].request.to_json()
        for point in points.values():
            if point.layout != layout or point.request.seed or point.point == "published":
                continue
            other = point.request.to_json()
            differ = {key for key in other if other[key] != published[key]} - {"recorded_sequences"}
            if point.axis == "router" or point.point == "loss-free":  # these bring balance and capacity of their own
                assert "router" in differ and differ <= {"router", "balance", "capacity"}
            else:
                assert len(differ) == 1, f"{point.name} varies {differ}"


def test_granularities_have_equal_compute() -> None:
    sizes = set()
    for point in library_points():
        if point.layout == "granularity":
            router, width = point.request.router, point.request.thin.expert_intermediate
            sizes.add((router.num_experts * width, router.top_k * width))
    assert len(sizes) == 1
    assert {point.request.seed for point in library_points() if point.layout == "granularity"} == set(SEEDS)


class OneThread(ThreadPoolExecutor):
    """Stands for the pool of processes, each of which imports torch: a bunch trains in this one."""

    def __init__(self, workers: int, context: object, **settings: object) -> None:
        super().__init__(1)


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rehearsal_trains_resumes_and_lists(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    processes: bool,
) -> None:
    if not processes:
        monkeypatch.setattr(library, "ProcessPoolExecutor", OneThread)
    name = "granularity/16x2/seed1"
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--corpus", str(corpus), "--only", name]
    assert library.main(arguments) == 0
    entry = find_entry(name, tmp_path)
    trace = load_library(name, tmp_path)
    assert (entry.layout, entry.axis, entry.value, entry.seed) == ("16x2", "granularity", "16x2", 1)
    assert trace.num_layers == 2 and trace.final.num_tokens == entry.tokens
    assert trace.curves.validation_loss[-1] == entry.held_out_loss < trace.curves.validation_loss[0]
    assert (trace.earlier[0].counts_LSE.sum(axis=(1, 2)) == trace.final.num_tokens * 2).all()
    made_at = (tmp_path / entry.file).stat().st_mtime_ns
    capsys.readouterr()
    assert library.main(arguments) == 0
    assert "1 entries are made, 0 are missing" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / entry.file).stat().st_mtime_ns == made_at


def test_a_bunch_of_every_kind_is_written(tmp_path: Path, corpus: Path) -> None:
    wanted = ("64x6/published/seed0", "256x8/router-expert_choice/seed0", "64x6/router-hash/seed0")
    points = [library._shrunk(point) for point in library_points(corpus=str(corpus), device="cpu", steps=2)]
    library.keep_order(points[0].request, tmp_path)
    for point in points:
        if point.name in wanted:
            assert library.train_bunch([point], tmp_path) == []
    assert library.write_index(tmp_path) == len(wanted)
    entries = {entry.name: entry for entry in library_entries(tmp_path)}
    assert set(entries) == set(wanted)
    for name in wanted:
        trace = load_library(name, tmp_path)
        if trace.router.kind == "expert_choice":
            assert trace.final.expert_ids_LSTK.min() == -1, "tokens get different numbers of experts"
    assert entries["64x6/published/seed0"].dropped_share > 0
    assert entries["256x8/router-expert_choice/seed0"].dropped_share == 0


def test_a_damaged_entry_is_made_again_and_a_diverged_one_reported(tmp_path: Path, corpus: Path) -> None:
    points = library_points(corpus=str(corpus), device="cpu", learning_rate=1e30)
    point = library._shrunk(next(point for point in points if point.name == "granularity/16x2/seed0"))
    (tmp_path / "granularity--16x2--seed0.routing").write_bytes(b"damaged")
    assert not library._is_made(point, tmp_path)
    (failure,) = library.train_bunch([point], tmp_path)
    assert "granularity/16x2/seed0: training diverged before step" in failure
    assert not library._is_made(point, tmp_path)


def test_names_are_listed_and_unknown_ones_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library.main(["--out", str(tmp_path), "--list", "--only", "64x6/M?/seed2"]) == 0
    assert capsys.readouterr().out.split() == ["64x6/M1/seed2", "64x6/M2/seed2", "64x6/M4/seed2"]
    assert library.main(["--out", str(tmp_path), "--only", "nothing*"]) == 1
    assert "no such entry" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tokens_are_what_studies_need_or_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for point in library_points(tokens=131_072):
        assert point.request.recorded_sequences * point.request.sequence_length == 131_072
    for tokens in ("1000", "12288", "524288", "0", "-4096"):
        with pytest.raises(SystemExit):
            library.main(["--out", "never", "--tokens", tokens])
        assert "is not 4096 times 1, 2, 4" in capsys.readouterr().err


def test_interrupt_stops_a_bunch_between_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path) -> None:
    class Pressed:
        def is_set(self) -> bool:
            return True

    monkeypatch.setattr(library, "_STOP", Pressed())
    point = library._shrunk(library_points(corpus=str(corpus), device="cpu")[-1])
    with pytest.raises(library.Stopped):
        library.train_bunch([point], tmp_path)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_layouts_people_plan_with_differ_from_their_unbalanced_twin_in_the_balance_alone() -> None:
    points = {point.name: point.request for point in library_points()}
    for layout in ("8x2", "64x8", "128x8", "384x8"):
        published, alone = points[f"{layout}/published/seed0"], points[f"{layout}/no-balance/seed0"]
        experts, top_k = map(int, layout.split("x"))
        assert (published.router.num_experts, published.router.top_k) == (experts, top_k)
        mine, other = published.to_json(), alone.to_json()
        assert {key for key in mine if mine[key] != other[key]} == {"balance", "recorded_sequences"}
