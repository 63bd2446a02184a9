"""A base scenario that simulates in a blink, and studies over it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweep_cases import BASE


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`study(text)`: a study file beside `small.yaml`; the working directory and the cache are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.yaml").write_text(BASE)

    def write(text: str, *, name: str = "study.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The whole lines of points.jsonl."""

    def read(folder: Path) -> list[dict[str, Any]]:
        file = folder / "points.jsonl"
        content = file.read_bytes() if file.exists() else b""
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]

    return read


@pytest.fixture
def started(tmp_path: Path):
    """`started("sweep", ...)`: the command line in a process of its own; killed when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(*argv: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "moesim", *map(str, argv)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def wait_until(
    condition: Callable[[], Any], *, process: "subprocess.Popen[str] | None" = None, seconds: float = 60.0
) -> None:
    """Wait for something that another process, such as `process`, does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """`eventually(condition)` waits until it holds."""
    return wait_until
