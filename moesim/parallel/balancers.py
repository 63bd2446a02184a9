"""Balancers of experts: which get copies, and which rank holds which; EPLB, by ranks' speeds, and a local search.

EPLB is written from the description of DeepSeek's policies (github.com/deepseek-ai/EPLB, README): experts with the
largest load per copy are copied until all slots are taken, and items are packed greedily, the heaviest first into the
lightest pack with room. The hierarchical policy first packs the router's groups of experts to nodes and copies inside
each node, so that limits on nodes per token keep their worth; the global one copies over all ranks. Sums are of 32-bit
floats, as there. Of experts with equal loads the one with the smaller index comes first; the published code sorts with
torch's unstable sort, which beyond 16 items orders equal ones by version and CPU, so that there its own results differ
as well.

On ranks of different speeds rows are in proportion to speed, so that all take about equally long: copies as by EPLB;
then slots are dealt, the heaviest first, each to the rank that would be done with it first among those with room, ties
to the first one. With equal speeds that is EPLB's global policy.

EPLB looks at rows alone. In the search slots change ranks while a layer is estimated to take less time: it costs what
its busiest rank computes and gets sent, and experts that tokens choose together are worth a place on one rank, or on
one node, where a token is sent once for both. The estimate is rough (rows and copies times a price each, nothing
overlapped); a search that finds nothing better returns one of its starts.

Legend: L layers, E experts, Z slots of all ranks (in the search they keep their experts and rows while they change
ranks), D ranks, J nodes, T tokens, N rows of a batch, I items or slots to deal, P packs, Y slots of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import Mesh
from moesim.scenario import Scenario
from moesim.scenario.placement import MadeFromRows
from moesim.scenario.pools import pools_of_ranks, relative_speeds

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Packing(NamedTuple):
    """Where every item of every row goes: its pack, and its place in the pack, int64 [N, I]."""

    pack_NI: Ints
    place_NI: Ints


def uses_hierarchy(*, num_groups: int, num_nodes: int) -> bool:
    """Whether groups of experts go to nodes as a whole: where they divide evenly; else the global policy holds."""
    return num_groups % num_nodes == 0


def balance_experts(
    load_LE: NDArray[np.generic], *, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Ints:
    """The expert in every slot, int64 [L, Z]; rank r holds slots r*Z/R to (r+1)*Z/R - 1, node by node.

    `load_LE`: rows of every expert, any scale. The sizes must divide: slots and nodes by ranks, experts by groups;
    every expert gets at least one slot (asserted: the checks of a scenario refuse other sizes).
    """
    load = np.asarray(load_LE, dtype=np.float32)
    assert num_slots % num_ranks == 0 and num_ranks % num_nodes == 0 and load.shape[1] % num_groups == 0
    assert num_slots >= load.shape[1], "every expert needs a slot"
    if not uses_hierarchy(num_groups=num_groups, num_nodes=num_nodes):
        num_groups = num_nodes = 1
    expert_of_local_LE = _experts_by_node(load, num_groups=num_groups, num_nodes=num_nodes)
    layers, per_node = len(load), load.shape[1] // num_nodes
    local_load_NE: Floats = np.take_along_axis(load, expert_of_local_LE, axis=1).reshape(-1, per_node)
    copied_NY = copy_heaviest(local_load_NE, num_slots=num_slots // num_nodes)
    copies_NE = count_copies(copied_NY, num_experts=per_node)
    each_NE: Floats = np.divide(local_load_NE, copies_NE, dtype=np.float32)
    slot_load_NY: Floats = np.take_along_axis(each_NE, copied_NY, axis=1)
    packing = pack_evenly(slot_load_NY, num_packs=num_ranks // num_nodes)
    slot_NY = packing.pack_NI * (num_slots // num_ranks) + packing.place_NI
    local_NY = np.empty_like(copied_NY)
    np.put_along_axis(local_NY, slot_NY, copied_NY, axis=1)
    local_LZ = (local_NY.reshape(layers, num_nodes, -1) + per_node * np.arange(num_nodes)[:, None]).reshape(layers, -1)
    return np.take_along_axis(expert_of_local_LE, local_LZ, axis=1)


def pack_evenly(weight_NI: Floats, *, num_packs: int) -> Packing:
    """Items into packs of equally many, the heaviest first into the lightest pack with room, ties to the first.

    Packs of one item take the items in order: nothing could be balanced.
    """
    rows, items = weight_NI.shape
    room, rest = divmod(items, num_packs)
    assert rest == 0, (items, num_packs)
    pack_NI, place_NI = np.empty((2, rows, items), dtype=np.int64)
    if room == 1:
        pack_NI[:], place_NI[:] = np.arange(items), 0
        return Packing(pack_NI, place_NI)
    order_NI = np.argsort(-weight_NI, axis=1, kind="stable")
    sorted_NI = np.take_along_axis(weight_NI, order_NI, axis=1)
    filled_NP = np.zeros((rows, num_packs), dtype=np.int64)
    open_NP = np.zeros((rows, num_packs), dtype=np.float32)  # the weight in each pack, infinite where it is full
    row_N = np.arange(rows)
    for turn in range(items):
        pack_N = open_NP.argmin(axis=1)
        place_N = filled_NP[row_N, pack_N]
        pack_NI[row_N, order_NI[:, turn]], place_NI[row_N, order_NI[:, turn]] = pack_N, place_N
        filled_NP[row_N, pack_N] = place_N + 1
        open_NP[row_N, pack_N] = np.where(place_N + 1 == room, np.inf, open_NP[row_N, pack_N] + sorted_NI[:, turn])
    return Packing(pack_NI, place_NI)


def copy_heaviest(load_NE: Floats, *, num_slots: int) -> Ints:
    """The experts in order, then, one by one, another copy of the one with the largest load per copy: [N, slots]."""
    rows, experts = load_NE.shape
    expert_NY = np.empty((rows, num_slots), dtype=np.int64)
    expert_NY[:, :experts] = np.arange(experts)
    copies_NE = np.ones((rows, experts), dtype=np.float32)
    row_N = np.arange(rows)
    each_NE = load_NE.copy()
    for slot in range(experts, num_slots):
        heaviest_N = each_NE.argmax(axis=1)
        expert_NY[:, slot] = heaviest_N
        copies_NE[row_N, heaviest_N] += 1
        each_NE[row_N, heaviest_N] = load_NE[row_N, heaviest_N] / copies_NE[row_N, heaviest_N]
    return expert_NY


def count_copies(expert_NY: Ints, *, num_experts: int) -> Ints:
    """How many slots of each row hold each expert, int64 [N, E]."""
    rows = len(expert_NY)
    bins = expert_NY + num_experts * np.arange(rows)[:, None]
    return np.bincount(bins.ravel(), minlength=rows * num_experts).reshape(rows, num_experts)


def _experts_by_node(load_LE: Floats, *, num_groups: int, num_nodes: int) -> Ints:
    """The experts of node 0, then of node 1 and so on, int64 [L, E]: groups packed to nodes by their loads."""
    layers, experts = load_LE.shape
    size = experts // num_groups
    load_LG = load_LE.reshape(layers, num_groups, size).sum(axis=2, dtype=np.float32)
    packing = pack_evenly(load_LG, num_packs=num_nodes)
    turn_LG = packing.pack_NI * (num_groups // num_nodes) + packing.place_NI
    group_in_turn_LG = np.argsort(turn_LG, axis=1)
    return np.asarray((group_in_turn_LG[:, :, None] * size + np.arange(size)).reshape(layers, experts))


def speeds_of_group(scenario: Scenario) -> NDArray[np.float64] | None:
    """The speed of every rank of an expert group that experts are placed by [D]; None where all are alike, or unheeded.

    Those that the placement states, or else the cluster's: of the ranks' kinds of GPU, by data sheets, times
    `cluster.speeds`. Where groups differ, which have one placement, it is the mean of their ranks in the same place.
    """
    placement, mesh = scenario.placement, scenario.parallelism
    if not isinstance(placement, MadeFromRows) or not placement.heeds_speeds:
        return None
    if placement.rank_speeds is not None:
        return np.array(placement.rank_speeds)
    factor_W = scenario.cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    speed_W = np.array(relative_speeds(scenario))[list(pools_of_ranks(scenario.cluster, mesh))]
    speed_W = speed_W / speed_W.max() if factor_W is None else factor_W * speed_W / speed_W.max()
    ranks = Mesh(mesh, scenario.cluster)
    groups = np.concatenate([np.array(ranks.expert_groups(stage)) for stage in range(mesh.pipeline)])
    speed_D = speed_W[groups].mean(axis=0)
    return None if np.allclose(speed_D, speed_D[0], rtol=1e-12) else speed_D


def place_by_speed(load_LE: NDArray[np.generic], *, num_slots: int, speed_D: NDArray[np.float64]) -> Ints:
    """The expert in every slot, int64 [L, Z]; each rank has as many slots as any other."""
    load = np.asarray(load_LE, dtype=np.float32)
    layers, experts = load.shape
    room, rest = divmod(num_slots, len(speed_D))
    assert rest == 0 and num_slots >= experts
    copied_LZ = copy_heaviest(load, num_slots=num_slots)
    each_LE = np.divide(load, count_copies(copied_LZ, num_experts=experts), dtype=np.float32)
    speed = speed_D.astype(np.float32)
    slots_LZ = np.empty_like(copied_LZ)
    for layer in range(layers):
        weight_I = each_LE[layer, copied_LZ[layer]]
        held: list[list[int]] = [[] for _ in speed_D]
        load_D = np.zeros(len(speed_D), dtype=np.float32)
        for item in np.argsort(-weight_I, kind="stable").tolist():
            ends_D = (load_D + weight_I[item]) / speed
            ends_D[[len(rank) == room for rank in held]] = np.inf
            rank = int(ends_D.argmin())
            held[rank].append(int(copied_LZ[layer, item]))
            load_D[rank] += weight_I[item]
        slots_LZ[layer] = np.concatenate(held)
    return slots_LZ


Array = NDArray[Any]

MEAN_SHARE = 0.1  # of a mean rank's traffic beside that of the busiest: more bytes are never free
HOT_TRIES = 0.5  # share of tries that begin at the rank with most rows


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds of a row that a rank computes, of a copy of a token to a rank, and of one to a node."""

    row: float
    rank_copy: float
    node_copy: float


