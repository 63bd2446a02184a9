"""What prompts and a static cache of transformers' models took on an H100 (tools/measure_peaks.py)."""

import gzip
from pathlib import Path

import pytest
from listed_steps import scenario_of
from measure_peaks import Case
from peak_table import DATA

from moesim.serving.loading import load_serving
from moesim.serving.memory import memory_of
from moesim.strict_json import parse_json

FILE = Path(__file__).parents[2] / "scenarios" / "serving" / "qwen3-30b-one-h100.yaml"
STEPS = [row for row in parse_json(gzip.decompress(DATA.read_bytes()))["steps"] if row["case"]["cache"]]
WORKSPACE = 2**26  # of cuBLAS


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["case"]["name"])
def test_weights_keys_and_the_room_for_a_step(step: dict) -> None:
    case = Case(**step["case"])
    budget = [f"engine.token_budget={case.batch * case.sequence}", f"engine.running={case.batch}"]
    base = load_serving(FILE, ["engine.software=transformers", *budget])
    memory = memory_of(base.model_copy(update={"model": scenario_of(case).model}))  # type: ignore[arg-type]
    assert memory.weights + WORKSPACE == pytest.approx(step["weights"], rel=0.003)
    cache = memory.kv_per_token * case.batch * case.cache
    assert memory.weights + cache + WORKSPACE == pytest.approx(step["held"], rel=0.003)
    room = step["prefill"] - step["held"]
    assert -0.01 * step["prefill"] < memory.workspace - room < 0.6 * room
    assert memory.workspace > step["decode"] - step["held"]
