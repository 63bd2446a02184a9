"""Files of traces: exact round trips, and nothing damaged is ever read."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.trace import (
    RoutingTrace,
    TraceStep,
    TrainingCurves,
    load_trace,
    save_trace,
    trace_hash,
    uniform_trace,
)
from moesim.trace.store import SCHEMA_VERSION

ARRAYS = ("expert_ids_LSTK", "affinities_LSTK", "gates_LSTK")


def make(num_experts: int = 16) -> RoutingTrace:
    router = RouterShape(kind="deepseek_v2", num_experts=num_experts, top_k=2, routed_scaling_factor=1 / 3)
    made = uniform_trace(router, num_layers=2, num_sequences=3, sequence_length=8, seed=4)
    curves = TrainingCurves(steps=np.arange(3.0), train_loss=np.array([3.0, 2.0, 1.0 / 3.0]))
    gates = made.final.affinities_LSTK / np.float32(3)  # not exact in float16
    steps = replace(made.final, gates_LSTK=gates), replace(made.final, step=7, gates_LSTK=gates)
    return replace(
        made, router=router, steps=steps, curves=curves, provenance={"corpus": "abc", "versions": {"x": [1]}}
    )


@pytest.mark.parametrize("num_experts", [16, 255, 256, 400])
def test_round_trip_is_exact(tmp_path: Path, num_experts: int) -> None:
    made = make(num_experts)
    save_trace(made, tmp_path / "a.trace")
    back = load_trace(tmp_path / "a.trace")
    assert back.router == made.router
    assert back.provenance == made.provenance
    for before, after in zip(made.steps, back.steps, strict=True):
        assert before.step == after.step
        for name in ARRAYS:
            assert getattr(before, name).dtype == getattr(after, name).dtype
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    np.testing.assert_array_equal(back.curves.train_loss, made.curves.train_loss)
    assert back.curves.imbalance.shape == (0,)
    assert trace_hash(back) == trace_hash(made)


def test_no_expert_survives_the_round_trip(tmp_path: Path) -> None:
    ids = np.array([255, -1, 3, 0], dtype=np.int16).reshape(1, 1, 2, 2)
    for num_experts, most in ((256, 255), (254, 253)):
        ids[0, 0, 0, 0] = most
        zeros = np.zeros(ids.shape, dtype=np.float32)
        step = TraceStep(step=0, expert_ids_LSTK=ids, affinities_LSTK=zeros, gates_LSTK=zeros)
        router = RouterShape(kind="expert_choice", num_experts=num_experts, top_k=2)
        save_trace(RoutingTrace(router=router, steps=(step,)), tmp_path / "e.trace")
        np.testing.assert_array_equal(load_trace(tmp_path / "e.trace").final.expert_ids_LSTK, ids)


def test_equal_traces_give_equal_bytes_and_the_hash_follows_content(tmp_path: Path) -> None:
    save_trace(make(), tmp_path / "a")
    save_trace(make(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    ids = make().final.expert_ids_LSTK.copy()
    ids[0, 0, 0] = ids[0, 0, 0, ::-1]
    other = replace(make(), steps=(make().steps[0], replace(make().final, expert_ids_LSTK=ids)))
    assert trace_hash(other) != trace_hash(make())
    assert trace_hash(replace(make(), provenance={})) == trace_hash(make())


@pytest.mark.parametrize("position", [0.05, 0.2, 0.5, 0.9, 0.999])
def test_one_changed_byte_anywhere_is_refused(tmp_path: Path, position: float) -> None:
    path = tmp_path / "a.trace"
    save_trace(make(), path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x20
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_trace(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.6, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.trace"
    save_trace(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"truncated|not a routing trace|schema version"):
        load_trace(path)


def test_other_files_versions_and_places_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    save_trace(make(), path)
    _, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(b"moesim-trace %d\n" % (SCHEMA_VERSION + 1) + rest)
    with pytest.raises(UserError, match="schema version 2"):
        load_trace(path)
    for content in (b"", b"PK\x03\x04zip", b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a routing trace"):
            load_trace(path)
    with pytest.raises(UserError, match="No such file"):
        load_trace(tmp_path / "missing.trace")
    with pytest.raises(UserError, match="cannot be written"):
        save_trace(make(), tmp_path / "no" / "such" / "folder.trace")


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.trace"
    save_trace(make(), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save_trace(make(32), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.trace"]


def test_an_inconsistent_trace_with_a_right_hash_is_refused(tmp_path: Path) -> None:
    made = make()
    ids = made.final.expert_ids_LSTK.copy()
    ids[..., 1] = ids[..., 0]
    save_trace(replace(made, steps=(replace(made.final, expert_ids_LSTK=ids),)), tmp_path / "a.trace")
    with pytest.raises(UserError, match=r"a\.trace: .*same expert twice"):
        load_trace(tmp_path / "a.trace")


def test_a_header_that_does_not_fit_is_refused_even_with_a_right_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    save_trace(make(), path)
    first, _, body = path.read_bytes().split(b"\n", 2)
    for old, new in ((b'"top_k"', b'"top_q"'), (b'"uint8"', b'"object"'), (b'"shape": [2', b'"shape": [3')):
        changed = body.replace(old, new, 1)
        assert changed != body
        digest = hashlib.sha256(changed).hexdigest().encode()
        path.write_bytes(b"\n".join([first, digest, changed]))
        with pytest.raises(UserError, match="do not fit together"):
            load_trace(path)
