"""Files are whole or not there, a folder has one writer, and waiting processes take turns."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.errors import MachineError, UserError
from moesim.files import claimed, is_leftover, turn, whole_file, write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from moesim.files import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_file_is_replaced_whole_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_bytes(b"half")
        1 / 0
    assert path.read_bytes() == b"one"
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, full_disk) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    with (
        full_disk(2),
        pytest.raises(MachineError, match="file: cannot be written: File too large; make") as error,
    ):
        write_atomically(path, b"two two")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"new", replace=False)
    with pytest.raises(UserError, match="exists by now; choose another --out, or --force"):
        write_atomically(path, b"newer", replace=False)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_one_of_two_writers_of_a_folder_gets_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with (
        claimed(folder),
        pytest.raises(UserError, match="a is being written by another call; wait for it"),
        claimed(folder),
    ):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was written, so nothing is left
    with claimed(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_killed_writer_holds_its_folder_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="being written by another call"), claimed(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    assert all(is_leftover(path.name) for path in tmp_path.iterdir())
    with claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_second_waits_for_its_turn(tmp_path: Path) -> None:
    """A child takes the turn while this process has it; it comes after, and says that it waits."""
    code = (
        "import sys; from pathlib import Path; from moesim.files import turn\n"
        "with turn(Path(sys.argv[1]), on_wait=lambda: print('waits', flush=True)):\n"
        "    print(Path(sys.argv[1]).read_text())\n"
    )
    path = tmp_path / "router"
    with turn(path, on_wait=lambda: pytest.fail("nobody else is there")):
        child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "waits\n"
        path.write_text("trained")
    assert child.communicate(timeout=60)[0] == "trained\n"
    assert list(tmp_path.iterdir()) == [path]
