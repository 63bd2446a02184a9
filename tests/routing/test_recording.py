"""Recording: distinct sequences of held-out text, whole and unchanged by how they are batched."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_cases import shape_of, small_request

from moesim.errors import UserError
from moesim.routing.corpus import load_corpus
from moesim.routing.held_out import held_out_sequences, record
from moesim.routing.request import TrainingRequest
from moesim.routing.transformer import LanguageModel
from moesim.scenario.routing import DeviceCapacity


def model_of(request: TrainingRequest) -> LanguageModel:
    return LanguageModel(request, torch.Generator().manual_seed(1))


def test_sequences_are_distinct_contiguous_and_spread() -> None:
    text = np.random.default_rng(0).integers(0, 256, 10_001, dtype=np.uint8).tobytes()
    sequences = held_out_sequences(text, num_sequences=7, length=1000)
    starts = [text.index(row.tobytes()) for row in sequences]
    assert sequences.shape == (7, 1001)
    assert all(b - a >= 1000 for a, b in pairwise(starts))
    assert starts[-1] >= 8000
    with pytest.raises(UserError, match="too few for 11 distinct"):
        held_out_sequences(text, num_sequences=11, length=1000)


@pytest.mark.parametrize("length", [256, 200, 40])
def test_batching_does_not_change_what_is_recorded(corpus: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    request = small_request(corpus, sequence_length=length, capacity=DeviceCapacity(kind="device", factor=0.1))
    model, held_out = model_of(request), load_corpus(str(corpus)).held_out
    together = record(model, request, held_out, step=0, num_sequences=6)
    monkeypatch.setattr("moesim.routing.held_out.TOKENS_PER_FORWARD", 1)
    alone = record(model, request, held_out, step=0, num_sequences=6)
    assert together.step.expert_ids_LSTK.shape == (2, 6, length, 4)
    assert together.step.expert_ids_LSTK.dtype == np.int16 and together.step.expert_ids_LSTK.min() >= 0  # no dropping
    assert (together.step.expert_ids_LSTK == alone.step.expert_ids_LSTK).mean() > 0.999
    np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-5)


def test_windows_start_afresh_at_the_context(corpus: Path) -> None:
    """A sequence of two contexts routes as its two halves do alone."""
    held_out = load_corpus(str(corpus)).held_out[:129]
    long, short = small_request(corpus, sequence_length=128), small_request(corpus, sequence_length=64)
    model = model_of(long)
    one = record(model, long, held_out, step=0, num_sequences=1).step.expert_ids_LSTK
    two = record(model, short, held_out, step=0, num_sequences=2).step.expert_ids_LSTK
    np.testing.assert_array_equal(one.reshape(two.shape), two)


def test_expert_choice_competes_over_a_micro_batch_and_pads_columns(corpus: Path) -> None:
    request = small_request(corpus, router=shape_of("expert_choice"), sequence_length=64)
    step = record(model_of(request), request, load_corpus(str(corpus)).held_out, step=0, num_sequences=5).step
    ids_LSTK = step.expert_ids_LSTK
    for layer in range(2):
        for sequence in range(5):
            chosen = ids_LSTK[layer, sequence][ids_LSTK[layer, sequence] >= 0]
            assert (np.bincount(chosen, minlength=16) == 64 * 4 // 16).all()
    assert ids_LSTK.min() == -1 and (step.gates_LSTK[ids_LSTK < 0] == 0).all()
