"""A real trace says what a step recorded without a GPU says, keeps every second, and survives the disk."""

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.importing.calibration import NOISE, load_calibration, model_of_trace
from moesim.importing.trace_collectives import exposed_seconds
from moesim.importing.trace_file import read_trace
from moesim.importing.traced_step import TracedStep, step_with_times, traced_step
from moesim.kernels import kernel_model
from moesim.recorded.estimate import step_estimate
from moesim.recorded.pricing import SDPA, prices
from moesim.recorded.step_file import load_step, parsed_ops, save_step
from moesim.strict_json import parse_json

DATA = Path(__file__).parent.parent / "data"
TRACE, TWO_GPUS = DATA / "mixtral-8k.trace.json.gz", DATA / "ddp.trace.json.gz"
# Operations of which a trace and a recording legitimately differ: fills of single numbers, copies of what the GPU's
# attention takes as it is, and what the meta device cannot say.
DIFFER = {"clone", "zeros", "new_zeros", "ones_like", "_foreach_add_", "_local_scalar_dense"}


@pytest.fixture(scope="module")
def step() -> TracedStep:
    return traced_step(TRACE)


@pytest.fixture(scope="module")
def two_gpus() -> TracedStep:
    return traced_step(TWO_GPUS)


@pytest.fixture(scope="module")
def recorded() -> list:
    steps = parse_json(gzip.decompress((DATA / "hf_steps.json.gz").read_bytes()))["steps"]
    return next(parsed_ops(each["ops"], where="here") for each in steps if each["name"] == "mixtral-8k")


def counts(ops) -> Counter:
    found: Counter = Counter()
    for op in ops:
        if op.name not in DIFFER:
            found[op.name, op.phase] += op.count
    return found


def test_a_trace_and_a_recording_without_a_gpu_have_the_same_operations(step: TracedStep, recorded) -> None:
    assert counts(step.ops) == counts(recorded)


def test_a_trace_and_a_recording_cost_the_same(step: TracedStep, recorded) -> None:
    kernels = kernel_model("h100")
    traced, other = step_estimate(step.ops, kernels).kernels_s, step_estimate(recorded, kernels).kernels_s
    assert abs(traced / other - 1) < 0.005


def test_parameters_are_those_of_the_recording_also_where_the_trace_lists_none(step: TracedStep, recorded) -> None:
    from moesim.importing.trace_shapes import parameters_seen

    (optimizer,) = (op for op in step.ops if op.name == "_fused_adamw_")
    (other,) = (op for op in recorded if op.name == "_fused_adamw_")
    assert optimizer.facts["parameters"] == other.facts["parameters"]
    accumulated = parameters_seen(read_trace(TRACE).ops, micro_batches=1)
    assert accumulated[0] == (other.facts["parameters"],) and accumulated[1] == "bfloat16"


def test_no_second_of_a_kernel_is_lost(step: TracedStep, two_gpus: TracedStep) -> None:
    for found, path in ((step, TRACE), (two_gpus, TWO_GPUS)):
        work = read_trace(path).device_work
        own = sum(op.count * op.measured_s for op in found.ops)
        shared = sum(each.measured_s for each in found.calibration.collectives)
        total = own + shared + found.calibration.unexplained_s + found.calibration.slowed_s
        assert total == pytest.approx(sum(each.end - each.start for each in work))
        assert own == pytest.approx(sum(each.measured_s for each in found.calibration.corrections))


def test_the_time_of_the_gpu_is_work_gaps_and_waiting_for_the_host(step: TracedStep, two_gpus: TracedStep) -> None:
    for times in (step.calibration.times, two_gpus.calibration.times):
        assert times.span_s == pytest.approx(times.busy_s + times.gaps_s + times.late_s)
    one_stream = step.calibration.times
    assert one_stream.busy_s == pytest.approx(sum(op.count * op.measured_s for op in step.ops), rel=1e-4)


