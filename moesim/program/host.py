"""What a software's host costs: seconds per launch and read-back."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostModel:
    """Seconds the host needs per launch in either direction and per read-back; FREE_HOST where it never limits."""

    forward_launch: float
    backward_launch: float
    readback: float


FREE_HOST = HostModel(forward_launch=0.0, backward_launch=0.0, readback=0.0)
