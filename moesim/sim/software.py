"""Which software a step runs: an implementation lists its kernels part by part and says what its host costs."""

from typing import Protocol

from moesim.compute import KernelModel
from moesim.sim import fused, torch_eager
from moesim.sim.executor import HostModel
from moesim.sim.loads import LayerLoads
from moesim.sim.operations import Operation
from moesim.sim.sizes import Passes, Step
from moesim.sim.writer import KernelWriter


class Software(Protocol):
    """The surface of an implementation: `moesim.sim.fused` and `moesim.sim.torch_eager` are modules of this shape."""

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


SOFTWARE: dict[str, Software] = {"fused": fused, "torch_eager": torch_eager}
