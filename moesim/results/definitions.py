"""What every number of result.json means (`definitions.yaml`, shown by the reference of the documentation), and what no
result may break: checked on every run before anything is written, whatever was simulated.

Numbers are finite, parts of the step are not negative and add up to it, no GPU computes faster than its peak, and no
byte moves faster than its memory or its links. A result that breaks one of these is a mistake of this program.

Legend: C categories, W ranks of the world, P pipeline ranks, S routing samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from moesim.errors import InternalError
from moesim.network import Fabric
from moesim.results.store import RunRecord
from moesim.strict_json import json_text

NO_UNIT = ""


@dataclass(frozen=True)
class Definition:
    """The unit of a number (empty: a text, or a number without one) and what it means."""

    unit: str
    text: str


def _defined(line: str | list[str]) -> Definition:
    return Definition(NO_UNIT, line) if isinstance(line, str) else Definition(*line)


def read_definitions(file: Path) -> dict[str, Definition]:
    """The definitions in a file of lines alone, by path."""
    return {path: _defined(line) for path, line in yaml.safe_load(file.read_text(encoding="utf-8")).items()}


def _read(path: str, line: str | list[str]) -> Iterator[tuple[str, Definition]]:
    """The definitions of one line of the file on runs: one, or one for every name of a list."""
    if path.endswith("}"):
        before, _, name = path[:-1].partition("{")
        assert isinstance(line, str), "the unit of every name of the list"
        for each, text in LISTS[name].items():
            yield before + each, Definition(line, text)
    else:
        yield path, _defined(line)


_FILE = yaml.safe_load((Path(__file__).parent / "definitions.yaml").read_text(encoding="utf-8"))
# What names of a list mean wherever they stand: categories of time, parts of memory, sources of estimates.
LISTS: Mapping[str, Mapping[str, str]] = _FILE["lists"]
# Heading of a section of the reference, a sentence on all of it, and its definitions.
SECTIONS: Sequence[tuple[str, str, Mapping[str, Definition]]] = tuple(
    (section["title"], section["about"], dict(each for line in section["numbers"].items() for each in _read(*line)))
    for section in _FILE["sections"]
)
DEFINITIONS: Mapping[str, Definition] = {
    path: definition for _, _, section in SECTIONS for path, definition in section.items()
}


# What is one number of every result, by which runs can be compared: no item of a list, no text.
NUMBERS: Sequence[str] = tuple(
    path for path, found in DEFINITIONS.items() if found.unit != NO_UNIT and not {"[]", "*"} & set(path.split("."))
)


def definition(path: str) -> Definition | None:
    """What the number at the path of a result means; None where nobody has written it down."""
    return DEFINITIONS.get(path) or DEFINITIONS.get(f"{path}.[]") or DEFINITIONS.get(path.rpartition(".")[0] + ".*")


def paths(result: Any, path: str = "") -> set[str]:
    """The paths of all numbers and texts of a result; a null stands for what it could be, an empty list for nothing."""
    if isinstance(result, Mapping):
        below = [paths(value, f"{path}.{key}" if path else str(key)) for key, value in result.items()]
        return set().union(*below)
    if isinstance(result, list):
        return set().union(*(paths(item, f"{path}.[]") for item in result))
    return {path}


TOLERANCE = 1e-6  # relative, of sums of many seconds


class Bound(NamedTuple):
    """The least seconds that a step can take, and why."""

    seconds: float
    why: str


def check_plausible(record: RunRecord, fabric: Fabric) -> None:
    """Raises InternalError in one line for a result that cannot be."""
    json_text(record.result)
    step_s = record.result["step_time_s"]
    for name, values in record.arrays.items():
        if not np.isfinite(values).all():
            _refuse(record, f"{name} holds numbers that are not finite")
    if step_s <= 0:
        _refuse(record, f"the step takes {step_s:.4g} s")
    for section in ("attribution_s", "attribution_balanced_s"):
        least = min(record.result[section], key=record.result[section].__getitem__)
        if record.result[section][least] < 0:
            _refuse(record, f"{section}.{least} is {record.result[section][least]:.4g} s")
    parts_s = sum(record.result["attribution_s"].values())
    if abs(parts_s - step_s) > TOLERANCE * step_s:
        _refuse(record, f"the parts of the step add up to {parts_s:.6g} s, not to its {step_s:.6g} s")
    for bound in bounds(record, fabric):
        if step_s < bound.seconds * (1 - TOLERANCE):
            _refuse(record, f"a step of {step_s:.4g} s, but {bound.why} take {bound.seconds:.4g} s at least")


def bounds(record: RunRecord, fabric: Fabric) -> Iterator[Bound]:
    """What physics asks of a step: FLOPs over peak, bytes over bandwidth."""
    scenario, result = record.scenario, record.result
    cluster, mesh, gemm = scenario.cluster, scenario.parallelism, scenario.workload.precision.gemm
    gpu = max((pool.spec for pool in cluster.pools), key=lambda spec: spec.memory_bandwidth)
    speed_W = cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    fastest = 1.0 if speed_W is None else max(1.0, float(speed_W.max()))
    # MFU = FLOPs / (ranks * peak * step), so FLOPs / (ranks * peak) is MFU times the step. Of kept rows and of causal
    # attention: dropped rows and the other half of the scores are not computed.
    compute_s = result["effective"]["mfu_causal"] * result["step_time_s"] / fastest
    yield Bound(compute_s, f"its FLOPs at the {gemm} peak of {gpu.name} (MFU {result['effective']['mfu_causal']:.0%})")
    held = record.arrays["held_bytes_P"].max() - scenario.memory.reserved
    # Weights, gradients and optimizer states are all touched once; what fits into the cache may be touched there.
    memory_s = float(held - gpu.l2_bytes) / (gpu.memory_bandwidth * fastest)
    yield Bound(memory_s, f"weights, gradients and optimizer states at the memory bandwidth of {gpu.name}")
    moved = result["communication"]["intra_node_bytes"] + result["communication"]["inter_node_bytes"]
    ports = {f"gpu{rank}" for rank in range(scenario.parallelism.world_size)}
    out = sum(
        float(bandwidth)
        for (source, _), bandwidth in zip(fabric.links, fabric.bandwidth_X, strict=True)
        if source in ports
    )
    if moved:
        yield Bound(moved / out, "dispatched and combined bytes over the links of the GPUs")


def _refuse(record: RunRecord, what: str) -> None:
    raise InternalError(f"{record.scenario.name}: {what}: that cannot be")
