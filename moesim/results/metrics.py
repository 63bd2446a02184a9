"""The numbers of a step: one definition each (formulas: spec, section 3).

Those of traffic and spans come first, then throughput, utilisation and money. MFU and price count every token with all
K of its experts, whatever is dropped: the less is computed, the better they look. In the section `effective` a token
counts as far as its rows were computed, and a FLOP where it was spent. Last is whether the router is balanced at all:
one that nobody asked to balance is not what anybody would train at scale.

Legend: S samples, B micro-batches, R ranks of a group, D the same as destinations, E experts, C categories, W world.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel import ExpertPlacement, Mesh, TrafficSample
from moesim.parallel.memory.report import MemoryReport
from moesim.parallel.traffic import stage_copies, token_bytes
from moesim.scenario import Contiguous, RouterShape, Scenario, TrainRouting
from moesim.scenario.flops import forward_flops_per_token, model_flops_per_token
from moesim.scenario.pools import kinds_of_pools, pools_of_ranks, rank_counts
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import StatedRouting
from moesim.trace import RoutingTrace
from moesim.trace.metrics import imbalance, uniform_floor

FloatArray = NDArray[np.float64]

PASSES = 2  # forward and backward: the gradient of combine travels as a dispatch, that of dispatch as a combine


def num_passes(scenario: Scenario) -> int:
    """How often a micro-batch is dispatched and combined in each layer; full recomputation repeats the forward pass."""
    return PASSES + (scenario.workload.recompute == "full")


RANGE = (0.05, 0.95)


def mean_and_range(plain_S: FloatArray, bootstrap_S: FloatArray) -> tuple[float, list[float] | None]:
    """Mean of the plain samples and the 90 % range of the bootstrap samples, recentred on that mean: chance of routing.

    None without bootstrap samples: a trace that is too small gives no range.
    """
    mean = float(plain_S.mean())
    if not len(bootstrap_S):
        return mean, None
    deviations = np.quantile(bootstrap_S - bootstrap_S.mean(), RANGE)
    return mean, [mean + float(deviations[0]), mean + float(deviations[1])]


def mean_imbalance(loads: NDArray[Any]) -> float:
    """max / mean over the last axis, averaged over the others."""
    return float(imbalance(loads).mean())


class TrafficFacts:
    """Sums over the plain samples of one scenario: loads, copies and bytes of one step."""

    def __init__(self, scenario: Scenario, samples: Sequence[TrafficSample]) -> None:
        self.scenario = scenario
        # How many micro-batches of the step hold the sequences of each drawn one.
        drawn = scenario.num_drawn_micro_batches
        self.uses_of = {
            count: np.bincount(np.arange(count) % drawn, minlength=drawn) for count in scenario.micro_batches_of_pools
        }
        pools = pools_of_ranks(scenario.cluster, scenario.parallelism) if len(scenario.cluster.pools) > 1 else ()
        groups = Mesh(scenario.parallelism, scenario.cluster).expert_groups()
        self.batches_of_group = [
            scenario.micro_batches_of_pools[pools[int(ranks_R[0])] if pools else 0] for ranks_R in groups
        ]
        places = enumerate(scenario.stage_layers)
        self.place_of_layer = {
            layer: stage % scenario.parallelism.pipeline for stage, layers in places for layer in layers
        }
        self.num_groups = scenario.parallelism.stage_ranks // scenario.parallelism.expert
        self.num_layers = scenario.model.moe_layers
        placement = samples[0].placement
        self.imbalance: dict[str, list[float]] = {"expert": [], "rank_rows": [], "rank_bytes": [], "balancedness": []}
        self.expert_load_LE = np.zeros((self.num_layers, scenario.model.experts))
        self.rank_load_LR = np.zeros((self.num_layers, scenario.parallelism.expert))
        self.copies_RD = np.zeros((scenario.parallelism.expert,) * 2)  # group 0, all layers and micro-batches
        self.remote_node_copies = self.own_node_copies = 0.0
        # Rows of ranks if each had neighbouring experts: what another placement is compared with.
        self.contiguous: list[float] = []
        self.compares = scenario.placement != Contiguous() and scenario.model.experts % scenario.parallelism.expert == 0
        self.routed = self.dropped = self.padded = 0
        for sample in samples:
            for group in range(self.num_groups):
                for layer in range(self.num_layers):
                    self._add(sample, group, layer, placement)
        self.num_samples = len(samples)

    def _add(self, sample: TrafficSample, group: int, layer: int, placement: ExpertPlacement) -> None:
        place = self.place_of_layer[self.scenario.model.moe_layer_numbers[layer]]
        arrays, uses_B = sample.arrays(group, layer, stage=place), self.uses_of[self.batches_of_group[group]]
        rows_BE, held = arrays.computed_BE, sample.map_of(layer)
        if held is not None:
            rows_BE = held.rows_of_experts(rows_BE)
        rank_rows_BD = arrays.slot_rows_BDP(placement).sum(axis=2)
        deduplicate, tokens = self.scenario.dispatch.deduplicate, self.scenario.tokens_per_rank
        stages = stage_copies(arrays, placement, deduplicate, tokens=tokens)
        sent_BRD = np.sum(stages, axis=0)
        self.expert_load_LE[layer] += uses_B @ rows_BE
        self.rank_load_LR[layer] += uses_B @ rank_rows_BD
        self.imbalance["expert"].append(mean_imbalance(rows_BE))
        self.imbalance["rank_rows"].append(mean_imbalance(rank_rows_BD))
        self.imbalance["balancedness"].append(float((1.0 / imbalance(rank_rows_BD)).mean()))
        if self.compares:
            self.contiguous.append(mean_imbalance(self._by_neighbours(rows_BE)))
        self.imbalance["rank_bytes"].append(mean_imbalance(sent_BRD.sum(axis=1)))
        sent_RD = np.einsum("b,brd->rd", uses_B, sent_BRD)
        own_node = float(sent_RD[arrays.layout.same_node_RD].sum())
        self.own_node_copies += own_node
        self.remote_node_copies += float(sent_RD.sum()) - own_node
        self.routed += int(uses_B @ arrays.routed_rows_B)
        self.dropped += int(uses_B @ arrays.dropped_rows_B)
        self.padded += int(uses_B @ arrays.padded_rows_B)
        if group == 0:
            self.copies_RD += sent_RD

    def _by_neighbours(self, rows_BE: NDArray[Any]) -> NDArray[Any]:
        """Rows of ranks with neighbouring experts."""
        return np.asarray(rows_BE.reshape(len(rows_BE), self.scenario.parallelism.expert, -1).sum(axis=2))

    @property
    def contiguous_rank_rows(self) -> float | None:
        """max / mean rows of ranks, as `imbalance["rank_rows"]`, if each had neighbouring experts without copies."""
        if self.scenario.placement == Contiguous():
            return float(np.mean(self.imbalance["rank_rows"]))
        return float(np.mean(self.contiguous)) if self.compares else None

    @property
    def contiguous_load_LR(self) -> FloatArray | None:
        """The rows of the whole step on each rank likewise; None where experts do not spread evenly over ranks."""
        return self._by_neighbours(self.expert_load_LE) if self.compares else None

    @property
    def dropped_share(self) -> float:
        """Dropped rows / routed rows."""
        return self.dropped / self.routed if self.routed else 0.0

    @property
    def kept_share(self) -> float:
        """Computed rows without padding / (tokens * K): below 1 where rows are dropped, or a router chose fewer."""
        scenario = self.scenario
        asked = scenario.model.top_k * scenario.tokens_per_step * self.num_layers * self.num_samples
        return (self.routed - self.dropped) / asked if asked else 1.0

    @property
    def padded_share(self) -> float:
        """Padded rows / computed rows."""
        computed = self.routed - self.dropped + self.padded
        return self.padded / computed if computed else 0.0

    def communication(self) -> dict[str, float]:
        """Bytes of one step over all ranks, layers and both passes; a rank's copy to itself is no traffic."""
        dispatch, hidden = self.scenario.dispatch, self.scenario.model.row_width
        out, back = token_bytes(hidden, dispatch.dtype), token_bytes(hidden, dispatch.combine_dtype)
        per_step = num_passes(self.scenario) / self.num_samples
        tokens = self.scenario.tokens_per_step * self.num_layers * self.num_samples
        return {
            "dispatch_bytes": (self.own_node_copies + self.remote_node_copies) * out * per_step,
            "combine_bytes": (self.own_node_copies + self.remote_node_copies) * back * per_step,
            "intra_node_bytes": self.own_node_copies * (out + back) * per_step,
            "inter_node_bytes": self.remote_node_copies * (out + back) * per_step,
            "copies_per_token": (self.own_node_copies + self.remote_node_copies) / tokens if tokens else 0.0,
        }

    def traffic_RR(self) -> FloatArray:
        """Dispatched bytes between the ranks of group 0 in one step, both passes, mean over samples."""
        dispatch = self.scenario.dispatch
        return (
            self.copies_RD
            * token_bytes(self.scenario.model.row_width, dispatch.dtype)
            * num_passes(self.scenario)
            / self.num_samples
        )


