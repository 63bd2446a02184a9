"""simulate(scenario): the only place that wires the layers together. Read it from top to bottom.

Legend: S plain routing samples, W ranks of the world, C categories.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine import simulate_step, step_kernels
from moesim.kernels import KernelModel, kernel_model
from moesim.kernels.errors import bases_of, clock_error_of, kernels_rest_on
from moesim.network import Fabric
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.memory import MemoryReport
from moesim.parallel.memory_remedy import check_memory
from moesim.parallel.memory_rows import RoutedRows, even_rows, routed_rows
from moesim.parallel.stated import stated_trace
from moesim.program import StepProgram, build_program
from moesim.program.scenario_fabric import scenario_fabric
from moesim.program.warnings import coverage, layout_warnings, sharing_warnings
from moesim.results import CATEGORIES, RESULT_SCHEMA_VERSION, RunRecord, SpanTable, Stream, attribute
from moesim.results.balance import balance_warnings
from moesim.results.critical_path import path_facts
from moesim.results.economy import cost, utilisation
from moesim.results.effective import dropping_warnings, effective
from moesim.results.metrics import (
    TrafficFacts,
    imbalance_facts,
    mean_and_range,
    no_communication,
    no_imbalance,
    window_tokens,
)
from moesim.results.placement import placement_arrays, placement_facts, placement_warnings
from moesim.results.plausible import check_plausible
from moesim.results.stages import action_seconds, stage_facts, stage_warnings
from moesim.results.uncertainty import Basis, error_parts, kernel_range, path_shares, whole_range
from moesim.routing.cache import cached_trace
from moesim.routing.progress import ProgressCallback
from moesim.routing.replay import recorded_trace
from moesim.routing.request import TrainingRequest
from moesim.scenario import Scenario
from moesim.scenario.check import require_supported
from moesim.scenario.routing import PopularityRouting, StatedRouting, TraceRouting, TrainRouting
from moesim.seeding import stream, stream_seed
from moesim.trace import RoutingTrace, popularity_trace, trace_hash, uniform_trace
from moesim.trace.agreement import check_agreement, import_notes, limit_difference
from moesim.trace.basis import rests_on
from moesim.trace.metrics import expert_load_LE, first_load_LE, imbalance
from moesim.trace.sampling import MIN_COVERAGE_FOR_RANGE

FloatArray = NDArray[np.float64]

SYNTHETIC_LAYERS = 2  # distinct layers of a synthetic trace; model layers take them in turn
SYNTHETIC_TOKENS = (65_536, 262_144)  # at least, and at most while one expert group's micro-batch fits
SPAN_MEMORY = 400e6  # bytes of spans simulated at once: more samples than fit run in several passes
BYTES_PER_SPAN = 20
SPANS_PER_LAYER = 70  # about, both directions
MERGED_SPAN_MEMORY = 900e6  # the same where a single sample is larger: kernels are merged, and pairs go together
MERGED_SPANS_PER_LAYER = 22


def simulate(
    scenario: Scenario, *, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RunRecord:
    """Simulate one optimizer step of `scenario` and derive its numbers.

    Trains the router first where the scenario asks for it and no equal one is cached (`progress` is told of each
    training step). Raises UserError for what cannot be simulated and InfeasibleError for what does not fit.
    """
    require_supported(scenario)
    trace = obtain_trace(scenario, progress=progress, cache_dir=cache_dir)
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    fabric = scenario_fabric(scenario, kernels)
    assert (trace is None) == (scenario.model.experts == 0), "an MoE step is driven by a routing trace"
    plain, bootstrap = draw_samples(scenario, trace)
    memory = check_memory(scenario, lambda variant: _rows(scenario, variant, trace, plain))
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=plain)
    spread = [sample.balanced() for sample in plain]
    outcome = _simulate_samples(scenario, fabric, kernels, [*plain, *spread, *bootstrap])
    record = _record(scenario, fabric, kernels, memory, trace, plain, outcome)
    check_plausible(record, fabric)
    return record


def mean_step_seconds(scenario: Scenario, trace: RoutingTrace | None) -> float:
    """Mean step time of the plain routing samples alone, the same as `simulate` gives: for what-ifs.

    Raises as `simulate` does.
    """
    require_supported(scenario)
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    plain = draw_samples(scenario, trace, bootstrap=False)[0]
    check_memory(scenario, lambda variant: _rows(scenario, variant, trace, plain))
    fabric = scenario_fabric(scenario, kernels)
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=plain)
    return float(_simulate_samples(scenario, fabric, kernels, plain).step_S.mean())


def _rows(
    scenario: Scenario, variant: Scenario, trace: RoutingTrace | None, plain: Sequence[TrafficSample]
) -> RoutedRows:
    """The rows of a variant of the scenario under the same routing; those of the scenario itself are drawn already."""
    if trace is None:
        return even_rows(variant)
    return routed_rows(variant, plain if variant is scenario else draw_samples(variant, trace)[0])


def obtain_trace(
    scenario: Scenario, *, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RoutingTrace | None:
    """The routing of the scenario: trained (or cached), read from a file or the library, or drawn; None when dense."""
    if scenario.model.experts == 0:
        return None
    routing = scenario.routing
    if isinstance(routing, TrainRouting):
        return cached_trace(TrainingRequest.from_scenario(scenario), cache_dir, progress=progress)
    if isinstance(routing, TraceRouting):
        trace = recorded_trace(scenario, tokens=_synthetic_tokens(scenario), cache_dir=cache_dir)
        check_agreement(trace, routing, wanted=scenario.router_shape())
        return trace
    length = scenario.workload.sequence_length
    num_sequences, seed = -(-_synthetic_tokens(scenario) // length), stream_seed(scenario.seed, "synthetic-trace")
    if isinstance(routing, StatedRouting):
        return stated_trace(scenario, routing, num_layers=SYNTHETIC_LAYERS, num_sequences=num_sequences, seed=seed)
    common: dict[str, Any] = {"num_sequences": num_sequences, "sequence_length": length, "seed": seed}
    if isinstance(routing, PopularityRouting):
        nested = not isinstance(routing.counts[0], int | float)
        layers = len(routing.counts) if nested else SYNTHETIC_LAYERS
        common |= {"counts": routing.counts, "counts_of": routing.source, "num_layers": layers}
        return popularity_trace(scenario.router_shape(), **common)
    return uniform_trace(scenario.router_shape(), num_layers=SYNTHETIC_LAYERS, **common)


def _synthetic_tokens(scenario: Scenario) -> int:
    """How many tokens of drawn routing a scenario gets."""
    fewest, most = SYNTHETIC_TOKENS
    return max(fewest, window_tokens(scenario), min(most, scenario.tokens_per_step))


def draw_samples(
    scenario: Scenario, trace: RoutingTrace | None, *, bootstrap: bool = True
) -> tuple[list[TrafficSample], list[TrafficSample]]:
    """Plain routing samples, and as many from resampled traces for the range.

    None for the range from one sample, or from a trace that is too small.
    """
    if trace is None:
        return [], []
    sampler = TrafficSampler(scenario, trace)
    count = scenario.uncertainty.samples
    plain = [sampler.draw(stream(scenario.seed, "sample", number)) for number in range(count)]
    if not bootstrap or count == 1 or coverage(scenario, plain[0]) < MIN_COVERAGE_FOR_RANGE:
        return plain, []
    again = [sampler.draw(stream(scenario.seed, "bootstrap", number), bootstrap=True) for number in range(count)]
    return plain, again


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Samples simulated in lockstep. `spans`: group 0 of every pipeline rank, first sample; `critical_path`: of it.

    `shared_links`: how many links groups of ranks can fill together.
    """

    step_S: FloatArray
    attribution_CSW: FloatArray
    compute_time_SW: FloatArray
    busy_SP: FloatArray
    source_seconds: Mapping[Basis, float]
    tensor_bytes: float
    spans: tuple[SpanTable, ...]
    critical_path: dict[str, Any]
    shared_links: int

    def samples(self, chosen: slice) -> "_Outcome":
        """The outcome of some of the samples."""
        return replace(
            self,
            step_S=self.step_S[chosen],
            attribution_CSW=self.attribution_CSW[:, chosen],
            compute_time_SW=self.compute_time_SW[chosen],
            busy_SP=self.busy_SP[chosen],
        )


