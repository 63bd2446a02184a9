"""Training requests: what they are made of, what they refuse, and that they need no torch; and the corpus."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moe_cases import shape_of, small_request, write_corpus

from moesim.errors import UserError
from moesim.routing.corpus import load_corpus
from moesim.routing.request import TrainingRequest
from moesim.scenario.loader import scenario_from_mapping
from moesim.scenario.routing import Balance, LossFree, Thin


def mapping(**routing: Any) -> dict[str, Any]:
    return {
        "name": "case",
        "model": {"preset": "deepseek-moe-16b"},
        "routing": {"kind": "train", "router": {"kind": "deepseek_v2", "device_limit": 3}, "steps": 20, **routing},
        "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 8},
        "parallelism": {"data": 8, "expert": 8},
        "workload": {"kind": "training", "sequence_length": 4096, "global_batch": 8},
        "seed": 3,
    }


def test_a_scenario_gives_its_request() -> None:
    scenario = scenario_from_mapping(mapping(balance={"expert": 0.003}))
    request = TrainingRequest.from_scenario(scenario)
    assert (request.router.num_experts, request.router.top_k, request.router.num_groups) == (64, 6, 8)
    assert request.recorded_sequences == 16 and request.first_sequences == 4  # 65,536 and 16,384 tokens
    assert request.shared_experts == 2 and request.seed == 3 and request.balance.expert == 0.003
    more = TrainingRequest.from_scenario(scenario_from_mapping(mapping(tokens=100_000)))
    assert more.recorded_sequences * 4096 >= 100_000
    large = mapping()
    large["workload"]["global_batch"] = 512
    assert TrainingRequest.from_scenario(scenario_from_mapping(large)).recorded_sequences * 4096 == 262_144
    large["workload"].update(micro_batch=16)
    assert TrainingRequest.from_scenario(scenario_from_mapping(large)).recorded_sequences == 8 * 16


def test_the_hash_covers_every_field(corpus: Path) -> None:
    request = small_request(corpus)
    changes: dict[str, Any] = {
        "router": shape_of("deepseek_v3"),
        "steps": 7,
        "sequence_length": 512,
        "recorded_sequences": 9,
        "micro_batch": 2,
        "shared_experts": 2,
        "balance": Balance(expert=0.1),
        "thin": Thin(hidden=64, device="cpu"),
        "seed": 1,
    }
    hashes = {replace(request, **{name: value}).content_hash() for name, value in changes.items()}
    assert len(hashes | {request.content_hash()}) == len(changes) + 1
    assert small_request(corpus).content_hash() == request.content_hash()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thin": {"hidden": 36, "heads": 4}}, "even multiple of heads"),
        ({"thin": {"hidden": 36, "heads": 2}}, "multiple of 8"),
        ({"thin": {"expert_intermediate": 10}}, "expert_intermediate = 10"),
        ({"thin": {"tokens_per_step": 500}}, "micro_batches"),
        ({"router": shape_of("switch", top_k=2)}, "set it to 1"),
        ({"router": shape_of("gshard", top_k=3)}, "set it to 2"),
        ({"balance": Balance(loss_free=LossFree())}, "loss_free needs"),
        ({"router": shape_of("hash"), "balance": Balance(expert=0.1)}, "no affinities"),
        ({"router": shape_of("deepseek_moe", num_devices=3), "balance": Balance(device=0.1)}, "do not divide"),
    ],
)
def test_requests_that_do_not_fit_are_refused(corpus: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_request(corpus, **changes)


def test_requests_hashes_and_cached_traces_need_no_torch() -> None:
    code = (
        "import sys, moesim.routing;"
        "from moesim.routing import TrainingRequest, cached_trace, trace_path, show_training;"
        "from moesim.scenario.routing import RouterShape;"
        "r = TrainingRequest(router=RouterShape(kind='switch', num_experts=4, top_k=1), steps=1, sequence_length=64,"
        " recorded_sequences=1); trace_path(r); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
