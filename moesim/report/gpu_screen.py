"""What `moesim gpus` prints: one line per GPU, and the sources of its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import RenderableType
from rich.text import Text

from moesim.report.screen import number_table, show
from moesim.units import format_bandwidth, format_bytes

_FORMATS = ("bf16", "fp8", "tf32", "fp32")


def print_gpus(gpus: Sequence[Mapping[str, Any]], *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print what `moesim gpus --json` holds: peaks in TFLOP/s, memory, NVLink, rent; then where they come from."""
    show(lambda _: _screen(gpus), file=file, width=width)


def _screen(gpus: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    head = ("GPU", *_FORMATS, "memory", "bandwidth", "NVLink", "$/hour")
    rows = [
        (
            gpu["name"],
            *(_peak(gpu["peak_flop_per_s"].get(name)) for name in _FORMATS),
            format_bytes(gpu["memory_bytes"]),
            format_bandwidth(gpu["memory_bytes_per_s"]),
            format_bandwidth(gpu["nvlink_bytes_per_s"]),
            f"{gpu['usd_per_gpu_hour']:.2f}",
        )
        for gpu in gpus
    ]
    note = "peaks in TFLOP/s, dense; NVLink per direction; rents are quotes, defaults where a scenario names no price"
    sources = [Text(f"{gpu['name']}: {gpu['source']}; rent: {gpu['price_source']}", style="dim") for gpu in gpus]
    return [number_table(head, rows), Text(note, style="dim"), Text(), *sources]


def _peak(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / 1e12:,.0f}"
