"""Real text for training and recording: the standard library's own source, or the user's file or folder."""

import hashlib
import os
import pydoc_data
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moesim.errors import UserError

MOST_BYTES = 16_000_000
LEAST_TRAIN_BYTES = 65_536
HELD_OUT_PARTS = 8  # one file in eight is held out
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training text and held-out text that share no file (no byte, where the corpus is one file)."""

    name: str
    train: bytes
    held_out: bytes
    content_hash: str
    num_files: int


@lru_cache(maxsize=4)
def load_corpus(name: str) -> Corpus:
    """The corpus `stdlib`, or the text file or folder at the path `name`.

    `stdlib` is every `.py` file of the running Python's standard library without tests, and `pydoc_data/topics.py`.
    Files come in the order of the hash of their relative names, so that any prefix mixes subjects, are cut off after
    16 MB, and one in eight is held out by that hash; a single file is cut, its last eighth held out. The content hash
    covers names, contents and the split. Raises UserError when the text is missing, unreadable or too small.
    """
    texts = sorted(_texts(name), key=lambda item: _name_hash(item[0]))
    digest = hashlib.sha256()
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for relative, text in texts:
        if total + len(text) > MOST_BYTES and len(texts) > 1:
            break
        total += len(text)
        digest.update(f"{relative}\0{len(text)}\0".encode())
        digest.update(text)
        if len(texts) == 1:
            cut = len(text) - len(text) // HELD_OUT_PARTS
            parts[False].append(text[:cut])
            parts[True].append(text[cut:])
        else:
            parts[_name_hash(relative)[0] % HELD_OUT_PARTS == 0].append(text)
    train, held_out = b"".join(parts[False]), b"".join(parts[True])
    if len(train) < LEAST_TRAIN_BYTES or not held_out:
        raise UserError(
            f"routing.corpus = {name}: {len(train)} bytes to train on and {len(held_out)} held out are too few; give a "
            f"text of at least {2 * LEAST_TRAIN_BYTES} bytes, in many files where possible"
        )
    return Corpus(
        name=name,
        train=train,
        held_out=held_out,
        content_hash=digest.hexdigest(),
        num_files=sum(map(len, parts.values())),
    )


def _name_hash(relative: str) -> bytes:
    return hashlib.sha256(relative.encode()).digest()


def _texts(name: str) -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of every file of the corpus."""
    if name == "stdlib":
        yield from _standard_library()
        return
    root = Path(name).expanduser()
    try:
        if root.is_file():
            with root.open("rb") as file:
                yield root.name, file.read(MOST_BYTES)
            return
        if not root.is_dir():
            raise UserError(f"routing.corpus = {name}: no such file or folder; give a path, or stdlib")
        for path in _files(root):
            text = path.read_bytes()
            if b"\0" not in text[:4096]:  # text, not a binary file
                yield path.relative_to(root).as_posix(), text
    except OSError as error:
        raise UserError(f"routing.corpus = {name}: cannot read it ({error.strerror}); check its permissions") from error


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, left_out=LEFT_OUT_FOLDERS):
        if path.suffix == ".py":
            yield path.relative_to(root).as_posix(), path.read_bytes()
    topics = Path(next(iter(pydoc_data.__path__))) / "topics.py"
    if not topics.is_relative_to(root):  # some distributions move it
        yield "pydoc_data/topics.py", topics.read_bytes()


def _files(root: Path, *, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files under `root` without hidden ones; folders named in `left_out` are not even listed (speed)."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in left_out and not sub.startswith(".")]
        for file_name in names:
            path = Path(folder, file_name)
            if not file_name.startswith(".") and path.is_file():
                yield path