@dataclass(eq=False)
class SearchState:
    """Where slots are, and what follows from it. reach_D, reach_M: tokens with a slot on the rank, on the node.

    speed_D: of the ranks against each other.
    """

    tokens_Z: Sequence[Ints]
    rank_Z: Ints
    node_D: Ints
    prices: Prices
    num_tokens: int
    speed_D: NDArray[np.float64]
    rows_D: Ints = field(init=False)
    count_DT: Array = field(init=False)
    count_JT: Array = field(init=False)
    reach_D: Ints = field(init=False)
    reach_J: Ints = field(init=False)

    def __post_init__(self) -> None:
        ranks, nodes = len(self.node_D), int(self.node_D.max()) + 1
        self.count_DT = np.zeros((ranks, self.num_tokens), dtype=np.int16)
        self.count_JT = np.zeros((nodes, self.num_tokens), dtype=np.int16)
        self.rows_D = np.zeros(ranks, dtype=np.int64)
        for tokens, rank in zip(self.tokens_Z, self.rank_Z.tolist(), strict=True):
            self.rows_D[rank] += len(tokens)
            self.count_DT[rank, tokens] += 1
            self.count_JT[self.node_D[rank], tokens] += 1
        self.reach_D = (self.count_DT > 0).sum(axis=1)
        self.reach_J = (self.count_JT > 0).sum(axis=1)

    @property
    def load_D(self) -> NDArray[np.float64]:
        """Rows of every rank over its speed."""
        return np.asarray(self.rows_D / self.speed_D)

    def cost(self) -> float:
        """Seconds of the layer."""
        copies = self.reach_D.max() + MEAN_SHARE * self.reach_D.mean()
        crossing = self.reach_J.max() + MEAN_SHARE * self.reach_J.mean()
        return float(
            self.prices.row * self.load_D.max() + self.prices.rank_copy * copies + self.prices.node_copy * crossing
        )

    def swap(self, one: int, other: int) -> None:
        """Two slots change ranks; a second time undoes it."""
        first, second = int(self.rank_Z[one]), int(self.rank_Z[other])
        mine, theirs = self.tokens_Z[one], self.tokens_Z[other]
        self.rows_D[first] += len(theirs) - len(mine)
        self.rows_D[second] += len(mine) - len(theirs)
        _exchange(self.count_DT, self.reach_D, (first, mine), (second, theirs))
        nodes = int(self.node_D[first]), int(self.node_D[second])
        if nodes[0] != nodes[1]:
            _exchange(self.count_JT, self.reach_J, (nodes[0], mine), (nodes[1], theirs))
        self.rank_Z[one], self.rank_Z[other] = second, first


