"""points.jsonl: what was finished survives whatever ends the writer.

The 90 % interval of a mean: Student's t against the integral of its density, and the width by hand.
"""

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.study import Point, PointRecord, PointsFile, read_points, scenario_id
from moesim.study.points import half_width_90, student_t_95


@pytest.fixture
def records(points) -> list[PointRecord]:
    made: list[Point] = points([{"seed": seed} for seed in range(4)])
    return [point.record("done", pid=1, seconds=0.5, result={"step_time_s": 1.0, "router": {}}) for point in made]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "points.jsonl"


def written(path: Path, records: list[PointRecord]) -> None:
    with PointsFile.opened(path) as file:
        for record in records:
            file.append(record)


def test_records_come_back_in_order(path, records):
    written(path, records[:2])
    written(path, records[2:])
    stored = read_points(path)
    assert stored.records == tuple(records)
    assert not stored.torn


def test_no_file_holds_no_records(path):
    assert read_points(path).records == ()


def test_the_last_record_of_an_id_counts(path, records, points):
    failed = points([{"seed": 0}])[0].record("failed", pid=2, reason="killed")
    written(path, [failed, *records])
    assert read_points(path).by_id()[records[0].id].status == "done"
    assert len(read_points(path).records) == len(records)


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_left_out_and_cut_before_the_next(path, records, kept):
    written(path, records[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + records[2].to_line()[:kept])
    stored = read_points(path)
    assert stored.torn
    assert stored.records == tuple(records[:2])
    written(path, records[3:])
    assert path.read_bytes() == whole + records[3].to_line()


@pytest.mark.parametrize("line", [b"\x00\x00\n", b'{"id": 3}\n', b"[]\n", b"{\n"])
def test_a_damaged_line_in_the_middle_is_named(path, records, line):
    written(path, records[:1])
    path.write_bytes(path.read_bytes() + line + records[1].to_line())
    with pytest.raises(UserError, match=r"points\.jsonl:2: .*remove this line"):
        read_points(path)


def test_a_done_record_without_result_is_no_record(path, records, points):
    line = points([{"seed": 0}])[0].record("done", pid=1).to_line()
    path.parent.mkdir()
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"points\.jsonl:1"):
        read_points(path)


def test_a_disk_that_fills_up_takes_whole_records_only(path, records):
    """A limit on the size of files stands for the end of the disk: the kernel takes a part, then refuses."""
    line = records[0].to_line()
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from moesim.errors import UserError; from moesim.study import PointsFile, PointRecord\n"
        f"record = PointRecord.from_line({line!r}); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({int(2.5 * len(line))},) * 2)\n"
        f"with PointsFile.opened(Path({str(path)!r})) as file:\n"
        "    try:\n"
        "        for _ in range(4): file.append(record)\n"
        "    except UserError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "make room and run the same command again" in done.stdout
    assert path.read_bytes() == 2 * line


def test_a_failing_sync_takes_the_record_back(path, records, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    written(path, records[:1])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the points before are kept"):
        written(path, records[1:])
    assert read_points(path).records == tuple(records[:1])


def test_ids_follow_from_the_resolved_scenario_alone(small):
    same = scenario_id(small({"parallelism.zero": {"dense": 0}}))
    assert same == scenario_id(small())
    assert len(same) == 16
    assert same != scenario_id(small({"seed": 1}))


def test_metrics_are_dotted_paths_into_the_result(records):
    assert records[0].metric("step_time_s") == 1.0
    assert records[0].metric("router.validation_loss") is None
    assert records[0].metric("step_time_s.deeper") is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 31, 100, 1000])
def test_quantiles_of_student_t_leave_five_per_cent_above(freedom: int) -> None:
    """Against the integral of the density, substituted so that its tail is finite: x = q / u for u in (0, 1]."""
    quantile, u = student_t_95(freedom), (np.arange(200_000) + 0.5) / 200_000
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + (quantile / u) ** 2 / freedom) ** (-(freedom + 1) / 2)
    assert float((density * quantile / u**2).mean()) == pytest.approx(0.05, abs=2e-5)


def test_half_widths_by_hand() -> None:
    assert half_width_90([1.0, 2.0, 3.0]) == pytest.approx(2.9200 / 3**0.5)  # standard deviation 1
    assert half_width_90([float(number % 2) for number in range(40)]) == pytest.approx(1.6849 * 0.50637 / 40**0.5, 1e-4)
