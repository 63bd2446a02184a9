"""Folders of runs, sweeps and plans made by hand, with numbers that follow from their values."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.results import CATEGORIES

TOKENS = 262_144
LIMIT, SEED, GPU, NODES, STAGES = (
    "routing.router.device_limit",
    "seed",
    "cluster.gpu",
    "cluster.nodes",
    "parallelism.pipeline",
)
TOO_SMALL = "needs 92.3 GB of 80 GB on pipeline rank 0; use workload.recompute = full"
PRICES = {"h100": 2.5, "h200": 3.5, "b200": 6.0}
SPEEDS = {"h100": 1.0, "h200": 1.12, "b200": 2.1}


def result_of(step_s: float, *, gpus: int = 8, price: float = 3.5, loss: float | None = 2.4) -> dict[str, Any]:
    """A result whose numbers agree with each other: attribution, rates and prices follow from the step time."""
    shares = {"attention": 0.25, "experts": 0.45, "dispatch_exposed": 0.08, "combine_exposed": 0.07,
              "imbalance_wait": 0.05, "optimizer": 0.1}  # fmt: skip
    per_step = price * gpus * step_s / 3600
    return {
        "schema_version": 1,
        "kind": "training",
        "scenario_name": "case",
        "gpus": gpus,
        "samples": 8,
        "step_time_s": step_s,
        "step_time_range_s": [0.98 * step_s, 1.03 * step_s],
        "tokens_per_second": TOKENS / step_s,
        "tokens_per_second_per_gpu": TOKENS / step_s / gpus,
        "mfu": {"causal": 0.4 / step_s, "non_causal": 0.44 / step_s},
        "attribution_s": {name: shares.get(name, 0.0) * step_s for name in CATEGORIES},
        "communication": {"dispatch_bytes": 1e11, "combine_bytes": 3e11, "inter_node_bytes": 0.0},
        "imbalance": {"expert": 1.9, "rank_rows": 1.2, "cost_s": 0.04 * step_s},
        "dropped_share": 0.05,
        "memory": {"peak_bytes": 60e9, "fits_share": 1.0},
        "cost": {
            "usd_per_step": per_step,
            "usd_per_million_tokens": per_step / TOKENS * 1e6,
            "usd_total": None,
            "days": None,
            "price_source": "scenario",
        },
        "estimate_sources": {"interpolated": 0.8, "network": 0.2},
        "router": {"kind": "deepseek_v2", "validation_loss": loss},
        "warnings": [],
    }


def point(number: int, values: Mapping[str, Any], result: Mapping[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """A line of points.jsonl."""
    status = {"status": "done", "reason": None} if result else {"status": "infeasible", "reason": TOO_SMALL}
    return {"id": f"{number:016x}", "number": number, "values": dict(values), "pid": 7, "seconds": 1.5,
            "result": result, "scenario_file": None} | status | changes  # fmt: skip


def axis(
    keys: str | Sequence[str], values: Iterable[Any], *, labels: Any = None, repeat: bool = False
) -> dict[str, Any]:
    """An axis of study.json."""
    listed = [keys] if isinstance(keys, str) else list(keys)
    rows = [list(value) if isinstance(value, tuple) else [value] for value in values]
    return {"keys": listed, "values": rows, "labels": labels, "repeat": repeat}


def write_study(folder: Path, points: Sequence[Mapping[str, Any]], *, kind: str = "sweep", **about: Any) -> Path:
    """A folder of `moesim sweep` or `moesim plan`."""
    folder.mkdir(parents=True)
    head = {"schema_version": 1, "kind": kind, "name": folder.name, "num_points": len(points), "plot": None, **about}
    (folder / {"sweep": "study.json", "plan": "plan.json"}[kind]).write_text(json.dumps(head))
    (folder / "points.jsonl").write_text("".join(json.dumps(found) + "\n" for found in points))
    return folder


def write_run(folder: Path, result: Mapping[str, Any], scenario: str) -> Path:
    """A folder of `moesim run`."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "scenario.yaml").write_text(scenario)
    return folder


def limits(folder: Path, **about: Any) -> Path:
    """A sweep of five limits with three seeds each; the seeds of a limit differ by one per cent in step time."""
    points = []
    for limit in (1, 2, 3, 4, None):
        for seed in range(3):
            size = limit or 6
            result = result_of((1 + 0.05 * size) * (1 + 0.01 * seed), loss=2.6 - 0.03 * size + 0.01 * seed)
            points.append(point(len(points) + 1, {LIMIT: limit, SEED: seed}, result))
    axes = [
        axis(LIMIT, (1, 2, 3, 4, None), labels=["1", "2", "3", "4", "no limit"]),
        axis(SEED, (0, 1, 2), repeat=True),
    ]
    return write_study(folder, points, axes=axes, **about)


def plan_about(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What plan.json says of two ranked layouts: the first one wins by 1000 USD, mostly of routed experts."""
    winner, other = results
    outcomes = {
        name: {"values": {"gpus": 8, GPU: "h200", STAGES: stages, "workload.micro_batch": 1}, "usd": usd}
        for (name, stages, usd) in ((winner, 1, 40_000.0), (other, 2, 41_000.0))
    }
    parts = [("experts", 900.0), ("bubble", 150.0), ("combine_exposed", -52.0), ("router", 2.0)]
    change = {"change": "bandwidth of all links x2", "note": "", "winner": other, "changes_winner": True,
              "usd": 39_000.0, "days": 61.5, "layouts": 2}  # fmt: skip
    flip = {"gpu": "b200", "usd_per_gpu_hour": 2.5, "price_ratio": 1.2, "price_ratio_now": 2.4}
    discarded = [{"stage": "memory", "reason": "h100", "count": 38, "example": "143.6 GB of 85.5 GB"}]
    return {
        "ranking": [winner, other],
        "front": [winner],
        "outcomes": outcomes,
        "why": {
            "winner": winner,
            "runner_up": {"other": other, "parts": [{"part": part, "usd_difference": usd} for part, usd in parts]},
        },
        "sensitivity": {"changes": [change], "price_flips": [flip]},
        "counts": {"looked_at": 1440, "kept": 321, "simulated": 14, "discarded": discarded},
        "screen_error": {"layouts": 6, "median": 0.0012, "worst": 0.0019},
        "baseline": None,
    }


def clusters(folder: Path, *, kind: str = "plan", **about: Any) -> Path:
    """A plan over GPU types, nodes and pipeline sizes; one H100 node does not hold the model."""
    points = []
    for gpu in PRICES:
        for nodes in (1, 2, 4, 8):
            for stages in (1, 2):
                values = {GPU: gpu, NODES: nodes, STAGES: stages}
                step_s = 1.3 / (nodes**0.9 * SPEEDS[gpu] * (1.0 if stages == 1 else 0.93))
                fits = (gpu, nodes, stages) != ("h100", 1, 1)
                found = result_of(step_s, gpus=8 * nodes, price=PRICES[gpu]) if fits else None
                points.append(point(len(points) + 1, values, found))
    axes = [axis(GPU, PRICES), axis(NODES, (1, 2, 4, 8)), axis(STAGES, (1, 2))]
    return write_study(folder, points, kind=kind, **({"axes": axes} if kind == "sweep" else {}), **about)
