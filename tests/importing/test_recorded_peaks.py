"""The most memory of a recorded step: storages alive on the meta device, beside hand-counted and measured ones."""

import gzip
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moesim.importing.recording import record_step
from moesim.parallel.memory import WORKSPACE_BYTES
from moesim.recorded.peak import step_peak
from moesim.recorded.scaling import updating
from moesim.recorded.step_file import load_step, save_step
from moesim.strict_json import parse_json

ROOT = Path(__file__).parents[2]
TOKENS, HIDDEN, WIDTH = 4096, 512, 2048
FP32 = 4


def step():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False))
        inputs = torch.randn(TOKENS, HIDDEN)
    return model, lambda: model(inputs).square().mean()


def test_what_is_alive_is_what_a_hand_counts() -> None:
    """Of Y = X W1 W2 and mean(Y^2): behind the first product of the way back stand X, X W1, the gradients of Y, of X W1
    and of W2."""
    peak = step_peak(record_step(*step()))
    assert peak is not None
    weights, wide, narrow = (FP32 * size for size in (2 * HIDDEN * WIDTH, TOKENS * WIDTH, TOKENS * HIDDEN))
    assert peak.held == weights + narrow and peak.states == 2 * weights
    assert peak.phase == "backward"
    assert peak.moving == pytest.approx(2 * wide + narrow + weights / 2 + WORKSPACE_BYTES, rel=1e-3)
    later = step_peak(record_step(*step()), micro_batches=3)
    assert later is not None and later.total == peak.total + weights


def test_a_file_keeps_the_peak_and_another_size_has_none(tmp_path: Path) -> None:
    ops = record_step(*step())
    save_step(tmp_path / "step.json", ops, source="here")
    assert step_peak(load_step(tmp_path / "step.json")[1]) == step_peak(ops)
    assert step_peak([*ops[:-1], updating(ops[-1], 77)]) is None
    assert step_peak(ops[:-1]) is None


def test_measured_peaks_of_transformers_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an H100, in no choice but that of a kernel's own product; `python tools/peak_table.py` has all 34 steps."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from measure_peaks import Case
    from peak_table import recorded_bytes

    data = parse_json(gzip.decompress((ROOT / "tests" / "data" / "peaks_h100.json.gz").read_bytes()))
    rows = {row["case"]["name"]: row for row in data["steps"]}
    for name in ("qwen3-short", "olmoe-twice", "mixtral-eager", "v3-like-short"):
        row = rows[name]
        measured = max(row[moment] for moment in ("forward", "backward", "optimizer"))
        assert recorded_bytes(Case(**row["case"])) == pytest.approx(measured, rel=0.005), name
