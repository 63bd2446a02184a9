"""What single pieces of eager torch cost the host among other work: more than when one is issued over and over.

A step of a small model has many kinds of operations, each issued from Python of its own, so that the host's caches hold
little of what comes next. Here a small model has a place behind each of its operations where more can
be put: a piece's cost is the difference that it makes to the forward and the backward pass of that model, over how
often it stands there. The model's tensors are so small that its GPU waits for the host all the time.

    python -m moesim.kernels.benchmarks.host_in_situ    # how fast this host is, in a few seconds

No number of a model that anyone runs is in it. Needs torch and nothing of moesim.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, WIDTH, HEADS, EXPERTS, TOP_K, LAYERS = 128, 256, 4, 4, 2, 3
PLACES = 9  # of a layer, each with rows of TOKENS and WIDTH
ROUNDS, WARM_UP = 100, 3
Call = Callable[[Tensor, Tensor], Tensor]  # of what flows through the model, and a weight of its own


class Identity(nn.Module):
    """A module that does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Layer(nn.Module):
    """A transformer layer with experts, with a place behind many of its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(0.02 * torch.randn(EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(0.02 * torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        """[TOKENS, WIDTH] to the same."""
        y = at(self.norms[0](x))
        q, k, v = self.qkv(y).view(1, TOKENS, 3, HEADS, -1).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(TOKENS, WIDTH)
        y = at(self.out(at(y)))
        x = at(x + y)
        y = at(self.norms[1](x))
        gates, experts = self.gate(y).float().softmax(-1).topk(TOP_K)
        y = at(y)
        order = experts.flatten().argsort(stable=True)
        counts = (experts.flatten()[:, None] == torch.arange(EXPERTS, device=x.device)).sum(0)
        y = at(y)
        ends = counts.cumsum(0).to(torch.int32)
        rows = y.repeat_interleave(TOP_K, 0)[order]
        first, second = F.grouped_mm(rows, self.up, offs=ends).chunk(2, -1)
        done = F.grouped_mm(F.silu(first) * second, self.down, offs=ends)
        done = done * gates.flatten()[order].to(done.dtype)[:, None]
        y = at(torch.zeros_like(x).index_add(0, order // TOP_K, done))
        return at(x + y)


class Surroundings(nn.Module):
    """Layers whose places hold nothing, or a piece."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.weights = nn.ParameterList()

    def forward(self, x: Tensor, piece: Call) -> Tensor:
        """The loss."""
        weights = iter(self.weights)

        def at(x: Tensor) -> Tensor:
            return piece(x, next(weights))

        for layer in self.layers:
            x = layer(x, at)
        return x.float().mean()


def _called(x: Tensor, at: int, *, scale: float) -> Tensor:
    return x if at >= 0 and scale else -x


@dataclass
class _Holder:
    sizes: dict[str, int]
    flag: bool = True
    mode: str = "eager"


