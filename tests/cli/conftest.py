"""A real scenario small enough to simulate in a blink, and a way to call the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moesim.cli import main

SMALL = """
schema_version: 1
name: small
model: {layers: 2, hidden: 64, heads: 4, kv_heads: 4, head_dim: 16, vocab: 256, experts: 8, top_k: 2,
        expert_intermediate: 32}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 1, gpus_per_node: 2, price_per_gpu_hour: 3.5}
parallelism: {data: 2, expert: 2}
workload: {sequence_length: 512, global_batch: 4}
compute: {profile: roofline}
uncertainty: {samples: 2}
"""


@dataclass(frozen=True)
class Answer:
    """What one call left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr of a call that failed without printing anything else."""
        assert self.out == ""
        assert "Traceback" not in self.err
        assert self.err.endswith("\n") and self.err.count("\n") == 1
        return self.err.rstrip("\n")


@pytest.fixture
def whole_report() -> None:
    """Runs of the test write the report that users get; those of others write a line, in a tenth of the time."""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_tokens: None, request: pytest.FixtureRequest) -> Path:
    """The file of the small scenario; the working directory and the cache are empty folders of the test."""
    del few_tokens
    if "whole_report" not in request.fixturenames:
        monkeypatch.setattr("moesim.report.report.render", lambda record: f"the report of {record.scenario.name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESIM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def moesim(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`moesim("run", path, ...)` calls the command line in this process."""

    def call(*argv: object) -> Answer:
        code = main([str(word) for word in argv])
        return Answer(code, *capsys.readouterr())

    return call
