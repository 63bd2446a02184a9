"""The kernels of a software: what lists them, part by part, and says what its host costs.

What else a step asks of a software are facts (`moesim.scenario.software`).
"""

from collections.abc import Callable
from typing import Protocol

from moesim.kernels import KernelModel
from moesim.program.host import HostModel
from moesim.program.loads import LayerLoads
from moesim.program.operations import Operation
from moesim.program.recorded import RecordedKernels
from moesim.program.sizes import Passes, Step
from moesim.program.switched import SwitchedKernels
from moesim.program.writer import KernelWriter
from moesim.scenario import Scenario


class KernelList(Protocol):
    """The surface of such a list, of one scenario."""

    def host_model(self, kernels: KernelModel) -> HostModel:
        """What each launch and read-back costs the host."""

    def embedding_part(self, w: KernelWriter, step: Step) -> Passes:
        """Token embedding."""

    def layer_part(self, w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
        """One transformer layer; `loads` is None for a dense layer."""

    def head_part(self, w: KernelWriter, step: Step) -> Passes:
        """Final norm, logits and loss."""

    def accumulation(self, w: KernelWriter, *, parameters: float, first: bool) -> list[Operation]:
        """What the first, or a later, micro-batch does to add its gradients to those before."""

    def flat_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """What comes before and after the reductions of the gradients of `parameters` parameters."""

    def shard_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """What takes the gathered weights of a part apart, and what joins its gradients before they are scattered."""


KERNEL_LISTS: dict[str, Callable[[Scenario], KernelList]] = {
    "switched": SwitchedKernels,
    "own_program": RecordedKernels,
}


def kernel_list(scenario: Scenario) -> KernelList:
    """The kernels of the scenario's software."""
    return KERNEL_LISTS[scenario.implementation.software.kernels](scenario)
