"""Measured steps of Megatron-Core and torchtitan beside the lists of their kernels (tools/software_steps.py)."""

import gzip

import numpy as np
import pytest
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
