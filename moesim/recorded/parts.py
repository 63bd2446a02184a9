"""A file of a recorded step by its parts: operations of the layers of each kind, and those before and behind them."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moesim.errors import UserError
from moesim.recorded.layers import EXPERTS_GEMM, module_in_layer
from moesim.recorded.pricing import OPTIMIZER, kernels_of
from moesim.recorded.sizes import MatchedOp, StepSizes, matched, sizes_of
from moesim.recorded.step_file import AGAIN, load_step


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """A file of a step: what it has in the layers of each kind, before and behind them, with its sizes."""

    sizes: StepSizes
    ops: tuple[MatchedOp, ...]
    experts_module: str  # of a layer, "" where the file does not say
    recomputes: bool  # whether its backward pass repeats layers (activation checkpointing); `ops` are without those

    def of_layer(self, kind: str, phase: str) -> list[MatchedOp]:
        """The operations of the layers of a kind."""
        return [each for each in self.ops if each.op.layer == kind and each.op.phase == phase]

    def outside(self, phase: str) -> tuple[list[MatchedOp], list[MatchedOp]]:
        """What comes before the first operation of a layer, and what behind it."""
        ops = [each for each in self.ops if each.op.phase == phase and each.op.name != OPTIMIZER]
        first = next((place for place, each in enumerate(ops) if each.op.layer), len(ops))
        return ops[:first], [each for each in ops[first:] if not each.op.layer]


def kept_sizes(path: Path) -> str:
    """What of a recorded step does not follow the scenario: operations with a dimension that matches none of the step's
    sizes, and those that no table knows, by name; "" where there are none.
    """
    step = recorded_step(path)
    kept = sorted({each.op.name for each in step.ops if not each.known})
    unknown = sorted({each.op.name for each in step.ops if not kernels_of(each.op)[1]})
    told = [f"keep a dimension at its recorded size, which matches none of the step's: {', '.join(kept)}"] * bool(kept)
    told += [f"are priced by their bytes alone: {', '.join(unknown)}"] * bool(unknown)
    return "; ".join(told)


@lru_cache(maxsize=4)
def _read(path: Path, changed: float) -> RecordedStep:
    _, ops = load_step(path)
    sizes = sizes_of(ops, where=str(path))
    if any("collective" in op.facts for op in ops):
        raise UserError(f"{path} was recorded on several ranks; record one rank alone: the scenario adds the others")
    experts = next((module_in_layer(op.module) for op in ops if op.name == EXPERTS_GEMM), "")
    once = [op for op in ops if AGAIN not in op.facts]
    return RecordedStep(
        sizes=sizes, ops=tuple(matched(once, sizes)), experts_module=experts, recomputes=len(once) < len(ops)
    )


def recorded_step(path: Path) -> RecordedStep:
    """The step of a file. Raises UserError, one line, for what is none or cannot be scaled."""
    try:
        changed = path.stat().st_mtime
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _read(path, changed)
