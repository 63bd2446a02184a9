"""Library entries on disk: exact ids, affinities within the stated error, gates by the routers' own formulas."""

import hashlib
import json
import lzma
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.trace.library
from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.trace import RoutingTrace, StepCounts, TraceStep, TrainingCurves
from moesim.trace.library import (
    COARSE_RATIO,
    FILE,
    LEVELS,
    file_of,
    find_entry,
    gates_of,
    load_library,
    quantise,
    read_entry,
    read_facts,
    read_order,
    restore,
    sort_text,
    write_entry,
    write_index,
    write_order,
)

FACTS = {
    "name": "8x2/a/seed0",
    "aliases": ["8x2/b"],
    "layout": "8x2",
    "axis": "M",
    "value": "1",
    "seed": 0,
    "tokens": 30,
    "train_loss": 1.5,
    "held_out_loss": 1.75,
    "imbalance": 1.2,
    "dropped_share": 0.0,
}


@pytest.fixture(autouse=True)
def _small_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compression prepares tables for the longest entry that ships, which takes longer than all these."""
    monkeypatch.setitem(moesim.trace.library._LZMA[0], "dict_size", 1 << 16)


def made_trace(router: RouterShape, *, columns: int, missing: float = 0.0, seed: int = 0) -> RoutingTrace:
    """Random distinct experts, a share of them none, with affinities of both large and tiny size."""
    rng = np.random.default_rng(seed)
    shape = (2, 3, 5, columns)
    keys = rng.random((*shape[:3], router.num_experts))
    ids = np.argsort(keys, axis=-1)[..., :columns].astype(np.int16)
    affinities = np.exp(rng.uniform(-8, 0, shape)).astype(np.float32)
    none = rng.random(shape) < missing
    ids, affinities = np.where(none, -1, ids).astype(np.int16), np.where(none, 0, affinities).astype(np.float32)
    final = TraceStep(
        step=9,
        expert_ids_LSTK=ids,
        affinities_LSTK=affinities,
        gates_LSTK=gates_of(router, ids, affinities),
    )
    counts = columns * rng.integers(0, 50, (2, 3, router.num_experts)).astype(np.int32)  # of K experts per token
    curves = TrainingCurves(
        steps=np.arange(1.0, 10.0),
        train_loss=np.linspace(3, 1, 9),
        validation_steps=np.array([0.0, 9.0]),
        validation_loss=np.array([3.1, 1.0 / 3]),
        imbalance=np.linspace(4, 1.1, 9),
    )
    earlier = (StepCounts(step=0, counts_LSE=counts), StepCounts(step=3, counts_LSE=counts + columns))
    return RoutingTrace(router=router, steps=(final,), earlier=earlier, curves=curves, provenance={"corpus": "abc"})


def choices(step: TraceStep) -> list[dict[int, float]]:
    """Each token's experts with their affinities."""
    columns = step.expert_ids_LSTK.shape[-1]
    pairs = zip(step.expert_ids_LSTK.reshape(-1, columns), step.affinities_LSTK.reshape(-1, columns), strict=True)
    return [{int(i): float(a) for i, a in zip(ids, scores, strict=True) if i >= 0} for ids, scores in pairs]


@pytest.mark.parametrize("ratio", [1.2, 2.0, COARSE_RATIO])
@pytest.mark.parametrize(("num_experts", "columns", "missing"), [(8, 2, 0.0), (256, 8, 0.0), (256, 5, 0.7), (64, 1, 0)])
def test_round_trip(tmp_path: Path, num_experts: int, columns: int, missing: float, ratio: float) -> None:
    kind = "expert_choice" if missing else "deepseek_moe"
    router = RouterShape(kind=kind, num_experts=num_experts, top_k=2 if missing else columns)
    made = made_trace(router, columns=columns, missing=missing)
    write_entry(tmp_path / "e.routing", made, facts=FACTS, ratio=ratio)
    back = read_entry(tmp_path / "e.routing")
    assert (back.router, back.provenance, back.final.step) == (router, {"corpus": "abc"}, 9)
    for before, after in zip(choices(made.final), choices(back.final), strict=True):
        assert after.keys() == before.keys()
        for expert, affinity in before.items():
            odds = after[expert] / (1 - after[expert]) * (1 - affinity) / affinity
            assert ratio**-0.5 <= odds * 1.001 and odds <= ratio**0.5 * 1.001
    assert (np.diff(back.final.affinities_LSTK, axis=-1) <= 0).all(), "highest affinity first, none last"
    for before, after in zip(made.earlier, back.earlier, strict=True):
        assert before.step == after.step
        np.testing.assert_array_equal(before.counts_LSE.sum(axis=1), after.counts_LSE.sum(axis=1))
    np.testing.assert_array_equal(back.curves.validation_loss, made.curves.validation_loss)
    np.testing.assert_allclose(back.curves.train_loss, made.curves.train_loss, rtol=2**-11)
    np.testing.assert_allclose(back.curves.imbalance, made.curves.imbalance, rtol=2**-11)
    np.testing.assert_array_equal(back.curves.steps, made.curves.steps)


