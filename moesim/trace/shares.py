"""Weights by which experts are drawn so that each gets the share of the tokens that was counted.

Drawing K distinct experts in proportion to their counts flattens the counts: a popular expert can be drawn only once.
Legend: L layers, E experts, K selections, G points in time.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST_SHARE = 0.999  # of the tokens that may choose one expert
_LOG_TIME_G = np.linspace(-12.0, 16.0, 161)
_ROUNDS = 12
_CELLS = 4_000_000  # numbers in memory at once


def shares_of_counts(counts_LE: Floats, *, top_k: int) -> Floats:
    """Shares of the tokens that choose each expert: in proportion to the counts, at most 0.999, K in sum."""
    most = _MOST_SHARE if top_k < counts_LE.shape[1] else 1.0
    share_LE = counts_LE * (top_k / counts_LE.sum(axis=1, keepdims=True))
    for _ in range(counts_LE.shape[1]):
        full_LE = share_LE >= most
        rest_L = top_k - most * full_LE.sum(axis=1)
        free_L = np.where(full_LE, 0.0, share_LE).sum(axis=1)
        factor_L = np.divide(rest_L, free_L, out=np.ones_like(rest_L), where=free_L > 0)
        share_LE = np.where(full_LE, most, share_LE * factor_L[:, None])
        if (share_LE <= most * (1 + 1e-12)).all():
            break
    return np.asarray(np.minimum(share_LE, most))


def weights_of_shares(share_LE: Floats, *, top_k: int) -> Floats:
    """Weights of a draw of K distinct experts, one after the other in proportion to the weights left, that chooses
    every expert with its share's probability.

    A fixed point: each weight is raised where its probability is too low, until they agree.
    """
    layers, experts = share_LE.shape
    if top_k == experts:
        return np.ones_like(share_LE)
    weight_LE = share_LE if top_k == 1 else -np.log1p(-share_LE)
    at_once = max(1, _CELLS // (experts * top_k * len(_LOG_TIME_G)))
    for _ in range(_ROUNDS if top_k > 1 else 0):
        chance_LE = np.concatenate(
            [chances(weight_LE[start : start + at_once], top_k=top_k) for start in range(0, layers, at_once)]
        )
        found_LE = np.log1p(-np.minimum(chance_LE, 1 - 1e-12))
        weight_LE = weight_LE * np.divide(np.log1p(-share_LE), found_LE, out=np.ones_like(share_LE), where=share_LE > 0)
    return np.asarray(weight_LE)


def chances(weight_LE: Floats, *, top_k: int) -> Floats:
    """The probability that an expert is among the K.

    Experts arrive at exponential times of rate w, and the first K count: expert e is one of them if at its time t fewer
    than K others have come. Hence the integral over t of w exp(-w t) P(fewer than K of the others by t), here over
    log t.
    """
    time_G = np.exp(_LOG_TIME_G)
    late_ELG = np.exp(-weight_LE.T[:, :, None] * time_G)  # has not come yet
    before, after = _numbers(late_ELG, top_k), _numbers(late_ELG[::-1], top_k)[::-1]
    fewer_ELG = (before * np.cumsum(after, axis=1)[:, ::-1]).sum(axis=1)
    rate_ELG = weight_LE.T[:, :, None] * time_G * late_ELG
    return np.asarray((rate_ELG * fewer_ELG).sum(axis=2).T * (_LOG_TIME_G[1] - _LOG_TIME_G[0]))


def _numbers(late_ELG: Floats, top_k: int) -> Floats:
    """P(n of the experts before E in the list have come), n from 0 to K - 1: [E, K, L, G]."""
    experts, layers, times = late_ELG.shape
    found = np.zeros((experts, top_k, layers, times))
    found[0, 0] = 1.0
    for expert in range(experts - 1):
        late_LG = late_ELG[expert]
        found[expert + 1] = found[expert] * late_LG
        found[expert + 1, 1:] += found[expert, :-1] * (1.0 - late_LG)
    return found