def _simulate_samples(
    scenario: Scenario, fabric: Fabric, kernels: KernelModel, samples: Sequence[TrafficSample]
) -> _Outcome:
    """Simulate the samples in lockstep, as many at once as memory allows."""
    runs = scenario.num_micro_batches * scenario.parallelism.world_size // scenario.parallelism.pipeline
    bytes_per_sample = scenario.model.layers * SPANS_PER_LAYER * runs * BYTES_PER_SPAN
    merge = bytes_per_sample > SPAN_MEMORY
    at_once = max(1, int(SPAN_MEMORY / bytes_per_sample))
    if merge:
        at_once = max(1, int(MERGED_SPAN_MEMORY / (bytes_per_sample * MERGED_SPANS_PER_LAYER / SPANS_PER_LAYER)))
    parts = [
        _simulate_program(
            build_program(
                scenario,
                fabric=fabric,
                kernels=kernels,
                samples=samples[start : start + at_once],
                merge=merge,
            ),
            first=start == 0,
        )
        for start in range(0, max(1, len(samples)), at_once)
    ]
    return _Outcome(
        step_S=np.concatenate([part.step_S for part in parts]),
        attribution_CSW=np.concatenate([part.attribution_CSW for part in parts], axis=1),
        compute_time_SW=np.concatenate([part.compute_time_SW for part in parts]),
        busy_SP=np.concatenate([part.busy_SP for part in parts]),
        source_seconds=parts[0].source_seconds,
        tensor_bytes=parts[0].tensor_bytes,
        spans=parts[0].spans,
        critical_path=parts[0].critical_path,
        shared_links=max(part.shared_links for part in parts),
    )


