"""make_serving_plan: for every combination the fewest instances that answer the load within its limits, ranked.

A unit (an instance, or prefill and decode instances in a ratio) is simulated with its share of the requests: every n-th
part of their rate for n units, with more of them where too few come to form a queue. n doubles until the limits are met
and is then bisected. The best are simulated again as whole fleets behind one router, and n grows where that misses the
limits. What was simulated is kept in points.jsonl; the same command goes on from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import InfeasibleError, UserError
from moesim.files import write_atomically
from moesim.planner.plan_folder import POINTS_FILE, PlanFolder, scenario_file
from moesim.planner.serving_plan import ServingPlan, Unit, scenario_of, scenario_text, units_of, values_of
from moesim.routing.request import content_digest, routing_digest
from moesim.serving.answers import answers_of
from moesim.serving.fleet import Deployment
from moesim.serving.requests import draw_requests
from moesim.serving.schema import TraceArrivals
from moesim.serving.steady import carried_share, served_steadily
from moesim.strict_json import json_text, parse_json
from moesim.study.points import content_hash, pareto_front

ASKED = 10_000  # requests whose mean rate and lengths are the load that prices are over, at least
WHOLE = 3  # best combinations that are simulated as whole fleets
KEPT = (
    "good_share", "requests_per_second", "output_tokens_per_second", "tokens_per_second_per_gpu",
    "tokens_per_second_per_user", "ttft_s", "tpot_s", "latency_s", "rank_rows_imbalance", "kv_peak_share", "memory",
    "preempted", "warnings",
)  # fmt: skip

_OF_LOADS = ("requests_per_second", "good_share", "tokens_per_second_per_gpu", "tokens_per_second_per_user")

Progress = Callable[[int, int], None]


@dataclass
class Points:
    """What was simulated, by a key of the plan's file; appended at once."""

    path: Path
    known: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        """Take what an earlier call wrote; a line that was cut off is forgotten."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = parse_json(line)
                self.known[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        text = "".join(json_text(record) + "\n" for record in self.known.values())
        write_atomically(self.path, text.encode())

    def of(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of a key; made where it is not known."""
        if key not in self.known:
            record = {"key": key, **make()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(record) + "\n")
            self.known[key] = record
        return dict(self.known[key])


@dataclass(frozen=True)
class Found:
    """A combination with its fewest units, None where the limits are missed; and what came closest."""

    unit: Unit
    units: int | None
    record: Mapping[str, Any]
    reason: str = ""


def plan_digest(plan: ServingPlan) -> str:
    """16 hexadecimal digits of the SHA-256 of the plan with all its defaults and of what its files hold."""
    content: dict[str, Any] = {"plan": plan.model_dump(mode="json")}
    arrivals = plan.workload.arrivals
    named = [arrivals.file if isinstance(arrivals, TraceArrivals) else None, plan.fabric.file, plan.compute.profile]
    files = {str(name): content_digest(Path(name)) for name in named if name is not None and Path(name).is_file()}
    recordings = [routing_digest(routing) for routing in (plan.routing, plan.decode_routing)]
    if files or any(recordings):
        content |= {"files": files, "recordings": recordings}
    return content_hash(content)[:16]


def make_serving_plan(
    plan: ServingPlan, folder: Path, *, progress: Progress | None = None, force: bool = False
) -> dict[str, Any]:
    """Make the plan, write it into the folder and return what plan.json holds.

    Raises InfeasibleError with the nearest combination where none meets the limits.
    """
    kept = PlanFolder(path=folder, kind="serving plan", name=plan.name, digest=plan_digest(plan))
    with kept.claimed(force=force):
        points = Points(folder / POINTS_FILE)
        points.read()
        units = units_of(plan)
        found = []
        for number, unit in enumerate(units):
            if progress is not None:
                progress(number, len(units))
            found.append(_fewest(plan, unit, points))
        if progress is not None:
            progress(len(units), len(units))
        meeting = sorted((each for each in found if each.units is not None), key=lambda each: _rank(plan, each))
        ranking = [each for each in meeting if not each.unit.is_alternative]
        others = [each for each in meeting if each.unit.is_alternative]
        if not ranking:
            raise InfeasibleError(_why_nothing(plan, found))
        whole = {id(each): _as_fleet(plan, each, points) for each in ranking[:WHOLE]}
        found = [whole.get(id(each), each) for each in found]
        ranking = [each for each in (whole.get(id(each), each) for each in ranking) if each.units is not None]
        ranking.sort(key=lambda each: _rank(plan, each))
        if not ranking:
            raise InfeasibleError(_why_nothing(plan, found))
        content = _content(plan, found, ranking, others, points)
        _write_scenarios(plan, kept, ranking)
        kept.write(content)
        return content


