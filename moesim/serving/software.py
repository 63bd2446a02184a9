"""What serves: which kernels a layer is made of, whether steps are replayed as CUDA graphs, what the host adds.

One entry per software; kernels are listed by `moesim.serving.layers`, as `kernels` names the list.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from moesim.serving.decode_kernels import facts


@dataclass(frozen=True, kw_only=True)
class ServingSoftware:
    """The facts of one software.

    kernels: the list of small kernels of a layer. attention, experts: whose kernels
    read stored keys and compute routed experts. graph_tokens: steps of at
    most so many tokens are replayed as CUDA graphs; in longer ones, and without graphs, the host launches every kernel,
    which shows where the GPU is faster. launch: seconds of such a launch. step: seconds of a step in which the GPU
    waits: the replay, and reading the tokens back. own_all_reduce: whether small all-reduces take a kernel of the
    engine's own.
    """

    name: str
    about: str
    listed: str
    checked: str
    kernels: Literal["fused", "compiled", "torch"]
    attention: Literal["engines", "torch"]
    experts: Literal["engines", "torch"]
    graph_tokens: int
    launch: float
    step: float
    own_all_reduce: bool


@cache
def serving_software() -> Mapping[str, ServingSoftware]:
    """All of them by name."""
    host = facts()["host"]
    wait = host["replay"] + host["readback"]
    entries = (
        ServingSoftware(
            name="fused",
            about="an engine with fused kernels, CUDA graphs of decoding steps, and attention kernels of its own",
            listed="drawn up as serving engines fuse their layers: norms with residuals, rotary, cache, activation, "
            "top-k and sums over experts are one kernel each",
            checked="no measured step; its kernels by themselves",
            kernels="fused",
            attention="engines",
            experts="engines",
            graph_tokens=512,
            launch=host["launch"],
            step=wait,
            own_all_reduce=True,
        ),
        ServingSoftware(
            name="torch_graphs",
            about="plain torch layers, captured as CUDA graphs",
            listed="kernel by kernel from the layers of tools/measure_decode.py",
            checked="decoding steps on one H100 (pytest -s tests/serving)",
            kernels="torch",
            attention="torch",
            experts="torch",
            graph_tokens=1 << 30,
            launch=host["eager_launch"],
            step=wait,
            own_all_reduce=False,
        ),
        ServingSoftware(
            name="torch_compiled",
            about="the same layers compiled by torch.compile, captured as CUDA graphs",
            listed="kernel by kernel from compiled layers of tools/measure_decode.py",
            checked="decoding steps on one H100 (pytest -s tests/serving)",
            kernels="compiled",
            attention="torch",
            experts="torch",
            graph_tokens=1 << 30,
            launch=host["eager_launch"],
            step=wait,
            own_all_reduce=False,
        ),
        ServingSoftware(
            name="torch_eager",
            about="plain torch layers, launched kernel by kernel from Python",
            listed="kernel by kernel from the layers of tools/measure_decode.py",
            checked="decoding steps on one H100 (pytest -s tests/serving)",
            kernels="torch",
            attention="torch",
            experts="torch",
            graph_tokens=0,
            launch=host["eager_launch"],
            step=host["readback"],
            own_all_reduce=False,
        ),
    )
    return {entry.name: entry for entry in entries}
