"""The checks of the software, and of its switches, against the rest of a scenario."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moesim.errors import ConflictError, InfeasibleError
from moesim.scenario.document import Path
from moesim.scenario.schema import Scenario
from moesim.scenario.software import FUSED, IMPORTED


def dotted(path: Path) -> str:
    """The keys of a path as one writes them."""
    return ".".join(str(key) for key in path)


@dataclass(frozen=True)
class Report:
    """Makes the error of a dotted key; `where` says its place."""

    where: Callable[[Path], str] = dotted

    def place(self, key: str) -> str:
        """Where the key stands."""
        return self.where(tuple(int(part) if part.isdigit() else part for part in key.split(".")))

    def user(self, key: str, message: str) -> ConflictError:
        """A mistake of the user at `key` (exit code 1)."""
        return ConflictError(f"{self.place(key)}: {message}")

    def infeasible(self, key: str, message: str) -> InfeasibleError:
        """What is well-formed and cannot run, by `key` (exit code 2)."""
        return InfeasibleError(f"{self.place(key)}: {message}")


FREE_OF_FILE = ("reduce_dtype", "counts", "accumulation")  # what a recorded step of one rank leaves open


def require_software(scenario: Scenario, report: Report) -> None:
    """Raises UserError for what the software cannot do, and for settings that contradict another key."""
    software = scenario.implementation.software
    if not software.other_layers:
        for key in ("dense_at", "local", "shared_intermediate", "expert_hidden"):
            if getattr(scenario.model, key):
                raise report.user(f"model.{key}", f"{software.name} has none; use {FUSED.name}")
        if not scenario.model.gated:
            raise report.user("model.gated", f"networks of {software.name} are gated; use {FUSED.name}")
    if not software.shares_layers:
        for axis in ("tensor", "context", "expert_tensor"):
            if (size := getattr(scenario.parallelism, axis)) > 1:
                message = f"{software.name} has no such ranks ({size}); {software.whole_layers}use {FUSED.name}"
                raise report.user(f"parallelism.{axis}", message)
    if scenario.workload.recomputed_parts and not software.recomputes_parts:
        message = f"{software.name} can only recompute whole layers; use none or full, or implementation {FUSED.name}"
        raise report.user("workload.recompute", message)
    if not software.overlaps:
        for key in type(scenario.overlap).model_fields:
            if getattr(scenario.overlap, key):
                raise report.user(
                    f"overlap.{key}", f"{software.name} overlaps nothing; leave it out, or use {FUSED.name}"
                )
    for key, message in _refused(scenario):
        raise report.user(key, message)


def _refused(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """(key, message) of what the software does not have, and of switches that cannot be honoured."""
    software, mesh = scenario.implementation.software, scenario.parallelism
    switches = scenario.implementation.switches
    yield from _refused_of_file(scenario)
    if scenario.workload.precision.scaling and not software.casts_fp8:
        gemm = scenario.workload.precision.gemm
        yield "workload.precision.gemm", f"{software.name} has no products in {gemm}; use bf16, or {FUSED.name}"
    if mesh.expert > 1 and not software.expert_ranks:
        what = f"{software.name} shares experts by copies of all tokens on every rank, which is not modelled"
        yield "parallelism.expert", f"{what}; use 1"
    if switches.attention != "fused" and mesh.context > 1:
        yield (
            "implementation.attention",
            f"{switches.attention} needs whole sequences; use parallelism.context: 1, or fused",
        )
    if not switches.sequence_parallel and mesh.tensor > 1 and scenario.model.experts:
        what = "layers with experts share their tokens among tensor ranks"
        yield "implementation.sequence_parallel", f"{what}; use true, or parallelism.tensor: 1"
    if switches.cuda_graphs != "none" and switches.host == "free":
        yield "implementation.cuda_graphs", "launches cost nothing with host: free; drop this key, or host: launches"
    reads = "counts" if switches.counts and mesh.expert * mesh.expert_tensor > 1 else ""
    reads = "permute" if switches.permute == "mask" else reads
    if switches.cuda_graphs == "step" and scenario.model.experts and reads:
        what = f"the host reads back how many rows there are (implementation.{reads}), which no graph can hold"
        yield "implementation.cuda_graphs", f"{what}; use attention"


def _refused_of_file(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """A recorded step without its file, a file of a software that reads none, and switches that a file decides."""
    given, reads_file = scenario.implementation, scenario.implementation.software.kernels == "own_program"
    if reads_file and given.file is None:
        yield "implementation.file", "is missing; name the file that moesim import-step STEP --out FILE wrote"
    if not reads_file and given.file is not None:
        yield "implementation.file", f"{given.kind} reads no file; drop this key, or use kind: {IMPORTED.name}"
    fixed = [name for name in given.set_anew if name not in FREE_OF_FILE] if reads_file else []
    if fixed:
        yield f"implementation.{fixed[0]}", "is as the recorded program has it; drop this key, or record it otherwise"
