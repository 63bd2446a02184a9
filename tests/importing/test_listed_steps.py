"""The switches of `transformers` list what its models record: FLOPs alike, bytes and operations nearly so."""

import numpy as np
import pytest
from listed_steps import compared

QUICK = {"qwen3-small-8k", "mixtral-small-8k", "olmoe-2k", "deepseek-v2-lite-8k", "deepseek-v3-like-8k"}


def test_the_list_has_the_work_of_recorded_steps() -> None:
    found = compared(QUICK, time=False)
    assert {step.name for step in found} == QUICK
    for step in found:
        for phase in ("forward", "backward"):
            assert step.ratio("flops", phase) == pytest.approx(1, rel=1e-6), (step.name, phase)
            # a recorded step counts what kernels of operands in another order take as bytes of others
            assert step.ratio("moved", phase) == pytest.approx(1, rel=0.08), (step.name, phase)
            assert step.ratio("operations", phase) == pytest.approx(1, rel=0.15), (step.name, phase)
        parts = [part for phase, part in step.recorded if phase == "forward" and part != "mlp"]
        rows = {"experts": ("experts", "rows")}  # torch's modules hold what moves rows inside of their experts
        for part in set(parts) - {"attention", "embedding", "router", "shared experts"}:
            listed = sum(step.listed["forward", own].moved for own in rows.get(part, (part,)))
            assert listed == pytest.approx(step.recorded["forward", part].moved, rel=0.1), (step.name, part)


@pytest.mark.slow
def test_the_list_predicts_steps_that_it_was_not_made_from() -> None:
    """But for one whose host was slower than the one that was measured for hosts."""
    errors = {step.name: step.error for step in compared() if step.name != "olmoe-2k"}
    assert len(errors) == 17
    assert np.median(np.abs(list(errors.values()))) < 0.04, errors
    assert max(map(abs, errors.values())) < 0.07, errors