def _simulate_program(program: StepProgram, *, first: bool) -> _Outcome:
    """`first`: sample 0 is among the samples, whose spans and critical path are kept."""
    step = simulate_step(program)
    places = [group.pipeline_rank for group in program.groups]
    kept = [table for group, table in zip(program.groups, step.tables, strict=True) if group.number == 0]
    world = sum(len(group.ranks_R) for group in program.groups)
    attribution_CSW = np.zeros((len(CATEGORIES), program.samples, world))
    compute_time_SW = np.zeros((program.samples, world))
    busy_SP = np.zeros((program.samples, 1 + max(places)))
    for place, table in zip(places, step.tables, strict=True):
        attribution_CSW[:, :, table.ranks_R] = attribute(table, compiled=program.compiled)
        rows_N = table.rows(Stream.COMPUTE)
        compute_time_SW[:, table.ranks_R] = (table.finish_NSR[rows_N] - table.start_NSR[rows_N]).sum(axis=0)
        busy_SP[:, place] += action_seconds(table).mean(axis=1) / places.count(place)
    return _Outcome(
        step_S=step.step_S,
        attribution_CSW=attribution_CSW,
        compute_time_SW=compute_time_SW,
        busy_SP=busy_SP,
        source_seconds=program.source_seconds,
        tensor_bytes=program.tensor_bytes,
        spans=tuple(table.first_sample() for table in kept) if first else (),
        critical_path=path_facts(step.tables, pipeline_ranks=places) if first else {},
        shared_links=len(program.contention.capacity_L) if program.contention else 0,
    )


def _shares(seconds: Mapping[Basis, float]) -> dict[str, float]:
    """Of all operations' seconds by source."""
    total, by_source = sum(seconds.values()), dict.fromkeys(sorted({basis.source for basis in seconds}), 0.0)
    for basis, value in seconds.items():
        by_source[basis.source] += value / total
    return by_source


def _ranges(
    kernels: KernelModel, outcome: _Outcome, step_s: float, routing: list[float] | None, *, routed: bool
) -> dict[str, Any]:
    """The 90 % range of the step time, its two parts, and what the part of the kernels rests on.

    No whole range where chance of routing is unknown; a dense model has none.
    """
    shares = path_shares(outcome.source_seconds, outcome.critical_path["seconds"])
    parts = error_parts(shares, bases_of(kernels), clock_error=clock_error_of(kernels))
    of_kernels = kernel_range(step_s, parts)
    whole = whole_range(step_s, of_kernels, routing) if routing else None
    return {
        "step_time_range_s": of_kernels if whole is None and not routed else whole,
        "step_time_routing_range_s": routing,
        "step_time_kernel_range_s": of_kernels,
        "step_time_errors": [part.as_json() for part in parts],
    }