def _code(x: Tensor, holder: _Holder, *, scale: float, **kwargs: Any) -> Tensor:
    """A page of what the Python of models does: attributes, dictionaries, conditions, arguments by name."""
    for name in ("hidden", "heads", "experts"):
        size = holder.sizes[name] if holder.flag else kwargs.get(name, 0)
        if size is None or (holder.mode != "eager" and kwargs):
            return -x
        kwargs[name] = size
    shape = (*x.shape[:-1], -1, kwargs["heads"])
    mask = kwargs.get("mask")
    if mask is not None and len(shape) > 2:
        return -x
    return _called(_called(x, len(shape), scale=scale), holder.sizes["heads"], scale=scale)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is put in the places, and the shape of the weight that it has there (none: one that it leaves alone)."""

    call: Call
    weight: tuple[int, ...] = ()
    rounds: int = ROUNDS


def pieces(device: str) -> dict[str, Piece]:
    """By name."""
    some = torch.ones(TOKENS, 8, device=device, dtype=torch.bfloat16)
    ids = torch.arange(TOKENS, device=device)
    ends = torch.arange(1, EXPERTS + 1, device=device, dtype=torch.int32) * (TOKENS // EXPERTS)
    one = torch.ones((), device=device, dtype=torch.bfloat16)
    module = Identity().to(device)
    holder = _Holder({"hidden": WIDTH, "heads": HEADS, "experts": EXPERTS})

    def beside(call: Callable[[], Any]) -> Call:
        def run(x: Tensor, weight: Tensor) -> Tensor:
            call()
            return x

        return run

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        y = x.view(1, TOKENS, HEADS, 64).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, is_causal=True).transpose(1, 2).view(TOKENS, WIDTH)

    def heads_alone(x: Tensor, weight: Tensor) -> Tensor:
        return x.view(1, TOKENS, HEADS, 64).transpose(1, 2).transpose(1, 2).view(TOKENS, WIDTH)

    found = {
        "python": Piece(call=lambda x, _: _code(x, holder, scale=1.0)),
        "module": Piece(call=lambda x, _: module(x)),
        "two views": Piece(call=lambda x, _: x.t().t()),
        "slice": Piece(call=lambda x, _: x[:, :]),
        "detached view": Piece(call=beside(lambda: some.view(-1))),
        "empty": Piece(call=beside(lambda: torch.empty_like(some))),
        "add": Piece(call=lambda x, _: x + one),
        "mul": Piece(call=lambda x, _: x * one),
        "mul of a weight": Piece(call=lambda x, w: x * w, weight=(TOKENS, WIDTH)),
        "silu": Piece(call=lambda x, _: F.silu(x)),
        "two casts": Piece(call=lambda x, _: x.float().to(torch.bfloat16)),
        "softmax": Piece(call=lambda x, _: x.softmax(-1)),
        "norm": Piece(call=lambda x, w: F.rms_norm(x, (WIDTH,), w), weight=(WIDTH,)),
        "gemm": Piece(call=lambda x, w: F.linear(x, w), weight=(WIDTH, WIDTH)),
        "grouped gemm": Piece(call=lambda x, w: F.grouped_mm(x, w, offs=ends), weight=(EXPERTS, WIDTH, WIDTH)),
        "attention": Piece(call=heads),
        "its views": Piece(call=heads_alone),
        "cat of a chunk": Piece(call=lambda x, _: torch.cat(x.chunk(2, -1), -1)),
        "index": Piece(call=lambda x, _: x[ids]),
        "index_select": Piece(call=lambda x, _: x.index_select(0, ids)),
        "index_add": Piece(call=lambda x, _: torch.zeros_like(x).index_add(0, ids, x)),
        "plain mul": Piece(call=beside(lambda: some * some)),
        "plain sum": Piece(call=beside(lambda: some.sum(-1))),
        "plain topk": Piece(call=beside(lambda: some.topk(2))),
        "plain sort": Piece(call=beside(lambda: ids.argsort(stable=True))),
        "plain zeros": Piece(call=beside(lambda: torch.zeros(TOKENS, device=device))),
        "plain bmm": Piece(call=beside(lambda: torch.bmm(some.t()[None], some[None]))),
        "three muls": Piece(call=lambda x, _: x * one * one * one),
    }
    if device != "cpu":
        found["launch"] = Piece(call=beside(lambda: torch.cuda._sleep(1)))  # type: ignore[no-untyped-call]
        found["item"] = Piece(call=beside(lambda: one.item()), rounds=20)
    return found


class Meter:
    """Measures steps of the surroundings with a piece or without."""

    def __init__(self, device: str, *, layers: int = LAYERS) -> None:
        torch.manual_seed(0)
        self.device, self.places = device, layers * PLACES
        self.model = Surroundings(layers).to(device, torch.bfloat16)
        self.x = torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.none = [nn.Parameter(torch.ones((), device=device)) for _ in range(self.places)]
        self.own: dict[str, list[nn.Parameter]] = {}
        del self.model.weights

    def weights_of(self, name: str, piece: Piece) -> list[nn.Parameter]:
        """One for each place."""
        if not piece.weight:
            return self.none
        if name not in self.own:
            one = 0.05 * torch.randn(self.places, *piece.weight, device=self.device)
            self.own[name] = [nn.Parameter(each.to(torch.bfloat16)) for each in one]
        return self.own[name]

    def step(self, name: str = "", piece: Piece = Piece(call=lambda x, _: x)) -> tuple[float, float]:
        """Seconds of the host in the forward and in the backward pass; with nothing in the places by default."""
        self.model.weights = self.weights_of(name, piece)  # type: ignore[assignment]
        begin = time.perf_counter()
        loss = self.model(self.x, piece.call)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        self.model.zero_grad()
        self.x.grad = None
        for each in self.own.get(name, ()):
            each.grad = None
        return middle - begin, end - middle

    def wait(self) -> None:
        """For the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def in_situ(device: str, *, rounds: int = ROUNDS) -> dict[tuple[str, str], float]:
    """(forward or backward, name) -> seconds of one; ("step", ...) of the surroundings with nothing in their places."""
    meter, known = Meter(device), pieces(device)
    more: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    bare: list[tuple[float, float]] = []
    for name, piece in known.items():
        for _ in range(WARM_UP):
            meter.step(name, piece)
    was = gc.isenabled()
    gc.disable()
    for number in range(rounds):
        gc.collect()
        meter.wait()
        for _ in range(WARM_UP):
            before = meter.step()
        due = [name for name, piece in known.items() if number < piece.rounds]
        for first, second in zip(due[::2], [*due[1::2], None], strict=False):
            pair = [(name, meter.step(name, known[name])) for name in (first, second) if name is not None]
            after = meter.step()
            middle = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
            for name, took in pair:
                more[name].append((took[0] - middle[0], took[1] - middle[1]))
            bare.append(after)
            before = after
    if was:
        gc.enable()
    found = {}
    for at, part in enumerate(("forward", "backward")):
        for name, rows in more.items():
            found[part, name] = statistics.median(row[at] for row in rows) / meter.places
        found["step", part] = statistics.median(row[at] for row in bare)
    return found


