"""The kernels of a software: a module lists them part by part and says what its host costs.

What else a step asks of a software are facts (`moesim.scenario.software`).
"""

from typing import Protocol

from moesim.kernels import KernelModel
from moesim.program import fused, torch_eager
from moesim.program.host import HostModel
from moesim.program.loads import LayerLoads
from moesim.program.operations import Operation
from moesim.program.sizes import Passes, Step
from moesim.program.writer import KernelWriter
from moesim.scenario import Scenario


class KernelList(Protocol):
    """The surface of such a module: the modules `fused` and `torch_eager` of this package have this shape."""

    def host_model(self, kernels: KernelModel) -> HostModel:
        """What each launch and read-back costs the host."""

    def embedding_part(self, w: KernelWriter, step: Step) -> Passes:
        """Token embedding."""

    def layer_part(self, w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
        """One transformer layer; `loads` is None for a dense layer."""

    def head_part(self, w: KernelWriter, step: Step) -> Passes:
        """Final norm, logits and loss."""

    def accumulation(self, w: KernelWriter, *, parameters: float) -> list[Operation]:
        """What the second and later micro-batches do to add their gradients to those before."""

    def flat_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """What comes before and after the reductions of the gradients of `parameters` parameters."""


KERNEL_LISTS: dict[str, KernelList] = {"fused": fused, "torch_eager": torch_eager}


def kernel_list(scenario: Scenario) -> KernelList:
    """The kernels of the scenario's software."""
    return KERNEL_LISTS[scenario.implementation.software.kernels]