def trace_coverage(scenario: Scenario, sample: TrafficSample) -> float:
    """Trace sequences / batch sequences: how far the trace carries a statement about the batch."""
    return sample.draw.num_trace_sequences / scenario.workload.global_batch


def window_tokens(scenario: Scenario) -> int:
    """Tokens of one expert group's micro-batch: the window of every imbalance that is not over the whole step."""
    return scenario.parallelism.expert * scenario.tokens_per_rank


def imbalance_facts(
    scenario: Scenario, facts: TrafficFacts, *, compute_time_SW: FloatArray, router: RouterShape, cost_s: float
) -> dict[str, Any]:
    """max / mean per layer, micro-batch and group, averaged; and over the whole step.

    Floors: what a uniform router has on the same window over experts, and over ranks under the router's group limit.
    """
    window = window_tokens(scenario)
    return {
        **{name: float(np.mean(values)) for name, values in facts.imbalance.items()},
        "rank_time": mean_imbalance(compute_time_SW),
        "uniform_floor": uniform_floor(scenario.model.experts, top_k=router.top_k, tokens=window),
        "uniform_floor_rank": uniform_floor(
            scenario.model.experts,
            top_k=router.top_k,
            tokens=window,
            num_groups=router.num_groups,
            group_limit=router.group_limit,
            num_bins=scenario.parallelism.expert,
        ),
        "window_tokens": window,
        "whole_step_expert": mean_imbalance(facts.expert_load_LE),
        "whole_step_rank_rows": mean_imbalance(facts.rank_load_LR),
        "cost_s": cost_s,
    }


