"""Many scenarios at once: points, their records on disk, and the pool of processes that simulates them."""

from moesim.study.points import Point, PointRecord, PointsFile, StoredPoints, read_points, scenario_id
from moesim.study.pool import Progress, run_points, show_points

__all__ = [
    "Point",
    "PointRecord",
    "PointsFile",
    "Progress",
    "StoredPoints",
    "read_points",
    "run_points",
    "scenario_id",
    "show_points",
]
