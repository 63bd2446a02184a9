"""A dense transformer in plain torch, compiled, whose Linear layers torchao scales to FP8: what torchtitan's users run.

Every layer is a compiled unit, and so is the head with its loss, as torchtitan compiles them; bf16 weights, gradients
and states, one fused AdamW. Recipes: bf16, and torchao's tensorwise and rowwise, both with dynamic scales; the head
stays in bf16. Needs torch, torchao and a GPU, and nothing of moesim.

Legend: B sequences, S tokens of each, H heads, D width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fused_cases import Sizes
from torch import Tensor, nn

TORCHAO = ("tensorwise", "rowwise")


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        h, d = sizes.hidden, sizes.head_dim
        self.sizes = sizes
        self.norm1, self.norm2 = nn.RMSNorm(h), nn.RMSNorm(h)
        self.q = nn.Linear(h, sizes.heads * d, bias=False)
        self.k, self.v = (nn.Linear(h, sizes.kv_heads * d, bias=False) for _ in range(2))
        self.out = nn.Linear(sizes.heads * d, h, bias=False)
        self.w1, self.w3 = (nn.Linear(h, sizes.dense_width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(sizes.dense_width, h, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (part(y).view(batch, length, -1, self.sizes.head_dim) for part in (self.q, self.k, self.v))
        q, k = (_turned(part, cosine, sine) for part in (q, k))
        out = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
        )
        x = x + self.out(out.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine


class Head(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


class CompiledTrainer:
    """The model, its optimizer and one micro-batch of random tokens."""

    def __init__(self, sizes: Sizes, recipe: str) -> None:
        self.sizes = sizes
        with torch.device("cuda"):
            layers = nn.ModuleList([Layer(sizes) for _ in range(sizes.layers)]).bfloat16()
            self.embedding, self.head = nn.Embedding(sizes.vocab, sizes.hidden).bfloat16(), Head(sizes).bfloat16()
            self.tokens = torch.randint(sizes.vocab, (sizes.batch, sizes.sequence))
            half = torch.arange(sizes.head_dim // 2) * (-9.210340372 / (sizes.head_dim // 2))
            angle = (torch.arange(sizes.sequence)[:, None] * half.exp()).repeat(1, 2)[:, None].to(torch.float32)
            self.tables = angle.cos().bfloat16(), angle.sin().bfloat16()
        if recipe in TORCHAO:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            convert_to_float8_training(layers, config=Float8LinearConfig.from_recipe_name(recipe))
        self.parameters = [*layers.parameters(), *self.embedding.parameters(), *self.head.parameters()]
        torch._dynamo.reset()
        self.layers = [torch.compile(layer) for layer in layers]
        self.loss = torch.compile(self.head)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self) -> Tensor:
        """Forward, backward, AdamW."""
        x: Any = self.embedding(self.tokens)
        for layer in self.layers:
            x = layer(x, *self.tables)
        loss = self.loss(x, self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # type: ignore[no-any-return]
