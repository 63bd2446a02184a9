"""Pieces of sequences: held once each, and equal work for causal attention."""

import numpy as np
import pytest

from moesim.parallel.mesh import pieces_of_ranks


@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
def test_every_piece_is_held_once_and_in_token_order(context: int, tensor: int) -> None:
    pieces_RV = pieces_of_ranks(context=context, tensor=tensor)
    assert pieces_RV.shape == (context * tensor, 1 if context == 1 else 2)
    assert sorted(pieces_RV.reshape(-1).tolist()) == list(range(pieces_RV.size))
    held_CT = pieces_RV.reshape(context, -1)  # a context rank's tokens, tensor rank after tensor rank
    assert (np.diff(held_CT, axis=1) > 0).all()


@pytest.mark.parametrize("context", [2, 4, 8])
def test_context_ranks_have_equal_shares_of_causal_attention(context: int) -> None:
    """The keys that the queries of a piece see grow with its place: the sums over ranks' pieces are the same."""
    sums_C = pieces_of_ranks(context=context, tensor=2).reshape(context, -1).sum(axis=1)
    assert len(set(sums_C.tolist())) == 1
