"""The routing trace that is made of what a source says: experts and top-K are agreed, and tokens cut into sequences.

Legend: L layers, T tokens, K selections, E experts.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesim.errors import UserError, closest
from moesim.routing.importing.forms import AUTO, FORMS, Form, form_of
from moesim.routing.importing.source import Selections, Source
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.trace import RoutingTrace, popularity_trace
from moesim.trace.check import check_trace, has_duplicates
from moesim.trace.record import TraceStep

DRAWN_TOKENS = 65_536  # of a trace that is drawn from counts
DRAWN_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class MessageWords:
    """What the user calls what the source is asked to agree with."""

    experts: str = "--experts"
    top_k: str = "--top-k"
    sequence_length: str = "--sequence-length"
    remedy: str = "leave {} out or fix it"


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What the user says beside the source: each None where the source is to say it itself.

    fill: whether tokens are repeated up to one sequence where there are fewer. yields: whether the length of the
    source's own sequences wins over `sequence_length`.
    """

    experts: int | None = None
    top_k: int | None = None
    sequence_length: int | None = None
    tokens: int = DRAWN_TOKENS
    seed: int = 0
    fill: bool = False
    yields: bool = False
    words: MessageWords = MessageWords()


def import_routing(kind: str, path: str | os.PathLike[str], *, asked: ImportRequest | None = None) -> RoutingTrace:
    """The routing trace of a file or folder of form `kind`: a key of `FORMS`, or "auto" to tell by the content.

    Counts alone become a drawn trace of that popularity per layer. Raises UserError for an unknown form, a damaged
    source, what neither the source nor `asked` says, and where the two differ.
    """
    asked, place = asked or ImportRequest(), Path(path)
    form = _named(kind) if kind != AUTO else form_of(place)
    try:
        source = form.read(place)
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be read ({error.strerror}); check the path") from None
    if source.steps and any(has_duplicates(step.expert_ids_LTK) for step in source.steps):
        source = _as_counts(source, _experts(source, asked, place))
    trace, notes = _drawn(source, asked, place) if source.counts_LE is not None else _recorded(source, asked, place)
    provenance = {
        **trace.provenance,
        "source": f"imported, {form.name}",
        "form": form.name,
        "path": place.name,
        "layers": list(source.layers),
        "sequences": None if source.sequence_length is not None else asked.words.sequence_length,
        "notes": [*source.notes, *notes],
    }
    provenance.pop("counts", None)
    trace = replace(trace, provenance=provenance)
    check_trace(trace)
    return trace


def _named(kind: str) -> Form:
    if kind not in FORMS:
        known = [AUTO, *FORMS]
        raise UserError(f"unknown form of routing {kind!r}{closest(kind, known)}; use one of: {', '.join(known)}")
    return FORMS[kind]


def _agreed(name: str, said: int | None, asked: int | None, place: Path, *, word: str, remedy: str) -> int:
    if said is not None and asked is not None and said != asked:
        raise UserError(f"{place}: {name} is {said} there, but {word} says {asked}; {remedy.format(word)}")
    found = said if said is not None else asked
    if found is None:
        raise UserError(f"{place}: this form does not say {name}; add {word}")
    return found


def _agreed_experts(source: Source, asked: ImportRequest, place: Path) -> int:
    words = asked.words
    return _agreed(
        "the number of experts", source.num_experts, asked.experts, place, word=words.experts, remedy=words.remedy
    )


def _agreed_top_k(said: int | None, asked: ImportRequest, place: Path) -> int:
    return _agreed("top-K", said, asked.top_k, place, word=asked.words.top_k, remedy=asked.words.remedy)


def _experts(source: Source, asked: ImportRequest, place: Path) -> int:
    found = _agreed_experts(source, asked, place)
    highest = max((int(step.expert_ids_LTK.max()) for step in source.steps), default=-1)
    lowest = min((int(step.expert_ids_LTK.min()) for step in source.steps), default=0)
    if highest >= found or lowest < 0:
        wrong = highest if highest >= found else lowest
        raise UserError(f"{place}: expert {wrong} of {found} is chosen there; give the right {asked.words.experts}")
    return found


def _recorded(source: Source, asked: ImportRequest, place: Path) -> tuple[RoutingTrace, list[str]]:
    """Tokens with their experts, in sequences; gates where the source has them, else equal ones. And notes."""
    width = int(source.steps[0].expert_ids_LTK.shape[2])
    if source.sequence_length is not None and asked.yields:
        length = source.sequence_length
    else:
        length = _agreed(
            "the sequence length",
            source.sequence_length,
            asked.sequence_length,
            place,
            word=asked.words.sequence_length,
            remedy=asked.words.remedy,
        )
    top_k = _agreed_top_k(width, asked, place)
    source, notes = _as_shares(source)
    weighed = all(step.weights_LTK is not None for step in source.steps)
    shape = RouterShape(
        kind="recorded" if weighed else "selections", num_experts=_experts(source, asked, place), top_k=top_k
    )
    tokens = source.steps[-1].expert_ids_LTK.shape[1]
    if not weighed:
        notes.append("the source has no gates: equal ones stand for them, and capacity drops at random")
    if asked.fill and tokens < (asked.sequence_length or length):
        source, length = _filled(source, asked.sequence_length or length), asked.sequence_length or length
        notes.append(
            f"its {tokens:,} tokens are repeated to fill one sequence of {length:,}: loads are as uncertain as those "
            "of so few tokens; record more"
        )
    elif source.sequence_length is None and asked.yields:
        notes.append(f"it does not part sequences: {asked.words.sequence_length} = {length:,} does")
    highest = max(int(step.expert_ids_LTK.max()) for step in source.steps)
    if highest + 1 < shape.num_experts:
        notes.append(f"no token chose an expert above {highest} of 0 to {shape.num_experts - 1}")
    steps = tuple(_trace_step(step, length, weighed=weighed, asked=asked, place=place) for step in source.steps)
    return RoutingTrace(router=shape, steps=steps), notes


