"""Steps of transformers' own MoE models, measured on an H100, beside what their recorded operations are priced at."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.kernels import KernelModel, kernel_model
from moesim.recorded.pricing import StepEstimate, step_estimate
from moesim.recorded.scaling import scaled
from moesim.recorded.sizes import sizes_of
from moesim.recorded.step_file import parsed_ops
from moesim.strict_json import parse_json

FILE = Path(__file__).parent.parent / "data" / "hf_steps.json.gz"
LIBRARY = FILE.with_name("library_steps.json.gz")


@pytest.fixture(scope="module")
def kernels() -> KernelModel:
    return kernel_model("h100")


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[dict, StepEstimate]]:
    kernels = kernel_model("h100")
    found = parse_json(gzip.decompress(FILE.read_bytes()))["steps"]
    return {step["name"]: (step, step_estimate(parsed_ops(step["ops"], where=step["name"]), kernels)) for step in found}


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
    assert max(map(abs, found.values())) < 0.04, found


def test_every_operation_of_these_models_is_known(steps) -> None:
    unknown = {op.name for _, estimate in steps.values() for op in estimate.ops if not op.matched}
    assert unknown == set()


def test_other_sizes_from_one_recording(kernels: KernelModel) -> None:
    """Of seven programs, recorded at their first size alone; the third of three sizes was kept out of every choice."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for program in parse_json(gzip.decompress(LIBRARY.read_bytes()))["programs"].values():
        ops = parsed_ops(program["ops"], where="program")
        sizes = sizes_of(ops, where="program")
        for step in program["steps"]:
            moe_layers = step["layers"] - sizes.dense_layers
            to = replace(sizes, sequences=step["sequences"], sequence_length=step["tokens"], moe_layers=moe_layers)
            predicted = step_estimate(scaled(ops, sizes, to), kernels).step_s
            if not step["first"]:
                errors[step["blind"]].append(abs(predicted / step["sustained_s"] - 1))
    assert len(errors[True]) == len(errors[False]) == 7
    assert np.median(errors[True]) < 0.02 and max(errors[True]) < 0.05
    assert np.median(errors[False]) < 0.025 and max(errors[False]) < 0.07
