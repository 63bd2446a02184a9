"""Traces whose load per rank is stated: how evenly the ranks of an expert group are loaded, and nothing else.

Legend: L layers, S sequences, T tokens per sequence, K selections, E experts, D ranks of an expert group, P phases.
"""

from dataclasses import dataclass, replace

import numpy as np

from moesim.scenario.routing import RouterShape
from moesim.scenario.stress import StressFacts, StressLayout
from moesim.seeding import stream
from moesim.trace.quotas import draw_with_quotas
from moesim.trace.record import NO_EXPERT, Array, RoutingTrace
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, sequences, tokens of a sequence."""
        return self.num_layers, self.num_sequences, self.sequence_length

    @property
    def piece_length(self) -> int:
        """Tokens of a piece."""
        return self.sequence_length // self.pieces_per_sequence

    def tokens_of_pieces(self, live_S: Array) -> Array:
        """Routed tokens of the pieces of all sequences in order; the first `live_S` of each sequence is routed."""
        first_V = np.arange(self.pieces_per_sequence) * self.piece_length
        live_S1 = np.rint(live_S * self.sequence_length).astype(np.int64)[:, None]
        return np.asarray(np.clip(live_S1 - first_V, 0, self.piece_length).reshape(-1))


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
        shares_E = balancedness_shares(value, rank_of_expert_E=rank_of_expert_E, hot_rank=hot_rank)
        tokens_B = size.tokens_of_pieces(np.ones(size.num_sequences))
        return _draw(router, shares_E, tokens_B=tokens_B, rank_of_expert_E=rank_of_expert_E, rng=rng)

    return drawn_trace(
        replace(router, kind="balancedness"),
        np.stack([draw(layer) for layer in range(size.num_layers)]),
        shape=size.shape,
        seed=seed,
        made_from={
            "source": "balancedness",
            "rests_on": f"balancedness {value:g}",
            "rests_on_how": f"synthetic: stated for {num_ranks} ranks, not measured",
        },
    )


def stress_trace(
    router: RouterShape, *, facts: StressFacts, severity: float, rank_of_expert_E: Array, size: TraceSize, seed: int
) -> RoutingTrace:
    """The pattern `facts` on the ranks of a layout: its loads to whole rows in every sequence, its padding, its phases.

    Padding stands at the end of a sequence. The trace has at least `size.num_sequences`, a multiple of the phases.
    """
    layout = StressLayout(rank_of_expert_E=rank_of_expert_E, top_k=router.top_k)
    per_phase = -(-size.num_sequences // facts.num_phases)
    size = replace(size, num_sequences=per_phase * facts.num_phases)
    live_S = np.array([facts.live_share(number, severity=severity) for number in range(size.num_sequences)])
    tokens_PB = size.tokens_of_pieces(live_S).reshape(facts.num_phases, -1)
    slots_PBT = np.arange(size.piece_length) < tokens_PB[..., None]

    def draw(layer: int) -> Array:
        rng = stream(seed, "stress-trace", layer)
        order_E = rng.permutation(router.num_experts)
        ids_PBTK = np.full((*slots_PBT.shape, router.top_k), NO_EXPERT)
        for phase, tokens_B in enumerate(tokens_PB):
            shares_E = facts.shares_E(layout, order_E=order_E, phase=phase, severity=severity)
            ids_PBTK[phase, slots_PBT[phase]] = _draw(
                router, shares_E, tokens_B=tokens_B, rank_of_expert_E=rank_of_expert_E, rng=rng
            )
        return ids_PBTK.reshape(-1, router.top_k)

    trace = drawn_trace(
        replace(router, kind="stress"),
        np.stack([draw(layer) for layer in range(size.num_layers)]),
        shape=size.shape,
        seed=seed,
        made_from={
            "source": "stress",
            "rests_on": f"stress, {facts.name} at severity {severity:g}",
            "rests_on_how": f"synthetic: a pattern on {layout.num_ranks} ranks, not measured",
        },
    )
    return replace(trace, num_phases=facts.num_phases)


def _draw(
    router: RouterShape, shares_E: Array, *, tokens_B: Array, rank_of_expert_E: Array, rng: np.random.Generator
) -> Array:
    return draw_with_quotas(
        shares_E,
        tokens_B=tokens_B,
        top_k=router.top_k,
        order_E=np.argsort(rank_of_expert_E, kind="stable"),
        num_groups=router.num_groups,
        group_limit=router.group_limit,
        rng=rng,
    )
