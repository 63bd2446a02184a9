"""A validation table on the terminal."""

from rich.console import Console
from rich.table import Table as RichTable

from moesim.validation.table import GOALS, Row, Table

STEP_PARTS = ("forward", "backward", "reduction", "optimizer")


def print_table(table: Table, *, console: Console | None = None) -> None:
    """Steps and their parts, the parts of the MoE layers, the slowdowns by skew, and the summary."""
    console = console or Console()
    console.print(_steps(table))
    if any(row.measured["layer_parts"] for row in table.rows):
        console.print(_layers(table))
    if table.slowdowns():
        console.print(_slowdowns(table))
    console.print(_summary(table))


def _summary(table: Table) -> str:
    summary = table.summary()
    goal = f"goals: median {GOALS['median']:.0%}, worst {GOALS['worst']:.0%}, skew within {GOALS['skew']:.0%}"
    parts = [
        f"{text} {value:.1%}"
        for text, value in (
            ("median error", summary["median_error"]),
            ("worst", summary["worst_error"]),
            ("slowdown by skew off by up to", summary["worst_skew_error"]),
        )
        if value is not None
    ]
    if not parts:
        return f"no case has {GOALS['from_tokens']:.0f} tokens or more, from which on errors are summed up"
    return f"step time at {GOALS['from_tokens']:.0f} tokens and more: {', '.join(parts)} ({goal})"


def _steps(table: Table) -> RichTable:
    shown = RichTable(title=f"Measured and predicted on {table.device.get('name', '?')}, ms (error)")
    shown.add_column("case")
    for column in ("step", *STEP_PARTS):
        shown.add_column(column, justify="right")
    for row in table.rows:
        cells = [_pair(row.measured["step"], row.predicted["step"])]
        cells += [_pair(row.measured["parts"][part], row.predicted["parts"][part]) for part in STEP_PARTS]
        shown.add_row(row.case.name, *cells)
    return shown


def _layers(table: Table) -> RichTable:
    keys = sorted({key for row in table.rows for key in row.measured["layer_parts"]}, key=_part_order)
    shown = RichTable(title="MoE layers, forward + backward, ms per layer (error)")
    shown.add_column("case")
    parts = list(dict.fromkeys(key.split(".")[1] for key in keys))
    for part in parts:
        shown.add_column(part, justify="right")
    for row in table.rows:
        if row.measured["layer_parts"]:
            shown.add_row(row.case.name, *(_layer_cell(row, part) for part in parts))
    return shown


def _part_order(key: str) -> int:
    order = ("router", "permute", "dispatch", "experts", "combine", "shared")
    return order.index(key.split(".")[1])


def _layer_cell(row: Row, part: str) -> str:
    def both(source: dict[str, float]) -> float:
        return source.get(f"forward.{part}", 0.0) + source.get(f"backward.{part}", 0.0)

    scenario = row.case.scenario
    runs = scenario.model.moe_layers * scenario.num_micro_batches
    return _pair(both(row.measured["layer_parts"]) / runs, both(row.predicted["layer_parts"]) / runs)


def _pair(measured: float, predicted: float) -> str:
    if round(max(measured, predicted) * 1e3, 2) == 0:
        return "-"  # a part that this case does not have
    error = f" ({predicted / measured - 1:+.1%})" if measured > 0 else ""
    return f"{measured * 1e3:.2f} {predicted * 1e3:.2f}{error}"


def _slowdowns(table: Table) -> RichTable:
    shown = RichTable(title="Slowdown by skew")
    for column in ("case", "measured", "predicted"):
        shown.add_column(column, justify="right" if column != "case" else "left")
    for name, measured, predicted in table.slowdowns():
        shown.add_row(name, f"{measured:.1%}", f"{predicted:.1%}")
    return shown
