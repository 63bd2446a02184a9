"""Steps of transformers' own MoE models, measured on an H100, beside what their recorded operations are priced at."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from host_table import SLOWER_HOST, error_of_step, predicted
from host_table import programs as host_programs
from host_table import steps as host_steps
from library_table import Program, by_scenario, group_of, pair, predicted_s, programs

from moesim.kernels import KernelModel, kernel_model
from moesim.recorded.estimate import StepEstimate, step_estimate
from moesim.recorded.host import PACES
from moesim.recorded.spread import WRAPPERS
from moesim.recorded.step_file import parsed_ops
from moesim.strict_json import parse_json

FILE = Path(__file__).parent.parent / "data" / "hf_steps.json.gz"


@pytest.fixture(scope="module")
def kernels() -> KernelModel:
    return kernel_model("h100")


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[dict, StepEstimate]]:
    kernels = kernel_model("h100")
    found = parse_json(gzip.decompress(FILE.read_bytes()))["steps"]
    return {
        step["name"]: (
            step,
            step_estimate(parsed_ops(step["ops"], where=step["name"]), kernels, host=SLOWER_HOST),
        )
        for step in found
    }


def errors(steps: dict, *, blind: bool) -> dict[str, float]:
    return {
        name: estimate.step_s / step["measured"]["sustained_s"] - 1
        for name, (step, estimate) in steps.items()
        if step["blind"] is blind
    }


def test_steps_that_no_constant_was_fitted_to(steps) -> None:
    found = errors(steps, blind=True)
    assert len(found) >= 6
    assert np.median(np.abs(list(found.values()))) < 0.02, found
    assert max(map(abs, found.values())) < 0.045, found


def test_steps_that_gave_the_two_constants(steps) -> None:
    found = errors(steps, blind=False)
    assert len(found) >= 10
    assert np.median(np.abs(list(found.values()))) < 0.015, found
    assert max(map(abs, found.values())) < 0.05, found


def test_every_operation_of_these_models_is_known(steps) -> None:
    unknown = {op.name for _, estimate in steps.values() for op in estimate.ops if not op.matched}
    assert unknown == set()


def library_errors(*, of: Callable[[str, str], bool], every: int = 1) -> dict[bool, list[float]]:
    """Errors of the steps kept out of every choice, and of the seen ones; of every so many of the programs."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    chosen = [found for name, found in sorted(programs().items()) if of(*group_of(name, found["mode"]))]
    for found in chosen[::every]:
        program = Program.of(found)
        for step in found["steps"]:
            if not step["first"]:
                error = abs(predicted_s(program, step) / step["sustained_s"] - 1)
                errors[step["blind"]].append(error)
    return errors


@pytest.mark.parametrize(("every", "blind", "seen"), [(3, 13, 1), pytest.param(1, 40, 8, marks=pytest.mark.slow)])
def test_other_sizes_from_one_recording(every: int, blind: int, seen: int) -> None:
    """Of 17 programs, recorded at their first size alone; most of the steps were kept out of every choice."""
    errors = library_errors(of=lambda _, mode: mode == "one", every=every)
    assert len(errors[True]) == blind and len(errors[False]) == seen
    assert np.median(errors[True]) < 0.013 and max(errors[True]) < 0.041
    assert np.median(errors[False]) < 0.02 and max(errors[False]) < 0.025


@pytest.mark.parametrize(("wrapper", "blind", "seen", "worst"), [("ddp", 5, 2, 0.03), ("fsdp2", 5, 3, 0.055)])
def test_two_gpus_from_a_recording_of_one(wrapper: str, blind: int, seen: int, worst: float) -> None:
    errors = library_errors(of=lambda _, mode: mode == wrapper)
    assert len(errors[True]) == blind and len(errors[False]) == seen
    assert np.median(errors[True]) < 0.045 and max(*errors[True], *errors[False]) < worst


