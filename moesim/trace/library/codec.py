"""Entries of the library on disk: small, and not readable wrongly.

Legend: L layers, S sequences, T tokens per sequence, K selections, E experts, P steps.

    line 1   moesim-library <schema version>
    line 2   sha256 of all that follows, in hex
    line 3   header: JSON with the entry's facts, router, provenance and the arrays' names, types, shapes and lengths
    rest     the arrays one behind the other, each compressed by LZMA

What is exact: expert ids, held-out losses, counts of earlier steps. What is rounded: affinities to 8 bits (see
`quantise`), and with them the gates, which are made again by the router's own formula; the curves of training loss and
imbalance to 11 significant bits. A token's experts come back highest affinity first, equal ones by id.
"""

import hashlib
import lzma
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.scenario.routing import RouterShape
from moesim.strict_json import json_text, parse_json
from moesim.trace.record import NO_EXPERT, RoutingTrace, StepCounts, TraceStep, TrainingCurves, check_trace
from moesim.trace.store import header_and_arrays

SCHEMA_VERSION = 1
LEVELS = 256
LEVEL_RATIO = 1.04  # one level of a positive affinity: 2 % of rounding error either way
_MAGIC = b"moesim-library"
_LZMA_PRESET = 6 | lzma.PRESET_EXTREME
_DTYPES = {"uint8", "uint16", "int32", "float16", "float64"}

Array = NDArray[Any]


def write_entry(path: Path, trace: RoutingTrace, *, facts: dict[str, Any]) -> None:
    """Write the final step, the counts of earlier steps, curves and `facts` (JSON values); complete or not at all."""
    codes_LSTK, scale = quantise(trace.final.affinities_LSTK)
    gaps, codes = _in_id_order(trace.final.expert_ids_LSTK, codes_LSTK, num_experts=trace.router.num_experts)
    curves = trace.curves
    arrays = {
        "id_gaps": gaps,
        "affinity_codes": codes,
        "train_loss": curves.train_loss.astype(np.float16),
        "imbalance": curves.imbalance.astype(np.float16),
        "validation_steps": curves.validation_steps.astype(np.float64),
        "validation_loss": curves.validation_loss.astype(np.float64),
    }
    arrays |= {f"earlier.{each.step}": each.counts_LSE.astype(np.uint16) for each in trace.earlier}
    blobs = [_compress(array) for array in arrays.values()]
    header = {
        "facts": {**facts, "provenance": dict(trace.provenance)},
        "router": asdict(trace.router),
        "step": trace.final.step,
        "affinity_scale": scale,
        "shape_LSTK": list(trace.final.expert_ids_LSTK.shape),
        "arrays": [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "bytes": len(blob)}
            for (name, array), blob in zip(arrays.items(), blobs, strict=True)
        ],
    }
    body = json_text(header, sort_keys=True).encode() + b"\n" + b"".join(blobs)
    digest = hashlib.sha256(body).hexdigest().encode()
    write_atomically(path, b"%s %d\n%s\n" % (_MAGIC, SCHEMA_VERSION, digest) + body)


def read_facts(path: Path) -> tuple[dict[str, Any], str]:
    """The facts of an entry and the hash of its content, which is checked. Raises UserError."""
    body, digest = _checked_body(path)
    return parse_json(body[: body.index(b"\n")])["facts"], digest


def read_entry(path: Path, *, digest: str | None = None) -> RoutingTrace:
    """The trace of an entry. Raises UserError for a missing or damaged one, or for another content than `digest`."""
    body, found = _checked_body(path)
    if digest is not None and digest != found:
        raise UserError(f"{path}: not the entry that the library's index names; install moesim again")
    try:
        trace = _parse(body)
        check_trace(trace)
    except (KeyError, TypeError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path}: the entry's parts do not fit together ({error}); install moesim again") from error
    return trace


def quantise(affinities: Array) -> tuple[NDArray[np.uint8], dict[str, float | str]]:
    """Affinities as 8-bit codes and the scale that `restore` needs.

    Positive ones (probabilities) on a logarithmic scale downwards from the largest, a level being 4 %: the relative
    error is at most 2 %, and for those below 1/20,000 of the largest the absolute error is at most that. Logits, which
    have both signs, on a linear scale: the error is at most 1/510 of their range. 0 (no expert) stays 0.
    """
    top, bottom = float(affinities.max()), float(affinities.min())
    if bottom < 0:
        step = (top - bottom) / (LEVELS - 1)
        codes = np.rint((affinities.astype(np.float64) - bottom) / step)
        return codes.astype(np.uint8), {"kind": "linear", "bottom": bottom, "step": step}
    with np.errstate(divide="ignore"):
        levels = np.log(top / affinities.astype(np.float64)) / math.log(LEVEL_RATIO)
    codes = np.minimum(np.rint(levels), LEVELS - 2)
    return np.where(affinities > 0, codes, LEVELS - 1).astype(np.uint8), {"kind": "logarithmic", "top": top}


