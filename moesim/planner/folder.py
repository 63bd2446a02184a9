"""A plan's folder: what was asked, every simulated layout as a scenario file, the records, the plan.

OUT/plan.json               the plan that was made; until it is, its hash and `"status"`: unfinished or failed
OUT/points.jsonl            one record per simulated layout, appended at once
OUT/variants.jsonl          likewise for the best layouts on faster and slower links
OUT/scenarios/NNNN.yaml     the layouts; `moesim run` accepts them and gives the recorded result
OUT/search.journal          trials of the search, where the space was too large to enumerate
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import MachineError, UserError
from moesim.files import claimed, write_atomically
from moesim.planner.plan import Plan
from moesim.routing.replay import routing_digest
from moesim.scenario import Scenario, dump_scenario
from moesim.strict_json import json_text, parse_json
from moesim.study import Point, PointRecord, PointsFile, read_points, run_points, scenario_id
from moesim.study.pool import Watch

PLAN_FILE, POINTS_FILE, VARIANTS_FILE, JOURNAL_FILE = "plan.json", "points.jsonl", "variants.jsonl", "search.journal"
PLAN_SCHEMA_VERSION = 1


def plan_hash(plan: Plan) -> str:
    """16 hexadecimal digits of the SHA-256 of the plan with all its defaults, and of what its `routing.file` holds."""
    settings, recording = plan.model_dump(mode="json"), routing_digest(plan.routing)
    content = settings if recording is None else {"plan": settings, "recording": recording}
    text = json_text(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Folder:
    """The folder of one plan, with `workers` processes (or a Dask `cluster`) to simulate what it lacks."""

    path: Path
    plan: Plan
    workers: int | None = None
    cluster: str | None = None
    cache_dir: Path | None = None
    watch: Watch | None = None
    _numbers: dict[str, dict[str, int]] = field(init=False, default_factory=dict, repr=False)

    @contextmanager
    def claimed(self, *, force: bool) -> Iterator[None]:
        """Keep the folder for this plan and this process until the block ends; why a plan failed goes into plan.json.

        Raises UserError where it holds another plan, unless `force` clears that, or there is nothing of it to lose: it
        failed, or nothing was simulated yet.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a folder with --out")
        with claimed(self.path):
            self._take(force=force)
            try:
                yield
            except MachineError:  # the same command goes on from here
                raise
            except UserError as error:
                if self._state().get("status") != "done":
                    with suppress(MachineError):
                        self.write({"status": "failed", "reason": str(error)})
                raise

    def _take(self, *, force: bool) -> None:
        state, ours = self._state(), plan_hash(self.plan)
        points = self.path / POINTS_FILE
        has_points = points.exists() and points.stat().st_size > 0
        if not state and has_points and not force:
            raise UserError(f"{self.path} holds {POINTS_FILE} of something else; choose another --out, or --force")
        if state.get("hash") == ours:
            return
        nothing_to_lose = state.get("status") == "failed" or (state.get("status") == "unfinished" and not has_points)
        if state and not nothing_to_lose and not force:
            raise UserError(f"{self.path} holds another plan (or this one, changed); choose another --out, or --force")
        for name in (PLAN_FILE, POINTS_FILE, VARIANTS_FILE, JOURNAL_FILE):
            (self.path / name).unlink(missing_ok=True)
        for scenario in (self.path / "scenarios").glob("[0-9]*.yaml"):
            scenario.unlink()
        self.write({"status": "unfinished"})

    def _state(self) -> dict[str, Any]:
        """What plan.json holds; empty where there is none."""
        path = self.path / PLAN_FILE
        if not path.exists():
            return {}
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        return content if isinstance(content, dict) and content else {"status": "damaged"}

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace plan.json; name, kind and hash are added."""
        head = {
            "schema_version": PLAN_SCHEMA_VERSION,
            "kind": "plan",
            "name": self.plan.name,
            "hash": plan_hash(self.plan),
        }
        write_atomically(self.path / PLAN_FILE, (json_text({**head, **content}, indent=1) + "\n").encode())

    def simulate(
        self, scenarios: Sequence[tuple[Scenario, Mapping[str, Any]]], *, file: str = POINTS_FILE
    ) -> list[PointRecord]:
        """Records of the scenarios (with what the plan chose for each), in their order; finished ones are not redone.

        Points get a scenario file, variants do not. Numbers follow the order of the first requests, which a rerun of
        the plan repeats.
        """
        points = [self._point(scenario, values, file=file) for scenario, values in scenarios]
        with PointsFile.opened(self.path / file) as points_file:
            finished = {record.id for record in read_points(self.path / file).records if record.status != "failed"}
            missing = {point.id: point for point in points if point.id not in finished}
            for point in missing.values():
                if point.scenario_file is not None:
                    self._write_scenario(point)
            run_points(
                list(missing.values()),
                on_record=points_file.append,
                workers=self.workers,
                cluster=self.cluster,
                cache_dir=self.cache_dir,
                watch=self.watch,
            )
        records = read_points(self.path / file).by_id()
        return [records[point.id] for point in points]

    def _point(self, scenario: Scenario, values: Mapping[str, Any], *, file: str) -> Point:
        numbers = self._numbers.setdefault(file, {})
        number = numbers.setdefault(scenario_id(scenario), len(numbers))
        name = f"scenarios/{number:04d}.yaml" if file == POINTS_FILE else None
        return Point.of(scenario, number=number, values=values, scenario_file=name)

    def _write_scenario(self, point: Point) -> None:
        assert point.scenario_file is not None
        target = self.path / point.scenario_file
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, scenario_text(self.plan, point).encode())


def scenario_text(plan: Plan, point: Point) -> str:
    """The scenario of a point as YAML that says what the planner chose."""
    offer = next(offer for offer in plan.goal.gpus if offer.gpu == point.scenario.cluster.main_pool.gpu_name)
    head = [
        f"# Layout {point.number} of the plan {plan.name}: `moesim run` gives the result that the plan ranked it by.",
        f"# Rent of a {offer.gpu}: ${offer.usd_per_gpu_hour:g} per GPU-hour ({_one_line(offer.source)}).",
        "# Chosen by the planner:",
        *(f"#   {key}: {json_text(value)}" for key, value in point.values.items()),
    ]
    return "\n".join(head) + "\n" + dump_scenario(point.scenario)


def _one_line(text: str) -> str:
    return " ".join(text.split())