def _as_shares(source: Source) -> tuple[Source, list[str]]:
    """Gates no larger than 1: a factor that a router multiplies all of them by is divided out again, and noted."""
    most = max((float(step.weights_LTK.max()) for step in source.steps if step.weights_LTK is not None), default=0.0)
    if most <= 1:
        return source, []
    steps = tuple(
        replace(step, weights_LTK=None if step.weights_LTK is None else step.weights_LTK / np.float32(most))
        for step in source.steps
    )
    return replace(source, steps=steps), [f"gates are divided by {most:.4g}, the largest, so that they are shares"]


def _filled(source: Source, length: int) -> Source:
    """Every step with its tokens repeated, in order, up to `length`."""

    def fill(step: Selections) -> Selections:
        index_T = np.arange(length) % step.expert_ids_LTK.shape[1]
        weights = step.weights_LTK
        return replace(
            step,
            expert_ids_LTK=step.expert_ids_LTK[:, index_T],
            weights_LTK=None if weights is None else weights[:, index_T],
        )

    return replace(source, steps=tuple(fill(step) for step in source.steps))


def _trace_step(step: Selections, length: int, *, weighed: bool, asked: ImportRequest, place: Path) -> TraceStep:
    ids_LTK = step.expert_ids_LTK
    layers, tokens, top_k = ids_LTK.shape
    if tokens < length:
        raise UserError(
            f"{place}: step {step.step} has {tokens} tokens, less than a sequence of {length}; "
            f"give a smaller {asked.words.sequence_length}"
        )
    shape = (layers, tokens // length, length, top_k)
    kept = shape[1] * length
    if weighed:
        assert step.weights_LTK is not None
        affinities = gates = step.weights_LTK[:, :kept].reshape(shape)
    else:  # they mean nothing, but let capacity by score drop at random and not always the last tokens
        affinities = stream(asked.seed, "trace-affinities").random(shape, dtype=np.float32)
        gates = np.full(shape, 1.0 / top_k, dtype=np.float32)
    return TraceStep(
        step=step.step,
        expert_ids_LSTK=ids_LTK[:, :kept].reshape(shape).astype(np.int16),
        affinities_LSTK=affinities,
        gates_LSTK=gates,
    )


def _as_counts(source: Source, experts: int) -> Source:
    """Counts of the last step, where tokens have an expert twice (two slots of one expert, say)."""
    ids_LTK = source.steps[-1].expert_ids_LTK
    counts_LE = np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in ids_LTK]).astype(float)
    twice = np.mean([has_duplicates(ids_TK[None, None]) for ids_TK in ids_LTK.swapaxes(0, 1)])
    note = f"{twice:.0%} of the tokens choose an expert twice: only counts per layer were taken"
    return replace(source, steps=(), counts_LE=counts_LE, top_k=ids_LTK.shape[2], notes=(*source.notes, note))


def _drawn(source: Source, asked: ImportRequest, place: Path) -> tuple[RoutingTrace, list[str]]:
    counts_LE = source.counts_LE
    assert counts_LE is not None
    if source.num_experts is None and asked.experts is not None and counts_LE.shape[1] > asked.experts:
        raise UserError(f"{place}: counts of {counts_LE.shape[1]} experts; give the right {asked.words.experts}")
    experts = _agreed_experts(source, asked, place)
    counts_LE = np.pad(counts_LE, ((0, 0), (0, experts - counts_LE.shape[1])))
    top_k = _agreed_top_k(source.top_k, asked, place)
    if top_k > experts:
        raise UserError(f"{place}: {asked.words.top_k} = {top_k} exceeds its {experts} experts; give the right one")
    length = asked.sequence_length or source.sequence_length or DRAWN_LENGTH
    counts_LE = np.maximum(counts_LE, 0.5)  # an expert that was never seen may still be chosen
    trace = popularity_trace(
        RouterShape(kind="popularity", num_experts=experts, top_k=top_k),
        counts=counts_LE.tolist(),
        num_layers=len(counts_LE),
        num_sequences=max(1, asked.tokens // length),
        sequence_length=length,
        seed=asked.seed,
    )
    notes = [f"only counts: {trace.final.num_tokens:,} tokens were drawn; which experts go together is not known"]
    most = (counts_LE.max(axis=1) / counts_LE.sum(axis=1)).max()
    if most * top_k > 1:
        notes.append(
            f"an expert has {most:.0%} of a layer's selections, more than 1 of {top_k} distinct ones of each token: "
            f"is {asked.words.top_k} right?"
        )
    return trace, notes
