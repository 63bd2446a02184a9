"""What befalls a process from outside: no room on the disk, no reader, signals, a second call into the same folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.cli import VERBS
from moesim.files import claimed

TRAINED = (
    "routing={kind: train, router: {kind: deepseek_moe}, steps: 4, thin: {layers: 1, hidden: 16, heads: 2, "
    "expert_intermediate: 8, context: 64, tokens_per_step: 128}}"
)


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_is_one_line_and_the_run_can_be_repeated(scenario: Path, moesim, full_disk, room: int) -> None:
    with full_disk(room):
        answer = moesim("run", scenario, "--out", "out")
    assert answer.code == 1
    assert "out: cannot be written: File too large; make room" in answer.complaint
    assert not Path("out").exists()
    assert moesim("run", scenario, "--out", "out", "--quiet").code == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with full_disk(room):
        assert moesim("run", scenario, "--out", "out", "--force", "--set", "seed=1").code == 1
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_forced_run_leaves_nothing_of_the_one_before(scenario: Path, moesim) -> None:
    assert moesim("run", scenario, "--out", "out", "--quiet", "--timeline").code == 0
    assert Path("out/timeline.json.gz").exists()
    assert moesim("run", scenario, "--out", "out", "--quiet", "--force").code == 0
    assert not Path("out/timeline.json.gz").exists()


def test_training_that_cannot_be_kept_says_so(scenario: Path, moesim, full_disk) -> None:
    with full_disk(1000):
        answer = moesim("run", scenario, "--set", TRAINED)
    assert answer.code == 1
    assert "with MOESIM_CACHE; the training so far is lost" in answer.complaint


def test_a_full_disk_leaves_a_sweep_and_a_plan_that_go_on(scenario: Path, moesim, full_disk) -> None:
    Path("study.yaml").write_text("name: st\nbase: small.yaml\naxes: [{key: seed, values: [1]}]\n")
    with full_disk(100):
        answer = moesim("sweep", "study.yaml", "--out", "out")
    assert answer.code == 1
    assert "study.json: cannot be written: File too large" in answer.complaint
    assert not Path("out").exists()


@pytest.mark.parametrize("verb", ["run", "sweep", "plan"])
def test_a_folder_that_another_call_writes_is_refused(scenario: Path, moesim, verb: str) -> None:
    files = {
        "run": Path("small.yaml"),
        "sweep": Path("study.yaml"),
        "plan": Path("plan.yaml"),
    }
    files["sweep"].write_text("name: st\nbase: small.yaml\naxes: [{key: seed, values: [1]}]\n")
    files["plan"].write_text(
        "name: pl\nmodel: {preset: deepseek-moe-16b}\nrouting: {kind: uniform}\n"
        "goal: {tokens: 1e9, gpus: [{gpu: h100, at_most: 8, usd_per_gpu_hour: 1, source: a test}]}\n"
        "workload: {sequence_length: 512, global_batch: 8}\nchoices: {gpus: [8], expert: [8]}\n"
    )
    with claimed(Path("out")):
        answer = moesim(verb, files[verb], "--out", "out", *(["--force"] if verb != "sweep" else []))
    assert answer.code == 1
    assert "out is being written by another call" in answer.complaint


@pytest.mark.parametrize("argv", [["run", "small.yaml", "--out", ""], ["plan", "p.yaml", "--storage= "], ["run", ""]])
def test_an_empty_argument_is_refused(scenario: Path, moesim, argv: list[str]) -> None:
    before = sorted(Path().iterdir())
    answer = moesim(*argv)
    assert answer.code == 1
    assert "is empty; write what is meant, or leave it out" in answer.complaint
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_every_verb_refuses_an_empty_value(moesim, verb: str) -> None:
    for flag in ("--out", "--cluster", "--cache", "--profile", "--set"):
        for words in ([flag, ""], [f"{flag}="]):
            answer = moesim(verb, *words)
            assert answer.code == 1
            assert f"{flag} is empty" in answer.complaint


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command line in which `moesim` stands for this installation's."""
    text = f'moesim() {{ "{sys.executable}" -m moesim "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("moesim completion bash >/dev/full", 1, "No space left on device"),
        ("moesim rnu 2>/dev/full", 1, ""),
        ("moesim completion bash >&- 2>&- <&-", 0, ""),
    ],
)
def test_a_full_or_closed_stream_is_no_traceback(scenario: Path, command: str, code: int, said: str) -> None:
    ended = shell(command)
    assert ended.returncode == code
    assert said in ended.stderr and "Traceback" not in ended.stderr and ended.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    ("words", "stream", "code"),
    [("completion bash", "stdout", 141), ("gpus", "stdout", 141), ("rnu", "stderr", 1)],
)
def test_no_reader_is_no_traceback(scenario: Path, words: str, stream: str, code: int) -> None:
    """The reader of the pipe is gone before the first word, as that of `| head` is after some lines; `gpus` prints with
    rich, which leaves by itself then."""
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    command = [sys.executable, "-m", "moesim", *words.split()]
    ended = subprocess.run(command, check=False, **{stream: writer, other: subprocess.PIPE})
    os.close(writer)
    assert ended.returncode == code
    assert not getattr(ended, other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_to_end_keep_the_training_as_ctrl_c_does(scenario: Path, moesim, monkeypatch, number) -> None:
    from moesim.routing.training import Trainer

    advance = Trainer.advance

    def signalled(self: Trainer):
        os.kill(os.getpid(), number)
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", signalled)
    before = signal.getsignal(number)
    answer = moesim("run", scenario, "--set", TRAINED)
    assert answer.code == 130
    assert "the training so far is kept in" in answer.complaint
    assert signal.getsignal(number) is before
