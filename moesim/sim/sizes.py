"""What every implementation's list of kernels starts from: the sizes of one micro-batch, and passes to chain."""

from dataclasses import dataclass

from moesim.scenario import Model
from moesim.sim.operations import Operation

Passes = tuple[list[Operation], list[Operation]]  # forward, backward (each in issue order)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes of one micro-batch on one rank: `batch` sequences of `sequence` tokens; `quantise` when dispatch is fp8.

    `remote`: experts are spread over more than one rank. `sigmoid`: the router's affinities are sigmoids.
    `shared_beside`: shared experts run beside the dispatch, where the software can.
    """

    model: Model
    batch: int
    sequence: int
    quantise: bool
    remote: bool
    sigmoid: bool = False
    shared_beside: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.batch * self.sequence


def chain(*parts: Passes) -> Passes:
    """Forward in order, backward in the opposite order."""
    forward = [operation for part in parts for operation in part[0]]
    backward = [operation for part in reversed(parts) for operation in part[1]]
    return forward, backward
