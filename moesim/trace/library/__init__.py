"""Which trained routers the library holds, by name, and its entries on disk: small, and not readable wrongly.

A name is LAYOUT/POINT/seedN, e.g. `64x6/M2/seed1`; without a seed it means seed 0, and `library:` may stand before it.
The published setting of a layout lies on every axis, so `64x6/M3` and `64x6/capacity-1.0` are other names of
`64x6/published`.

Legend: L layers, S sequences, T tokens per sequence, N = S T tokens, K selections, E experts, P steps.

    line 1   moesim-library <schema version>
    line 2   sha256 of all that follows, in hex
    line 3   header: JSON with the entry's facts, router, provenance and the arrays' names, types, shapes and lengths
    rest     the arrays one behind the other, each compressed by LZMA

What is exact: expert ids, held-out losses, counts of earlier steps, which are summed over the recorded sequences. What
is rounded: affinities to the levels of a coarse scale of their log odds (see `quantise`), and with them the gates,
which are made again by the router's own formula; the curves of training loss and imbalance to 11 significant bits. A
token's experts come back highest affinity first, equal ones by id.

All entries record the same held-out text, and a router does nearly the same wherever it has read nearly the same.
Sorted by what leads up to them, tokens compress a fifth better than in reading order. That order is made once from the
text and kept in one file for all entries; every entry names the hash of that file:

    line 1   moesim-text-order <schema version> <sequences> <tokens per sequence>
    line 2   sha256 of all that follows, in hex
    rest     for every place in the sorted order the token's place in the text, each in as many bits as N - 1 needs
"""

import difflib
import hashlib
import lzma
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.scenario.routing import LIBRARY_PREFIX, RouterShape
from moesim.strict_json import json_text, parse_json
from moesim.trace.check import check_trace, gates_of
from moesim.trace.record import NO_EXPERT, Json, RoutingTrace, StepCounts, TraceStep, TrainingCurves
from moesim.trace.store import header_and_arrays

FILE = "text.order"
ORDER_VERSION = 1
DEPTH = 12  # bytes looked back at
MOST_TOKENS = 1 << 24
_ORDER_MAGIC = b"moesim-text-order"


@dataclass(frozen=True, eq=False, kw_only=True)
class TextOrder:
    """`places_N` (int64): where in the text the tokens stand that come first, second, ... in sorted order."""

    num_sequences: int
    sequence_length: int
    places_N: NDArray[np.int64]
    digest: str

    def of_sequences(self, num_sequences: int, sequence_length: int) -> NDArray[np.int64]:
        """The order of `num_sequences` of the sequences, evenly spread from the first on, int64 [S T].

        Raises ValueError where the text has no such sequences.
        """
        every, rest = divmod(self.num_sequences, num_sequences) if num_sequences > 0 else (0, 1)
        if rest or not every or sequence_length != self.sequence_length:
            raise ValueError(f"no {num_sequences} sequences of {sequence_length} tokens in the text's order")
        sequences_N, tokens_N = np.divmod(self.places_N, sequence_length)
        held_N = sequences_N % every == 0
        return np.asarray(sequences_N[held_N] // every * sequence_length + tokens_N[held_N])


def sort_text(bytes_ST: NDArray[np.uint8], *, context: int) -> TextOrder:
    """The order of a text's tokens by the bytes up to each, nearest byte first; windows of `context` begin anew."""
    num_sequences, length = bytes_ST.shape
    windows = bytes_ST.reshape(-1, context)
    before = np.concatenate([np.zeros((len(windows), DEPTH), np.uint8), windows], axis=1)
    keys = [before[:, DEPTH - back : DEPTH - back + context].ravel() for back in range(DEPTH)]
    places_N = np.lexsort(keys[::-1])  # the last key is the first to sort by
    body = _packed(places_N)
    return TextOrder(
        num_sequences=num_sequences, sequence_length=length, places_N=places_N, digest=hashlib.sha256(body).hexdigest()
    )


def write_order(folder: Path, order: TextOrder) -> None:
    """Write the order into a library's folder."""
    head = b"%s %d %d %d\n" % (_ORDER_MAGIC, ORDER_VERSION, order.num_sequences, order.sequence_length)
    (folder / FILE).write_bytes(head + order.digest.encode() + b"\n" + _packed(order.places_N))


def read_order(folder: Path) -> TextOrder:
    """The order that lies in a library's folder. Raises UserError when it is missing or damaged."""
    path = folder / FILE
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{path}: cannot read the library's order ({error.strerror}); install moesim again") from error
    return _read(path, changed)


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> TextOrder:
    del changed  # part of the key: another file of the same name is another order
    try:
        head, digest, body = [*path.read_bytes().split(b"\n", 2), b"", b""][:3]
    except OSError as error:
        raise UserError(f"{path}: cannot read the library's order ({error.strerror}); install moesim again") from error
    words = head.split(b" ")
    if words[:2] != [_ORDER_MAGIC, b"%d" % ORDER_VERSION] or hashlib.sha256(body).hexdigest().encode() != digest:
        raise UserError(f"{path}: this is no text order of version {ORDER_VERSION}, or a damaged one; install again")
    try:
        num_sequences, length = (int(word) for word in words[2:])
        places_N = _unpacked(body, num_sequences * length)
    except ValueError as error:
        raise UserError(f"{path}: the order does not fit its own size ({error}); install moesim again") from error
    return TextOrder(num_sequences=num_sequences, sequence_length=length, places_N=places_N, digest=digest.decode())


def _bits(num: int) -> int:
    return max(1, (num - 1).bit_length())


def _packed(places_N: NDArray[Any]) -> bytes:
    bits = _bits(len(places_N))
    return np.packbits((places_N[:, None] >> np.arange(bits)[::-1]) & 1 == 1).tobytes()


def _unpacked(body: bytes, num: int) -> NDArray[np.int64]:
    """The `num` places of packed bits; ValueError where they are not every place once."""
    bits = _bits(num)
    if not 0 < num <= MOST_TOKENS or len(body) != (num * bits + 7) // 8:
        raise ValueError(f"{len(body)} bytes for {num} tokens")
    set_NB = np.unpackbits(np.frombuffer(body, np.uint8), count=num * bits).reshape(num, bits)
    places_N = set_NB.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64)[::-1])
    if (np.bincount(places_N, minlength=num) != 1).any():
        raise ValueError("not every token once")
    return places_N