def _exchange(count_DT: Array, reach_D: Ints, gives: tuple[int, Ints], takes: tuple[int, Ints]) -> None:
    """The tokens of two slots change places. Those of both are counted twice, which cancels: they stay as they are."""
    (first, mine), (second, theirs) = gives, takes
    both = np.concatenate([mine, theirs])
    for place, out, into in ((first, mine, theirs), (second, theirs, mine)):
        count_T = count_DT[place]
        before = np.count_nonzero(count_T[both])
        count_T[out] -= 1
        count_T[into] += 1
        reach_D[place] += np.count_nonzero(count_T[both]) - before


def search_ranks(
    tokens_Z: Sequence[Ints],
    starts: Sequence[Ints],
    *,
    node_D: Ints,
    speed_D: NDArray[np.float64],
    prices: Prices,
    num_tokens: int,
    tries: int,
    rng: np.random.Generator,
) -> tuple[Ints, float]:
    """The rank of every slot, with as many slots on each rank as in the starts, and its cost, no higher than theirs.

    `tokens_Z`: the tokens with a row in each slot. `starts`: ranks of all slots; each is improved by `tries`
    exchanges. `speed_D`: of the ranks against each other.
    """
    best: tuple[Ints, float] | None = None
    for start in starts:
        state = SearchState(tokens_Z, start.copy(), node_D, prices, num_tokens, speed_D)
        cost = _improve(state, tries=tries, rng=rng)
        if best is None or cost < best[1]:
            best = state.rank_Z, cost
    assert best is not None
    return best


def _improve(state: SearchState, *, tries: int, rng: np.random.Generator) -> float:
    cost, slots = state.cost(), len(state.rank_Z)
    from_hot_N = rng.random(tries) < HOT_TRIES
    one_N, other_N = rng.integers(slots, size=(2, tries)).tolist()
    for from_hot, one, other in zip(from_hot_N.tolist(), one_N, other_N, strict=True):
        if from_hot:
            hot_Z = np.flatnonzero(state.rank_Z == state.load_D.argmax())
            one = int(hot_Z[one % len(hot_Z)])
        if state.rank_Z[one] == state.rank_Z[other]:
            continue
        state.swap(one, other)
        changed = state.cost()
        if changed < cost:
            cost = changed
        else:
            state.swap(one, other)
    return cost