def optimizer_in_situ(device: str, *, rounds: int = 30) -> dict[tuple[str, str], float]:
    """Of a fused AdamW: ("optimizer", "step") of none, ("optimizer", "weight") of each weight, with zero_grad."""
    meter, numbers = Meter(device), (16, 64, 256)
    made = {}
    for number in numbers:
        weights = [nn.Parameter(torch.randn(64, 64, device=device, dtype=torch.bfloat16)) for _ in range(number)]
        made[number] = (weights, torch.optim.AdamW(weights, lr=1e-5, fused=True))
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number, (weights, optimizer) in made.items():
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            meter.step()
            begin = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            times[number].append(time.perf_counter() - begin)
    took = [statistics.median(times[number]) for number in numbers]
    each = (took[-1] - took[0]) / (numbers[-1] - numbers[0])
    return {("optimizer", "step"): took[0] - numbers[0] * each, ("optimizer", "weight"): each}


# Of the step with nothing in its places, forward and backward together, on the host that `moesim.recorded.host` stands
# for: the mean of occasions on three machines with H100s.
REFERENCE_S = 8.9e-3


def pace(device: str, *, steps: int = 40) -> float:
    """How many times as long this host takes for the step with nothing in its places as the one of the reference."""
    meter, times = Meter(device), []
    for number in range(steps):
        took = sum(meter.step())
        meter.wait()
        meter.step()
        if number >= steps // 4:
            times.append(took)
    return statistics.median(times) / REFERENCE_S


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here whose host could be measured; run it where you train")
    factor = pace("cuda")
    print(f"this host takes {factor:.2f} times as long: moesim import-step --host-factor {factor:.2f}")