SCHEMA_VERSION = 2
LEVELS = 256
ALMOST_ONE = 1 - 2.0**-24  # what float32 has below 1
FINE_RATIO = 2.0  # of odds from level to level, where capacity drops by affinity: alters step times by below 0.1 %
COARSE_RATIO = 64.0  # where nothing is dropped, and affinities only order a token's experts
MOST_BYTES = 1 << 28  # of one array in memory
_MAGIC = b"moesim-library"
# ids and codes take turns, which lp and pb of 1 tell apart; the dictionary holds all pairs of the longest entry
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lp": 1, "pb": 1, "dict_size": 1 << 24}]
_DTYPES = {"uint8", "uint16", "uint32", "float16", "float64"}

Array = NDArray[Any]


def write_entry(
    path: Path, trace: RoutingTrace, *, facts: dict[str, Any], ratio: float, order: TextOrder | None = None
) -> None:
    """Write the final step, the counts of earlier steps, curves and `facts` (JSON values); complete or not at all.

    `ratio` is the affinities' from level to level; with `order`, which must lie beside the entry, tokens are sorted.
    """
    final, curves = trace.final, trace.curves
    num_layers, num_sequences, length, num_columns = final.expert_ids_LSTK.shape
    codes_LSTK, scale = quantise(final.affinities_LSTK, ratio=ratio)
    pairs_LNK2 = _in_id_order(final.expert_ids_LSTK, codes_LSTK, num_experts=trace.router.num_experts)
    if order is not None:
        pairs_LNK2 = pairs_LNK2[:, order.of_sequences(num_sequences, length)]
    arrays = {
        "pairs": pairs_LNK2,
        "earlier": _narrow(np.array([each.counts_LSE.sum(axis=1) for each in trace.earlier], dtype=np.uint32)),
        "train_loss": curves.train_loss.astype(np.float16),
        "imbalance": curves.imbalance.astype(np.float16),
        "validation_steps": curves.validation_steps.astype(np.float64),
        "validation_loss": curves.validation_loss.astype(np.float64),
    }
    blobs = [_compress(array) for array in arrays.values()]
    header = {
        "facts": {**facts, "provenance": dict(trace.provenance)},
        "router": asdict(trace.router),
        "step": final.step,
        "earlier_steps": [each.step for each in trace.earlier],
        "affinity_scale": scale,
        "order": order.digest if order is not None else None,
        "shape_LSTK": [num_layers, num_sequences, length, num_columns],
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
        trace = _parse(body, path.parent)
        check_trace(trace)
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError, AttributeError, lzma.LZMAError) as error:
        raise UserError(f"{path}: the entry's parts do not fit together ({error}); install moesim again") from error
    return trace


