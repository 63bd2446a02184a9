"""Traces whose load per rank is stated: how evenly the ranks of an expert group are loaded, and nothing else.

Legend: L layers, S sequences, T tokens per sequence, K selections, E experts, D ranks of an expert group, P phases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.trace.quotas import draw_with_quotas
from moesim.trace.record import Array, Json, RoutingTrace
from moesim.trace.synthetic import drawn_trace


@dataclass(frozen=True, kw_only=True)
class TraceSize:
    """How large a trace is to be: layers, sequences, their length, and the pieces that ranks share of a sequence.

    Loads hold in every piece, so also for groups of ranks that hold a part of the sequences alone.
    """

    num_layers: int
    num_sequences: int
    sequence_length: int
    pieces_per_sequence: int = 1


def balancedness_shares(value: float, *, rank_of_expert_E: Array, hot_rank: int) -> Array:
    """Share of all rows that every expert gets, [E], where the mean over the ranks' rows is `value` times the most.

    The hot rank has 1 / (D value) of the rows, all others the same, and the experts of a rank the same.
    """
    experts_D = np.bincount(rank_of_expert_E)
    num_ranks = len(experts_D)
    hot = 1.0 / (num_ranks * value)
    shares_D = np.full(num_ranks, (1.0 - hot) / max(1, num_ranks - 1))
    shares_D[hot_rank] = hot
    return np.asarray(np.maximum(shares_D, 0.0)[rank_of_expert_E] / experts_D[rank_of_expert_E])


def balancedness_trace(
    router: RouterShape, *, value: float, rank_of_expert_E: Array, size: TraceSize, seed: int
) -> RoutingTrace:
    """K distinct experts per token such that mean / max of the rows per rank is `value` in every sequence.

    To whole rows: at 1 no rank gets a row more than another where the rows divide, and one more where they do not.
    Which rank is hot is drawn for every layer. `value` is within what the layout reaches
    (`moesim.scenario.routing.lowest_balancedness`).
    """
    num_ranks = int(rank_of_expert_E.max()) + 1

    def draw(layer: int) -> Array:
        rng = stream(seed, "balancedness-trace", layer)
        hot_rank = int(rng.integers(num_ranks))
        return draw_with_quotas(
            balancedness_shares(value, rank_of_expert_E=rank_of_expert_E, hot_rank=hot_rank),
            tokens_B=_tokens_of_pieces(size),
            top_k=router.top_k,
            order_E=np.argsort(rank_of_expert_E, kind="stable"),
            num_groups=router.num_groups,
            group_limit=router.group_limit,
            rng=rng,
        )

    made_from: Mapping[str, Json] = {"source": "balancedness", "value": value, "ranks": num_ranks}
    return drawn_trace(
        replace(router, kind="balancedness"),
        np.stack([draw(layer) for layer in range(size.num_layers)]),
        shape=(size.num_layers, size.num_sequences, size.sequence_length),
        seed=seed,
        made_from=made_from,
    )


def _tokens_of_pieces(size: TraceSize) -> Array:
    """Tokens of every piece of all sequences in order."""
    length = size.sequence_length // size.pieces_per_sequence
    return np.full(size.num_sequences * size.pieces_per_sequence, length)
