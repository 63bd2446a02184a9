"""Traces with a right hash and wrong content: one line, before anything large is made, or the trace as it was."""

import hashlib
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.scenario.routers import ROUTERS
from moesim.trace import RoutingTrace, StepCounts, TraceStep, TrainingCurves, load_trace, save_trace, trace_hash
from moesim.trace.check import gates_of
from moesim.trace.store import MOST_BYTES

ODD = [None, True, -1, 0, 1.5, 10**12, 10**30, 1e308, "x", "", [], {}, [10**12], {"0": 0}, "\u0000\n\u202e" * 50]


def sound(kind: str = "deepseek_v3", **changes: Any) -> RoutingTrace:
    """A trace of 2 layers, 3 sequences of 5 tokens, with counts of an earlier step and curves."""
    shape = {"num_groups": 4, "group_limit": 4} | changes
    router = RouterShape(kind=kind, num_experts=8, top_k=2, routed_scaling_factor=2.5, **shape)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 3, 5, 8)), axis=-1)[..., :2].astype(np.int16)
    affinities = rng.random(ids.shape).astype(np.float32)
    step = TraceStep(
        step=9, expert_ids_LSTK=ids, affinities_LSTK=affinities, gates_LSTK=gates_of(router, ids, affinities)
    )
    counts = 2 * rng.integers(0, 50, (2, 3, 8)).astype(np.int32)
    curves = TrainingCurves(
        steps=np.arange(1.0, 4.0),
        train_loss=np.array([3.0, 2.0, 1.0]),
        validation_steps=np.array([0.0, 3.0]),
        validation_loss=np.array([3.1, 1.1]),
    )
    earlier = (StepCounts(step=0, counts_LSE=counts),)
    provenance = {"corpus": "abc", "seed": 1, "request": {"steps": [1, 2]}}
    return RoutingTrace(router=router, steps=(step,), earlier=earlier, curves=curves, provenance=provenance)


def parts(path: Path) -> tuple[bytes, dict[str, Any], bytes]:
    """First line, header and packed arrays of a trace file."""
    first, _, header, packed = path.read_bytes().split(b"\n", 3)
    return first, json.loads(header), packed