def quantise(affinities: Array, *, ratio: float) -> tuple[NDArray[np.uint8], dict[str, float | str]]:
    """Affinities as 8-bit codes and the scale that `restore` needs.

    Probabilities on a linear scale of their log odds, logits (of either sign, or beyond 1) on one of their own, both
    downwards from the largest: the odds, or e^logit, come back within a factor of sqrt(ratio), or of a 508th part of
    their range where that is more than 254 levels. 0 (no expert) stays 0.
    """
    kind = "logits" if affinities.min() < 0 or affinities.max() > 1 else "probabilities"
    held = (affinities > 0) | (kind == "logits")
    if not held.any():
        return np.full(affinities.shape, LEVELS - 1, np.uint8), {"kind": kind, "top": 0.0, "step": math.log(ratio)}
    heights = np.where(held, affinities, 0.5).astype(np.float64)
    if kind == "probabilities":
        heights = np.log(heights) - np.log1p(-np.minimum(heights, ALMOST_ONE))
    top, bottom = float(heights[held].max()), float(heights[held].min())
    step = max(math.log(ratio), (top - bottom) / (LEVELS - 2))
    codes = np.where(held, np.rint((top - heights) / step), LEVELS - 1)
    return codes.astype(np.uint8), {"kind": kind, "top": top, "step": step}


def restore(codes: NDArray[np.uint8], scale: dict[str, Any]) -> NDArray[np.float32]:
    """The affinities of `codes`, float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a scale that no quantising gave; not finite, it is refused
        heights = scale["top"] - scale["step"] * np.arange(LEVELS, dtype=np.float64)
        if scale["kind"] == "probabilities":
            # what float32 cannot tell from 0 stays an affinity
            heights = np.maximum(1 / (1 + np.exp(-heights)), np.finfo(np.float32).tiny)
            heights[LEVELS - 1] = 0.0
        return np.asarray(heights.astype(np.float32)[codes])


def _compress(array: Array) -> bytes:
    return lzma.compress(np.ascontiguousarray(array).tobytes(), check=lzma.CHECK_NONE, filters=_LZMA)


def _narrow(array: Array) -> Array:
    """The array in the narrowest unsigned type that holds its values."""
    return array.astype(np.min_scalar_type(int(array.max()) if array.size else 0))


def _in_id_order(ids_LSTK: Array, codes_LSTK: Array, *, num_experts: int) -> Array:
    """Every token's ids ascending, no expert counting as id E, each with its code [L, N, K, 2].

    The order among a token's experts is worth log2 K! bits and follows from the affinities. A token's numbers stay
    together: LZMA finds the same choices again.
    """
    num_layers, *_, num_columns = ids_LSTK.shape
    ids_LNK = np.where(ids_LSTK == NO_EXPERT, num_experts, ids_LSTK).reshape(num_layers, -1, num_columns)
    order_LNK = np.argsort(ids_LNK, axis=2, kind="stable")
    codes_LNK = np.take_along_axis(codes_LSTK.reshape(ids_LNK.shape), order_LNK, axis=2)
    return _narrow(np.stack([np.take_along_axis(ids_LNK, order_LNK, axis=2), codes_LNK], axis=3))


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
    if (
        not all(isinstance(each, int) and each >= 0 for each in shape)
        or math.prod(shape) > MOST_BYTES // dtype.itemsize
    ):
        raise ValueError(f"{name} of shape {list(shape)}")
    size = math.prod(shape) * dtype.itemsize
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    content = decompressor.decompress(packed, max_length=size + 1)
    if len(content) != size or not decompressor.eof:
        raise ValueError(f"{name} does not fill its shape {list(shape)}")
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _parse(body: bytes, folder: Path) -> RoutingTrace:
    header, arrays = header_and_arrays(body, _unpack, dtypes=_DTYPES)
    router = RouterShape(**header["router"])
    train_loss = arrays["train_loss"].astype(np.float64)
    counts_PLE = arrays["earlier"].astype(np.int32)
    return RoutingTrace(
        router=router,
        steps=(_final_step(header, arrays["pairs"], router, folder),),
        earlier=tuple(
            StepCounts(step=step, counts_LSE=counts_LE[:, None])
            for step, counts_LE in zip(header["earlier_steps"], counts_PLE, strict=True)
        ),
        curves=TrainingCurves(
            steps=np.arange(1, len(train_loss) + 1, dtype=np.float64),
            train_loss=train_loss,
            imbalance=arrays["imbalance"].astype(np.float64),
            validation_steps=arrays["validation_steps"],
            validation_loss=arrays["validation_loss"],
        ),
        provenance=header["facts"]["provenance"],
    )


def _final_step(header: dict[str, Any], pairs_LNK2: Array, router: RouterShape, folder: Path) -> TraceStep:
    num_layers, num_sequences, length, num_columns = shape = tuple(header["shape_LSTK"])
    if pairs_LNK2.shape != (num_layers, num_sequences * length, num_columns, 2):
        raise ValueError(f"pairs of shape {pairs_LNK2.shape} for routing of shape {shape}")
    pairs_LNK2 = _in_reading_order(pairs_LNK2, header["order"], num_sequences, length, folder)
    ids_LNK, codes_LNK = pairs_LNK2[..., 0].astype(np.int16), pairs_LNK2[..., 1]
    none_LNK = ids_LNK == router.num_experts
    order_LNK = np.argsort(np.where(none_LNK, np.int16(LEVELS), codes_LNK), axis=2, kind="stable")
    ids_LNK = np.take_along_axis(np.where(none_LNK, np.int16(NO_EXPERT), ids_LNK), order_LNK, axis=2)
    codes_LNK = np.take_along_axis(codes_LNK, order_LNK, axis=2)
    affinities_LSTK = restore(codes_LNK, header["affinity_scale"]).reshape(shape)
    ids_LSTK = ids_LNK.reshape(shape)
    affinities_LSTK = np.where(ids_LSTK == NO_EXPERT, np.float32(0), affinities_LSTK)
    return TraceStep(
        step=header["step"],
        expert_ids_LSTK=ids_LSTK,
        affinities_LSTK=affinities_LSTK,
        gates_LSTK=gates_of(router, ids_LSTK, affinities_LSTK),
    )


def _in_reading_order(pairs_LNK2: Array, digest: str | None, num_sequences: int, length: int, folder: Path) -> Array:
    """The pairs as the text has them, of those that the order file of this hash sorted."""
    if digest is None:
        return pairs_LNK2
    order = read_order(folder)
    if order.digest != digest:
        raise ValueError("the text order beside it is another")
    back_LNK2 = np.empty_like(pairs_LNK2)
    back_LNK2[:, order.of_sequences(num_sequences, length)] = pairs_LNK2
    return back_LNK2


DATA = Path(__file__).parent / "data"
INDEX = "index.json"
SUFFIX = ".routing"


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """One trained router. Losses are nats per byte; `held_out_loss` is over 262,144 held-out tokens without dropping.

    `axis` is what was varied around the layout's published setting and `value` to what; `aliases` are other names
    without a seed. `imbalance` is max / mean expert load over the last tenth of the training steps, `dropped_share`
    the rows dropped there.
    """

    name: str
    aliases: tuple[str, ...]
    layout: str
    axis: str
    value: str
    seed: int
    tokens: int
    train_loss: float
    held_out_loss: float
    imbalance: float
    dropped_share: float
    provenance: dict[str, Json]
    digest: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the entry, each with its seed."""
        return (self.name, *(f"{alias}/seed{self.seed}" for alias in self.aliases))

    @property
    def file(self) -> str:
        """The entry's file in the data folder."""
        return file_of(self.name)


