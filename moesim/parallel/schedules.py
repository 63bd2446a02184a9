"""Pipeline schedules by the `kind` of `parallelism.schedule`: who does what in which order, as data."""

from collections.abc import Callable

from moesim.parallel import schedules_orders as orders
from moesim.parallel.schedules_record import Action, Handoff, Pass, Schedule, Work
from moesim.parallel.schedules_walk import Timetable, equal_seconds, walk_schedule

__all__ = [
    "SCHEDULES",
    "Action",
    "Handoff",
    "Pass",
    "Schedule",
    "Timetable",
    "Work",
    "build_schedule",
    "equal_seconds",
    "walk_schedule",
]


def _without_chunks(order: Callable[[int, int], Schedule]) -> Callable[[int, int, int], Schedule]:
    def build(num_ranks: int, num_micro_batches: int, virtual: int) -> Schedule:
        assert virtual == 1, "the scenario's checks refuse chunks where there are none"
        return order(num_ranks, num_micro_batches)

    return build


# (pipeline ranks, micro-batches, chunks per rank) -> Schedule
SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": _without_chunks(orders.gpipe),
    "1f1b": _without_chunks(orders.one_forward_one_backward),
    "interleaved": orders.interleaved,
    "zb_h1": _without_chunks(orders.zb_h1),
    "dualpipe": _without_chunks(orders.dualpipe),
}


def build_schedule(kind: str, *, num_ranks: int, num_micro_batches: int, virtual: int = 1) -> Schedule:
    """The order of one step on `num_ranks` pipeline ranks.

    >>> schedule = build_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    >>> [str(action) for action in schedule.actions[0]]
    ['F0.0', 'F1.0', 'B0.0', 'B1.0']
    """
    return SCHEDULES[kind](num_ranks, num_micro_batches, virtual)
