"""Profile files: round trip, and one line for everything that can be wrong with one."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.kernels import (
    Gemm,
    kernel_model,
    load_profile,
)
from moesim.kernels.fitting import fit_profile
from moesim.kernels.profile import SCHEMA_VERSION, SHIPPED, Profile, load_profile_file, save_profile

ROW = {"family": "gemm", "m": 8, "k": 64, "n": 64, "dtype": "bf16", "direction": "forward", "p50": 1e-5}


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    profile = Profile(name="p", sessions=[{"device": "x"}], rows=[ROW], fits={"gemm/bf16/forward": {"alpha": 0.5}})
    save_profile(profile, tmp_path / name)
    assert load_profile_file(tmp_path / name) == profile
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_saving_is_a_fixed_function_of_the_profile(tmp_path: Path) -> None:
    profile = Profile(name="p", sessions=[], rows=[ROW])
    save_profile(profile, tmp_path / "a.json.gz")
    save_profile(profile, tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def content(**changes: object) -> str:
    whole = {"schema_version": SCHEMA_VERSION, "name": "p", "sessions": [], "rows": [ROW]}
    return json.dumps({name: value for name, value in (whole | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (content(schema_version=99), "schema version 99"),
        (content(schema_version=None), "no schema_version"),
        (content(rows=None), "without name, sessions or rows"),
        (content(rows=[{"m": 1}]), "names no family"),
        (content(rows=[ROW | {"p50": 0.0}]), r"rows\.0\.p50: must be a number between 1e-09 and 10000, got 0.0"),
        (content(rows=[ROW, ROW | {"m": -8}]), r"rows\.1\.m: must be a number between 1 and 1e\+13, got -8"),
        (content(rows=[ROW | {"k": True}]), r"rows\.0\.k: must be a number"),
        (content(rows=[ROW | {"dtype": 16}]), r"rows\.0\.dtype: must be a text, got 16"),
        (content(rows=[{"family": "gemm"}]), r"rows\.0\.m: missing in a row of gemm"),
        (
            content(rows=[{"family": "sustained", "of": {"family": "gemm"}, "p50": 1, "flops_per_second": 1e12}]),
            r"rows\.0\.of\.m: missing in a row of gemm",
        ),
        (content(rows=[ROW | {"p50": 1e400}]), "not a whole profile"),
        ("[1, 2]", "not a profile"),
        (content()[:-20], "not a whole profile"),
        ("", "not a whole profile"),
    ],
)
def test_damaged_profiles_are_one_line_with_the_file_and_a_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    assert "moesim calibrate" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json.gz"
    path.write_bytes(gzip.compress(content().encode())[:-12])
    with pytest.raises(UserError, match="not a whole profile"):
        load_profile(path)


def test_missing_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"shipped are a100, .*h100, h200, .*derived: .*h800"):
        load_profile("h2000")


def test_a_profile_of_an_unknown_device_needs_rows_to_judge_it_by(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content(sessions=[{"device": "Abacus"}]))
    with pytest.raises(UserError, match="unknown device"):
        load_profile(path)
    moved = {"family": "memory_bound", "kind": "copy", "rows": 1, "width": 1, "bytes": 4e6, "p50": 1e-4}
    path.write_text(content(sessions=[{"device": "Abacus"}], rows=[ROW, moved]))
    with pytest.warns(UserWarning, match="no rows for grouped_gemm"):
        model = load_profile(path)
    assert model.seconds(Gemm(m=64, k=64, n=64)).source == "roofline"  # one row is no calibration


def test_a_profile_of_another_gpu_is_scaled_to_the_one_asked_for() -> None:
    shipped = str(SHIPPED / "h200.json.gz")
    own, other = kernel_model("h200", shipped), kernel_model("a100", shipped)
    call = {"m": 4097, "k": 4096, "n": 4096}
    assert own.seconds(Gemm(**call)).source == "interpolated"
    assert other.seconds(Gemm(**call)).source == "scaled"
    assert other.seconds(Gemm(**call)).seconds > own.seconds(Gemm(**call)).seconds


def test_the_shipped_profile_says_where_it_comes_from() -> None:
    profile = load_profile_file(SHIPPED / "h200.json.gz")
    for session in profile.sessions:
        assert session["device"] == "NVIDIA H200"
        assert {"driver", "torch", "cuda", "nccl", "date"} <= session.keys()
    for row in profile.family("gemm"):
        assert 0 < row["p20"] <= row["p50"] * 1.0001
        assert row["repeats"] >= 5 and 300 <= row["clock_mhz"] <= 2000
        assert row["watts"] > 50
    kinds = {row["kind"] for row in profile.family("collective")}
    assert {"all_to_all", "all_to_all_uneven", "all_reduce", "all_gather", "reduce_scatter", "send_recv"} <= kinds
    assert len(profile.family("contention")) >= 12


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.json.gz")))
def test_no_row_of_a_shipped_profile_stands_twice(name: str) -> None:
    """A row that stands twice is predicted from itself, and its class looks better than it is."""
    rows = load_profile_file(SHIPPED / name).rows
    texts = [json.dumps({key: row[key] for key in row if key != "session"}, sort_keys=True) for row in rows]
    twice = [text for text, count in Counter(texts).items() if count > 1 and '"p50"' in text]
    assert not twice


def test_a_class_keeps_its_fit_while_its_rows_stay() -> None:
    """So that a profile that is extended moves nothing but what was measured."""
    sizes = np.geomspace(1e5, 1e9, 12)
    rows = [
        {"family": "memory_bound", "kind": kind, "rows": 1, "width": 1024, "bytes": size, "p50": 3e-6 + size / 2.5e12}
        for kind in ("copy", "silu")
        for size in sizes
    ]
    profile = Profile(name="own", sessions=[], rows=rows)
    fit_profile(profile)
    for name in ("memory_bound/copy", "memory_bound/silu"):
        profile.fits[name] = profile.fits[name] | {"alpha": 0.123}  # whatever it was
    profile.rows = [*rows, {**rows[0], "bytes": 2e8, "p50": 9e-5}]
    fit_profile(profile)
    assert profile.fits["memory_bound/silu"]["alpha"] == 0.123
    assert profile.fits["memory_bound/copy"]["alpha"] == 0.0
