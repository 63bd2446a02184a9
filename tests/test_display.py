"""What shows how far the work is: bars for a person, a line now and then for a log, nothing when quiet."""

from io import StringIO

import pytest
from rich.console import Console

from moesim.display import LINE_SECONDS, Lines, opened_display
from moesim.routing.request import StepReport, show_training
from moesim.study import Progress, show_points


def test_bars_show_routers_points_and_training() -> None:
    stream = StringIO()
    with opened_display(console=Console(file=stream, force_terminal=True, width=120)) as display:
        assert display is not None
        show_training(display)(StepReport(3, 40, 2.5, 1.25))
        show_points(display)(Progress(points=4, routers=2, trained=1, done=1, infeasible=1, running=2))
    shown = stream.getvalue()
    assert all(text in shown for text in ("routers", "1/2", "points", "2/4", "2 running, 1 infeasible", "left"))
    assert all(text in shown for text in ("training the router", "3/40", "loss 2.500, imbalance 1.25"))


def test_nothing_is_shown_when_quiet_or_before_the_first_report() -> None:
    with opened_display(quiet=True) as display:
        assert display is None
    for terminal in (True, False):
        stream = StringIO()
        with opened_display(console=Console(file=stream, force_terminal=terminal)):
            pass
        assert stream.getvalue() == ""


def test_a_log_gets_a_line_now_and_then() -> None:
    times = iter([0.0, 1.0, LINE_SECONDS, LINE_SECONDS + 1, 3 * LINE_SECONDS])
    written: list[str] = []
    lines = Lines(written.append, clock=lambda: next(times))
    for step in range(1, 6):
        lines.show("training the router", completed=step, total=1500, note="loss 2.500")
    assert written == [
        "training the router: 3 of 1,500, loss 2.500\n",
        "training the router: 5 of 1,500, loss 2.500\n",
    ]


def test_a_log_without_a_reader_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("moesim.display.LINE_SECONDS", 0.0)
    lines = Lines(refuse)
    lines.show("points", completed=1, total=2)
    lines.show("points", completed=2, total=2)
