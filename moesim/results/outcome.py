"""What a simulated step gives, the range of its step time, and all of it told in the words of `definitions.yaml`.

The range is what chance of routing and the known errors of kernels and transfers make of it together. The error of one
family of kernels from one source is one unknown factor, common to all kernels of that family in the step; families and
sources are independent of each other and of the routing. A kernel's own error is not drawn anew for each kernel: it
would average out over a step's thousands, and errors of a profile or of scaling do not. The step follows a family's
factor by the family's share of the critical path. In log space the parts add in squares.

Legend: S routing samples, W ranks of the world, C categories, L layers, E experts, R ranks of a group, P pipeline
ranks, V stages of one, B micro-batches.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import KernelModel
from moesim.kernels.errors import NETWORK, TRANSFERS, bases_of, clock_error_of, kernels_rest_on, known_error
from moesim.parallel import TrafficSample
from moesim.parallel.memory.report import MemoryReport
from moesim.results.critical_path import stage_facts, stage_warnings
from moesim.results.metrics import (
    TrafficFacts,
    balance_warnings,
    cost,
    dropping_warnings,
    effective,
    imbalance_facts,
    mean_and_range,
    no_communication,
    no_imbalance,
    pool_facts,
    trace_coverage,
    utilisation,
)
from moesim.results.placement import placement_arrays, placement_facts, placement_warnings, replacing_warnings
from moesim.results.spans import CATEGORIES, SpanTable
from moesim.results.store import RESULT_SCHEMA_VERSION, RunRecord
from moesim.results.waits import Waits, waiting_facts
from moesim.scenario import Implementation, Scenario
from moesim.trace import RoutingTrace, trace_hash
from moesim.trace.metrics import imbalance
from moesim.trace.provenance import import_notes, limit_difference, rests_on

CLOCK = "clock"  # under load, of a kind without a published sustained rate
_CLOCK_HOW = (
    "no sustained rate of this kind is known: the nearest kind's threshold per watt (moesim/kernels/clock_laws.py)"
)
_COMPUTING = ("gemm", "grouped_gemm", "attention")
_TRANSFER_CATEGORIES = ("dispatch_exposed", "combine_exposed", "data_parallel", "tensor", "pipeline")


class Basis(NamedTuple):
    """What seconds of an attribution category rest on: their source, and the family whose errors they share."""

    category: str
    source: str
    family: str


@dataclass(frozen=True, kw_only=True)
class ErrorPart:
    """A family of kernels from one source in a step. `share`: of the critical path; `log_error`: log of the factor that
    nine of ten such predictions stay within; `count`: kernels that it was measured on; `how`: the way.
    """

    source: str
    family: str
    share: float
    log_error: float
    count: int
    how: str

    @property
    def log_range(self) -> tuple[float, float]:
        """By how much less and how much more, in logs, the step takes at either end of the error; both >= 0."""
        grown = [math.log1p(self.share * math.expm1(error)) for error in (-self.log_error, self.log_error)]
        return -grown[0], grown[1]


def path_shares(
    source_seconds: Mapping[Basis, float], path_seconds: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """Share of the critical path by (source, family): its seconds of a category are split as the category's operations.

    Bubbles, host stalls and what no operation stands for belong to none.
    """
    total = sum(path_seconds.values())
    in_category: defaultdict[str, float] = defaultdict(float)
    for basis, seconds in source_seconds.items():
        in_category[basis.category] += seconds
    shares: defaultdict[tuple[str, str], float] = defaultdict(float)
    for basis, seconds in sorted(source_seconds.items()):
        if seconds > 0.0:
            part = seconds / in_category[basis.category]
            shares[basis.source, basis.family] += part * path_seconds.get(basis.category, 0.0) / total
    for category in _TRANSFER_CATEGORIES:
        if not in_category.get(category) and path_seconds.get(category):
            shares[NETWORK, TRANSFERS] += path_seconds[category] / total
    return dict(shares)


def error_parts(
    shares: Mapping[tuple[str, str], float], bases: tuple[str, ...], *, clock_error: float = 0.0
) -> tuple[ErrorPart, ...]:
    """The known error of every part of a step on a GPU whose kernels rest on `bases`; the weightiest first.

    clock_error: log of the factor that a clock under load, of which nothing was published, may be off: of all kernels
    that compute.
    """
    parts = []
    if clock_error > 0.0:
        computing = sum(share for (_, family), share in shares.items() if family.split()[0] in _COMPUTING)
        clock = ErrorPart(
            source=CLOCK, family="all that compute", share=computing, log_error=clock_error, count=0, how=_CLOCK_HOW
        )
        parts.append(clock)
    for (source, family), share in shares.items():
        known = known_error(bases, source, family)
        part = ErrorPart(
            source=source, family=family, share=share, log_error=known.half_width, count=known.count, how=known.how
        )
        parts.append(part)
    return tuple(sorted(parts, key=lambda part: (-part.share * part.log_error, part.source, part.family)))


def kernel_range(step_s: float, parts: Sequence[ErrorPart]) -> list[float]:
    """The 90 % range of the step time from errors of kernels and transfers alone."""
    down, up = (math.hypot(*(part.log_range[end] for part in parts)) for end in (0, 1))
    return [step_s * math.exp(-down), step_s * math.exp(up)]


def whole_range(step_s: float, *ranges: Sequence[float]) -> list[float]:
    """Independent ranges around one mean as one, end by end, in squares of logs."""
    down, up = (math.hypot(*(math.log(found[end] / step_s) for found in ranges)) for end in (0, 1))
    return [step_s * math.exp(-down), step_s * math.exp(up)]


FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Samples simulated in lockstep. `spans`: group 0 of every pipeline rank, first sample; `critical_path`: of it.

    `jitter_SW`: at most so many seconds of the waiting in `attribution_CSW` are for chips and hosts that are slower
    than others by chance. `shared_links`: how many links groups of ranks can fill together. `waits`: seconds of sample
    0.
    """

    step_S: FloatArray
    attribution_CSW: FloatArray
    jitter_SW: FloatArray
    compute_time_SW: FloatArray
    busy_SP: FloatArray
    source_seconds: Mapping[Basis, float]
    tensor_bytes: float
    transfer_sources: tuple[str, ...]
    spans: tuple[SpanTable, ...]
    critical_path: dict[str, Any]
    shared_links: int
    waits: Waits

    def samples(self, chosen: slice) -> "Outcome":
        """The outcome of some of the samples."""
        return replace(
            self,
            step_S=self.step_S[chosen],
            attribution_CSW=self.attribution_CSW[:, chosen],
            jitter_SW=self.jitter_SW[chosen],
            compute_time_SW=self.compute_time_SW[chosen],
            busy_SP=self.busy_SP[chosen],
        )

    @classmethod
    def joined(cls, parts: "Sequence[Outcome]") -> "Outcome":
        """Samples simulated one part after the other; what is kept of one sample alone is that of the first part."""
        return replace(
            parts[0],
            step_S=np.concatenate([part.step_S for part in parts]),
            attribution_CSW=np.concatenate([part.attribution_CSW for part in parts], axis=1),
            jitter_SW=np.concatenate([part.jitter_SW for part in parts]),
            compute_time_SW=np.concatenate([part.compute_time_SW for part in parts]),
            busy_SP=np.concatenate([part.busy_SP for part in parts]),
            shared_links=max(part.shared_links for part in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One scenario, simulated: the plain samples, those with all loads equal, and the times of resampled traces.

    `plain` and `trace` are empty for a dense model, whose two outcomes are one. `step_s`: mean over plain samples.
    """

    scenario: Scenario
    kernels: KernelModel
    memory: MemoryReport
    trace: RoutingTrace | None
    plain: tuple[TrafficSample, ...]
    outcome: Outcome
    balanced: Outcome
    resampled_S: FloatArray

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        kernels: KernelModel,
        memory: MemoryReport,
        trace: RoutingTrace | None,
        plain: Sequence[TrafficSample],
        everything: Outcome,
    ) -> "Simulated":
        """`everything` holds the plain samples, then their counterfactuals, then the resampled traces."""
        count = len(plain)
        return cls(
            scenario=scenario,
            kernels=kernels,
            memory=memory,
            trace=trace,
            plain=tuple(plain),
            outcome=everything.samples(slice(count)) if plain else everything,
            balanced=everything.samples(slice(count, 2 * count)) if plain else everything,
            resampled_S=everything.step_S[2 * count :] if plain else everything.step_S[:0],
        )

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return float(self.outcome.step_S.mean())

    @property
    def imbalance_cost_s(self) -> float:
        """Seconds of a step that equal loads would save."""
        return float((self.outcome.step_S - self.balanced.step_S).mean())


@dataclass(frozen=True, kw_only=True)
class SearchedPlacement:
    """A placement that a search simulated: the weight of traffic in it, and the step on the rows to place by."""

    traffic: float
    step_time_s: float


def assemble(
    simulated: Simulated,
    *,
    layout_warnings: Sequence[str],
    replacing: dict[str, Any] | None = None,
    searched: Sequence[SearchedPlacement] = (),
) -> RunRecord:
    """The record of a run; `layout_warnings` come before those that its own numbers give.

    `replacing`: what placing experts anew costs and brings, None where they are placed once. `searched`: placements
    that were simulated to choose this one.
    """
    scenario, trace = simulated.scenario, simulated.trace
    facts = TrafficFacts(scenario, simulated.plain) if simulated.plain else None
    stages = stage_facts(scenario, simulated.outcome.busy_SP.mean(axis=0))
    kept = effective(scenario, kept_share=facts.kept_share if facts else 1.0, step_s=simulated.step_s)
    result: dict[str, Any] = {
        "schema_version": RESULT_SCHEMA_VERSION,
        "kind": scenario.workload.kind,
        "scenario_name": scenario.name,
        "world_size": scenario.parallelism.world_size,
        "gpus": scenario.cluster.num_gpus,
        "samples": len(simulated.outcome.step_S),
        "kernels": kernels_rest_on(simulated.kernels),
        **_times(simulated),
        "stages": stages,
        "communication": (facts.communication() if facts else no_communication())
        | {"tensor_bytes": simulated.outcome.tensor_bytes},
        "imbalance": no_imbalance(),
        "dropped_share": facts.dropped_share if facts else 0.0,
        "padded_share": facts.padded_share if facts else 0.0,
        "memory": simulated.memory.as_json(),
        "pools": pool_facts(
            scenario, simulated.memory, step_s=simulated.step_s, compute_time_SW=simulated.outcome.compute_time_SW
        ),
        "waiting": waiting_facts(simulated.outcome.waits, jitter_s=float(simulated.outcome.jitter_SW.mean())),
        "cost": cost(scenario, simulated.step_s),
        "effective": kept,
        "estimate_sources": _shares(simulated.outcome.source_seconds),
        "transfer_sources": list(simulated.outcome.transfer_sources),
        "software": software_facts(scenario.implementation),
        "router": {"kind": "none (dense model)", "train_loss": None, "validation_loss": None},
        "placement": {"kind": "none (dense model)"},
        "warnings": [
            *layout_warnings,
            *placement_warnings(scenario),
            *replacing_warnings(replacing),
            *dropping_warnings(kept),
            *stage_warnings(stages, listed=scenario.parallelism.stages is not None),
            *(balance_warnings(scenario, trace) if trace else ()),
            *limit_difference(trace, scenario),
            *import_notes(trace, scenario),
            *scenario.model.left_out,
        ],
    }
    arrays = _arrays(simulated)
    if facts is not None and trace is not None:
        result |= _routing_sections(simulated, facts, trace)
        result["placement"] |= {} if replacing is None else {"replacing": replacing}
        result["placement"] |= {"searched": [vars(each) for each in searched]} if searched else {}
        arrays |= _load_arrays(facts) | placement_arrays(scenario, simulated.plain, facts)
    return RunRecord(
        scenario=scenario, result=result, arrays=arrays, pipeline_spans=simulated.outcome.spans, trace=trace
    )


def _times(simulated: Simulated) -> dict[str, Any]:
    """Step time with its ranges, throughput, and what the time goes to."""
    scenario = simulated.scenario
    step_s, range_s = mean_and_range(simulated.outcome.step_S, simulated.resampled_S)
    per_second = scenario.tokens_per_step / step_s
    return {
        "step_time_s": step_s,
        **_ranges(simulated, range_s),
        "balanced_step_time_s": float(simulated.balanced.step_S.mean()),
        "tokens_per_second": per_second,
        "tokens_per_second_per_gpu": per_second / scenario.cluster.num_gpus,
        "mfu": utilisation(scenario, step_s),
        "attribution_s": _by_category(simulated.outcome.attribution_CSW),
        "attribution_balanced_s": _by_category(simulated.balanced.attribution_CSW),
        "critical_path": simulated.outcome.critical_path,
    }


def _ranges(simulated: Simulated, routing: list[float] | None) -> dict[str, Any]:
    """The 90 % range of the step time, its two parts, and what the part of the kernels rests on.

    No whole range where chance of routing is unknown; a dense model has none.
    """
    shares = path_shares(simulated.outcome.source_seconds, simulated.outcome.critical_path["seconds"])
    parts = error_parts(shares, bases_of(simulated.kernels), clock_error=clock_error_of(simulated.kernels))
    of_kernels = kernel_range(simulated.step_s, parts)
    whole = whole_range(simulated.step_s, of_kernels, routing) if routing else None
    return {
        "step_time_range_s": of_kernels if whole is None and simulated.trace is None else whole,
        "step_time_routing_range_s": routing,
        "step_time_kernel_range_s": of_kernels,
        "step_time_errors": [asdict(part) for part in parts],
    }


def _shares(seconds: Mapping[Basis, float]) -> dict[str, float]:
    """Of all operations' seconds by source."""
    total, by_source = sum(seconds.values()), dict.fromkeys(sorted({basis.source for basis in seconds}), 0.0)
    for basis, value in seconds.items():
        by_source[basis.source] += value / total
    return by_source


def _by_category(attribution_CSW: FloatArray) -> dict[str, float]:
    means_C = attribution_CSW.mean(axis=(1, 2))
    return {name: float(seconds) for name, seconds in zip(CATEGORIES, means_C, strict=True)}


def _arrays(simulated: Simulated) -> dict[str, FloatArray]:
    """The arrays of a result that every model has."""
    return {
        "step_time_S": simulated.outcome.step_S,
        "attribution_CW": simulated.outcome.attribution_CSW.mean(axis=1),
        "attribution_balanced_C": simulated.balanced.attribution_CSW.mean(axis=(1, 2)),
        "compute_time_W": simulated.outcome.compute_time_SW.mean(axis=0),
        "held_bytes_P": simulated.memory.held_P,
        "kept_bytes_PVBW": simulated.memory.kept_PCBW,
    }


def _routing_sections(simulated: Simulated, facts: TrafficFacts, trace: RoutingTrace) -> dict[str, Any]:
    """The sections that only a model with experts fills."""
    imbalance_section = imbalance_facts(
        simulated.scenario,
        facts,
        compute_time_SW=simulated.outcome.compute_time_SW,
        router=trace.router,
        cost_s=simulated.imbalance_cost_s,
    )
    return {
        "imbalance": imbalance_section,
        "router": _router_facts(simulated.scenario, trace, simulated.plain[0]),
        "placement": placement_facts(simulated.scenario, simulated.plain, facts),
    }


def _load_arrays(facts: TrafficFacts) -> dict[str, FloatArray]:
    def relative(rows: FloatArray) -> FloatArray:
        """Over the mean of the layer; 0 where a layer kept no row at all."""
        means = rows.mean(axis=1, keepdims=True)
        return np.asarray(rows / np.where(means > 0, means, 1.0))

    return {
        "expert_load_LE": relative(facts.expert_load_LE),
        "rank_load_LR": relative(facts.rank_load_LR),
        "traffic_RR": facts.traffic_RR(),
    }


def _router_facts(scenario: Scenario, trace: RoutingTrace, sample: TrafficSample) -> dict[str, Any]:
    """The section `router` of a result: how it was trained, how even it is, and how far its trace carries."""
    curves = trace.curves
    load_first = imbalance(trace.first_load_LE)
    load_last = imbalance(trace.final_load_LE)
    return {
        "kind": trace.router.kind,
        "train_loss": float(curves.train_loss[-1]) if len(curves.train_loss) else None,
        "validation_loss": float(curves.validation_loss[-1]) if len(curves.validation_loss) else None,
        "steps": [step.step for step in trace.steps],
        "imbalance_first": float(load_first.mean()),
        "imbalance_last": float(load_last.mean()),
        "trace_hash": trace_hash(trace),
        "trace_sequences": sample.draw.num_trace_sequences,
        "batch_sequences": scenario.workload.global_batch,
        "trace_coverage": trace_coverage(scenario, sample),
        "reused_share": sample.draw.reused_share,
        **rests_on(trace, scenario),
    }


def software_facts(implementation: Implementation) -> dict[str, str]:
    """Whose kernels are priced, which switches are set otherwise, where their list is from and what checked it."""
    software, changed = implementation.software, implementation.overridden
    return {
        "name": software.name,
        "switches": ", ".join(f"{name}: {_word(setting)}" for name, setting in changed.items()),
        "listed": software.listed + (f": {Path(implementation.file).name}" if implementation.file else ""),
        "checked": software.checked,
    }


def _word(setting: object) -> str:
    return str(setting).lower() if isinstance(setting, bool) else str(setting)
