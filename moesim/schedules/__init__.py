"""In WHICH ORDER pipeline ranks work: schedules as data, one table of their facts, and a walk without a clock."""

from moesim.schedules.record import P2P, Action, Pass, Schedule, Work
from moesim.schedules.table import (
    COMBINED,
    GPIPE,
    INTERLEAVED,
    PLAIN,
    SCHEDULES,
    SPLIT,
    PassTimes,
    ScheduleFacts,
    build_schedule,
)
from moesim.schedules.walk import Seconds, Timetable, Walk, equal_seconds, walk_schedule

__all__ = [
    "COMBINED",
    "GPIPE",
    "INTERLEAVED",
    "P2P",
    "PLAIN",
    "SCHEDULES",
    "SPLIT",
    "Action",
    "Pass",
    "PassTimes",
    "Schedule",
    "ScheduleFacts",
    "Seconds",
    "Timetable",
    "Walk",
    "Work",
    "build_schedule",
    "equal_seconds",
    "walk_schedule",
]
