"""What tables of measured steps have in common: their files, their rows, peaks, and the operations of a list."""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.kernels import KernelModel
from moesim.network import build_fabric
from moesim.program import build_program
from moesim.program.drawn_routing import draw_samples, obtain_trace
from moesim.program.operations import Operation
from moesim.results.spans import Part, Phase
from moesim.scenario import Scenario
from moesim.strict_json import json_text, parse_json

DATA = Path(__file__).parent.parent / "tests" / "data"


def read(path: Path) -> Any:
    """What a file of measurements holds."""
    return parse_json(gzip.decompress(path.read_bytes()))


def write(path: Path, content: Any) -> None:
    """The same file to the byte for the same content."""
    path.write_bytes(gzip.compress(json_text(content).encode(), 9, mtime=0))


def write_peaks(path: Path, runs: Iterable[Path], libraries: Any) -> None:
    """The peaks of several runs of one script on one machine, without those that failed."""
    found = [parse_json(file.read_bytes()) for file in sorted(runs)]
    steps = [step for each in found for step in each["steps"] if "error" not in step]
    write(path, {"machine": found[0]["machine"], "libraries": libraries, "steps": steps})


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of one step: the most that tensors took, `moment`: when, and what was predicted of it."""

    name: str
    blind: bool
    moment: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of what tensors take."""
        return self.predicted / self.measured - 1

    @property
    def cells(self) -> tuple[str, ...]:
        """Under `PEAK_HEAD`, but for the error, whose digits are the table's own."""
        pair = f"{self.measured / 1e9:.2f} / {self.predicted / 1e9:.2f} GB"
        return self.name, "yes" if self.blind else "", self.moment, pair


PEAK_HEAD = ("step", "in no choice", "at", "tensors, measured / predicted", "")


def print_head(*names: str) -> None:
    """The two lines above the rows of a table."""
    print_row(*names)
    print("|" + "---|" * len(names))


def print_row(*cells: str) -> None:
    """At once, as the next one may take its time."""
    print("|" + "|".join(f" {cell} " for cell in cells) + "|", flush=True)


def summary(errors: Iterable[float]) -> str:
    """How far off, whatever the direction."""
    sizes = [abs(error) for error in errors]
    return f"median {np.median(sizes):.1%}, worst {max(sizes):.1%}"


def listed_operations(scenario: Scenario, kernels: KernelModel) -> Iterator[tuple[str, Operation]]:
    """(phase, operation) of a step's list on the first rank group: those that compute, the optimizer's with them."""
    samples, _ = draw_samples(scenario, obtain_trace(scenario))
    program = build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples)
    group = program.groups[0]
    blocks = [run.block for task in group.tasks for run in task.runs] + [group.optimizer]
    for operation in (operation for block in blocks for operation in block.operations):
        if operation.seconds_MSR is None:
            continue
        phase = "forward" if operation.phase is Phase.FORWARD else "backward"
        yield "optimizer" if operation.part is Part.OPTIMIZER else phase, operation
