"""From what a source says to a routing trace: experts and top-K agreed, tokens cut into sequences.

Legend: L layers, T tokens, K selections, E experts.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moesim.errors import UserError
from moesim.routing.importing import readers
from moesim.routing.importing.source import Selections, Source
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.trace import RoutingTrace, popularity_trace
from moesim.trace.check import check_trace, has_duplicates
from moesim.trace.record import TraceStep

READERS: Mapping[str, Callable[[Path], Source]] = MappingProxyType(
    {
        "flame": readers.read_flame,
        "megatron": readers.read_megatron,
        "sglang": readers.read_sglang,
        "vllm": readers.read_vllm,
        "trtllm": readers.read_trtllm,
        "olmoe": readers.read_olmoe,
        "counts": readers.read_counts,
    }
)
DRAWN_TOKENS = 65_536  # of a trace that is drawn from counts


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user says beside the source: each None where the source is to say it itself."""

    experts: int | None = None
    top_k: int | None = None
    sequence_length: int | None = None
    tokens: int = DRAWN_TOKENS
    seed: int = 0


def import_routing(kind: str, path: str | os.PathLike[str], *, asked: Asked | None = None) -> RoutingTrace:
    """The routing trace of a file or folder of form `kind` (a key of `READERS`).

    Counts alone become a drawn trace of that popularity per layer. Raises UserError for an unknown form, a damaged
    source, what neither the source nor `asked` says, and where the two differ.
    """
    if kind not in READERS:
        raise UserError(f"unknown form of routing {kind!r}; use one of: {', '.join(READERS)}")
    asked, place = asked or Asked(), Path(path)
    try:
        source = READERS[kind](place)
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be read ({error.strerror}); check the path") from None
    if source.steps and any(has_duplicates(step.expert_ids_LTK) for step in source.steps):
        source = _as_counts(source, _experts(source, asked, place))
    trace = _drawn(source, asked, place) if source.counts_LE is not None else _recorded(source, asked, place)
    provenance = {
        **trace.provenance,
        "source": f"imported, {kind}",
        "path": place.name,
        "layers": list(source.layers),
        "notes": list(source.notes),
    }
    provenance.pop("counts", None)
    trace = replace(trace, provenance=provenance)
    check_trace(trace)
    return trace


def _agreed(name: str, said: int | None, asked: int | None, place: Path, *, flag: str) -> int:
    if said is not None and asked is not None and said != asked:
        raise UserError(f"{place}: {name} is {said} there, but {flag} says {asked}; leave {flag} out or fix it")
    found = said if said is not None else asked
    if found is None:
        raise UserError(f"{place}: this form does not say {name}; add {flag}")
    return found


def _experts(source: Source, asked: Asked, place: Path) -> int:
    found = _agreed("the number of experts", source.num_experts, asked.experts, place, flag="--experts")
    highest = max((int(step.expert_ids_LTK.max()) for step in source.steps), default=-1)
    lowest = min((int(step.expert_ids_LTK.min()) for step in source.steps), default=0)
    if highest >= found or lowest < 0:
        wrong = highest if highest >= found else lowest
        raise UserError(f"{place}: expert {wrong} of {found} is chosen there; give the right --experts")
    return found


def _recorded(source: Source, asked: Asked, place: Path) -> RoutingTrace:
    """Tokens with their experts, in sequences; gates where the source has them, else equal ones."""
    width = int(source.steps[0].expert_ids_LTK.shape[2])
    length = _agreed(
        "the sequence length", source.sequence_length, asked.sequence_length, place, flag="--sequence-length"
    )
    top_k = _agreed("top-K", width, asked.top_k, place, flag="--top-k")
    weighed = all(step.weights_LTK is not None for step in source.steps)
    shape = RouterShape(
        kind="recorded" if weighed else "selections", num_experts=_experts(source, asked, place), top_k=top_k
    )
    steps = tuple(_trace_step(step, length, weighed=weighed, seed=asked.seed, place=place) for step in source.steps)
    return RoutingTrace(router=shape, steps=steps)


def _trace_step(step: Selections, length: int, *, weighed: bool, seed: int, place: Path) -> TraceStep:
    ids_LTK = step.expert_ids_LTK
    layers, tokens, top_k = ids_LTK.shape
    if tokens < length:
        raise UserError(
            f"{place}: step {step.step} has {tokens} tokens, less than a sequence of {length}; "
            "give a smaller --sequence-length"
        )
    shape = (layers, tokens // length, length, top_k)
    kept = shape[1] * length
    if weighed:
        assert step.weights_LTK is not None
        affinities = gates = step.weights_LTK[:, :kept].reshape(shape)
    else:  # they mean nothing, but let capacity by score drop at random and not always the last tokens
        affinities = stream(seed, "trace-affinities").random(shape, dtype=np.float32)
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


def _drawn(source: Source, asked: Asked, place: Path) -> RoutingTrace:
    counts_LE = source.counts_LE
    assert counts_LE is not None
    experts = _agreed("the number of experts", source.num_experts, asked.experts, place, flag="--experts")
    if counts_LE.shape[1] > experts:
        raise UserError(f"{place}: counts of {counts_LE.shape[1]} experts; give the right --experts")
    counts_LE = np.pad(counts_LE, ((0, 0), (0, experts - counts_LE.shape[1])))
    top_k = _agreed("top-K", source.top_k, asked.top_k, place, flag="--top-k")
    length = asked.sequence_length or source.sequence_length or 4096
    return popularity_trace(
        RouterShape(kind="popularity", num_experts=experts, top_k=top_k),
        counts=np.maximum(counts_LE, 0.5).tolist(),  # an expert that was never seen may still be chosen
        num_layers=len(counts_LE),
        num_sequences=max(1, asked.tokens // length),
        sequence_length=length,
        seed=asked.seed,
    )
