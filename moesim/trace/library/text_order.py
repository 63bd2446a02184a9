"""The order in which the library stores tokens: by the text that leads up to each, so that like stands beside like.

Legend: N tokens of the text, S sequences, T tokens per sequence.

All entries record the same held-out text, and a router does nearly the same wherever it has read nearly the same.
Sorted by what leads up to them, tokens compress a fifth better than in reading order. The order is made once from the
text and kept in one file for all entries; every entry names the hash of that file.

    line 1   moesim-text-order <schema version> <sequences> <tokens per sequence>
    line 2   sha256 of all that follows, in hex
    rest     for every place in the sorted order the token's place in the text, each in as many bits as N - 1 needs
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError

FILE = "text.order"
SCHEMA_VERSION = 1
DEPTH = 12  # bytes looked back at
MOST_TOKENS = 1 << 24
_MAGIC = b"moesim-text-order"


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
    head = b"%s %d %d %d\n" % (_MAGIC, SCHEMA_VERSION, order.num_sequences, order.sequence_length)
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
    if words[:2] != [_MAGIC, b"%d" % SCHEMA_VERSION] or hashlib.sha256(body).hexdigest().encode() != digest:
        raise UserError(f"{path}: this is no text order of version {SCHEMA_VERSION}, or a damaged one; install again")
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