def restore(codes: NDArray[np.uint8], scale: dict[str, Any]) -> NDArray[np.float32]:
    """The affinities of `codes`, float32."""
    level = np.arange(LEVELS, dtype=np.float64)
    if scale["kind"] == "linear":
        values = scale["bottom"] + scale["step"] * level
    else:
        values = scale["top"] * LEVEL_RATIO**-level
        values[LEVELS - 1] = 0.0
    return np.asarray(values.astype(np.float32)[codes])


def gates_of(router: RouterShape, expert_ids_LSTK: Array, affinities_LSTK: Array) -> NDArray[np.float32]:
    """The gates that the router's formula makes of the selected experts' affinities (spec, "Routers"), float32."""
    valid = expert_ids_LSTK != NO_EXPERT
    values = np.where(valid, affinities_LSTK.astype(np.float64), 0.0)
    if router.kind == "topk_softmax":
        values = np.exp(affinities_LSTK - affinities_LSTK.max(axis=-1, keepdims=True).astype(np.float64))
    if router.kind in ("topk_softmax", "gshard", "deepseek_v3"):
        values = values / np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    if router.kind in ("deepseek_v2", "deepseek_v3"):
        values = values * router.routed_scaling_factor
    if router.kind in ("hash", "uniform", "popularity"):
        values = np.where(valid, 1 / router.top_k, 0.0)
    return values.astype(np.float32)


def _compress(array: Array) -> bytes:
    return lzma.compress(np.ascontiguousarray(array).tobytes(), preset=_LZMA_PRESET)


def _in_id_order(ids_LSTK: Array, codes_LSTK: Array, *, num_experts: int) -> tuple[Array, Array]:
    """Gaps between a token's ascending ids [L S T, K], no expert counting as id E, and the codes in that order.

    The order among a token's experts is worth log2 K! bits and follows from the affinities. A token's numbers stay
    together: LZMA finds the same choices again (ids take a quarter less than column by column).
    """
    ids = np.where(ids_LSTK == NO_EXPERT, num_experts, ids_LSTK).reshape(-1, ids_LSTK.shape[-1]).astype(np.int32)
    order = np.argsort(ids, axis=1, kind="stable")
    ids_NK = np.take_along_axis(ids, order, axis=1)
    gaps_NK = np.diff(ids_NK, axis=1, prepend=0)
    codes_NK = np.take_along_axis(codes_LSTK.reshape(ids.shape), order, axis=1)
    narrow = np.uint8 if gaps_NK.max() < 256 else np.uint16
    return gaps_NK.astype(narrow), codes_NK


def _checked_body(path: Path) -> tuple[bytes, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the entry ({error.strerror}); install moesim again") from error
    first, second, body = [*content.split(b"\n", 2), b"", b""][:3]
    if first != b"%s %d" % (_MAGIC, SCHEMA_VERSION):
        raise UserError(f"{path}: this is no library entry of version {SCHEMA_VERSION}; install moesim again")
    if hashlib.sha256(body).hexdigest().encode() != second:
        raise UserError(f"{path}: the entry is truncated or altered (its hash differs); install moesim again")
    return body, second.decode()


def _unpack(packed: bytes, name: str, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Array:
    return np.frombuffer(lzma.decompress(packed), dtype=dtype).reshape(shape)


def _parse(body: bytes) -> RoutingTrace:
    header, arrays = header_and_arrays(body, _unpack, dtypes=_DTYPES)
    router = RouterShape(**header["router"])
    earlier = [
        StepCounts(step=int(name.removeprefix("earlier.")), counts_LSE=array.astype(np.int32))
        for name, array in arrays.items()
        if name.startswith("earlier.")
    ]
    train_loss = arrays["train_loss"].astype(np.float64)
    return RoutingTrace(
        router=router,
        steps=(_final_step(header, arrays, router),),
        earlier=tuple(sorted(earlier, key=lambda each: each.step)),
        curves=TrainingCurves(
            steps=np.arange(1, len(train_loss) + 1, dtype=np.float64),
            train_loss=train_loss,
            imbalance=arrays["imbalance"].astype(np.float64),
            validation_steps=arrays["validation_steps"],
            validation_loss=arrays["validation_loss"],
        ),
        provenance=header["facts"]["provenance"],
    )


def _final_step(header: dict[str, Any], arrays: dict[str, Array], router: RouterShape) -> TraceStep:
    ids_NK = arrays["id_gaps"].astype(np.int32).cumsum(axis=1)
    affinities_NK = restore(arrays["affinity_codes"], header["affinity_scale"])
    none_NK = ids_NK == router.num_experts
    order_NK = np.argsort(np.where(none_NK, np.inf, -affinities_NK), axis=1, kind="stable")
    shape = tuple(header["shape_LSTK"])
    ids_NK = np.where(none_NK, NO_EXPERT, ids_NK)
    ids_LSTK = np.take_along_axis(ids_NK, order_NK, axis=1).astype(np.int16).reshape(shape)
    affinities_LSTK = np.take_along_axis(affinities_NK, order_NK, axis=1).reshape(shape)
    return TraceStep(
        step=header["step"],
        expert_ids_LSTK=ids_LSTK,
        affinities_LSTK=affinities_LSTK,
        gates_LSTK=gates_of(router, ids_LSTK, affinities_LSTK),
    )
