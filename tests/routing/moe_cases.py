"""Shared cases of the MoE tests: small requests, inputs of routers, and one thread for torch."""

from pathlib import Path
from typing import Any

import torch

from moesim.routing.request import TrainingRequest
from moesim.routing.routers import RouterInputs
from moesim.scenario.routing import Capacity, NoCapacity, RouterShape, Thin

NUM_EXPERTS, TOP_K, NUM_GROUPS, GROUP_LIMIT = 16, 4, 4, 2


def shape_of(kind: str, **changes: Any) -> RouterShape:
    """A small router of `kind`: 16 experts, top-4 (what the kind fixes aside), 4 groups of which 2 where it has any."""
    grouped = kind in ("deepseek_v2", "deepseek_v3")
    settings: dict[str, Any] = {
        "num_experts": NUM_EXPERTS,
        "top_k": {"switch": 1, "gshard": 2}.get(kind, TOP_K),
        "num_groups": NUM_GROUPS if grouped else 1,
        "group_limit": GROUP_LIMIT if grouped else 1,
        "num_devices": 4,
        "routed_scaling_factor": 2.5 if grouped else 1.0,
    }
    return RouterShape(kind=kind, **{**settings, **changes})


def router_inputs(num_tokens: int, seed: int = 0) -> RouterInputs:
    """Hash keys and a generator for `num_tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return RouterInputs(torch.randint(0, 2**24, (num_tokens,), generator=generator), generator)


def write_corpus(folder: Path, *, files: int = 40, lines: int = 150) -> Path:
    """A folder of readable text with structure to learn, about 5 kB a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = "".join(f"def function_{number}_{line}(argument):\n    return {line}\n" for line in range(lines))
        (folder / f"file_{number}.py").write_text(text)
    return folder


def small_request(
    corpus: Path, *, capacity: Capacity | None = None, thin: dict[str, Any] | None = None, **changes: Any
) -> TrainingRequest:
    """A request that trains in about a second: 16 experts, hidden size 32, a few steps of 512 tokens."""
    sizes: dict[str, Any] = {
        "layers": 2,
        "hidden": 32,
        "expert_intermediate": 16,
        "context": 64,
        "tokens_per_step": 512,
        "device": "cpu",
    }
    settings: dict[str, Any] = {
        "router": shape_of("deepseek_v2"),
        "steps": 6,
        "sequence_length": 128,
        "recorded_sequences": 8,
        "shared_experts": 1,
    }
    return TrainingRequest(
        corpus=str(corpus),
        capacity=capacity or NoCapacity(),
        thin=Thin(**{**sizes, **(thin or {})}),
        **{**settings, **changes},
    )
