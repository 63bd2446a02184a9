"""The folder of a plan, of training or of serving: plan.json says which plan it holds, and how far that is.

Beside it lie points.jsonl with what was simulated, other files that grow with it, and scenarios/NNNN.yaml.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import MachineError, UserError
from moesim.files import claimed, write_atomically
from moesim.strict_json import json_text, parse_json

PLAN_FILE, POINTS_FILE = "plan.json", "points.jsonl"
PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlanFolder:
    """`digest`: of the plan and of what its files hold; `also`: names of what grows beside points.jsonl."""

    path: Path
    kind: str
    name: str
    digest: str
    also: tuple[str, ...] = ()

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
        state, points = self._state(), self.path / POINTS_FILE
        has_points = points.exists() and points.stat().st_size > 0
        if not state and has_points and not force:
            raise UserError(f"{self.path} holds {POINTS_FILE} of something else; choose another --out, or --force")
        if state.get("hash") == self.digest:
            return
        nothing_to_lose = state.get("status") == "failed" or (state.get("status") == "unfinished" and not has_points)
        if state and not nothing_to_lose and not force:
            raise UserError(f"{self.path} holds another plan (or this one, changed); choose another --out, or --force")
        for name in (PLAN_FILE, POINTS_FILE, *self.also):
            (self.path / name).unlink(missing_ok=True)
        self.clear_scenarios()
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
        """Replace plan.json; version, kind, name and hash are added."""
        head = {"schema_version": PLAN_SCHEMA_VERSION, "kind": self.kind, "name": self.name, "hash": self.digest}
        write_atomically(self.path / PLAN_FILE, (json_text({**head, **content}, indent=1) + "\n").encode())

    def clear_scenarios(self) -> None:
        """Take away the files of scenarios that an earlier call wrote."""
        for scenario in (self.path / "scenarios").glob("[0-9]*.yaml"):
            scenario.unlink()

    def write_scenario(self, name: str, text: str) -> None:
        """The file of one: `name` is its path in the folder."""
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, text.encode())


def scenario_file(number: int) -> str:
    """The path in the folder of the scenario of so many a layout."""
    return f"scenarios/{number:04d}.yaml"
