"""The names of the kernels that a call launches, by one pass of torch's profiler over many calls."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moesim.kernels.benchmarks.timing import Call

_MARKER_SIZE = 3


def kernel_names(calls: list[Call]) -> list[list[str]]:
    """Per call the kernels between it and the next, as the device ran them; empty lists when they cannot be told apart.

    A cosine of three numbers marks the border between two calls in the stream.
    """
    marker = torch.ones(_MARKER_SIZE, device="cuda", dtype=torch.float64)
    for call in calls:
        call(0)
    marker.cos()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as traced:
        marker.cos()
        for call in calls:
            call(0)
            marker.cos()
        torch.cuda.synchronize()
    found = _split(traced.events())
    return found if len(found) == len(calls) else [[] for _ in calls]


def _split(events: Any) -> list[list[str]]:
    kernels = sorted((event.time_range.start, event.name) for event in events if event.device_type.name == "CUDA")
    groups: list[list[str]] = []
    for _, name in kernels:
        if "cos_kernel" in name:
            groups.append([])
        elif groups and not name.startswith(("Memcpy", "Memset")):
            groups[-1].append(name)
    return groups[:-1]