def test_collectives_have_the_bytes_of_the_gradients(two_gpus: TracedStep) -> None:
    reduced = [each for each in two_gpus.calibration.collectives if each.name == "allreduce"]
    (optimizer,) = (op for op in two_gpus.ops if op.name == "_fused_adamw_")
    assert sum(each.count * each.bytes for each in reduced) == 2 * optimizer.facts["parameters"]
    assert {each.phase for each in reduced} == {"backward"} and {each.ranks for each in reduced} == {2}
    for each in two_gpus.calibration.collectives:
        assert 0 <= each.exposed_s <= each.measured_s


def test_attention_of_either_pass_is_causal_with_grouped_keys(step: TracedStep) -> None:
    attention = [op for op in step.ops if op.name == SDPA]
    assert {op.phase for op in attention} == {"forward", "backward"}
    assert all(op.facts["causal"] and [shape[1] for shape, _, _ in op.reads] == [32, 8, 8] for op in attention)


def test_the_clock_of_the_trace_makes_long_gemms_cost_what_they_took(step: TracedStep) -> None:
    calibration = step.calibration
    assert calibration.clock_mhz is not None and 900 < calibration.clock_mhz < 2000
    gemms = [each for each in calibration.corrections if each.family.split()[0] in ("gemm", "attention")]
    measured, predicted = (sum(getattr(each, side) for each in gemms) for side in ("measured_s", "predicted_s"))
    assert measured / predicted == pytest.approx(1, abs=0.01)


def test_corrections_bring_their_own_step_nearer(step: TracedStep) -> None:
    kernels, measured = kernel_model("h100"), sum(op.count * op.measured_s for op in step.ops)
    plain = step_estimate(step.ops, kernels).kernels_s
    corrected = step_estimate(step.ops, kernels, corrections=step.calibration).kernels_s
    assert abs(corrected - measured) < 0.5 * abs(plain - measured)


def test_a_kind_is_corrected_by_its_family_and_by_what_exceeds_the_noise(step: TracedStep) -> None:
    calibration = step.calibration
    (one, other, *_) = (each for each in calibration.corrections if each.family == "memory")
    both = replace(calibration, corrections=(replace(one, predicted_s=one.measured_s), replace(other, number=1)))
    common = (one.measured_s + other.measured_s) / (one.measured_s + other.predicted_s)
    assert calibration.factor(kind="never seen", family="nor this") == 1
    assert both.factor(kind="never seen", family="memory") == pytest.approx(common)
    far = replace(calibration, corrections=(one, replace(other, predicted_s=other.measured_s / np.exp(4 * NOISE))))
    applied = far.factor(kind=other.kind, family="memory")
    assert far.factor(kind="never seen", family="memory") < applied < np.exp(4 * NOISE)


def test_a_file_keeps_operations_and_corrections(step: TracedStep, tmp_path: Path) -> None:
    path = tmp_path / "step.json.gz"
    save_step(path, step.ops, source=step.source, calibration=step.calibration.as_json())
    assert load_calibration(path) == (step.source, list(step.ops), step.calibration)
    assert load_step(path) == (step.source, list(step.ops))
    assert step_with_times(path) == step


def test_every_kind_is_priced_by_some_kernel(step: TracedStep, two_gpus: TracedStep) -> None:
    for found in (step, two_gpus):
        for op in prices(found.ops, kernel_model("h100")):
            assert op.seconds > 0 and op.measured_s is not None and op.measured_s > 0


def test_exposed_seconds_are_those_that_no_other_work_covers() -> None:
    class Work:
        def __init__(self, start, end):
            self.start, self.end = start, end

    others = [Work(0, 2), Work(3, 4), Work(8, 20)]
    assert exposed_seconds([Work(1, 5), Work(6, 10)], others) == pytest.approx((3 - 2) + (5 - 4) + (8 - 6))
    assert exposed_seconds([Work(1, 5)], []) == 4
    assert exposed_seconds([Work(9, 12)], others) == 0


def test_one_kernel_of_another_kind_is_no_slow_clock(step: TracedStep) -> None:
    """Attention by a library whose kernels take eight times as long."""
    kernels = kernel_model("h100")
    other = [replace(op, measured_s=8 * op.measured_s) if op.name == SDPA else op for op in step.ops]
    clocks = [model_of_trace(ops, kernels)[1] for ops in (step.ops, other)]
    assert clocks[1] == pytest.approx(clocks[0], rel=0.04)
