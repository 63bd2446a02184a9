"""Pieces of the host's work run where they are put, and tell what they make of a step's duration."""

import pytest

torch = pytest.importorskip("torch")

from moesim.kernels.benchmarks import host_in_situ  # noqa: E402


def test_every_piece_runs_both_ways_and_leaves_the_step_as_it_was() -> None:
    meter = host_in_situ.Meter("cpu", layers=1)
    for name, piece in host_in_situ.pieces("cpu").items():
        times = meter.step(name, piece)
        assert min(times) > 0, name
        assert all(weight.grad is None for weight in meter.own.get(name, ()))
    assert all(weight.grad is None for weight in meter.model.parameters())


def test_pieces_are_told_by_what_a_step_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = {"": (1.0, 2.0), "module": (1.0 + 27e-3, 2.0), "add": (1.0, 2.0 + 54e-3)}
    places = host_in_situ.LAYERS * host_in_situ.PLACES
    monkeypatch.setattr(host_in_situ.Meter, "step", lambda self, name="", piece=None: longer.get(name, longer[""]))
    found = host_in_situ.in_situ("cpu", rounds=3)
    assert found["forward", "module"] == pytest.approx(27e-3 / places)
    assert found["backward", "add"] == pytest.approx(54e-3 / places)
    assert found["forward", "mul"] == 0 and found["step", "backward"] == 2.0
