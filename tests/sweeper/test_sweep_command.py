"""`moesim sweep` as a user meets it: exit codes, what it prints, and what survives when it is ended."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from moesim.cli import main

FEW = """
name: few
base: small.yaml
axes:
  - {key: parallelism.expert, values: [1, 2, 3]}
"""
# Large enough that several points are under way when the first is finished.
MANY = """
name: many
base: small.yaml
set: {model.layers: 8, workload.global_batch: 64}
axes:
  - {key: seed, values: [0, 1, 2, 3, 4, 5, 6, 7]}
"""


def test_a_sweep_prints_its_table_and_a_rerun_makes_nothing_new(study, capsys):
    path = str(study(FEW))
    assert main(["sweep", path, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 points done" in out
    assert "3 new points in runs/few" in out
    assert main(["sweep", path]) == 0
    assert "0 new points" in capsys.readouterr().out
    assert main(["sweep", path, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [point["status"] for point in data["points"]] == ["done", "done", "infeasible"]
    assert data["study"] == json.loads(Path("runs/few/study.json").read_text())
    assert main(["sweep", path, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_lists_points_and_writes_nothing(study, capsys):
    path = str(study(FEW))
    assert main(["sweep", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("to do") == 2
    assert "3 does not divide experts" in out
    assert main(["sweep", path, "--dry-run", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["misfit"] is None for point in points] == [True, True, False]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--workers", "0"], "--workers 0 is not a number of processes; use 1 or more"),
        (["--workers", "2", "--cluster", "tcp://127.0.0.1:1"], "leave it out beside --cluster"),
        (["--set", "seeed=1"], 'did you mean "seed"?'),
        (["--set", "parallelism.expert=2"], "is an axis of the study"),
        (["--out", "small.yaml"], "small.yaml is a file; name a folder with --out"),
        (["--dryrun"], "did you mean '--dry-run'?"),
    ],
)
def test_a_mistake_is_one_line(study, capsys, flags, complaint):
    assert main(["sweep", str(study(FEW)), *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1


def test_the_exit_code_says_when_nothing_fits(study, capsys):
    """The point passes the checks of its keys; memory decides when it is simulated."""
    text = "name: big\nbase: small.yaml\nset: {memory.reserved: 140.4 GiB}\naxes:\n- {key: seed, values: [0]}\n"
    assert main(["sweep", str(study(text)), "--workers", "1"]) == 2
    assert "infeasible (point 1): " in capsys.readouterr().out


def test_the_exit_code_says_when_a_point_failed(study, capsys):
    text = "name: odd\nbase: small.yaml\nset: {compute.profile: no-such-profile}\naxes:\n- {key: seed, values: [0]}\n"
    assert main(["sweep", str(study(text)), "--workers", "1"]) == 1
    assert "no-such-profile" in capsys.readouterr().out


def test_kill_9_of_a_worker_and_of_the_sweep_loses_only_what_was_running(study, started, lines, eventually, is_alive):
    path, out = study(MANY), Path("runs/many")
    first = started("sweep", path, "--workers", 2)
    eventually(lambda: lines(out), process=first)
    killed = lines(out)[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: any(line["pid"] != killed for line in lines(out)), process=first)
    first.kill()
    first.wait()
    kept = lines(out)
    assert 1 < len(kept) < 8
    assert {line["status"] for line in kept} == {"done"}
    for pid in {line["pid"] for line in kept}:
        eventually(lambda pid=pid: not is_alive(pid), seconds=20)
    assert main(["sweep", str(path), "--workers", "2", "--quiet"]) == 0
    assert lines(out)[: len(kept)] == kept
    assert sorted(line["number"] for line in lines(out)) == list(range(1, 9))


def test_ctrl_c_keeps_what_is_finished(study, started, lines, eventually):
    path, out = study(MANY), Path("runs/many")
    running = started("sweep", path, "--workers", 1)
    eventually(lambda: lines(out), process=running)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    kept = len(lines(out))
    assert 0 < kept < 8
    complaint = running.stderr.read()
    assert (
        complaint
        == f"moesim: interrupted; {kept} of 8 points are kept; run the same command again to go on from {out}\n"
    )


def test_a_full_disk_ends_the_sweep_with_whole_records(study, lines, monkeypatch, capsys):
    path, out = study(MANY), Path("runs/many")
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["sweep", str(path), "--workers", "2"]) == 1
    complaint = capsys.readouterr().err
    assert "points.jsonl: No space left on device; the points before are kept" in complaint
    assert complaint.count("\n") == 1
    assert len(lines(out)) == 2
    assert (out / "points.jsonl").read_bytes().endswith(b"\n")
    assert main(["sweep", str(path), "--workers", "2", "--quiet"]) == 0
    assert sorted(line["number"] for line in lines(out)) == list(range(1, 9))