def no_imbalance() -> dict[str, Any]:
    """The imbalance section of a dense model."""
    even = (
        "expert", "rank_rows", "rank_bytes", "balancedness", "rank_time", "uniform_floor", "uniform_floor_rank",
        "window_tokens", "whole_step_expert", "whole_step_rank_rows",
    )  # fmt: skip
    return dict.fromkeys(even, 1.0) | {"window_tokens": 0, "cost_s": 0.0}


def no_communication() -> dict[str, float]:
    """The communication section of a dense model."""
    keys = ("dispatch_bytes", "combine_bytes", "intra_node_bytes", "inter_node_bytes", "copies_per_token")
    return dict.fromkeys(keys, 0.0)


SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 86400.0


def utilisation(scenario: Scenario, step_s: float) -> dict[str, Any]:
    """MFU = model FLOPs / (dense peaks of all ranks * step time), for both counts of attention.

    `peak` names the number format whose peak `causal` and `non_causal` divide by, that of the large GEMMs;
    `*_of_bf16_peak` are the same FLOPs over the bf16 peak, so that runs in different formats compare.
    """
    workload = scenario.workload
    cluster = scenario.cluster
    ranks_of = [(cluster.pools[kind].spec, ranks) for kind, ranks in _ranks_of_kinds(scenario).items() if ranks]

    def peak(dtype: str) -> float:
        """Of all ranks together."""
        return sum(ranks * gpu.peak_flops[dtype] for gpu, ranks in ranks_of)

    mfu: dict[str, Any] = {"peak": workload.precision.gemm}
    for count, causal in (("causal", True), ("non_causal", False)):
        flops = scenario.tokens_per_step * model_flops_per_token(
            scenario.model, sequence_length=workload.sequence_length, causal=causal
        )
        mfu[count] = flops / (peak(workload.precision.gemm) * step_s)
        mfu[f"{count}_of_bf16_peak"] = flops / (peak("bf16") * step_s)
    return mfu


def _ranks_of_kinds(scenario: Scenario) -> dict[int, int]:
    """Ranks by kind of GPU, the number of the first pool that has it."""
    found: dict[int, int] = {}
    counts = rank_counts(scenario.cluster, scenario.parallelism)
    for kind, count in zip(kinds_of_pools(scenario.cluster), counts, strict=True):
        found[kind] = found.get(kind, 0) + count
    return found


def cost(scenario: Scenario, step_s: float) -> dict[str, Any]:
    """USD per step, per million tokens and for the token budget, and the days it takes; None without a budget."""
    per_step = scenario.cluster.usd_per_hour * step_s / SECONDS_PER_HOUR
    budget = scenario.workload.train_tokens
    steps = None if budget is None else budget / scenario.tokens_per_step
    return {
        "usd_per_step": per_step,
        "usd_per_million_tokens": per_step / (scenario.tokens_per_step / 1e6),
        "usd_total": None if steps is None else per_step * steps,
        "days": None if steps is None else steps * step_s / SECONDS_PER_DAY,
        "price_source": "; ".join(dict.fromkeys(pool.price_source for pool in scenario.cluster.pools)),
    }