def _record(
    scenario: Scenario,
    fabric: Fabric,
    kernels: KernelModel,
    memory: MemoryReport,
    trace: RoutingTrace | None,
    plain: Sequence[TrafficSample],
    everything: _Outcome,
) -> RunRecord:
    """`everything` holds the plain samples, then their counterfactuals, then the bootstrap samples."""
    count = len(plain)
    outcome = everything.samples(slice(count)) if plain else everything
    spread = everything.samples(slice(count, 2 * count)) if plain else everything
    again_S = everything.step_S[2 * count :] if plain else everything.step_S[:0]
    step_s, range_s = mean_and_range(outcome.step_S, again_S)
    cost_s = float((outcome.step_S - spread.step_S).mean())
    facts = TrafficFacts(scenario, plain) if plain else None
    stages = stage_facts(scenario, outcome.busy_SP.mean(axis=0))
    kept = effective(scenario, kept_share=facts.kept_share if facts else 1.0, step_s=step_s)
    per_second = scenario.tokens_per_step / step_s
    result: dict[str, Any] = {
        "schema_version": RESULT_SCHEMA_VERSION,
        "kind": scenario.workload.kind,
        "scenario_name": scenario.name,
        "world_size": scenario.parallelism.world_size,
        "gpus": scenario.cluster.num_gpus,
        "samples": len(outcome.step_S),
        "kernels": kernels_rest_on(kernels),
        "step_time_s": step_s,
        **_ranges(kernels, outcome, step_s, range_s, routed=trace is not None),
        "balanced_step_time_s": float(spread.step_S.mean()),
        "tokens_per_second": per_second,
        "tokens_per_second_per_gpu": per_second / scenario.cluster.num_gpus,
        "mfu": utilisation(scenario, step_s),
        "attribution_s": _by_category(outcome.attribution_CSW),
        "attribution_balanced_s": _by_category(spread.attribution_CSW),
        "critical_path": outcome.critical_path,
        "stages": stages,
        "communication": (facts.communication() if facts else no_communication())
        | {"tensor_bytes": everything.tensor_bytes},
        "imbalance": no_imbalance(),
        "dropped_share": facts.dropped_share if facts else 0.0,
        "padded_share": facts.padded_share if facts else 0.0,
        "memory": memory.as_json(),
        "cost": cost(scenario, step_s),
        "effective": kept,
        "estimate_sources": _shares(outcome.source_seconds),
        "software": {fact: getattr(scenario.implementation.software, fact) for fact in ("name", "listed", "checked")},
        "router": {"kind": "none (dense model)", "train_loss": None, "validation_loss": None},
        "placement": {"kind": "none (dense model)"},
        "warnings": [
            *layout_warnings(scenario, fabric, memory, plain),
            *sharing_warnings(outcome.shared_links, cost_s),
            *placement_warnings(scenario),
            *dropping_warnings(kept),
            *stage_warnings(stages, listed=scenario.parallelism.stages is not None),
            *(balance_warnings(scenario, trace) if trace else ()),
            *limit_difference(trace, scenario),
            *import_notes(trace, scenario),
            *scenario.model.left_out,
        ],
    }
    arrays = {
        "step_time_S": outcome.step_S,
        "attribution_CW": outcome.attribution_CSW.mean(axis=1),
        "attribution_balanced_C": spread.attribution_CSW.mean(axis=(1, 2)),
        "compute_time_W": outcome.compute_time_SW.mean(axis=0),
        "held_bytes_P": memory.held_P,
        "kept_bytes_PVBW": memory.kept_PCBW,
    }
    if facts is not None and trace is not None:
        result["imbalance"] = imbalance_facts(
            scenario, facts, compute_time_SW=outcome.compute_time_SW, router=trace.router, cost_s=cost_s
        )
        result["router"] = _router_facts(scenario, trace, plain[0])
        result["placement"] = placement_facts(scenario, plain, facts)
        arrays |= _load_arrays(facts) | placement_arrays(scenario, plain, facts)
    return RunRecord(scenario=scenario, result=result, arrays=arrays, pipeline_spans=outcome.spans, trace=trace)


def _by_category(attribution_CSW: FloatArray) -> dict[str, float]:
    means_C = attribution_CSW.mean(axis=(1, 2))
    return {name: float(seconds) for name, seconds in zip(CATEGORIES, means_C, strict=True)}


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
    curves = trace.curves
    load_first = imbalance(first_load_LE(trace))
    load_last = imbalance(expert_load_LE(trace.final, num_experts=trace.router.num_experts))
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
        "trace_coverage": coverage(scenario, sample),
        "reused_share": sample.draw.reused_share,
        **rests_on(trace, scenario),
    }
