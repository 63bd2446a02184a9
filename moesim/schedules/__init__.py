"""In WHICH ORDER pipeline ranks work: schedules as data, one table of their facts, and a walk without a clock."""

from moesim.schedules.record import (
    P2P,
    Action,
    Pass,
    Schedule,
    Seconds,
    Walk,
    Work,
)
from moesim.schedules.table import (
    COMBINED,
    GPIPE,
    INTERLEAVED,
    PLAIN,
    SCHEDULES,
    SPLIT,
    ScheduleFacts,
    build_schedule,
)

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
    "Schedule",
    "ScheduleFacts",
    "Seconds",
    "Walk",
    "Work",
    "build_schedule",
]
