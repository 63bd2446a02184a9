"""Tables over the tokens of a step: routed experts of the slowest rank, dispatch and combine, imbalance and drops.

Tokens are drawn from the scenario's routing: generated ones each by itself, as they belong to different requests, and
those of prompts in runs, as they follow each other. Where generated tokens were recorded apart (`decode_routing`), they
are drawn from there.

Legend: G numbers of tokens, M shares of generated tokens among them, N tokens, K experts of a token, R ranks,
E experts, Z slots of all ranks (rank r holds Z/R of them from r*Z/R on).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from math import gcd
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, build_fabric, prepare_combine, prepare_dispatch
from moesim.parallel.balancers import balance_experts
from moesim.parallel.mesh import GroupLayout
from moesim.parallel.traffic import node_stages, ring_copies, without_diagonal
from moesim.program.drawn_routing import obtain_trace
from moesim.program.scenario_fabric import dispatch_sharing
from moesim.scenario import BYTES_PER_ELEMENT, Routing, scenario_from_mapping
from moesim.scenario.routing import PopularityRouting, UniformRouting
from moesim.seeding import stream
from moesim.serving.pricing import Pricing
from moesim.serving.schema import ServingScenario
from moesim.trace import RoutingTrace

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SAMPLES = 6  # draws of tokens behind each number of tokens
MOST_DRAWN = 16_384
RECORDED = 16_384  # tokens of routing that are made
RUN = 256  # tokens of a prompt that follow each other
SHARES = (0.0, 0.5, 1.0)  # of generated tokens
UNREAD: dict[str, Any] = {  # keys that draws do not read: deployments that differ in them alone draw once a process
    "name": True,
    "fleet": True,
    "memory": True,
    "workload": {"arrivals", "requests", "slo", "prefixes", "priorities", "kv"},
    "engine": {
        "batching", "token_budget", "running", "chunked_prefill", "page", "host", "sampling", "preemption",
        "host_memory", "host_link", "prefix_cache", "balancing", "speculation", "two_batches",
    },
}  # fmt: skip


class ExpertCost(NamedTuple):
    """One layer: seconds of the slowest rank and of the exchange, max over mean of rows of ranks, share dropped."""

    seconds: float
    exchange: float
    imbalance: float
    dropped: float


class ExpertSlots:
    """The slots of one layer. `load_E`: rows by which they are placed, None: neighbours, without copies.

    Copies are placed by DeepSeek's global policy, and rows of an expert go to its copies in turn.
    """

    def __init__(self, load_E: NDArray[np.float64] | None, *, experts: int, slots: int, ranks: int) -> None:
        expert_Z = np.arange(experts)
        if load_E is not None:
            expert_Z = balance_experts(load_E[None], num_slots=slots, num_groups=1, num_nodes=1, num_ranks=ranks)[0]
        self.num_slots = len(expert_Z)
        self.is_plain = load_E is None
        self.slot_Z: IntArray = np.argsort(expert_Z, kind="stable")  # slots of expert 0, of expert 1 ...
        self.copies_E: IntArray = np.bincount(expert_Z, minlength=experts)
        self.first_E: IntArray = np.cumsum(self.copies_E) - self.copies_E

    def of(self, ids_NK: IntArray) -> IntArray:
        """[N, K] the slots that rows go to; -1 (dropped) stays."""
        if self.is_plain:
            return ids_NK
        flat = ids_NK.reshape(-1)
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        turn = np.arange(len(flat)) - np.searchsorted(ordered, ordered, side="left")
        slots = self.slot_Z[self.first_E[ordered] + turn % self.copies_E[ordered]]
        found = np.empty_like(flat)
        found[order] = np.where(ordered >= 0, slots, -1)
        return found.reshape(ids_NK.shape)


Place = TypeVar("Place")


def _blended(weight: float, low: Place, high: Place, of: Callable[[Place], ExpertCost]) -> ExpertCost:
    """What lies between two places of a table, `weight` of the way to the higher one; one alone where it is there."""
    if weight in (0.0, 1.0):
        return of(high if weight else low)
    pairs = zip(of(low), of(high), strict=True)
    return ExpertCost(*[(1.0 - weight) * below + weight * above for below, above in pairs])


class Drawn(NamedTuple):
    """What was drawn, and the sources of kernel durations that it rests on."""

    cost: ExpertCost
    sources: set[str]


def is_made_of_itself(scenario: ServingScenario) -> bool:
    """Whether routing and kernels are all in the scenario or ship: no file that may change meanwhile, no training."""
    kinds = PopularityRouting | UniformRouting
    routing, decode = scenario.routing, scenario.decode_routing
    is_drawn = isinstance(routing, kinds) and isinstance(decode or routing, kinds)
    return is_drawn and scenario.compute.profile is None and scenario.cluster.fabric.file is None


@lru_cache(maxsize=32)
def _drawn_alike(scenario: str) -> dict[tuple[int, float], Drawn]:
    """What deployments have drawn whose scenarios have this text, by tokens and share; they add to it."""
    del scenario
    return {}


class ExpertTables:
    """One layer by tokens of all ranks that step together and the share of generated ones; filled where it is asked."""

    def __init__(self, scenario: ServingScenario, pricing: Pricing) -> None:
        self.scenario, self.model, self.pricing = scenario, scenario.model, pricing
        self.together = scenario.parallelism.expert > 1
        groups = scenario.parallelism.data if self.together else 1
        rows = 1 + (len(scenario.engine.speculation.acceptance) if scenario.engine.speculation else 0)
        most = max(scenario.engine.token_budget, rows) * groups
        points = int(np.ceil(1.5 * np.log2(most))) + 1
        self.total_G: list[int] = np.unique(np.geomspace(1, most, points).round()).astype(int).tolist()
        self.fabric: Fabric = build_fabric(scenario.cluster)
        self._found: dict[tuple[int, float], ExpertCost] = {}
        self._drawn: dict[tuple[int, float], Drawn] = {}
        if is_made_of_itself(scenario):
            self._drawn = _drawn_alike(scenario.model_dump_json(exclude=UNREAD))

    def at(self, total: float, generated: float) -> ExpertCost:
        """A step of `total` tokens, of which `generated` are generated."""
        share = min(1.0, generated / max(total, 1.0))
        below = 0 if share < SHARES[1] else 1
        weight = (share - SHARES[below]) / (SHARES[below + 1] - SHARES[below])
        return _blended(weight, SHARES[below], SHARES[below + 1], lambda place: self._between(total, place))

    def _between(self, total: float, share: float) -> ExpertCost:
        """Interpolated between the two nearest numbers of tokens."""
        right = min(max(bisect_left(self.total_G, total), 1), len(self.total_G) - 1) if len(self.total_G) > 1 else 0
        left = max(right - 1, 0)
        low, high = self.total_G[left], self.total_G[right]
        weight = min(max((total - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return _blended(weight, low, high, lambda place: self._of(place, share))

    @cached_property
    def prompts(self) -> RoutingTrace:
        """How tokens of prompts choose."""
        return self._trace(self.scenario.routing)

    @cached_property
    def generated(self) -> RoutingTrace:
        """How generated tokens choose."""
        routing = self.scenario.decode_routing
        return self.prompts if routing is None else self._trace(routing)

    def _trace(self, routing: Routing) -> RoutingTrace:
        trace = obtain_trace(scenario_from_mapping(_as_training(self.scenario, routing)))
        assert trace is not None, "a model with experts has routing"
        return trace

    def _of(self, total: int, share: float) -> ExpertCost:
        """At a place of the table: means over draws and layers."""
        if (total, share) not in self._found:
            if (total, share) not in self._drawn:
                with self.pricing.noting() as sources:
                    self._drawn[total, share] = Drawn(self._drawn_mean(total, share), sources)
            self._found[total, share], sources = self._drawn[total, share]
            self.pricing.note(sources)
        return self._found[total, share]

    def _drawn_mean(self, total: int, share: float) -> ExpertCost:
        mesh = self.scenario.parallelism
        drawn = min(total, MOST_DRAWN)  # more of them are as many times these
        generated = round(drawn * share)
        rng = stream(self.scenario.seed, "serving routing", total, round(10 * share))
        found = np.zeros((SAMPLES, 4))
        for sample in range(SAMPLES):
            ids_NK = self._tokens(sample, generated, drawn - generated, rng)
            dropped = self._drop(ids_NK)
            slots = self._slots[sample]
            ids_NK = slots.of(ids_NK)
            rows_E = np.bincount(ids_NK[ids_NK >= 0], minlength=slots.num_slots)
            rows_E = np.rint(rows_E * (total / drawn)).astype(np.int64)
            rows_RE = rows_E.reshape(mesh.expert, -1)
            rank_R = rows_RE.sum(axis=1)
            exchange = 0.0
            if self.together:
                exchange = self._exchange(
                    ids_NK[rng.permutation(drawn)], times=total / drawn, per_rank=slots.num_slots // mesh.expert
                )
            imbalance = float(rank_R.max() / max(rank_R.mean(), 1e-9))
            found[sample] = (self._grouped(rows_RE), exchange, imbalance, dropped)
        means = ExpertCost(*found.mean(axis=0).tolist())
        return means._replace(seconds=means.seconds + self._router(total / mesh.expert, means.imbalance))

    def _tokens(self, sample: int, generated: int, prompts: int, rng: np.random.Generator) -> IntArray:
        """[N, K] choices in one layer of so many generated tokens and tokens of prompts."""
        parts = [
            _drawn(self.generated, sample, generated, 1, rng),
            _drawn(self.prompts, sample, prompts, RUN, rng),
        ]
        return np.concatenate(parts)

    def drawn_rows(self, total: int, generated: int, rng: np.random.Generator) -> FloatArray:
        """Rows in one layer in a step of so many tokens, one draw of them: [R] of ranks that share experts, else [E].

        Of more than MOST_DRAWN tokens so many are drawn.
        """
        drawn = min(total, MOST_DRAWN)
        of_answers = round(generated * drawn / max(total, 1))
        ids_NK = self._tokens(0, of_answers, drawn - of_answers, rng)
        self._drop(ids_NK)
        slots = self._slots[0]
        ids_NK = slots.of(ids_NK)
        rows_E = np.bincount(ids_NK[ids_NK >= 0], minlength=slots.num_slots) * (total / max(drawn, 1))
        return np.asarray(rows_E.reshape(self.scenario.parallelism.expert, -1).sum(axis=1) if self.together else rows_E)

    def _drop(self, ids_NK: IntArray) -> float:
        """Rows beyond the capacity of their expert are marked -1; the share that they are."""
        factor = self.scenario.engine.capacity_factor
        if factor is None:
            return 0.0
        most = int(np.ceil(factor * ids_NK.size / self.model.experts))
        flat = ids_NK.reshape(-1)  # a view: what is dropped is marked in place
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        place = np.arange(len(flat)) - np.searchsorted(ordered, ordered, side="left")
        over = order[(place >= most) & (ordered >= 0)]
        flat[over] = -1
        return len(over) / max(1, len(flat))

    def _router(self, local: float, imbalance: float) -> float:
        """Router, and the small kernels around the experts, of a rank's tokens and of the fullest rank's rows."""
        model, pricing = self.model, self.pricing
        tokens = max(local, 1.0)
        rows = max(local * model.top_k * imbalance, 1.0)
        kernels = pricing.lists.experts(model, tokens, rows, self._width)
        return pricing.gemm(tokens, model.hidden, model.experts, wide=True) + pricing.small(kernels)

    @property
    def _width(self) -> int:
        return self.model.expert_intermediate // (1 if self.together else self.scenario.parallelism.tensor)

    def _grouped(self, rows_RE: IntArray) -> float:
        """Seconds of the slowest rank's experts."""
        model = self.model
        sizes = {"hidden": model.row_width, "width": self._width, "matrices": model.ffn_matrices}
        return float(self.pricing.experts(rows_RE, **sizes).max())

    @cached_property
    def _slots(self) -> list[ExpertSlots]:
        """Where experts and their copies are, for each sample."""
        engine, experts, ranks = self.scenario.engine, self.model.experts, self.scenario.parallelism.expert
        slots, found = experts + engine.redundant_experts, []
        for sample in range(SAMPLES):
            load_E = None
            if self.together and (engine.redundant_experts or engine.expert_placement == "eplb"):
                traces = (self.prompts, self.generated)
                counts = [np.bincount(_layer(each, sample).reshape(-1), minlength=experts) for each in traces]
                load_E = np.sum(counts, axis=0, dtype=float)
            found.append(ExpertSlots(load_E, experts=experts, slots=slots, ranks=ranks))
        return found

    def _exchange(self, drawn_NK: IntArray, *, times: float, per_rank: int) -> float:
        """Dispatch and combine of so many times these tokens (their slots), which lie evenly on the ranks."""
        model, mesh, dispatch = self.model, self.scenario.parallelism, self.scenario.dispatch
        ranks, tokens, layout = mesh.expert, len(drawn_NK), self._layout
        source_N = np.arange(tokens) * ranks // max(tokens, 1)
        target_NK = np.where(drawn_NK >= 0, drawn_NK // per_rank, -1)
        once_NK = target_NK if dispatch.deduplicate == "per_expert" else _first_of_each(target_NK)
        copies_RR = _copies(source_N, once_NK, ranks)
        stages: tuple[FloatArray, ...] = (without_diagonal(copies_RR),)
        if dispatch.deduplicate == "all_ranks":
            stages = (ring_copies(tokens / ranks, ranks),)
        if dispatch.deduplicate == "per_node" and layout.num_nodes > 1:
            node_NK = np.where(target_NK >= 0, layout.node_of_rank_R[target_NK], -1)
            stages = node_stages(copies_RR, _copies(source_N, _first_of_each(node_NK), ranks, layout.num_nodes), layout)
        seconds = 0.0
        prepare: Callable[..., Any]
        ways = ((prepare_dispatch, dispatch.dtype), (prepare_combine, dispatch.combine_dtype))
        for prepare, dtype in ways:
            prepared = prepare(
                self.fabric,
                stages,
                token_bytes=times * model.row_width * BYTES_PER_ELEMENT[dtype],
                algorithm=dispatch.algorithm,
                sms=dispatch.sms(self.scenario.cluster.main_pool.spec.sm_count),
                ranks=np.arange(ranks),
                model=dispatch_sharing(self.scenario.network, self.fabric, np.arange(ranks), dispatch.algorithm),
            )
            seconds += float(prepared.alone_R.max())
        return seconds

    @cached_property
    def _layout(self) -> GroupLayout:
        sizes = self.scenario.cluster.domain_sizes
        node_R = np.repeat(np.arange(len(sizes)), sizes)[: self.scenario.parallelism.expert]
        first_R = np.searchsorted(node_R, node_R, side="left")
        return GroupLayout(node_R, np.arange(len(node_R)) - first_R)


def _layer(trace: RoutingTrace, layer: int) -> IntArray:
    """[N, K] choices of all recorded tokens in one layer."""
    ids_LSTK = trace.final.expert_ids_LSTK
    return np.asarray(ids_LSTK[layer % len(ids_LSTK)].reshape(-1, ids_LSTK.shape[-1]))


def _drawn(trace: RoutingTrace, layer: int, count: int, run: int, rng: np.random.Generator) -> IntArray:
    """[count, K] choices of tokens in runs of `run` that follow each other in the trace."""
    ids_NK = _layer(trace, layer)
    starts = rng.integers(0, len(ids_NK), -(-count // run))
    places = (starts[:, None] + np.arange(run)).reshape(-1)[:count] % len(ids_NK)
    return np.asarray(ids_NK[places].astype(np.int64))


def _first_of_each(target_NK: IntArray) -> IntArray:
    """The targets of each token, every one once; the others are -1."""
    ordered_NK = np.sort(target_NK, axis=1)
    ordered_NK[:, 1:][ordered_NK[:, 1:] == ordered_NK[:, :-1]] = -1
    return ordered_NK


def _copies(source_N: IntArray, target_NK: IntArray, ranks: int, targets: int | None = None) -> FloatArray:
    """[R, targets] copies from each rank to each target; -1 goes nowhere."""
    targets = targets or ranks
    places_NK = source_N[:, None] * targets + target_NK
    return np.bincount(places_NK[target_NK >= 0], minlength=ranks * targets).reshape(ranks, targets).astype(float)


def _as_training(scenario: ServingScenario, routing: Routing) -> Mapping[str, Any]:
    """A training scenario with the same model, routing and experts per rank: what makes its routing."""
    expert = gcd(scenario.parallelism.expert, scenario.model.experts)  # with copies the ranks need not divide them
    plain = scenario.model_dump(mode="json", exclude_none=True)
    return {
        "schema_version": 1,
        "name": scenario.name,
        "model": scenario.model.model_dump(mode="json"),
        "routing": routing.model_dump(mode="json", exclude_none=True),
        "cluster": plain["cluster"],
        "parallelism": {"data": expert, "expert": expert},
        "workload": {
            "kind": "training",
            "sequence_length": 1_024,
            "micro_batch": 1,
            "global_batch": max(expert, RECORDED // 1_024 // expert * expert),
        },
        "memory": {"check": "warn"},
        "seed": scenario.seed,
    }
