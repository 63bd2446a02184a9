"""sweep(study, folder): simulate the points that the folder lacks, one line on disk for each as soon as it is there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.study import Point, PointRecord, read_points, run_points
from moesim.study.progress import Watch
from moesim.study.store import POINTS_FILE
from moesim.sweeper.folder import SweepFolder
from moesim.sweeper.study import Misfit, Study


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """The records of all points by number. `new`: how many this call made; `torn`: a half-written line was redone."""

    records: tuple[PointRecord, ...]
    new: int
    torn: bool

    def count(self, status: str) -> int:
        """Points of a status."""
        return sum(record.status == status for record in self.records)

    @property
    def exit_code(self) -> int:
        """0: at least one point is done and none failed; 1: a point failed; 2: every point is infeasible."""
        if self.count("failed"):
            return 1
        return 0 if self.count("done") else 2


def sweep(
    study: Study,
    folder: SweepFolder,
    *,
    workers: int | None = None,
    cluster: str | None = None,
    retry: bool = False,
    cache_dir: Path | None = None,
    watch: Watch | None = None,
) -> SweepOutcome:
    """Simulate the points of `study` that have no record in `folder` yet (with `retry` also those that failed).

    The other arguments are those of `run_points`. Raises UserError for a folder of another sweep, a full disk and a
    cluster out of reach; KeyboardInterrupt keeps what is finished.
    """
    with folder.opened(study) as file:
        stored = read_points(folder.path / POINTS_FILE)
        known = stored.by_id()
        if retry:
            known = {key: record for key, record in known.items() if record.status != "failed"}
        new = [_misfit_record(misfit) for misfit in study.misfits if misfit.id not in known]
        for record in new:
            file.append(record)
        missing: Sequence[Point] = [point for point in study.points if point.id not in known]
        new += run_points(
            missing, on_record=file.append, workers=workers, cluster=cluster, cache_dir=cache_dir, watch=watch
        )
    known |= {record.id: record for record in new}
    records = sorted(known.values(), key=lambda record: record.number)
    return SweepOutcome(records=tuple(records), new=len(new), torn=file.torn)


def _misfit_record(misfit: Misfit) -> PointRecord:
    return PointRecord(
        id=misfit.id,
        number=misfit.number,
        values=dict(misfit.values),
        status="infeasible",
        reason=misfit.reason,
        pid=os.getpid(),
        seconds=0.0,
        result=None,
    )
