"""The corpus: deterministic, split by file, and refused in one line where it cannot serve."""

from pathlib import Path

import pytest
from moe_cases import write_corpus

from moesim.errors import UserError
from moesim.routing.corpus import load_corpus


def test_the_standard_library_suffices_for_large_recordings() -> None:
    corpus = load_corpus("stdlib")
    assert len(corpus.held_out) > 262_144 and len(corpus.train) > 2_000_000
    text = corpus.train + corpus.held_out
    assert b"class Thread" in text and b"# -*- coding: utf-8 -*-" in text


def test_files_are_split_whole_and_order_of_the_folder_does_not_matter(tmp_path: Path) -> None:
    corpus = load_corpus(str(write_corpus(tmp_path / "a")))
    files = sorted(path.read_bytes() for path in (tmp_path / "a").iterdir())
    assert len(corpus.train) + len(corpus.held_out) == sum(map(len, files))
    assert all((file in corpus.train) != (file in corpus.held_out) for file in files)
    assert load_corpus(str(write_corpus(tmp_path / "b"))).content_hash == corpus.content_hash
    (tmp_path / "b" / "file_1.py").write_text("changed")
    load_corpus.cache_clear()
    assert load_corpus(str(tmp_path / "b")).content_hash != corpus.content_hash


def test_hidden_and_binary_files_are_left_out(tmp_path: Path) -> None:
    wanted = load_corpus(str(write_corpus(tmp_path / "a")))
    write_corpus(tmp_path / "b")
    (tmp_path / "b" / ".hidden").write_text("x" * 1000)
    (tmp_path / "b" / "image.bin").write_bytes(b"\0" * 1000)
    assert load_corpus(str(tmp_path / "b")).content_hash == wanted.content_hash


def test_one_file_holds_out_its_last_eighth(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(32, 127)) * 2000)
    corpus = load_corpus(str(path))
    assert corpus.train + corpus.held_out == path.read_bytes()
    assert len(corpus.held_out) == len(path.read_bytes()) // 8


@pytest.mark.parametrize(("name", "message"), [("nowhere", "no such file or folder"), ("small.txt", "too few")])
def test_bad_corpora_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "small.txt").write_text("little")
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path / name))
