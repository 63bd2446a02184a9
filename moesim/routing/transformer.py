"""The thin byte-level language model: small in width, depth and vocabulary, its expert layout the real model's.

Legend: B sequences, T tokens per sequence, H hidden size, K selections per token, E routed experts, V vocabulary;
S sequences of the micro-batch (= B).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesim.routing.attention import build_attention
from moesim.routing.balance import keep_mask
from moesim.routing.experts import RoutedExperts, SharedExperts
from moesim.routing.request import TrainingRequest
from moesim.routing.routers import HashRouter, RouterInputs, Routing, build_router
from moesim.scenario.routing import NoCapacity

VOCABULARY = 256


class Mode(NamedTuple):
    """How one forward pass routes.

    `generator` (CPU) for routers that draw; `protected_S` the protected sequences while rows are dropped, None in
    evaluation, where nothing is; `fixed` uses the hash router instead of the learned one (warm-up).
    """

    generator: torch.Generator
    protected_S: Tensor | None = None
    fixed: bool = False


class MoELayer(nn.Module):
    """Router, routed experts and shared experts: sum_i FFN^s_i(u) + sum_i g_i FFN^r_i(u)."""

    def __init__(self, request: TrainingRequest, generator: torch.Generator, experts: type[RoutedExperts]) -> None:
        super().__init__()
        hidden, width = request.thin.hidden, request.thin.expert_intermediate
        self.shape, self.capacity = request.router, request.capacity
        self.router = build_router(self.shape, hidden=hidden, generator=generator)
        self.fixed_router = HashRouter(self.shape)
        self.fixed_router.reset_parameters(generator)
        self.experts = experts(hidden=hidden, num_experts=self.shape.num_experts, width=width)
        self.experts.reset_parameters(generator)
        self.shared: SharedExperts | None = None
        if request.shared_experts:
            self.shared = SharedExperts(hidden=hidden, num_experts=request.shared_experts, width=width)
            self.shared.reset_parameters(generator)

    def forward(self, hidden_BTH: Tensor, hash_keys_BT: Tensor, mode: Mode) -> tuple[Tensor, Routing]:
        """The layer's output [B, T, H] and the routing of its B * T tokens, before dropping."""
        hidden_TH = hidden_BTH.flatten(0, 1)
        router = self.fixed_router if mode.fixed else self.router
        routing: Routing = router(hidden_TH, RouterInputs(hash_keys_BT.flatten(), mode.generator))
        with torch.no_grad():
            keep_TK = self._keep(routing, hidden_BTH, mode)
        output_TH = self.experts(hidden_TH, routing.expert_ids_TK, routing.gates_TK, keep_TK)
        if self.shared is not None:
            output_TH = output_TH + self.shared(hidden_TH)
        return output_TH.view_as(hidden_BTH), routing

    def _keep(self, routing: Routing, hidden_BTH: Tensor, mode: Mode) -> Tensor:
        if mode.protected_S is None or isinstance(self.capacity, NoCapacity):
            return routing.expert_ids_TK >= 0
        batch, length = hidden_BTH.shape[:2]
        return keep_mask(
            self.capacity,
            routing.expert_ids_TK,
            routing.affinities_TK,
            router=self.shape,
            sequence_T=torch.arange(batch, device=hidden_BTH.device).repeat_interleave(length),
            protected_S=mode.protected_S,
        )


class Block(nn.Module):
    """Pre-norm attention and MoE layer, each added to the residual."""

    def __init__(self, request: TrainingRequest, generator: torch.Generator, experts: type[RoutedExperts]) -> None:
        super().__init__()
        hidden = request.thin.hidden
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = build_attention(request.thin.attention, hidden=hidden, heads=request.thin.heads)
        self.moe_norm = nn.RMSNorm(hidden)
        self.moe = MoELayer(request, generator, experts)

    def forward(self, hidden_BTH: Tensor, hash_keys_BT: Tensor, mode: Mode) -> tuple[Tensor, Routing]:
        """The block's output and its routing."""
        hidden_BTH = hidden_BTH + self.attention(self.attention_norm(hidden_BTH))
        output_BTH, routing = self.moe(self.moe_norm(hidden_BTH), hash_keys_BT, mode)
        return hidden_BTH + output_BTH, routing


class LanguageModel(nn.Module):
    """Embedding, blocks and head over bytes; all parameters drawn from `generator` (CPU).

    `experts` is how the routed experts are computed: the class changes neither parameters nor what is drawn for them.
    """

    def __init__(
        self, request: TrainingRequest, generator: torch.Generator, *, experts: type[RoutedExperts] = RoutedExperts
    ) -> None:
        super().__init__()
        hidden = request.thin.hidden
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(request, generator, experts) for _ in range(request.thin.layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=hidden**-0.5, generator=generator)
        for block in self.blocks:
            for module in block.get_submodule("attention").modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layer of every block, in order."""
        return [block.moe for block in self.blocks if isinstance(block, Block)]

    def forward(self, bytes_BT: Tensor, mode: Mode) -> tuple[Tensor, list[Routing]]:
        """Logits [B, T, V] of the next byte, and every layer's routing before dropping."""
        hash_keys_BT = hash_keys(bytes_BT)
        hidden_BTH = self.embedding(bytes_BT)
        routings = []
        for block in self.blocks:
            hidden_BTH, routing = block(hidden_BTH, hash_keys_BT, mode)
            routings.append(routing)
        return self.head(self.norm(hidden_BTH)), routings


def hash_keys(bytes_BT: Tensor) -> Tensor:
    """The last three bytes as one number [B, T]: what fixed routing hashes.

    One byte is a poor token (a fifth of source text is spaces); three stand for the sub-word of a real vocabulary.
    """
    padded = functional.pad(bytes_BT, (2, 0))
    return padded[:, :-2] * 65_536 + padded[:, 1:-1] * 256 + padded[:, 2:]
