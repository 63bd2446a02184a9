"""Whether the fields of a trace fit each other: files can be forged, and a wrong one must never become a number.

`gates_of` is how a router weighs the experts that it selected, by its facts: from affinities to gates.
Legend: L thin MoE layers, S sequences, T tokens per sequence, K columns of selections, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import RouterShape
from moesim.strict_json import json_text
from moesim.trace.metrics import distinct_domains
from moesim.trace.record import NO_EXPERT, RoutingTrace, StepCounts, TraceStep, TrainingCurves, group_of_expert

Array = NDArray[Any]

_LEAST = np.finfo(np.float32).min


def gates_of(router: RouterShape, expert_ids_LSTK: Array, affinities_LSTK: Array) -> NDArray[np.float32]:
    """The gates that the router's formula makes of the selected experts' affinities, float32; 0 where the id is -1."""
    facts = ROUTERS[router.kind]
    valid = expert_ids_LSTK >= 0
    values = np.where(valid, affinities_LSTK.astype(np.float64), 0.0)
    if facts.affinity == "none":
        values = np.where(valid, 1 / router.top_k, 0.0)
    if facts.affinity == "logits":
        below_top = np.where(valid, values, -np.inf) - values.max(axis=-1, keepdims=True, where=valid, initial=_LEAST)
        values = np.exp(below_top)
    if facts.normalised:
        values = values / np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    if facts.scaled:
        values = values * router.routed_scaling_factor
    return values.astype(np.float32)


_MOST_EXPERTS = np.iinfo(np.int16).max  # ids are int16
_MOST_FACTOR = 1e9  # of gates and of capacity
_MOST_STEPS = 2**53  # whole numbers that JSON and float64 hold
_GATE_ERROR = 1e-3  # of a gate: what float32 and another order of summation may do, and more
_LOST_AFFINITY = 1e-20  # below it float32 keeps no ratios of sigmoids, of which a router knows the logits


def check_trace(trace: RoutingTrace) -> None:
    """The invariants of a trace, every field against the others.

    The router's numbers fit each other; steps ascend; arrays have shapes and types that fit; ids are experts or -1, K
    distinct per token, in at most M groups; affinities and gates are finite, and gates what the router's formula makes
    of the affinities; counts of earlier steps are those of K experts per token; curves are finite, over steps that
    never go back; the provenance is JSON. Raises UserError that names the first broken one.
    """
    _check_router(trace.router)
    recorded = [step.step for step in trace.steps]
    if not recorded or not _ascend(recorded) or len(set(recorded)) < len(recorded):
        raise UserError("the trace has no recorded steps in ascending order; record it again")
    if not _ascend([each.step for each in trace.earlier]):
        raise UserError("the trace's earlier steps are not in ascending order; record it again")
    for step in trace.steps:
        _check_step(step, trace.router)
    if not _is_count(trace.num_phases, least=1, most=trace.num_sequences) or trace.num_sequences % trace.num_phases:
        what = f"{trace.num_sequences} sequences are not those of {_short(trace.num_phases)} phases"
        raise UserError(f"the trace's {what}; record it again")
    if len({step.expert_ids_LSTK.shape[0] for step in trace.steps}) > 1:
        raise UserError("the trace's steps have different numbers of layers; record it again")
    for each in trace.earlier:
        _check_counts(each, trace.router, num_layers=trace.num_layers)
    _check_curves(trace.curves)
    _check_provenance(trace.provenance)


def has_duplicates(expert_ids_NK: Array) -> bool:
    """Whether any row names an expert twice; -1 may repeat."""
    columns = expert_ids_NK.shape[-1]
    if columns > 16:
        sorted_NK = np.sort(expert_ids_NK, axis=-1)
        return bool(((sorted_NK[..., 1:] == sorted_NK[..., :-1]) & (sorted_NK[..., 1:] != NO_EXPERT)).any())
    by_column = np.ascontiguousarray(expert_ids_NK.reshape(-1, columns).T)
    for second in range(1, columns):  # pairwise comparison of whole columns beats sorting short rows tenfold
        for first in range(second):
            equal = by_column[first] == by_column[second]
            if equal.any() and (by_column[first][equal] != NO_EXPERT).any():
                return True
    return False


def _is_count(value: object, *, least: int, most: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST_FACTOR


def _check_router(router: RouterShape) -> None:
    counts = {
        "num_experts": _MOST_EXPERTS,
        "top_k": router.num_experts,
        "num_groups": router.num_experts,
        "group_limit": router.num_groups,
        "num_devices": _MOST_STEPS,
    }
    for name, most in counts.items():
        value = getattr(router, name)
        if not _is_count(value, least=1, most=most):
            raise UserError(f"the trace's router has {name} = {_short(value)}, no number from 1 to {most}")
    for name in ("routed_scaling_factor", "capacity_factor"):
        if not _is_factor(getattr(router, name)):
            raise UserError(
                f"the trace's router has {name} = {_short(getattr(router, name))}, no number from 0 to {_MOST_FACTOR:g}"
            )
    if not isinstance(router.kind, str) or router.kind not in ROUTERS:
        raise UserError(f"the trace's router is of kind {_short(router.kind)}; known are {', '.join(ROUTERS)}")
    facts = ROUTERS[router.kind]
    if router.random_second is not False and not (router.random_second is True and facts.random_second):
        others = " or ".join(other.name for other in ROUTERS.values() if other.random_second)
        raise UserError(f"the trace's router has a random second expert, which only {others} has")
    if router.num_experts % router.num_groups:
        raise UserError(
            f"the trace's router has {router.num_groups} groups, which do not divide its {router.num_experts} experts"
        )
    if router.group_limit * (router.num_experts // router.num_groups) < router.top_k:
        raise UserError(f"the trace's router has {router.group_limit} groups with fewer than {router.top_k} experts")


def _ascend(steps: Sequence[object]) -> bool:
    """Whether they are numbers of steps, none below the one before."""
    if not all(_is_count(step, least=0, most=_MOST_STEPS) for step in steps):
        return False
    return all(a <= b for a, b in pairwise(steps))  # type: ignore[operator]


def _check_step(step: TraceStep, router: RouterShape) -> None:
    ids = step.expert_ids_LSTK
    where = f"the trace's step {step.step}"
    if ids.ndim != 4 or 0 in ids.shape or not ids.shape == step.affinities_LSTK.shape == step.gates_LSTK.shape:
        raise UserError(f"{where} has arrays of shapes that do not fit each other; record it again")
    if ids.dtype != np.int16 or step.affinities_LSTK.dtype != np.float32 or step.gates_LSTK.dtype != np.float32:
        raise UserError(f"{where} has arrays of wrong types; expert ids are int16, affinities and gates float32")
    if ids.min() < NO_EXPERT or ids.max() >= router.num_experts:
        raise UserError(f"{where} names experts outside 0..{router.num_experts - 1}; record it again")
    if not ROUTERS[router.kind].by_experts and (ids.shape[-1] != router.top_k or not _has_k(ids, router)):
        raise UserError(f"{where} does not give every token top_k = {router.top_k} experts; record it again")
    if (ids.max(axis=(1, 2, 3)) == NO_EXPERT).any():
        raise UserError(f"{where} has a layer in which no token has an expert; record it again")
    if has_duplicates(ids):
        raise UserError(f"{where} gives a token the same expert twice; record it again")
    _check_weights(step, router, where)
    if router.num_groups > 1:
        most = int(distinct_domains(ids, domain_of_expert_E=group_of_expert(router)).max())
        if most > router.group_limit:
            raise UserError(
                f"{where} sends a token to {most} groups, over the limit {router.group_limit}; record it again"
            )


def _has_k(ids_LSTK: Array, router: RouterShape) -> bool:
    """Whether every token has K experts, but for a second one that is left to chance and for padding."""
    if router.random_second or ids_LSTK.min() != NO_EXPERT:
        return True
    return ROUTERS[router.kind].pads and bool(((ids_LSTK == NO_EXPERT).sum(axis=-1) % router.top_k == 0).all())


def _check_weights(step: TraceStep, router: RouterShape, where: str) -> None:
    """Affinities are finite, and probabilities where the router makes such; gates follow from them."""
    ids, affinities, gates = step.expert_ids_LSTK, step.affinities_LSTK, step.gates_LSTK
    if not (np.isfinite(affinities).all() and np.isfinite(gates).all()):
        raise UserError(f"{where} has affinities or gates that are not finite; record it again")
    if ids.min() == NO_EXPERT and (affinities[ids == NO_EXPERT].any() or gates[ids == NO_EXPERT].any()):
        raise UserError(f"{where} has affinities or gates where a token has no expert; record it again")
    facts = ROUTERS[router.kind]
    logits = facts.affinity == "logits"
    if not logits and (affinities.min() < 0 or affinities.max() > 1 + _GATE_ERROR):
        raise UserError(f"{where} has affinities outside 0 to 1, which {router.kind} does not make; record it again")
    factor = router.routed_scaling_factor if facts.scaled else 1.0
    wrong = np.abs(gates_of(router, ids, affinities) - gates) > _GATE_ERROR * (np.abs(gates) + 1e-3 * factor)
    if router.random_second:  # the first keeps the gate that it had beside the second
        wrong = (gates < 0) | (gates > 1 + _GATE_ERROR)
    elif facts.normalised and not logits:
        wrong &= affinities.max(axis=-1, keepdims=True) > _LOST_AFFINITY
    if wrong.any():
        raise UserError(f"{where} has gates that {router.kind} does not make of its affinities; record it again")


def _check_counts(each: StepCounts, router: RouterShape, *, num_layers: int) -> None:
    counts = each.counts_LSE
    where = f"the trace's counts of step {each.step}"
    if counts.ndim != 3 or counts.shape[0] != num_layers or counts.shape[2] != router.num_experts or not counts.size:
        wanted = f"[{num_layers} layers, sequences, {router.num_experts} experts]"
        raise UserError(f"{where} have the shape {list(counts.shape)}, not {wanted}; record it again")
    if counts.dtype != np.int32 or counts.min() < 0:
        raise UserError(f"{where} are no int32 numbers from 0 on; record it again")
    selected_LS = counts.sum(axis=2, dtype=np.int64)
    every_token_has_k = not ROUTERS[router.kind].by_experts and not router.random_second
    if not selected_LS.all() or (every_token_has_k and (selected_LS % router.top_k).any()):
        raise UserError(f"{where} are not those of top_k = {router.top_k} experts per token; record it again")


def _check_curves(curves: TrainingCurves) -> None:
    for name in (curve.name for curve in fields(curves)):
        values = getattr(curves, name)
        if np.ndim(values) != 1 or not np.issubdtype(np.asarray(values).dtype, np.number):
            raise UserError(f"the trace's training curve {name} is no list of numbers; record it again")
        if not np.isfinite(values).all():
            raise UserError(f"the trace's training curve {name} has numbers that are not finite; record it again")
    for places, measured in (
        ("steps", ("train_loss", "imbalance")),
        ("validation_steps", ("validation_loss",)),
    ):
        at = getattr(curves, places)
        for name in measured:
            if len(getattr(curves, name)) not in (0, len(at)):
                raise UserError(f"the trace's training curve {name} has not as many numbers as {places}")
        if (np.diff(at) < 0).any():
            raise UserError(f"the trace's training curve {places} goes back; record it again")


def _check_provenance(provenance: object) -> None:
    if not isinstance(provenance, Mapping) or not all(isinstance(key, str) for key in provenance):
        raise UserError("the trace's provenance is no mapping of names; record it again")
    try:
        json_text(dict(provenance))
    except (TypeError, UserError, RecursionError):
        raise UserError("the trace's provenance holds what JSON cannot; record it again") from None


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
