"""Library entries on disk: exact ids, affinities within the stated error, gates by the routers' own formulas."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.moe.routers import LEARNED_ROUTERS, RouterInputs, build_router
from moesim.scenario import RouterShape
from moesim.trace import RoutingTrace, StepCounts, TraceStep, TrainingCurves
from moesim.trace.library.catalogue import file_of, find_entry, load_library, write_index
from moesim.trace.library.codec import gates_of, quantise, read_entry, read_facts, restore, write_entry

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
    counts = rng.integers(0, 50, (2, 3, router.num_experts)).astype(np.int32)
    curves = TrainingCurves(
        steps=np.arange(1.0, 10.0),
        train_loss=np.linspace(3, 1, 9),
        validation_steps=np.array([0.0, 9.0]),
        validation_loss=np.array([3.1, 1.0 / 3]),
        imbalance=np.linspace(4, 1.1, 9),
    )
    earlier = (StepCounts(step=0, counts_LSE=counts), StepCounts(step=3, counts_LSE=counts + 1))
    return RoutingTrace(router=router, steps=(final,), earlier=earlier, curves=curves, provenance={"corpus": "abc"})


def choices(step: TraceStep) -> list[dict[int, float]]:
    """Each token's experts with their affinities."""
    columns = step.expert_ids_LSTK.shape[-1]
    pairs = zip(step.expert_ids_LSTK.reshape(-1, columns), step.affinities_LSTK.reshape(-1, columns), strict=True)
    return [{int(i): float(a) for i, a in zip(ids, scores, strict=True) if i >= 0} for ids, scores in pairs]


@pytest.mark.parametrize(("num_experts", "columns", "missing"), [(8, 2, 0.0), (256, 8, 0.0), (256, 5, 0.7), (64, 1, 0)])
def test_round_trip(tmp_path: Path, num_experts: int, columns: int, missing: float) -> None:
    kind = "expert_choice" if missing else "deepseek_moe"
    router = RouterShape(kind=kind, num_experts=num_experts, top_k=2 if missing else columns)
    made = made_trace(router, columns=columns, missing=missing)
    write_entry(tmp_path / "e.routing", made, facts=FACTS)
    back = read_entry(tmp_path / "e.routing")
    assert (back.router, back.provenance, back.final.step) == (router, {"corpus": "abc"}, 9)
    for before, after in zip(choices(made.final), choices(back.final), strict=True):
        assert after == pytest.approx(before, rel=0.02)
    assert (np.diff(back.final.affinities_LSTK, axis=-1) <= 0).all(), "highest affinity first, none last"
    for before, after in zip(made.earlier, back.earlier, strict=True):
        assert before.step == after.step
        np.testing.assert_array_equal(before.counts_LSE, after.counts_LSE)
    np.testing.assert_array_equal(back.curves.validation_loss, made.curves.validation_loss)
    np.testing.assert_allclose(back.curves.train_loss, made.curves.train_loss, rtol=2**-11)
    np.testing.assert_allclose(back.curves.imbalance, made.curves.imbalance, rtol=2**-11)
    np.testing.assert_array_equal(back.curves.steps, made.curves.steps)


@given(st.lists(st.floats(2.0**-40, 1.0, width=32), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_probabilities_keep_their_order_and_two_per_cent(values: list[float]) -> None:
    affinities = np.array(values, dtype=np.float32)
    codes, scale = quantise(affinities)
    back = restore(codes, scale)
    top = affinities.max()
    assert codes.dtype == np.uint8
    assert (np.abs(back - affinities) <= np.maximum(0.02 * affinities, top / 20_000) * 1.0001).all()
    order = np.argsort(affinities, kind="stable")
    assert (np.diff(back[order]) >= 0).all(), "no two change places"
    assert (back > 0).all(), "an expert's affinity is never taken for none"


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60).filter(lambda xs: min(xs) < 0 and max(xs) > 0))
@settings(max_examples=60, deadline=None)
def test_logits_keep_their_order_and_half_a_level(values: list[float]) -> None:
    logits = np.array(values, dtype=np.float32)
    codes, scale = quantise(logits)
    back = restore(codes, scale)
    assert np.abs(back - logits).max() <= (logits.max() - logits.min()) / 510 * 1.001 + 1e-5
    assert (np.diff(back[np.argsort(logits, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("kind", [*LEARNED_ROUTERS, "hash"])
def test_gates_are_the_routers_own(kind: str) -> None:
    grouped = kind in ("deepseek_v2", "deepseek_v3")
    shape = RouterShape(
        kind=kind,
        num_experts=16,
        top_k={"switch": 1, "gshard": 2}.get(kind, 4),
        num_groups=4 if grouped else 1,
        group_limit=2 if grouped else 1,
        routed_scaling_factor=2.5,
    )
    generator = torch.Generator().manual_seed(1)
    router = build_router(shape, hidden=8, generator=generator)
    keys = torch.arange(32)
    routing = router(torch.randn(32, 8, generator=generator), RouterInputs(keys, generator))
    gates = gates_of(shape, routing.expert_ids_TK.numpy(), routing.affinities_TK.detach().numpy())
    np.testing.assert_allclose(gates, routing.gates_TK.detach().numpy(), rtol=1e-5, atol=1e-7)


def library(folder: Path) -> Path:
    """A library of one entry; the path of its file."""
    path = folder / file_of(FACTS["name"])
    write_entry(path, made_trace(RouterShape(kind="deepseek_moe", num_experts=8, top_k=2), columns=2), facts=FACTS)
    assert write_index(folder) == 1
    return path


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
    write_entry(path, replace(other, provenance={}), facts=FACTS)
    assert read_facts(path)[1] != digest
    with pytest.raises(UserError, match="not the entry that the library's index names"):
        load_library("8x2/a", tmp_path)


@pytest.mark.parametrize("index", [None, "no json", json.dumps({"entries": [{"name": "x"}]})])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: cannot read"):
        find_entry("8x2/a", tmp_path)