def file_of(name: str) -> str:
    """File name of an entry: one flat folder, so that it can be shipped by one pattern."""
    return name.replace("/", "--") + SUFFIX


def is_library_name(file: str) -> bool:
    """Whether `routing.file` names an entry of the library and not a file."""
    return file.startswith(LIBRARY_PREFIX)


@lru_cache(maxsize=4)
def library_entries(folder: Path = DATA) -> tuple[LibraryEntry, ...]:
    """Every entry, ordered by name. Raises UserError when the index cannot be read."""
    try:
        rows = parse_json((folder / INDEX).read_text())["entries"]
        return tuple(LibraryEntry(**{**row, "aliases": tuple(row["aliases"])}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: cannot read the library's index ({error}); install moesim again") from error


def find_entry(name: str, folder: Path = DATA) -> LibraryEntry:
    """The entry called `name`, with or without `library:` and the seed. Raises UserError with the nearest names."""
    wanted = name.removeprefix(LIBRARY_PREFIX).strip("/")
    by_name = {each: entry for entry in library_entries(folder) for each in entry.names}
    for candidate in (wanted, f"{wanted}/seed0"):
        if candidate in by_name:
            return by_name[candidate]
    near = difflib.get_close_matches(wanted, [*by_name, *(each.removesuffix("/seed0") for each in by_name)], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"`moesim trace {LIBRARY_PREFIX}` lists all names"
    raise UserError(f"{LIBRARY_PREFIX}{wanted}: the library has no such entry; {hint}")


def load_library(name: str, folder: Path = DATA) -> RoutingTrace:
    """The routing of the entry called `name`. Raises UserError for an unknown name or a damaged file."""
    entry = find_entry(name, folder)
    return read_entry(folder / entry.file, digest=entry.digest)


def write_index(folder: Path) -> int:
    """Write the index of all entries in `folder` from their own headers; how many they are. Raises UserError."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        facts, digest = read_facts(path)
        rows.append({**facts, "digest": digest})
    rows.sort(key=lambda row: row["name"])
    text = ",\n".join(json_text(row, sort_keys=True) for row in rows)
    (folder / INDEX).write_text(f'{{"entries": [\n{text}\n]}}\n')
    return len(rows)
