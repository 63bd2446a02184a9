"""Lists of kernels that switches make, beside what was measured and what was recorded.

Measured steps of Megatron-Core and torchtitan (tools/software_steps.py); recorded ones of transformers' models
(tools/listed_steps.py): FLOPs alike, bytes and operations nearly so.
"""

import gzip

import numpy as np
import pytest
from listed_steps import compared as listed_and_recorded
from software_steps import DATA, compared, listed_parts, scenario_of

from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.strict_json import parse_json

QUICK = {"many-own-b", "ep-many-own-allgather", "sixteen-core-attn", "titan-c"}


def test_the_parts_of_a_list_take_as_long_as_those_of_a_trace() -> None:
    steps = parse_json(gzip.decompress(DATA.read_bytes()))["programs"]["megatron"]["steps"]
    traced = [step for step in steps if "parts" in step]
    assert len(traced) >= 5
    for step in traced:
        own = listed_parts(scenario_of("megatron", step["case"]))
        whole = sum(seconds for _, _, seconds, _ in step["parts"])
        assert sum(seconds for seconds, _ in own.values()) == pytest.approx(whole, rel=0.05), step["case"]["name"]
        for phase, part, seconds, _ in step["parts"]:
            # no part is off by more than a fiftieth of the step, and none that is a tenth of it by a quarter
            found = own.get((phase, part), (0.0, 0))[0]
            assert found == pytest.approx(seconds, abs=0.02 * whole, rel=0.12), (step["case"]["name"], phase, part)


def test_some_steps_that_gave_no_number() -> None:
    for step in compared(QUICK):
        assert abs(step.error) < 0.05, (step.name, step.error)


@pytest.mark.slow
def test_every_step_and_its_memory() -> None:
    found = list(compared())
    for program, median, worst in (("megatron", 0.05, 0.14), ("torchtitan", 0.045, 0.07)):
        errors = [abs(step.error) for step in found if step.program == program and step.blind]
        assert np.median(errors) < median, (program, errors)
        assert max(errors) < worst, (program, errors)


def test_the_peak_of_every_step() -> None:
    programs = parse_json(gzip.decompress(DATA.read_bytes()))["programs"]
    errors = {}
    for program, each in programs.items():
        for step in each["steps"]:
            scenario = scenario_of(program, step["case"])
            report = memory_report(scenario, even_rows(scenario))
            assert sum(report.parts[0].values()) == pytest.approx(report.peak_bytes)
            assert min(report.parts[0].values()) > 0
            errors[step["case"]["name"]] = report.peak_bytes / step["memory"] - 1
    assert len(errors) == 34
    low = errors.pop("sixteen-own-moe")  # nested checkpoints keep 0.3 GB more than any walk of its tensors tells
    assert low == pytest.approx(-0.0125, abs=0.001)
    assert min(errors.values()) > -0.006, errors
    assert max(errors.values()) < 0.013, errors
    assert abs(np.median(list(errors.values()))) < 0.004


QUICK_RECORDED = {"qwen3-small-8k", "mixtral-small-8k", "olmoe-2k", "deepseek-v2-lite-8k", "deepseek-v3-like-8k"}


def test_the_list_has_the_work_of_recorded_steps() -> None:
    found = listed_and_recorded(QUICK_RECORDED, time=False)
    assert {step.name for step in found} == QUICK_RECORDED
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
    errors = {step.name: step.error for step in listed_and_recorded() if step.name != "olmoe-2k"}
    assert len(errors) == 17
    assert np.median(np.abs(list(errors.values()))) < 0.04, errors
    assert max(map(abs, errors.values())) < 0.07, errors
