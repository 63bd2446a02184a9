"""A record made by hand, so that what a person sees can be tested without simulating anything."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from moesim.results.spans import CATEGORIES, Label, SpanTable, Stream
from moesim.results.store import RunRecord
from moesim.scenario import RouterShape, scenario_from_mapping
from moesim.trace import RoutingTrace, TraceStep, TrainingCurves

MakeRecord = Callable[..., RunRecord]

_FORWARD = (  # name, category, stream, microseconds
    ("attention", "attention", Stream.COMPUTE, 180.0),
    ("router.topk", "router", Stream.COMPUTE, 25.0),
    ("permute", "permute", Stream.COMPUTE, 40.0),
    ("dispatch", "dispatch_exposed", Stream.COMMUNICATION, 110.0),
    ("shared.w13", "shared_experts", Stream.COMPUTE, 90.0),
    ("experts.w13", "experts", Stream.COMPUTE, 260.0),
    ("combine", "combine_exposed", Stream.COMMUNICATION, 120.0),
    ("unpermute", "permute", Stream.COMPUTE, 30.0),
)


def make_spans(*, layers: int, ranks: int, rng: np.random.Generator) -> SpanTable:
    """One forward pass: each rank goes at its own pace and every transfer waits for the slowest."""
    labels = tuple(Label(name, kind, stream, layer) for layer in range(layers) for name, kind, stream, _ in _FORWARD)
    shape = (len(labels), 1, ranks)
    start_NSR, finish_NSR, own_NSR = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.float32)
    now_R = np.zeros(ranks)
    for row, label in enumerate(labels):
        own_R = 1e-6 * _FORWARD[row % len(_FORWARD)][3] * np.ones(ranks)
        if label.stream is Stream.COMPUTE:
            own_R = own_R * (1 + 0.3 * rng.random(ranks))
        start_NSR[row, 0], own_NSR[row, 0] = now_R, own_R
        now_R = (now_R.max() if label.stream is Stream.COMMUNICATION else now_R) + own_R
        finish_NSR[row, 0] = now_R
    return SpanTable(
        labels=labels,
        ranks_R=np.arange(ranks),
        label_N=np.arange(len(labels), dtype=np.int32),
        micro_batch_N=np.zeros(len(labels), np.int32),
        start_NSR=start_NSR,
        finish_NSR=finish_NSR,
        own_NSR=own_NSR,
        step_S=now_R.max(keepdims=True),
    )


def make_trace(*, experts: int, top_k: int, trained: bool, rng: np.random.Generator) -> RoutingTrace:
    """Two recorded steps of a router whose experts differ in popularity, and its curves."""

    def step(number: int, skew: float) -> TraceStep:
        key_LSTE = rng.gumbel(size=(2, 4, 256, experts)) + skew * rng.normal(size=(2, 1, 1, experts))
        ids_LSTK = np.argsort(-key_LSTE, axis=-1)[..., :top_k].astype(np.int16)
        weights = np.full(ids_LSTK.shape, 1 / top_k, np.float32)
        return TraceStep(step=number, expert_ids_LSTK=ids_LSTK, affinities_LSTK=weights, gates_LSTK=weights)

    steps = np.arange(150.0)
    curves = TrainingCurves()
    if trained:
        curves = TrainingCurves(
            steps=steps,
            train_loss=2.0 + 3.5 * np.exp(-steps / 30) + 0.05 * rng.normal(size=150),
            validation_steps=steps[::25],
            validation_loss=2.1 + 3.4 * np.exp(-steps[::25] / 30),
            imbalance=1.6 + np.exp(-steps / 40) + 0.05 * rng.normal(size=150),
        )
    router = RouterShape(
        kind="deepseek_v2", num_experts=experts, top_k=top_k, num_groups=8, group_limit=3, num_devices=8
    )
    return RoutingTrace(
        router=router, steps=(step(0, 0.9), step(150, 0.3)), curves=curves, provenance={"corpus": "stdlib"}
    )


def make_result(*, name: str, attribution_C: np.ndarray[Any, Any], balanced_s: float, ranks: int) -> dict[str, Any]:
    """A result.json whose numbers are all different, so that a test can find each of them."""
    step = float(attribution_C.sum())
    return {
        "schema_version": 1,
        "kind": "training",
        "scenario_name": name,
        "step_time_s": step,
        "step_time_range_s": [0.98 * step, 1.03 * step],
        "tokens_per_second": 262144 / step,
        "tokens_per_second_per_gpu": 262144 / step / ranks,
        "mfu": {
            "peak": "bf16",
            "causal": 0.3517,
            "non_causal": 0.3924,
            "causal_of_bf16_peak": 0.3517,
            "non_causal_of_bf16_peak": 0.3924,
        },
        "attribution_s": dict(zip(CATEGORIES, attribution_C.tolist(), strict=True)),
        "communication": {
            "dispatch_bytes": 1.13e12,
            "combine_bytes": 1.27e12,
            "intra_node_bytes": 2.38e12,
            "inter_node_bytes": 0.02e12,
            "copies_per_token": 2.417,
        },
        "imbalance": {
            "expert": 1.931,
            "rank_rows": 1.217,
            "rank_bytes": 1.143,
            "rank_time": 1.185,
            "uniform_floor": 1.039,
            "uniform_floor_rank": 1.012,
            "window_tokens": 32768,
            "cost_s": step - balanced_s,
        },
        "dropped_share": 0.0713,
        "effective": {
            "kept_share": 0.9287,
            "mfu_causal": 0.3431,
            "mfu_non_causal": 0.3838,
            "usd_per_million_tokens": 0.01306,
        },
        "critical_path": {
            "step_time_s": step,
            "seconds": {
                name: 0.9 * step * (name == "experts") + 0.1 * step * (name == "attention") for name in CATEGORIES
            },
            "seconds_by_rank": {"0": 0.4 * step, "3": 0.6 * step},
            "last_rank": 3,
        },
        "memory": {
            "peak_bytes": 71.3e9,
            "peak_bytes_by_pipeline_rank": [71.3e9],
            "capacity_bytes_by_pipeline_rank": [151.4e9],
            "fits_share": 0.875,
            "fullest_pipeline_rank": 0,
            "parts_bytes_by_pipeline_rank": [
                {"optimizer.experts": 31e9, "weights.dense": 21e9, "activations.attention": 12.3e9, "reserved": 7e9}
            ],
        },
        "cost": {"usd_per_step": 0.00347, "usd_per_million_tokens": 0.01213, "usd_total": 24321.0, "days": 31.27},
        "estimate_sources": {"roofline": 0.83, "measured": 0.17},
        "router": {
            "kind": "deepseek_v2",
            "train_loss": 1.9137,
            "validation_loss": 2.0259,
            "steps": [0, 150],
            "imbalance_first": 3.217,
            "imbalance_last": 1.641,
            "trace_sequences": 32,
            "batch_sequences": 64,
            "trace_coverage": 0.5,
            "reused_share": 0.5,
        },
        "warnings": ["the trace holds half as many sequences as the batch"],
        "samples": 8,
        "world_size": ranks,
        "gpus": ranks,
    }


@pytest.fixture(scope="session")
def make_record() -> MakeRecord:
    """`make_record(name=..., ranks=..., trained=...)` gives a RunRecord of DeepSeekMoE-16B, made once."""

    def make(
        *, name: str = "fixture", ranks: int = 8, trained: bool = True, layers: int = 27, experts: int = 64
    ) -> RunRecord:
        rng = np.random.default_rng(0)
        scenario = scenario_from_mapping(
            {
                "name": name,
                "model": {"preset": "deepseek-moe-16b"},
                "routing": {"kind": "uniform"},
                "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 8},
                "parallelism": {"data": 8, "expert": 8},
                "workload": {"sequence_length": 4096, "global_batch": 64},
            }
        )
        weight_C = rng.random(len(CATEGORIES)) * np.array(
            [c not in ("tensor", "pipeline", "bubble", "recompute") for c in CATEGORIES]
        )
        attribution_CW = 0.05 * weight_C[:, None] * (1 + 0.2 * rng.random((len(CATEGORIES), ranks)))
        attribution_C = attribution_CW.mean(axis=1)
        balanced_C = attribution_C * np.array([category != "imbalance_wait" for category in CATEGORIES])
        load_LE = np.exp(0.5 * rng.normal(size=(layers, experts)))
        load_LE /= load_LE.mean(axis=1, keepdims=True)
        traffic_RR = 1e9 * (1 + rng.random((ranks, ranks))) * (1 - np.eye(ranks))
        return RunRecord(
            scenario=scenario,
            result=make_result(name=name, attribution_C=attribution_C, balanced_s=float(balanced_C.sum()), ranks=ranks),
            arrays={
                "step_time_S": np.full(8, attribution_C.sum()),
                "attribution_CW": attribution_CW,
                "attribution_balanced_C": balanced_C,
                "compute_time_W": attribution_CW.sum(axis=0) * 0.7,
                "expert_load_LE": load_LE,
                "rank_load_LR": load_LE.reshape(layers, ranks, -1).mean(axis=2),
                "traffic_RR": traffic_RR,
            },
            pipeline_spans=(make_spans(layers=3, ranks=ranks, rng=rng),),
            trace=make_trace(experts=experts, top_k=6, trained=trained, rng=rng),
        )

    return cache(make)
