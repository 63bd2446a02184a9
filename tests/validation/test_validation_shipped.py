"""The shipped table: predictions made again from the shipped profile are those in the table.

When the profile or the simulation has changed for a reason, `moesim validate --report --out DIR` writes the tables
anew: copy its files to moesim/validation/data/.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from moesim.validation.cases import GPU_TOKENS, MODELS
from moesim.validation.comparison import GOALS, SHIPPED_TABLES, Table, differences, recompute, shipped_table

TOLERANCE = 0.005  # of any part of any case


@pytest.fixture(scope="module")
def shipped() -> Table:
    return shipped_table()


def assert_matches(shipped: Table, every: int) -> None:
    chosen = Table(shipped.device, shipped.rows[::every])
    worst = differences(chosen, recompute(chosen))
    assert {name: value for name, value in worst.items() if value > TOLERANCE} == {}


def test_some_predictions_are_those_of_the_shipped_profile(shipped: Table) -> None:
    assert_matches(shipped, every=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED_TABLES)
def test_all_predictions_are_those_of_the_shipped_profile(name: str) -> None:
    assert_matches(shipped_table(name), every=1)


def test_steps_of_models_that_were_never_used_were_predicted_within_reach() -> None:
    """Latent attention, more micro-batches, long sequences, other widths."""
    unseen = shipped_table("h200-unseen")
    errors = [abs(row.error) for row in unseen.rows]
    assert len(errors) >= 9 and np.median(errors) < GOALS["median"] and max(errors) < GOALS["worst"]
    assert_matches(unseen, every=4)


def test_steps_on_two_gpus_that_were_never_used_were_predicted_within_reach() -> None:
    """Sigmoid routers, replicas instead of expert parallelism, and seven skews beside their uniform twins."""
    unseen = shipped_table("h200-unseen-2gpu")
    scenarios = [row.case.scenario for row in unseen.rows]
    assert sum(scenario.router_shape().kind == "deepseek_v3" for scenario in scenarios) == 4
    assert sum(scenario.parallelism.expert < scenario.parallelism.data for scenario in scenarios) == 3
    errors = [abs(row.error) for row in unseen.rows]
    assert len(errors) == 22 and np.median(errors) < GOALS["median"] and max(errors) < GOALS["worst"]
    slowdowns = unseen.slowdowns()
    assert len(slowdowns) == 7 and all(measured > 0.03 for _, measured, _ in slowdowns)
    assert all(abs(predicted / measured - 1) < GOALS["skew"] for _, measured, predicted in slowdowns)
    assert_matches(unseen, every=5)


def test_steps_on_h100_were_predicted_within_reach() -> None:
    """Its kernels are its own, its steps took part in no fit; the last 16 are of models and sizes seen nowhere else."""
    again, last = shipped_table("h100"), shipped_table("h100-last")
    errors = [abs(row.error) for row in again.rows if row.case.tokens >= GOALS["from_tokens"]]
    assert len(errors) == 52 and np.median(errors) < GOALS["median"]
    assert sorted(errors)[-2] < GOALS["worst"]  # one case varied by a fifth from step to step
    errors = [abs(row.error) for row in last.rows]
    assert len(errors) == 16 and np.median(errors) < GOALS["median"] and max(errors) < GOALS["worst"]
    assert all(abs(predicted / measured - 1) < GOALS["skew"] for _, measured, predicted in last.slowdowns())
    assert_matches(last, every=5)


def test_the_table_covers_what_was_asked_for(shipped: Table) -> None:
    names = {row.case.name.split("-")[0] for row in shipped.rows}
    assert names == set(MODELS) and {row.case.tokens for row in shipped.rows} == set(GPU_TOKENS)
    assert {row.case.gpus for row in shipped.rows} == {1, 2}
    assert len(shipped.slowdowns()) == 2 * len(MODELS)


def test_measured_skew_and_parts_are_plausible(shipped: Table) -> None:
    """The measurements hang together: parts add up to the step, and a hot rank slows the step."""
    for row in shipped.rows:
        parts = row.measured["parts"]
        total = sum(parts[part] for part in ("forward", "backward", "reduction", "optimizer"))
        assert total == pytest.approx(row.measured["step"], rel=0.03)
    assert all(measured > 0.03 for _, measured, _ in shipped.slowdowns())


def test_predictions_stay_near_the_measurements(shipped: Table) -> None:
    """Not the goals themselves, but what must not get lost."""
    summary = shipped.summary()
    assert summary["median_error"] is not None and summary["median_error"] < 1.5 * GOALS["median"]
    assert summary["worst_error"] is not None and summary["worst_error"] < 1.5 * GOALS["worst"]


def test_the_readme_states_the_errors_of_the_shipped_tables() -> None:
    """Cases, median and worst error by number of GPUs: of those that shaped the model, then of those that did not."""
    groups = (("h200", "h200-unseen"), ("h200-unseen-2gpu",), ("h100",), ("h100-last",))
    assert [name for names in groups for name in names] == list(SHIPPED_TABLES)
    expected = []
    for names in groups:
        errors: dict[int, list[float]] = {}
        for row in (row for name in names for row in shipped_table(name).rows):
            if row.case.tokens >= GOALS["from_tokens"]:
                errors.setdefault(row.case.gpus, []).append(abs(row.error))
        for gpus, values in sorted(errors.items()):
            gpu = f"{'one' if gpus == 1 else 'two'} {names[0][:4].upper()}"
            figures = (f"{100 * np.median(values):.1f}", f"{100 * max(values):.1f}")
            expected.append((gpu, str(len(values)), *figures))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    row = r"\| `torch_eager` \| ((?:one|two) H[12]00) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|"
    assert re.findall(row, readme) == expected
