"""Serving: the host of an engine, rows that fill up captured graphs, and the least that exchanges take."""

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.serving import load_serving_text, serve
from moesim.serving.software import AHEAD, WAITING, serving_software
from moesim.strict_json import parse_json

SCHEDULERS = Path(__file__).parents[1] / "data" / "vllm_scheduler.json"
ONE = """schema_version: 1
name: one
model: {preset: qwen3-30b-a3b, layers: 2}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 1}
workload:
  kind: serving
  requests: 60
  arrivals: {kind: poisson, rate: 2000.0, input: {kind: fixed, tokens: 100}, output: {kind: fixed, tokens: 30}}
engine: {software: fused}
"""


@pytest.mark.parametrize(("kind", "of_step", "of_request"), [("AsyncScheduler", *AHEAD), ("Scheduler", *WAITING)])
def test_the_scheduler_takes_what_it_took_in_rows_that_shaped_nothing(kind: str, of_step: float, of_request: float):
    rows = [row for row in parse_json(SCHEDULERS.read_bytes())["rows"] if row["scheduler"] == kind and row["kept_out"]]
    requests, seconds = (np.array([row[key] for row in rows]) for key in ("requests", "seconds"))
    assert len(rows) == 3
    assert np.abs(np.log((of_step + of_request * requests) / seconds)).max() < 0.15


@pytest.mark.parametrize("software", serving_software().values(), ids=lambda each: each.name)
def test_rows_are_filled_up_to_the_next_captured_size(software):
    rows = np.arange(1, 2_000)
    filled = software.filled(rows)
    assert (filled >= rows).all() and (np.diff(filled) >= 0).all()
    assert np.array_equal(software.filled(filled), filled), "a captured size is filled no further"
    if software.name.startswith("fused"):
        captured = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]  # as vLLM's configuration documents them
        assert np.array_equal(np.unique(filled[:512]), captured) and np.array_equal(filled[512:], rows[512:])


def test_a_host_that_schedules_beside_the_gpu_never_makes_a_step_longer() -> None:
    hidden, shown = (
        serve(load_serving_text(ONE, overrides=(f"engine.software={n}",))) for n in ("fused", "fused_sync")
    )
    assert hidden["tpot_s"]["mean"] < shown["tpot_s"]["mean"]
    assert shown["time_s"]["host"] / shown["steps"] > WAITING[0]
    with pytest.raises(UserError, match=r"compute.host_factor: changes no step of serving.* set engine.host"):
        load_serving_text(ONE, overrides=("compute.host_factor=2",))
    slow = serve(load_serving_text(ONE, overrides=("engine.host=20 ms",)))
    assert slow["step_s"]["p50"] >= 0.02, "a host that is slower than the GPU sets the pace"