def _usd(plan: ServingPlan, unit: Unit, units: int) -> float:
    """USD per hour of so many units."""
    return plan.goal.gpus[unit.offer].usd_per_gpu_hour * unit.gpus * units


def _rank(plan: ServingPlan, each: Found) -> tuple[float, ...]:
    assert each.units is not None
    usd, gpus = _usd(plan, each.unit, each.units), float(each.unit.gpus * each.units)
    first = (usd, gpus) if plan.goal.serve.best == "usd" else (gpus, usd)
    return (*first, -float(each.record["good_share"]))


def _meets(plan: ServingPlan, record: Mapping[str, Any]) -> bool:
    return bool(record.get("carried_share", 0.0) >= plan.workload.slo.share)


def _simulated(plan: ServingPlan, deployment: Deployment, *, units: int, times: float) -> dict[str, Any]:
    """The record of `units` that get `times` the rate of the plan; `carried_share` as for a largest load."""
    first = deployment.requests(plan.seed)
    drawn, served = served_steadily(deployment, first, seed=plan.seed, factor=times)
    requests, number = drawn.faster(times), plan.workload.requests if len(drawn) == len(first) else len(drawn)
    result = answers_of(deployment, requests, served)
    carried = carried_share(served, requests, plan.workload.slo)
    return {"units": units, "carried_share": carried, "requests": number, **{name: result[name] for name in KEPT}}


def _missed(record: Mapping[str, Any]) -> str:
    """Why a load is not carried."""
    if record["carried_share"] > 0.0 or record["good_share"] == 0.0:
        return f"{min(record['carried_share'], record['good_share']):.1%} meet the limits"
    return f"more comes than goes ({record['good_share']:.1%} meet the limits, and waiting grows)"