def pool_facts(
    scenario: Scenario, memory: MemoryReport, *, step_s: float, compute_time_SW: FloatArray
) -> list[dict[str, Any]]:
    """The section `pools` of a result: one entry per pool."""
    cluster, mesh = scenario.cluster, scenario.parallelism
    counts = rank_counts(cluster, mesh)
    pool_W = np.array(pools_of_ranks(cluster, mesh) if len(cluster.pools) > 1 else (0,) * mesh.world_size)
    speed_W = cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    by_name = {pool.name: pool for pool in memory.pools}
    facts = []
    for number, pool in enumerate(cluster.pools):
        of_pool_W, used = pool_W == number, by_name.get(pool.name)
        hourly = pool.usd_per_gpu_hour * pool.nodes * pool.gpus_per_node
        facts.append(
            {
                "name": pool.name,
                "gpu": pool.gpu_name,
                "gpus": pool.nodes * pool.gpus_per_node,
                "ranks": counts[number],
                "micro_batches": scenario.micro_batches_of_pools[number],
                "compute_s": float(compute_time_SW[:, of_pool_W].mean()) if used else None,
                "slowest_speed": 1.0 if speed_W is None or not used else float(speed_W[of_pool_W].min()),
                "peak_bytes": used.peak_bytes if used else None,
                "capacity_bytes": pool.spec.memory_bytes,
                "fits_share": float(np.mean(used.fits_S)) if used else None,
                "usd_per_gpu_hour": pool.usd_per_gpu_hour,
                "usd_per_step": hourly * step_s / SECONDS_PER_HOUR,
                "price_source": pool.price_source,
            }
        )
    return facts


MUCH_DROPPED = 0.10  # share of the rows above which a run warns


def effective(scenario: Scenario, *, kept_share: float, step_s: float) -> dict[str, float | None]:
    """The section `effective` of a result; `kept_share`: computed rows without padding / (tokens * K).

    mfu_causal, mfu_non_causal: MFU without the FLOPs of routed experts that were not spent. usd_per_million_tokens: the
    price of a million tokens with all of their rows; None where none was computed.
    """
    mfu = utilisation(scenario, step_s)
    found: dict[str, float | None] = {"kept_share": kept_share}
    for name, causal in (("causal", True), ("non_causal", False)):
        flops = forward_flops_per_token(
            scenario.model, sequence_length=scenario.workload.sequence_length, causal=causal
        )
        found[f"mfu_{name}"] = mfu[name] * (1.0 - (1.0 - kept_share) * flops["routed_experts"] / sum(flops.values()))
    price = cost(scenario, step_s)["usd_per_million_tokens"]
    return found | {"usd_per_million_tokens": price / kept_share if kept_share else None}


def dropping_warnings(found: Mapping[str, float | None]) -> list[str]:
    """What a reader of a step that leaves many rows out must know; `found` is the section `effective`."""
    missing = 1.0 - (found["kept_share"] or 0.0)
    if missing <= MUCH_DROPPED:
        return []
    return [
        f"{missing:.0%} of the (token, expert) rows are not computed: step time, MFU and price are those of less work "
        f"than the model asks for; compare by the kept rows alone, and with the loss that dropping costs"
    ]


FAR_ABOVE_UNIFORM = 4.0  # times a uniform router's imbalance: published routers stay below, see docs/studies.md
FAR_OF_POSSIBLE = 0.5  # of N / K, which all tokens with the same experts would give: for few experts that is soon


def balance_warnings(scenario: Scenario, trace: RoutingTrace) -> list[str]:
    """What to know of the routing's balance, from all that was recorded, before drops."""
    router, final = trace.router, trace.final
    ratio = float(imbalance(trace.final_load_LE).mean())
    floor = uniform_floor(router.num_experts, top_k=router.top_k, tokens=final.num_tokens)
    measured = (
        f"its busiest expert gets {ratio:.1f} times the mean rows, mean over layers (a uniform router: {floor:.2f})"
    )
    routing = scenario.routing
    if isinstance(routing, StatedRouting):
        return []  # as it was asked for
    if isinstance(routing, TrainRouting) and not _is_balanced(routing):
        return [
            f"the router was trained without a balance loss or bias: {measured}; routers are trained with one, e.g. "
            f"routing.balance: {{expert: 0.01}}"
        ]
    if ratio <= min(FAR_ABOVE_UNIFORM * floor, max(floor, FAR_OF_POSSIBLE * router.num_experts / router.top_k)):
        return []
    remedy = (
        "raise routing.balance or routing.steps"
        if isinstance(routing, TrainRouting)
        else "see that it is the routing you mean"
    )
    return [f"the routing is far from balanced: {measured}; {remedy}"]


def _is_balanced(routing: TrainRouting) -> bool:
    balance = routing.balance
    coefficients = balance.expert, balance.device, balance.communication, balance.variance, balance.sequence
    biased = balance.loss_free is not None and balance.loss_free.gamma > 0
    facts = ROUTERS[routing.router.kind]
    nothing_to_balance = not facts.learned or facts.by_experts  # even by construction
    return nothing_to_balance or any(coefficients) or biased