@given(
    st.lists(st.floats(2.0**-40, 1.0, width=32), min_size=1, max_size=60), st.sampled_from([1.04, 2.0, COARSE_RATIO])
)
@settings(max_examples=60)
def test_probabilities_keep_their_order_and_half_a_level(values: list[float], ratio: float) -> None:
    affinities = np.array(values, dtype=np.float32)
    codes, scale = quantise(affinities, ratio=ratio)
    back = restore(codes, scale)
    assert codes.dtype == np.uint8
    before, after = log_odds(affinities), log_odds(back)
    level = max(np.log(ratio), np.ptp(before) / (LEVELS - 2))
    near_one = np.exp(before) * 2.0**-23  # float32 has few values there
    assert (np.abs(after - before) <= level * 0.5001 + near_one).all()
    order = np.argsort(affinities, kind="stable")
    assert (np.diff(back[order]) >= 0).all(), "no two change places"
    assert (back > 0).all(), "an expert's affinity is never taken for none"


def log_odds(values: np.ndarray) -> np.ndarray:
    values = np.minimum(values.astype(np.float64), 1 - 2.0**-24)
    return np.log(values) - np.log1p(-values)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60).filter(lambda xs: min(xs) < 0 or max(xs) > 1),
    st.sampled_from([1.04, 2.0]),
)
@settings(max_examples=60)
def test_logits_keep_their_order_and_half_a_level(values: list[float], ratio: float) -> None:
    logits = np.array(values, dtype=np.float32)
    codes, scale = quantise(logits, ratio=ratio)
    back = restore(codes, scale)
    level = max(np.log(ratio), (logits.max() - logits.min()) / (LEVELS - 2))
    assert np.abs(back - logits).max() <= level / 2 * 1.001 + 1e-5
    assert (np.diff(back[np.argsort(logits, kind="stable")]) >= 0).all()


def test_tokens_sorted_by_their_text_come_back_in_reading_order(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 3, (6, 8)).astype(np.uint8)
    order = sort_text(text, context=4)
    before = [
        text.reshape(-1, 4)[place // 4, : place % 4 + 1][::-1].tobytes().ljust(12, b"\0") for place in order.places_N
    ]
    assert before == sorted(before), "nearest byte first, nothing before a window begins"
    write_order(tmp_path, order)
    made = made_trace(RouterShape(kind="deepseek_moe", num_experts=8, top_k=2), columns=2)
    with pytest.raises(ValueError, match="no 3 sequences of 5"):
        write_entry(tmp_path / "e.routing", made, facts=FACTS, ratio=2.0, order=order)
    made = replace(made, steps=(cut_to(made.final, sequences=3, length=4),))
    text = np.random.default_rng(1).integers(0, 3, (6, 4)).astype(np.uint8)
    write_order(tmp_path, sort_text(text, context=4))
    write_entry(tmp_path / "e.routing", made, facts=FACTS, ratio=2.0, order=read_order(tmp_path))
    sorted_one = read_entry(tmp_path / "e.routing")
    write_entry(tmp_path / "plain.routing", made, facts=FACTS, ratio=2.0)
    plain = read_entry(tmp_path / "plain.routing")
    np.testing.assert_array_equal(sorted_one.final.expert_ids_LSTK, plain.final.expert_ids_LSTK)
    np.testing.assert_array_equal(sorted_one.final.affinities_LSTK, plain.final.affinities_LSTK)


def cut_to(step: TraceStep, *, sequences: int, length: int) -> TraceStep:
    arrays = ("expert_ids_LSTK", "affinities_LSTK", "gates_LSTK")
    return replace(step, **{name: getattr(step, name)[:, :sequences, :length] for name in arrays})


def ordered(folder: Path) -> Path:
    """An entry whose tokens are sorted by a text beside it; the path of the order."""
    made = made_trace(RouterShape(kind="deepseek_moe", num_experts=8, top_k=2), columns=2)
    order = sort_text(np.random.default_rng(1).integers(0, 3, (3, 5)).astype(np.uint8), context=5)
    write_order(folder, order)
    write_entry(folder / "e.routing", made, facts=FACTS, ratio=2.0, order=order)
    read_entry(folder / "e.routing")
    return folder / FILE


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (None, "cannot read the library's order"),
        (lambda content: content[:-1], "damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 2]), "damaged"),
        (lambda content: b"", "damaged"),
        (lambda content: content.replace(b" 3 5\n", b" 3 6\n"), "does not fit its own size"),
        (lambda content: content.replace(b" 3 5\n", b" 3\n"), "does not fit its own size"),
        (lambda content: content.replace(b" 3 5\n", b" -3 -5\n"), "fit"),
        (lambda content: content.replace(b" 3 5\n", b" 99999999999 5\n"), "does not fit its own size"),
    ],
)
def test_a_damaged_order_is_refused_in_one_line(tmp_path: Path, damage, complaint: str) -> None:
    path = ordered(tmp_path)
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(UserError, match=complaint) as caught:
        read_entry(tmp_path / "e.routing")
    assert "\n" not in str(caught.value) and "install" in str(caught.value)


