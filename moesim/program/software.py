"""The kernels of a software: what lists them, part by part, and says what its host costs.

Of a software whose facts are switches, each part is a module that asks for the settings of its own switches:
`attention` (with `norms_and_rotary`), `permutation`, `networks`, `moe` (which puts these in order, behind its router)
and `outside_layers`. What a setting means, which a software has, and what else a step asks of it stand in
`moesim.scenario.software`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from moesim.kernels import HostCosts, KernelModel
from moesim.kernels.unprofiled import ADDED_WIDE
from moesim.program.attention import attention_part
from moesim.program.host import FREE_HOST, HostModel, backward, forward
from moesim.program.loads import LayerLoads
from moesim.program.moe import moe_part
from moesim.program.networks import dense_ffn_part
from moesim.program.operations import Operation
from moesim.program.outside_layers import embedding_part, head_part
from moesim.program.recorded import RecordedKernels
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part, Phase
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.software import Switches

GRAPHED = (Part.ATTENTION, Part.NORM, Part.RESIDUAL, Part.ROUTER, Part.DENSE_FFN, Part.SHARED_EXPERTS)


@dataclass(frozen=True)
class SwitchedKernels:
    """The list of one scenario; see `moesim.program.software.KernelList`."""

    scenario: Scenario

    @cached_property
    def _switches(self) -> Switches:
        return self.scenario.implementation.switches

    @property
    def _gradient_bytes(self) -> float:
        return BYTES_PER_ELEMENT[self.scenario.workload.precision.gradients]

    def host_model(self, kernels: KernelModel) -> HostModel:
        """The host issues every operation and waits at read-backs, or never limits, also where graphs hold the step."""
        if self._switches.host_is_free:
            return FREE_HOST
        times = self.scenario.compute.host_factor
        return HostModel(
            forward_launch=times * kernels.host.launch,
            backward_launch=times * kernels.host.backward_launch,
            readback=kernels.host.readback,
        )

    def embedding_part(self, w: KernelWriter, step: Step) -> Passes:
        """Token embedding."""
        return embedding_part(w, step)

    def layer_part(self, w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
        """One transformer layer; `loads` is None for a dense layer."""
        attention = attention_part(w.at(Part.ATTENTION), step)
        ffn = dense_ffn_part(w.at(Part.DENSE_FFN), step) if loads is None else moe_part(w, step, loads)
        forward_pass, backward_pass = chain(attention, ffn)
        return list(map(self._launched, forward_pass)), list(map(self._launched, backward_pass))

    def _launched(self, operation: Operation) -> Operation:
        """Kernels of fixed shapes launch at no cost where graphs hold them; those that follow the rows do as ever."""
        if self._switches.cuda_graphs == "attention" and operation.part in GRAPHED:
            return replace(operation, launches=0.0)
        return operation

    def head_part(self, w: KernelWriter, step: Step) -> Passes:
        """Final norm, logits and loss."""
        return head_part(w, step)

    def accumulation(self, w: KernelWriter, *, parameters: float, first: bool) -> list[Operation]:
        """What the first, or a later, micro-batch does to add its gradients to those before.

        Nothing where the GEMM of the weight's gradient adds into the buffer. Into a buffer a kernel adds them in
        every micro-batch: bf16 gradients read, the sum read and written. Autograd adds from the second one on.
        """
        way, w = self._switches.accumulation, w.during(Phase.WEIGHT_GRADIENT)
        zeros = self._gradient_bytes * parameters
        out = (
            [w.moved("gradients.zero", "zero", forward("plain"), bytes_=zeros)]
            if first and self._switches.zeroed_gradients
            else []
        )
        if way == "gemm" or (first and way == "autograd"):
            return out
        size = 3.0 * self._gradient_bytes
        if way == "buffer":
            size = ADDED_WIDE * (BYTES_PER_ELEMENT["bf16"] + 2.0 * self._gradient_bytes)
        return [*out, w.moved("gradients.add", "elementwise", backward("accumulate"), bytes_=size * parameters)]

    def shard_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """Weights and gradients lie in the buffers of their collectives."""
        return [], []

    def flat_copies(self, w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
        """Gradients of `parameters` parameters into one flat buffer before their all-reduce, and back behind it."""
        if not parameters or not self._switches.flat_gradients:
            return [], []
        w, both = w.during(Phase.NONE), 2.0 * self._gradient_bytes * parameters
        return (
            [w.moved("gradients.flatten", "copy", forward("cat"), bytes_=both)],
            [w.moved("gradients.unflatten", "copy", forward("cat"), bytes_=both)],
        )

    def optimizer_launches(self, host: HostCosts, stages: Sequence[int]) -> float:
        """One, whatever the number of weights."""
        return 1.0


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

    def optimizer_launches(self, host: HostCosts, stages: Sequence[int]) -> float:
        """What a fused step of the optimizer costs the host, in launches of `host`, on a rank with these stages."""


KERNEL_LISTS: dict[str, Callable[[Scenario], KernelList]] = {
    "switched": SwitchedKernels,
    "own_program": RecordedKernels,
}


def kernel_list(scenario: Scenario) -> KernelList:
    """The kernels of the scenario's software."""
    return KERNEL_LISTS[scenario.implementation.software.kernels](scenario)