def _fewest(plan: ServingPlan, unit: Unit, points: Points) -> Found:
    """The fewest units that meet the limits: doubled until they do, then bisected."""
    most = min(plan.goal.gpus[unit.offer].at_most // unit.gpus, plan.most_instances)
    if most < 1:
        return Found(unit, None, {}, f"more GPUs than offered ({unit.gpus} of {unit.words(plan)})")
    deployments: list[Deployment] = []

    def at(units: int) -> dict[str, Any]:
        def make() -> Mapping[str, Any]:
            try:
                if not deployments:
                    deployments.append(Deployment(scenario_of(plan, unit, units=1)))
                return _simulated(plan, deployments[0], units=units, times=1.0 / units)
            except (InfeasibleError, UserError) as error:
                return {"refused": str(error)}

        return points.of(f"{unit}|steady share of {units}", make)

    low, high = 0, 1
    record = at(high)
    if "refused" in record:
        return Found(unit, None, {}, str(record["refused"]))
    while not _meets(plan, record):
        if high == most:
            return Found(unit, None, record, f"{_missed(record)} on {most * unit.gpus} GPUs")
        low, high = high, min(2 * high, most)
        record = at(high)
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(middle)
        if _meets(plan, tried):
            high, record = middle, tried
        else:
            low = middle
    return Found(unit, high, record)


def _as_fleet(plan: ServingPlan, each: Found, points: Points) -> Found:
    """The whole fleet behind one router, with more units where that misses the limits."""
    unit, first = each.unit, each.units
    assert first is not None
    most = min(plan.goal.gpus[unit.offer].at_most // unit.gpus, plan.most_instances)
    for units in range(first, min(most, 2 * first + 1) + 1):

        def make(units: int = units) -> Mapping[str, Any]:
            deployment = Deployment(scenario_of(plan, unit, units=units))
            return {"whole": True, **_simulated(plan, deployment, units=units, times=1.0)}

        record = points.of(f"{unit}|steady fleet of {units}", make)
        if _meets(plan, record):
            return Found(unit, units, record)
    return Found(unit, None, record, "the whole fleet misses the limits")


def _why_nothing(plan: ServingPlan, found: Sequence[Found]) -> str:
    """The nearest combination in one line."""
    head = f"{plan.name}: none of {len(found)} combinations answers the load within its limits"
    simulated = [each for each in found if each.record and not each.unit.is_alternative]
    if not simulated:
        reasons = [each.reason for each in found]
        return f"{head}; {reasons[0] if reasons else 'there is none'}; offer more or other GPUs, or choose other sizes"
    nearest = max(simulated, key=lambda each: (each.record["carried_share"], each.record["good_share"]))
    ttft, tpot = (nearest.record[name]["p90"] for name in ("ttft_s", "tpot_s"))
    asked = f"{plan.workload.slo.share:.0%} are asked"
    return (
        f"{head}; nearest: {nearest.unit.words(plan)}: {nearest.reason}, {asked} (p90 of "
        f"{ttft:.3g} s to the first token, {tpot:.3g} s per token); loosen workload.slo, offer more or other GPUs"
    )


def _shown(plan: ServingPlan, each: Found, *, output: float) -> dict[str, Any]:
    """What a table shows of one combination; `output` tokens per second are asked for, so that prices compare."""
    units = each.units or 0
    usd, record = _usd(plan, each.unit, units), each.record
    return {
        "words": each.unit.words(plan), "values": dict(values_of(each.unit, plan)), "units": units,
        "gpus": units * each.unit.gpus, "usd_per_hour": usd,
        "usd_per_million_output_tokens": usd / 3600 / output * 1e6,
        "asked_output_tokens_per_second": output,
        **{name: record[name] for name in KEPT},
        "whole": bool(record.get("whole")),
    }  # fmt: skip


def _content(
    plan: ServingPlan, found: Sequence[Found], ranking: Sequence[Found], others: Sequence[Found], points: Points
) -> dict[str, Any]:
    by_words = {str(each.unit): each.unit for each in found}
    asked_for = {"requests": max(plan.workload.requests, ASKED)}
    requests = draw_requests(plan.workload.model_copy(update=asked_for), seed=plan.seed)
    asked = requests.per_second * float(requests.output_N.mean())
    loads = []
    for key, record in points.known.items():
        unit = by_words.get(key.partition("|")[0])
        if unit is None or "refused" in record:
            continue
        gpus = unit.gpus * (record["units"] if record.get("whole") else 1)
        per_gpu = float(record["output_tokens_per_second"]) / gpus
        loads.append(
            {
                "words": unit.words(plan),
                "is_alternative": unit.is_alternative,
                "meets": _meets(plan, record),
                "gpus": gpus,
                "output_tokens_per_second_per_gpu": per_gpu,
                **{name: record[name] for name in (*_OF_LOADS, "ttft_s", "tpot_s", "latency_s")},
            }
        )
    alternative = plan.alternative
    return {
        "status": "done",
        "best": plan.goal.serve.best,
        "slo": plan.workload.slo.model_dump(mode="json"),
        "requests": ranking[0].record["requests"],
        "offers": [offer.model_dump(mode="json") for offer in plan.goal.gpus],
        "combinations": len(found),
        "simulations": len(points.known),
        "ranking": [_shown(plan, each, output=asked) for each in ranking],
        "warnings": list(ranking[0].record["warnings"]),
        "missed": [{"words": each.unit.words(plan), "reason": each.reason} for each in found if each.units is None],
        "loads": loads,
        "front": pareto(loads),
        "alternative": None
        if alternative is None
        else {
            "source": alternative.source,
            "model": alternative.model.preset or "the other model",
            "best": _shown(plan, others[0], output=asked) if others else None,
        },
    }


def pareto(loads: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the loads that no other beats in tokens per second of a user and of a GPU, the fastest first."""
    x, y = "tokens_per_second_per_user", "output_tokens_per_second_per_gpu"
    own = [place for place, load in enumerate(loads) if not load["is_alternative"] and load[x] is not None]
    points = [(loads[place][x], loads[place][y]) for place in own]
    return [own[index] for index in reversed(pareto_front(points, better=(1, 1)))]


def _write_scenarios(plan: ServingPlan, kept: PlanFolder, ranking: Sequence[Found]) -> None:
    kept.clear_scenarios()
    for number, each in enumerate(ranking, start=1):
        assert each.units is not None
        text = scenario_text(plan, each.unit, units=each.units, requests=int(each.record["requests"]))
        head = f"# Number {number} of the plan {plan.name}: {each.unit.words(plan)}, {each.units} of it\n"
        kept.write_scenario(scenario_file(number), head + text)