def forge(path: Path, header: Any, packed: bytes, first: bytes = b"moesim-trace 1") -> None:
    """Write a trace file whose hash is right."""
    body = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b"\n" + packed
    path.write_bytes(first + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def refused(path: Path) -> str:
    """The one line with which the file is refused, without its name."""
    with pytest.raises(UserError) as error:
        load_trace(path)
    text = str(error.value).removeprefix(f"{path}: ")
    assert text != str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in nested lists and mappings, inner ones included."""
    if place:
        yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[key], (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    target = copy
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = new
    return copy


def test_every_value_of_a_header_may_be_forged(tmp_path: Path) -> None:
    """Any odd value anywhere: refused in one line, or what it says is a trace that keeps every invariant."""
    save_trace(sound(), tmp_path / "a.npz")
    first, header, packed = parts(tmp_path / "a.npz")
    wanted = trace_hash(sound())
    accepted = []
    for place in leaves(header):
        for odd in ODD:
            forged = changed(header, place, odd)
            if json.dumps(forged) == json.dumps(header):
                continue
            forge(tmp_path / "b.npz", forged, packed, first)
            try:
                trace = load_trace(tmp_path / "b.npz")
            except UserError as error:
                assert "\n" not in str(error)
                continue
            json.dumps([dict(trace.provenance), [step.step for step in trace.steps]], allow_nan=False)
            accepted.append(place)
            if place[0] == "provenance":
                assert trace_hash(trace) == wanted
    harmless = {
        ("router", "num_devices"), ("router", "capacity_factor"), ("steps",), ("steps", 0), ("earlier",),
        ("earlier", 0), ("provenance",),
    }  # fmt: skip
    assert {place[:2] if place[0] != "provenance" else place[:1] for place in accepted} <= harmless


@pytest.mark.parametrize("key", ["arrays", "router", "steps", "provenance"])
def test_a_header_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    save_trace(sound(), tmp_path / "a.npz")
    first, header, packed = parts(tmp_path / "a.npz")
    forge(tmp_path / "b.npz", {name: value for name, value in header.items() if name != key}, packed, first)
    assert "do not fit together" in refused(tmp_path / "b.npz")


@pytest.mark.parametrize("header", [b"", b"null", b"[]", b"NaN", b"{", b"[" * 100_000, b"\xff", b'{"arrays": NaN}'])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    forge(tmp_path / "b.npz", header, b"")
    refused(tmp_path / "b.npz")


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    save_trace(sound(), tmp_path / "a.npz")
    first, header, packed = parts(tmp_path / "a.npz")
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        forge(tmp_path / "b.npz", json.dumps(header).replace("2.5", number).encode(), packed, first)
        assert "JSON" in refused(tmp_path / "b.npz") or "range" in refused(tmp_path / "b.npz")


def bomb(header: dict[str, Any], shape: list[int], blob: bytes) -> dict[str, Any]:
    arrays = [{"name": "0.expert_ids_LSTK", "dtype": "uint8", "shape": shape, "bytes": len(blob)}]
    return header | {"arrays": arrays}


@pytest.mark.parametrize(
    ("shape", "unpacked", "text"),
    [
        ([10**12], 10, "a trace holds at most"),
        ([10**6, 10**6], 10, "a trace holds at most"),
        ([MOST_BYTES // 2], 10, "claims more than"),
        ([10**5], 10**8, "does not fill its shape"),
        ([1000], 10, "does not fill its shape"),
        ([1] * 40, 1, "a shape or a length that is none"),
    ],
)
def test_sizes_are_checked_before_anything_is_unpacked(tmp_path: Path, shape: Any, unpacked: int, text: str) -> None:
    save_trace(sound(), tmp_path / "a.npz")
    first, header, _ = parts(tmp_path / "a.npz")
    blob = zlib.compress(bytes(unpacked), 9)
    forge(tmp_path / "b.npz", bomb(header, shape, blob), blob, first)
    tracemalloc.start()
    found = refused(tmp_path / "b.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text in found
    assert peak < 2_000_000, "no more than the claim, and not even that where it cannot be"


def test_a_file_that_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert "not a file" in refused(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room
    assert "larger than the" in refused(tmp_path / "large")


Change = Callable[[RoutingTrace], RoutingTrace]


def with_step(**changes: Any) -> Change:
    return lambda trace: replace(trace, steps=(replace(trace.final, **changes),))


def with_array(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda trace: with_step(**{name: change(getattr(trace.final, name).copy())})(trace)


def put(value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[1, 2, 4, 1] = value
        return array

    return change


def with_curves(**changes: Any) -> Change:
    return lambda trace: replace(trace, curves=replace(trace.curves, **changes))


def with_counts(change: Callable[[Any], Any]) -> Change:
    return lambda trace: replace(trace, earlier=(StepCounts(step=0, counts_LSE=change(trace.earlier[0].counts_LSE)),))


def add_one(counts: Any) -> Any:
    counts = counts.copy()
    counts[0, 0, 0] += 1
    return counts


FORGED: list[tuple[Change, str]] = [
    (with_array("expert_ids_LSTK", put(8)), "outside 0..7"),
    (with_array("expert_ids_LSTK", put(-1)), "does not give every token"),
    (with_array("affinities_LSTK", put(np.nan)), "not finite"),
    (with_array("affinities_LSTK", put(3e38)), "affinities outside 0 to 1"),
    (with_array("affinities_LSTK", put(-0.5)), "affinities outside 0 to 1"),
    (with_array("gates_LSTK", put(np.inf)), "not finite"),
    (with_array("gates_LSTK", put(0.0)), "gates that deepseek_v3 does not make"),
    (with_array("gates_LSTK", lambda gates: gates * np.float32(1.1)), "gates that deepseek_v3 does not make"),
    (with_array("gates_LSTK", lambda gates: gates[:, :, :-1]), "shapes that do not fit"),
    (with_array("expert_ids_LSTK", lambda ids: ids.reshape(2, 15, 1, 2)), "shapes that do not fit"),
    (with_array("expert_ids_LSTK", lambda ids: ids[..., :1].repeat(2, axis=-1)), "same expert twice"),
    (lambda trace: replace(trace, router=replace(trace.router, group_limit=1)), "to 2 groups, over the limit 1"),
    (lambda trace: replace(trace, router=replace(trace.router, kind="magic")), "of kind 'magic'; known are switch"),
    (lambda trace: replace(trace, router=replace(trace.router, kind="deepseek_v2")), "gates that deepseek_v2 does not"),
    (lambda trace: replace(trace, steps=()), "no recorded steps"),
    (lambda trace: replace(trace, steps=(trace.final, trace.final)), "ascending"),
    (with_step(step=-1), "ascending"),
    (with_counts(lambda counts: counts[0]), "have the shape [3, 8]"),
    (with_counts(lambda counts: counts[:1]), "have the shape [1, 3, 8]"),
    (with_counts(lambda counts: counts[..., :7]), "have the shape [2, 3, 7]"),
    (with_counts(lambda counts: -counts), "from 0 on"),
    (with_counts(add_one), "not those of top_k = 2"),
    (with_counts(lambda counts: 0 * counts), "not those of top_k = 2"),
    (
        lambda trace: replace(trace, earlier=(replace(trace.earlier[0], step=3), *trace.earlier)),
        "earlier steps are not in ascending order",
    ),
    (with_curves(train_loss=np.array([3.0, np.nan, 1.0])), "train_loss has numbers that are not finite"),
    (with_curves(validation_loss=np.array([3.0, np.inf])), "validation_loss has numbers that are not finite"),
    (with_curves(train_loss=np.zeros(2)), "train_loss has not as many numbers as steps"),
    (with_curves(validation_steps=np.zeros(1)), "validation_loss has not as many numbers"),
    (with_curves(steps=np.array([2.0, 1.0, 3.0])), "steps goes back"),
    (with_curves(imbalance=np.zeros((2, 2))), "imbalance is no list"),
]


@pytest.mark.parametrize(("change", "text"), FORGED)
def test_every_field_is_checked_against_the_others(tmp_path: Path, change: Change, text: str) -> None:
    save_trace(change(sound()), tmp_path / "a.npz")
    assert text in refused(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_a_sound_trace_of_every_kind_passes(tmp_path: Path, kind: str) -> None:
    save_trace(sound(kind), tmp_path / "a.npz")
    assert trace_hash(load_trace(tmp_path / "a.npz")) == trace_hash(sound(kind))


def test_sigmoids_that_underflowed_have_gates_of_their_logits(tmp_path: Path) -> None:
    trace = sound()
    tiny = with_array("affinities_LSTK", lambda affinities: affinities * np.float32(1e-30))(trace)
    save_trace(tiny, tmp_path / "a.npz")
    assert np.array_equal(load_trace(tmp_path / "a.npz").final.gates_LSTK, trace.final.gates_LSTK)
