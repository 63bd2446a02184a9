"""What the host pays: seconds per eager operation forward and backward, per module call, and per read-back.

The device is given next to nothing to do, so that the wall clock shows the host alone: Python, dispatch, autograd
bookkeeping, allocation and launch.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_ROWS, _WIDTH, _EXPERTS = 64, 128, 4
Operation = Callable[[], torch.Tensor]
Link = Callable[[torch.Tensor], torch.Tensor]


class _Wrapped(nn.Module):
    """A module that does nothing but call another: the cost of nn.Module.__call__."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        assert isinstance(out, torch.Tensor)
        return out


def _operations(device: str) -> dict[str, Operation]:
    """One small example of each kind of operation that a training step issues; results require gradients."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    x, wide = random(_ROWS, _WIDTH), random(_ROWS, 2 * _WIDTH)
    weight, gain = random(_WIDTH, _WIDTH), random(_WIDTH)
    experts, heads = random(_EXPERTS, _WIDTH, _WIDTH), random(1, 2, _ROWS, 64)
    logits = random(_ROWS, _EXPERTS, dtype=torch.float32)
    offsets = torch.arange(1, _EXPERTS + 1, device=device, dtype=torch.int32) * (_ROWS // _EXPERTS)
    ids = torch.randint(_ROWS, (_ROWS,), device=device)
    choices = ids % _EXPERTS
    linear = nn.Linear(_WIDTH, _WIDTH, bias=False, device=device, dtype=torch.bfloat16)
    wrapped = _Wrapped(linear)
    zeros = torch.zeros(_ROWS, _WIDTH, device=device, dtype=torch.bfloat16)
    return {
        "elementwise": lambda: x + zeros,
        "mul": lambda: x * x,
        "silu": lambda: F.silu(x),
        "cast": lambda: x.float(),
        "view": lambda: wide.view(_ROWS, 2, _WIDTH),
        "chunk": lambda: wide.chunk(2, dim=-1)[0],
        "linear": lambda: F.linear(x, weight),
        "linear_module": lambda: linear(x),
        "linear_module_wrapped": lambda: wrapped(x),
        "rms_norm": lambda: F.rms_norm(x, (_WIDTH,), gain),
        "softmax": lambda: logits.softmax(-1),
        "topk": lambda: logits.topk(2, dim=-1)[0],
        "gather": lambda: logits.gather(1, choices[:, None]),
        "index_select": lambda: x.index_select(0, ids),
        "index_add": lambda: zeros.index_add(0, ids, x),
        "cat": lambda: torch.cat([x, x]),
        "reduce": lambda: x.sum(-1),
        "grouped_mm": lambda: F.grouped_mm(x, experts, offs=offsets),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
        "cross_entropy": lambda: F.cross_entropy(logits, choices),
    }


def _plain_operations(device: str) -> dict[str, Callable[[], Any]]:
    """Operations without gradients, and the pieces around streams."""
    ids = torch.randint(_EXPERTS, (_ROWS,), device=device)
    x = torch.randn(_ROWS, _WIDTH, device=device, dtype=torch.bfloat16)
    plain: dict[str, Callable[[], Any]] = {
        "elementwise_no_grad": lambda: x + x,
        "zeros": lambda: torch.zeros(_ROWS, _WIDTH, device=device, dtype=torch.bfloat16),
        "empty": lambda: torch.empty(_ROWS, _WIDTH, device=device, dtype=torch.bfloat16),
        "sort": lambda: ids.argsort(stable=True),
        "cumsum": lambda: ids.cumsum(0),
        "scatter_add": lambda: torch.zeros(_EXPERTS, device=device, dtype=torch.int64).scatter_add_(0, ids, ids),
    }
    if device == "cuda":
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream()
        plain["event_record"] = lambda: event.record(stream)
        plain["event_wait"] = lambda: stream.wait_event(event)
    return plain


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds_per_call(call: Callable[[], Any], device: str, *, calls: int, repeats: int = 5) -> list[float]:
    seconds = []
    call()
    for _ in range(repeats):
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begin) / calls)
        _synchronise(device)
    return seconds


def _chains(device: str) -> dict[str, tuple[torch.Tensor, Link]]:
    """Operations whose result can be their next input: a start and one link, for graphs as deep as a real step's."""
    x = torch.randn(_ROWS, _WIDTH, device=device).to(torch.bfloat16).requires_grad_()
    scores = torch.randn(_ROWS, _EXPERTS, device=device).requires_grad_()
    heads = torch.randn(1, 2, _ROWS, 64, device=device).to(torch.bfloat16).requires_grad_()
    weight, gain = torch.eye(_WIDTH, device=device).to(torch.bfloat16), torch.ones(_WIDTH, device=device)
    gain = gain.to(torch.bfloat16)
    experts = weight.expand(_EXPERTS, _WIDTH, _WIDTH).contiguous()
    offsets = torch.arange(1, _EXPERTS + 1, device=device, dtype=torch.int32) * (_ROWS // _EXPERTS)
    ids, constant = torch.randperm(_ROWS, device=device), torch.zeros_like(x)

    def leaf(values: torch.Tensor) -> torch.Tensor:
        return values.detach().requires_grad_()  # weights of their own: gradients are stored, not summed

    return {
        "elementwise": (x, lambda y: y + constant),
        "mul": (x, lambda y: y * leaf(constant)),
        "silu": (x, F.silu),
        "view": (x, lambda y: y.view(_WIDTH, _ROWS)),
        "linear": (x, lambda y: F.linear(y, leaf(weight))),
        "rms_norm": (x, lambda y: F.rms_norm(y, (_WIDTH,), leaf(gain))),
        "softmax": (scores, lambda y: y.softmax(-1)),
        "index_select": (x, lambda y: y.index_select(0, ids)),
        "index_add": (x, lambda y: constant.index_add(0, ids, y)),
        "grouped_mm": (x, lambda y: F.grouped_mm(y, leaf(experts), offs=offsets)),
        "attention": (heads, lambda y: F.scaled_dot_product_attention(y, leaf(heads), leaf(heads), is_causal=True)),
    }


def _backward_seconds(start: torch.Tensor, link: Link, device: str, *, nodes: int, repeats: int = 5) -> list[float]:
    """Host seconds of one operation's backward, over a chain of `nodes` of them."""
    seconds = []
    for _ in range(repeats + 1):
        out = start
        for _ in range(nodes):
            out = link(out if out.shape == start.shape else out.view(start.shape))
        gradient = torch.ones_like(out)
        _synchronise(device)
        begin = time.perf_counter()
        torch.autograd.backward([out], [gradient])
        seconds.append((time.perf_counter() - begin) / nodes)
        _synchronise(device)
    return seconds[1:]


def _readbacks(device: str) -> dict[str, Callable[[], Any]]:
    counts = torch.arange(_EXPERTS * 16, device=device)
    flag = torch.ones((), device=device)
    return {
        "tolist_64": lambda: counts.tolist(),
        "item": lambda: flag.item(),
        "kernel_and_tolist_64": lambda: (counts + 1).tolist(),
    }


def host_calls(device: str, *, calls: int = 400) -> dict[tuple[str, str], Callable[[], list[float]]]:
    """(part, kind) -> a function that gives seconds per call, for every kind of host work."""
    found: dict[tuple[str, str], Callable[[], list[float]]] = {}
    for kind, operation in _operations(device).items():
        found["forward", kind] = partial(_seconds_per_call, operation, device, calls=calls)
    for kind, (start, link) in _chains(device).items():
        found["backward", kind] = partial(_backward_seconds, start, link, device, nodes=calls)
    for kind, plain in _plain_operations(device).items():
        found["plain", kind] = partial(_seconds_per_call, plain, device, calls=calls)
    for kind, read in _readbacks(device).items():
        found["readback", kind] = partial(_seconds_per_call, read, device, calls=calls)
    return found
