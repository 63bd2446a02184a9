"""Traces of torch's profiler made by hand, event by event, for what real ones do not show."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MAIN, ENGINE, GPU = 1, 2, 7  # threads of the host, and a stream


@dataclass
class Trace:
    """Events in microseconds; an operation is given the launch and the kernel that it makes, one behind the other."""

    events: list[dict[str, Any]] = field(default_factory=list)
    shapes: bool = True
    correlation: int = 0

    def op(self, name: str, start: float, dur: float, *, dims: Any = None, thread: int = MAIN, **args: Any) -> int:
        """An operation on the host; its id."""
        number = len(self.events) + 1000
        if dims is not None and self.shapes:
            args |= {"Input Dims": dims, "Input type": ["c10::BFloat16" if dim else "Scalar" for dim in dims]}
        self.event("cpu_op", name, start, dur, thread, {"External id": number} | args)
        return number

    def kernel(self, op: int, launched: float, start: float, dur: float, *, thread: int = MAIN, stream: int = GPU):
        """A kernel of the operation `op`, launched at `launched`."""
        self.correlation += 1
        link = {"External id": op, "correlation": self.correlation}
        self.event("cuda_runtime", "cudaLaunchKernel", launched, 1, thread, link)
        self.event("kernel", "some_kernel", start, dur, stream, link | {"stream": stream, "device": 0})

    def event(self, category: str, name: str, start: float, dur: float, thread: Any, args: Any = None) -> None:
        """Any event of a duration."""
        whole = {"ph": "X", "cat": category, "name": name, "pid": 9, "tid": thread, "ts": start, "dur": dur}
        self.events.append(whole | {"args": args or {}})

    def step(self, at: float = 0.0, *, backward: bool = True, optimizer: bool = True, kernels: bool = True) -> "Trace":
        """A GEMM forward, its two gradients, and an optimizer."""
        gemm = self.op("aten::mm", at + 10, 20, dims=[[64, 32], [32, 16]], **{"Sequence number": 5})
        work = [(gemm, at + 15, at + 40, MAIN)]
        if backward:
            node = {"Sequence number": 5, "Fwd thread id": 1}
            self.op("autograd::engine::evaluate_function: MmBackward0", at + 100, 90, thread=ENGINE, **node)
            self.op("MmBackward0", at + 101, 88, thread=ENGINE, dims=[[64, 16]], **node)
            for start, dims in ((at + 102, [[64, 16], [16, 32]]), (at + 150, [[32, 64], [64, 16]])):
                op = self.op("aten::mm", start, 20, dims=dims, thread=ENGINE)
                work.append((op, start + 1, start + 5, ENGINE))
            self.op("torch::autograd::AccumulateGrad", at + 185, 2, dims=[[32, 16]], thread=ENGINE)
        if optimizer:
            self.event("user_annotation", "Optimizer.step#AdamW.step", at + 300, 50, MAIN, {"External id": 1})
            op = self.op("aten::_fused_adamw_", at + 310, 20)
            if self.shapes:
                self.events[-1]["args"] |= {"Input Dims": [[]], "Input type": ["TensorList"]}
            work.append((op, at + 315, at + 320, MAIN))
        for op, launched, start, thread in work if kernels else ():
            self.kernel(op, launched, start, 10, thread=thread)
        return self

    def save(self, path: Path, **members: Any) -> Path:
        """As a file; its device is an H100 unless members say otherwise."""
        device = [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}]
        whole = {"schemaVersion": 1, "deviceProperties": device} | members | {"traceEvents": self.events}
        text = json.dumps(whole).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return path


@pytest.fixture
def trace() -> Callable[..., Trace]:
    """An empty trace to add events to."""
    return Trace