def test_ranks_that_share_their_tokens_by_plans_of_transformers() -> None:
    """Its expert plan in no choice; of its tensor plan, whose GEMMs cost the host, the first size gave that cost."""
    experts, tensor = (library_errors(of=lambda _, mode, plan=plan: mode == plan) for plan in ("hf-ep", "tp"))
    assert len(experts[True]) == 2 and max(*experts[True], *experts[False]) < 0.04
    assert len(tensor[False]) == 5 and np.median(tensor[False]) < 0.07 and max(tensor[False]) < 0.16


@pytest.mark.slow
def test_experts_on_two_gpus_from_a_recording_of_one() -> None:
    errors = library_errors(of=lambda _, mode: mode == "ep")
    assert len(errors[True]) == 3 and max(*errors[True], *errors[False]) < 0.055


@pytest.mark.slow
def test_fully_sharded_steps_by_a_scenario() -> None:
    """ZeRO 3 of a scenario whose software is the recorded step, copies of fully_shard included."""
    found = programs()["fsdp-titan"]
    ranks = {"data": 2, "expert": 1, "pipeline": 1, "tensor": 1, "zero": {"dense": 3, "expert": 3}}
    program = Program.of(found)
    for step in found["steps"]:
        assert abs(by_scenario(program, step, ranks=ranks) / step["sustained_s"] - 1) < 0.065


def test_small_models_show_what_a_host_is_known_by() -> None:
    """Of other machines than those whose hosts are known; half of the steps were kept out of every choice."""
    errors = library_errors(of=lambda software, mode: mode.startswith("small"))
    assert len(errors[True]) == 11 and len(errors[False]) == 6
    assert np.median(errors[False]) < 0.08 and max(errors[False]) < 0.15
    assert np.median(errors[True]) < 0.11 and max(errors[True]) < 0.28


def test_what_a_host_costs_part_by_part() -> None:
    """Of narrow programs, none of which gave a number."""
    errors = [abs(error_of_step(step)) for step in host_steps()]
    assert len(errors) == 16
    assert np.median(errors) < 0.07 and max(errors) < 0.14


def test_programs_beside_the_pieces_of_a_host() -> None:
    """Of one GPU no step gave a number; of two GPUs tp-qwen3 alone did."""
    errors: dict[str, list[float]] = {}
    for step, seconds, _ in host_programs():
        errors.setdefault(step["mode"], []).append(abs(seconds / step["sustained_s"] - 1))
    found = {mode: (len(each), float(np.median(each)), max(each)) for mode, each in errors.items()}
    bounds = {"one": (23, 0.07, 0.32), "ddp": (8, 0.13, 0.18), "fsdp2": (8, 0.11, 0.21), "tp": (2, 0.17, 0.24)}
    assert found.keys() == bounds.keys()
    for mode, (number, median, worst) in bounds.items():
        assert found[mode][0] == number and found[mode][1] < median and found[mode][2] < worst, (mode, found[mode])


def test_the_paces_of_hosts_cover_what_was_measured(steps, kernels) -> None:
    """Every step that its host paces, and the one of another machine whose host was slower than all others."""
    for step, _, (least, most) in host_programs():
        assert least < step["sustained_s"] < most, step["name"]
    for step in host_steps():
        whole = sum(predicted(step).values())
        assert PACES[0] * whole < step["sustained_s"] < PACES[1] * whole, step["name"]
    for name, found in programs().items():
        if not group_of(name, found["mode"])[1].startswith("small"):
            continue
        ranks = pair(found["mode"]) if found["mode"] in WRAPPERS else None
        least, most = step_estimate(Program.of(found).ops, kernels, ranks=ranks).by_host_s
        (step,) = found["steps"]
        assert least < step["sustained_s"] < most, name
    least, most = step_estimate(parsed_ops(steps["olmoe-2k"][0]["ops"], where="olmoe-2k"), kernels).by_host_s
    assert least < steps["olmoe-2k"][0]["measured"]["sustained_s"] < most
