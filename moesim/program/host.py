"""What a software's host costs: seconds per launch and read-back."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostModel:
    """Seconds the host needs per launch in either direction and per read-back; FREE_HOST where it never limits.

    `ahead`: seconds before the GPU ends a step at which the host begins to launch the next one; 0 where it waits.
    """

    forward_launch: float
    backward_launch: float
    readback: float
    ahead: float = 0.0


FREE_HOST = HostModel(forward_launch=0.0, backward_launch=0.0, readback=0.0)
