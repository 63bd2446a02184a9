"""A transformer with a dense layer and MoE layers by grouped GEMMs, for the meta device, in plain torch."""

import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from moesim.importing.recording import record_step
from moesim.recorded.step_file import RecordedOp

HIDDEN, HEADS, HEAD_DIM, DENSE, WIDTH, VOCAB, TOP_K = 1024, 8, 128, 2048, 512, 12288, 4


class Attention(nn.Module):
    """Causal attention of as many heads of keys as of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """The sum of values."""
        b, s, _ = x_BSH.shape
        q, k, v = self.qkv(x_BSH).view(b, s, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))


class Dense(nn.Module):
    """A gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * DENSE, bias=False), nn.Linear(DENSE, HIDDEN, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """The network's result."""
        gate, up = self.up(x_BSH).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Experts(nn.Module):
    """Softmax, top-k, rows in the order of experts, two grouped GEMMs, and the sum of each token's results."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, HIDDEN, 2 * WIDTH))
        self.down = nn.Parameter(torch.empty(experts, WIDTH, HIDDEN))

    def forward(self, x_BSH: Tensor) -> Tensor:
        """As many numbers as are given."""
        x_TH = x_BSH.reshape(-1, HIDDEN)
        gates_TK, ids_TK = self.router(x_TH).float().softmax(-1).topk(TOP_K)
        order_R = ids_TK.flatten().argsort()
        ends_E = torch.histc(ids_TK.flatten().int(), self.router.out_features).cumsum(0, dtype=torch.int32)
        rows_RH = x_TH[order_R // TOP_K]
        gate, up = torch._grouped_mm(rows_RH, self.up, offs=ends_E).chunk(2, dim=-1)
        results_RH = torch._grouped_mm(silu(gate) * up, self.down, offs=ends_E)
        weighted_RH = results_RH * gates_TK.flatten()[order_R, None].to(results_RH.dtype)
        return torch.zeros_like(x_TH).index_add(0, order_R // TOP_K, weighted_RH).view_as(x_BSH)


class Layer(nn.Module):
    """Both parts with their norms and residual sums."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.attention, self.ffn = Attention(), ffn

    def forward(self, x_BSH: Tensor) -> Tensor:
        """The next residual."""
        x_BSH = x_BSH + self.attention(self.norms[0](x_BSH))
        return x_BSH + self.ffn(self.norms[1](x_BSH))


class SmallMoe(nn.Module):
    """The first layer dense, the others with experts."""

    def __init__(self, *, layers: int, experts: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(Experts(experts) if number else Dense()) for number in range(layers))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """The mean loss."""
        x_BSH = self.table(tokens_BS)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        return cross_entropy(self.head(x_BSH).flatten(0, 1).float(), tokens_BS.flatten())


def small_step(*, sequences: int = 2, length: int = 4096, layers: int = 3, experts: int = 16):
    """The model in bf16 and its loss, as `moesim import-step` takes them."""
    with torch.device("meta"):
        model = SmallMoe(layers=layers, experts=experts).to(torch.bfloat16)
        tokens_BS = torch.randint(VOCAB, (sequences, length))
    return model, lambda: model(tokens_BS)


FIRST = {"sequences": 4, "length": 8192, "layers": 3, "experts": 16}
WIDTHS = ("HIDDEN", "HEADS", "HEAD_DIM", "DENSE", "WIDTH", "VOCAB", "TOP_K")


def recorded(**changes: int) -> list[RecordedOp]:
    """The step at its first size or another, of the widths that this module has now: tests change them."""
    widths = tuple(getattr(sys.modules[__name__], name) for name in WIDTHS)
    return _recorded(tuple(sorted((FIRST | changes).items())), widths)


@cache
def _recorded(sizes: tuple[tuple[str, int], ...], widths: tuple[int, ...]) -> list[RecordedOp]:
    return record_step(*small_step(**dict(sizes)))
