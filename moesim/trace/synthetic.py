"""Traces of routers without affinities: uniform, by given popularity, or with a stated load per rank.

The last say how evenly the ranks of an expert group are loaded, and nothing else. Gates are 1/K. Affinities are random
numbers: they mean nothing but let capacity, where it drops the lowest affinity first, drop at random and not always the
last tokens. Legend: L layers, S sequences, T tokens per sequence, K selections, E experts, D ranks of an expert group,
P phases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import UserError
from moesim.scenario.routers import StressFacts, StressLayout
from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.trace.draws import (
    draw_by_weight_in_groups,
    draw_distinct_in_groups,
    draw_with_quotas,
    shares_of_counts,
    weights_of_shares,
)
from moesim.trace.record import NO_EXPERT, Array, Json, RoutingTrace, TraceStep


def uniform_trace(
    router: RouterShape, *, num_layers: int, num_sequences: int, sequence_length: int, seed: int
) -> RoutingTrace:
    """K distinct experts per token, all equally likely; within M random groups when the router has a limit."""

    def draw(layer: int, num_tokens: int) -> Array:
        return draw_distinct_in_groups(
            num_tokens,
            num_experts=router.num_experts,
            top_k=router.top_k,
            num_groups=router.num_groups,
            group_limit=router.group_limit,
            rng=stream(seed, "uniform-trace", layer),
        )

    shape = (num_layers, num_sequences, sequence_length)
    made_from: dict[str, Json] = {
        "source": "uniform",
        "rests_on": "drawn uniformly",
        "rests_on_how": "no router: all experts are equally likely, which is a lower bound of imbalance",
    }
    return _build(replace(router, kind="uniform"), draw, shape, seed=seed, made_from=made_from)


def popularity_trace(
    router: RouterShape,
    *,
    counts: Sequence[float] | Sequence[Sequence[float]],
    num_layers: int,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    counts_of: str | None = None,
) -> RoutingTrace:
    """K distinct experts per token, each expert with the share of the tokens that its measured count says.

    counts: one list of E for all layers, or one list per layer (then `num_layers` of them); `counts_of` says whose.
    They are drawn one after the other by weights that give these shares (`moesim.trace.draws`); a share above 1
    becomes 0.999. With a group limit the counts themselves are the weights, which flattens them, and the experts come
    from the M groups with the highest perturbed maximum, as in `deepseek_v2`.
    Raises UserError when a list has not E entries or too few of them are above zero.
    """
    counts_LE = _counts_per_layer(counts, router=router, num_layers=num_layers)
    weights_LE = counts_LE
    if router.num_groups <= 1 or router.group_limit >= router.num_groups:
        layers_LE, layer_L = np.unique(counts_LE, axis=0, return_inverse=True)
        weights_LE = weights_of_shares(shares_of_counts(layers_LE, top_k=router.top_k), top_k=router.top_k)[layer_L]

    def draw(layer: int, num_tokens: int) -> Array:
        return draw_by_weight_in_groups(
            num_tokens,
            weights_E=weights_LE[layer],
            top_k=router.top_k,
            num_groups=router.num_groups,
            group_limit=router.group_limit,
            rng=stream(seed, "popularity-trace", layer),
        )

    shape = (num_layers, num_sequences, sequence_length)
    whose = "whose is not said (routing.source)" if counts_of is None else f"of {counts_of}"
    made_from: dict[str, Json] = {
        "source": "popularity",
        "counts": counts_LE.tolist(),
        "rests_on": "counts of experts",
        "rests_on_how": f"{whose}; tokens are drawn by them: which experts go together is not known",
    }
    return _build(replace(router, kind="popularity"), draw, shape, seed=seed, made_from=made_from)


def _build(
    router: RouterShape,
    draw: Callable[[int, int], Array],
    shape: tuple[int, int, int],
    *,
    seed: int,
    made_from: dict[str, Json],
) -> RoutingTrace:
    num_layers, num_sequences, sequence_length = shape
    if router.top_k > router.num_experts:
        raise UserError(f"top_k = {router.top_k} exceeds the model's {router.num_experts} experts; lower model.top_k")
    ids_LTK = np.stack([draw(layer, num_sequences * sequence_length).astype(np.int16) for layer in range(num_layers)])
    return drawn_trace(router, ids_LTK, shape=shape, seed=seed, made_from=made_from)


def drawn_trace(
    router: RouterShape, ids_LTK: Array, *, shape: tuple[int, int, int], seed: int, made_from: Mapping[str, Json]
) -> RoutingTrace:
    """A trace of drawn experts: `shape` is (layers, sequences, tokens per sequence), `made_from` says how.

    Tokens with -1 for experts are padding.
    """
    full_shape = (*shape, router.top_k)
    affinities = stream(seed, "trace-affinities").random(full_shape, dtype=np.float32)
    ids_LSTK = ids_LTK.astype(np.int16, copy=False).reshape(full_shape)
    gates = np.full(full_shape, 1.0 / router.top_k, dtype=np.float32)
    if (padding := ids_LSTK == NO_EXPERT).any():
        affinities[padding] = gates[padding] = 0.0
    step = TraceStep(
        step=0,
        expert_ids_LSTK=ids_LSTK,
        affinities_LSTK=affinities.astype(np.float16).astype(np.float32),
        gates_LSTK=gates,
    )
    return RoutingTrace(router=router, steps=(step,), provenance={**made_from, "seed": seed})


def _counts_per_layer(
    counts: Sequence[float] | Sequence[Sequence[float]], *, router: RouterShape, num_layers: int
) -> Array:
    rows = [list(row) for row in counts if isinstance(row, Sequence)]
    if not rows:
        rows = [[float(count) for count in counts if not isinstance(count, Sequence)]] * num_layers
    if len(rows) != num_layers:
        raise UserError(
            f"routing.counts has {len(rows)} lists for {num_layers} layers; give one list, or one per layer"
        )
    needed = router.top_k
    if router.num_groups > 1:  # any choice of groups must hold top_k experts
        needed = router.num_experts
    for layer, row in enumerate(rows):
        if len(row) != router.num_experts:
            raise UserError(
                f"routing.counts has {len(row)} entries in list {layer}; the model has {router.num_experts} experts"
            )
        if sum(count > 0 for count in row) < needed:
            raise UserError(
                f"routing.counts needs at least {needed} counts above 0 in list {layer}; add 1 to each count"
            )
    return np.array(rows, dtype=np.float64)


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
