"""What is no trace of one whole training step is refused in one line that says the remedy."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.importing import trace_file
from moesim.importing.calibration import load_calibration
from moesim.importing.traced_step import TracedStep, step_with_times, traced_step
from moesim.recorded.step_file import save_step
from moesim.strict_json import streamed_members

REAL = Path(__file__).parent.parent / "data" / "mixtral-8k.trace.json.gz"


def refused(path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        traced_step(path)
    assert path.name in str(error.value)


def test_without_shapes(trace, tmp_path: Path) -> None:
    refused(trace(shapes=False).step().save(tmp_path / "t.json"), "record_shapes=True")


def test_several_steps_are_named(trace, tmp_path: Path) -> None:
    made = trace().step(0).step(1000)
    refused(made.save(tmp_path / "t.json"), "2 steps .*active=1")
    for number, start in ((7, 0), (8, 1000)):
        made.event("user_annotation", f"ProfilerStep#{number}", start, 900, 1)
    refused(made.save(tmp_path / "t.json"), r"2 steps \(ProfilerStep#7, ProfilerStep#8\)")


def test_two_optimizers_of_one_step_are_one_step(trace, tmp_path: Path) -> None:
    made = trace().step()
    made.event("user_annotation", "Optimizer.step#Muon.step", 400, 50, 1)
    made.event("user_annotation", "Optimizer.step#AdamW.step", 500, 50, 1)
    assert traced_step(made.save(tmp_path / "t.json")).ops


def test_inference(trace, tmp_path: Path) -> None:
    refused(trace().step(backward=False, optimizer=False).save(tmp_path / "t.json"), "no backward pass")


def test_no_gpu(trace, tmp_path: Path) -> None:
    refused(trace().step(kernels=False).save(tmp_path / "t.json"), "ProfilerActivity.CUDA")


def test_no_operations(trace, tmp_path: Path) -> None:
    made = trace()
    made.event("user_annotation", "Optimizer.step#AdamW.step", 0, 50, 1)
    made.kernel(3, 5, 10, 5)
    refused(made.save(tmp_path / "t.json"), "ProfilerActivity.CPU")


def test_an_unknown_gpu_is_asked_for(trace, tmp_path: Path) -> None:
    path = trace().step().save(tmp_path / "t.json", deviceProperties=[{"name": "Some Chip 9000"}])
    refused(path, "Some Chip 9000.*--gpu")
    assert traced_step(path, gpu="h200").calibration.gpu == "h200"


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_cut_off(tmp_path: Path, keep: float) -> None:
    data = REAL.read_bytes()
    packed, plain = tmp_path / "cut.json.gz", tmp_path / "cut.json"
    packed.write_bytes(data[: int(keep * len(data))])
    refused(packed, "cut off")
    text = gzip.decompress(data)
    plain.write_bytes(text[: int(keep * len(text))])
    refused(plain, "no whole JSON")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no whole JSON"),
        (b"{}", "no trace of torch's profiler"),
        (b"[]", "no whole JSON"),
        (b"\x00\x01SQLite format 3", "no whole JSON"),
        (b"\x1f\x8bnonsense", "gzip"),
        (b"named .gz, and is none", "no whole JSON"),
        (b'[{"Name": "a list of Nsight Systems"}]', "no whole JSON"),
        (b'{"NvtxEvent": 1}\n{"CudaEvent": {"startNs": "1"}}', "no trace of torch's profiler"),  # its lines of JSON
        (
            b'{"traceEvents": [{"ph": "X", "ts": 1.0, "dur": 2, "name": "fusion.1"}]}',
            "no trace of torch's profiler",
        ),  # JAX
        (b'{"traceEvents": [{"ph": "X", "cat": "toplevel", "name": "a", "ts": 1, "dur": 1}]}', "toplevel"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a"}]}', "malformed"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": "x"}]}', "malformed"),
        (b'{"traceEvents": 3}', "no trace of torch's profiler"),
    ],
)
def test_something_else(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    refused(path, said)


@pytest.fixture(scope="module")
def step() -> TracedStep:
    return traced_step(REAL)


def test_a_missing_file_and_a_step_file(step: TracedStep, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.json", "cannot read")
    save_step(tmp_path / "step.json", step.ops, source="here")
    refused(tmp_path / "step.json", "--show")
    with pytest.raises(UserError, match="has no measured times"):
        step_with_times(tmp_path / "step.json")


def test_a_trace_in_the_place_of_a_step_file() -> None:
    with pytest.raises(UserError, match=r"is a trace of torch's profiler; make a step of it: moesim import-step"):
        load_calibration(REAL)


def test_a_malformed_calibration(step: TracedStep, tmp_path: Path) -> None:
    good = step.calibration.as_json()
    for changes in ({"corrections": ()}, {"corrections": [{}]}, {"times": {}}, {"collectives": 3}):
        save_step(tmp_path / "step.json", step.ops, source="here", calibration=good | changes)
        with pytest.raises(UserError, match="calibration is malformed"):
            load_calibration(tmp_path / "step.json")


def test_a_step_without_its_measured_seconds(step: TracedStep, tmp_path: Path) -> None:
    for seconds, said in ((None, "no operation has measured seconds"), (-1.0, "no time in seconds")):
        ops = [replace(op, measured_s=seconds) for op in step.ops]
        save_step(tmp_path / "step.json", ops, source="here", calibration=step.calibration.as_json())
        with pytest.raises(UserError, match=said):
            load_calibration(tmp_path / "step.json")


def test_too_much_for_one_step(trace, tmp_path: Path, monkeypatch) -> None:
    path = trace().step().save(tmp_path / "t.json")
    monkeypatch.setattr(trace_file, "MOST_KEPT", 5)
    refused(path, "more than 5 operations")


def test_stack_frames_take_no_memory(trace, tmp_path: Path, monkeypatch) -> None:
    made = trace()
    for number in range(2000):
        made.event("python_function", f"file.py({number}): call", number, 1, 1)
    monkeypatch.setattr(trace_file, "MOST_KEPT", 1000)
    assert traced_step(made.step(5000).save(tmp_path / "t.json")).ops


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4), st.lists(VALUES, max_size=5), st.integers(1, 40))
def test_a_stream_has_the_values_of_the_whole_text(members, items, size) -> None:
    text = json.dumps(members | {"many": items})
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(streamed_members(pieces, array="many")) == [*members.items(), *(("many", item) for item in items)]
    with pytest.raises(ValueError, match=r"middle|delimiter|Unterminated|Expecting|value"):
        list(streamed_members([text[:-1]], array="many"))


@pytest.mark.parametrize(
    "changes",
    [
        {"args": 3},
        {"args": {"External id": "x"}},
        {"args": {"Input Dims": 3}},
        {"args": {"Input Dims": [["x"]]}},
        {"args": {"Input Dims": [[1, [2]]]}},
        {"args": {"Sequence number": {}}},
        {"tid": []},
        {"name": None, "ts": None},
    ],
)
def test_a_malformed_operation(trace, tmp_path: Path, changes) -> None:
    made = trace().step()
    made.events[0] |= changes
    refused(made.save(tmp_path / "t.json"), "malformed")