def test_another_order_is_not_taken_for_the_entrys_own(tmp_path: Path) -> None:
    ordered(tmp_path)
    write_order(tmp_path, sort_text(np.arange(15, dtype=np.uint8).reshape(3, 5), context=5))
    with pytest.raises(UserError, match="the text order beside it is another"):
        read_entry(tmp_path / "e.routing")


def forge(path: Path, change) -> None:
    """Change the header of an entry and give it the hash that fits."""
    first, _, body = path.read_bytes().split(b"\n", 2)
    line, blobs = body.split(b"\n", 1)
    header = json.loads(line)
    change(header)
    body = json.dumps(header).encode() + b"\n" + blobs
    path.write_bytes(first + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("router"),
        lambda header: header.update(step="x", shape_LSTK=[2, 3, 5]),
        lambda header: header.update(shape_LSTK=[2, 5, 3, 1]),
        lambda header: header.update(shape_LSTK=[2, -3, -5, 2]),
        lambda header: header.update(earlier_steps=[0]),
        lambda header: header.update(earlier_steps=None),
        lambda header: header.update(affinity_scale={"kind": "probabilities", "top": 1.0}),
        lambda header: header.update(affinity_scale={"kind": "logits", "top": 1e300, "step": 1.0}),
        lambda header: header.update(affinity_scale={"kind": "logits", "top": 1e308, "step": 1e308}),
        lambda header: header.update(affinity_scale={"kind": "probabilities", "top": "1", "step": 2}),
        lambda header: header.update(affinity_scale=[]),
        lambda header: header["router"].update(num_experts=3),
        lambda header: header["arrays"][0].update(shape=[2, 15, 2, 1 << 60]),
        lambda header: header["arrays"][0].update(shape=[2, 15, 2, -2]),
        lambda header: header["arrays"][0].update(shape=[2, 15, 1, 2]),
        lambda header: header["arrays"][0].update(dtype="object"),
        lambda header: header["arrays"][0].update(bytes=10),
        lambda header: header["arrays"][0].update(bytes="10"),
        lambda header: header.update(arrays={}),
    ],
)
def test_a_forged_entry_is_refused_in_one_line(tmp_path: Path, change) -> None:
    path = library(tmp_path)
    forge(path, change)
    with pytest.raises(UserError) as caught:
        read_entry(path)
    assert "\n" not in str(caught.value)


def test_an_array_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path: Path) -> None:
    path = library(tmp_path)
    bomb = lzma.compress(bytes(1 << 26), preset=0)

    def grow(header) -> None:
        header["arrays"] = [{**header["arrays"][0], "bytes": len(bomb)}]

    first, _, body = path.read_bytes().split(b"\n", 2)
    path.write_bytes(first + b"\n\n" + body.split(b"\n", 1)[0] + b"\n" + bomb)
    forge(path, grow)
    tracemalloc.start()
    with pytest.raises(UserError, match="does not fill its shape"):
        read_entry(path)
    assert tracemalloc.get_traced_memory()[1] < 32e6
    tracemalloc.stop()


def library(folder: Path) -> Path:
    """A library of one entry; the path of its file."""
    for name, content in _library().items():
        (folder / name).write_bytes(content)
    return folder / file_of(FACTS["name"])


@cache
def _library() -> dict[str, bytes]:
    """The files of that library, written once."""
    made = made_trace(RouterShape(kind="deepseek_moe", num_experts=8, top_k=2), columns=2)
    with TemporaryDirectory() as folder:
        write_entry(Path(folder) / file_of(FACTS["name"]), made, facts=FACTS, ratio=2.0)
        assert write_index(Path(folder)) == 1
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("name", ["8x2/a/seed0", "8x2/a", "8x2/b", "8x2/b/seed0", "library:8x2/b"])
def test_every_name_finds_its_entry(tmp_path: Path, name: str) -> None:
    library(tmp_path)
    assert find_entry(name, tmp_path).name == "8x2/a/seed0"
    assert load_library(name, tmp_path).provenance == {"corpus": "abc"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content.replace(b'"step": 9', b'"step": 8'),
        lambda content: b"something else",
        lambda content: b"",
    ],
)
def test_a_damaged_entry_is_refused_in_one_line(tmp_path: Path, damage) -> None:
    path = library(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="install moesim again") as caught:
        load_library("8x2/a", tmp_path)
    assert "\n" not in str(caught.value)


def test_an_entry_must_be_the_one_that_the_index_names(tmp_path: Path) -> None:
    path = library(tmp_path)
    digest = read_facts(path)[1]
    other = made_trace(RouterShape(kind="deepseek_moe", num_experts=8, top_k=2), columns=2, seed=1)
    write_entry(path, replace(other, provenance={}), facts=FACTS, ratio=2.0)
    assert read_facts(path)[1] != digest
    with pytest.raises(UserError, match="not the entry that the library's index names"):
        load_library("8x2/a", tmp_path)


@pytest.mark.parametrize("index", [None, "no json", json.dumps({"entries": [{"name": "x"}]})])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: cannot read"):
        find_entry("8x2/a", tmp_path)
