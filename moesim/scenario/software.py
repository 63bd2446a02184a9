"""What the step, its memory and the checks of a scenario ask of a software, as data: one entry per software.

The kernels themselves are listed in `moesim.program`, as `kernels` names the list.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SoftwareFacts:
    """The facts of one software.

    listed: how its list of kernels was obtained; checked: what steps of it were set beside measured ones. Both end up
    in every result, beside the sources of its kernels.
    exchanges_counts: ranks exchange how many rows they will send and read that back, so that nobody sends before the
    last has come. bf16_optimizer: states in bf16 are updated by a kernel for them, else by that for fp32.
    Of the backward pass: keeps_fp8_inputs, whether inputs of FP8 GEMMs are kept in FP8; repeats_keys, whether keys and
    values of grouped queries are repeated to the number of heads; attention_outputs, in how many orders attention's
    output is kept; splits_keys, whether latent keys are kept before they are joined; keeps_activation, whether silu's
    output is kept beside its inputs; fp32_logits, whether the head keeps logits in fp32 and holds bf16 ones beside
    them; gates_inside, whether gates are multiplied inside of an expert, so that no result of one is kept;
    drops_gradients, whether gradients are made anew in every step.
    Of what it can do: shards_gradients (ZeRO 2 and 3), shares_layers (tensor, context and expert-tensor ranks),
    other_layers (dense layers anywhere, windows in some layers, networks that are not gated, experts of another
    width), recomputes_parts, overlaps, copies_experts (an expert in more than one slot), and runs_here: whether it is
    what `moesim validate` runs.
    """

    name: str
    about: str
    listed: str
    checked: str
    kernels: Literal["fused", "torch_eager"]
    exchanges_counts: bool
    bf16_optimizer: bool
    keeps_fp8_inputs: bool
    repeats_keys: bool
    attention_outputs: int
    splits_keys: bool
    keeps_activation: bool
    fp32_logits: bool
    gates_inside: bool
    drops_gradients: bool
    shards_gradients: bool
    shares_layers: bool
    other_layers: bool
    recomputes_parts: bool
    overlaps: bool
    copies_experts: bool
    runs_here: bool


FUSED = SoftwareFacts(
    name="fused",
    about="kernels of an ideal trainer whose host never limits: a bound",
    listed="drawn up as the kernels of a well-tuned stack whose host never limits: a bound, not any one program",
    checked="no measured step of it; its kernels by themselves (moesim calibrate --report)",
    kernels="fused",
    exchanges_counts=False,
    bf16_optimizer=False,
    keeps_fp8_inputs=True,
    repeats_keys=False,
    attention_outputs=1,
    splits_keys=False,
    keeps_activation=False,
    fp32_logits=False,
    gates_inside=True,
    drops_gradients=False,
    shards_gradients=True,
    shares_layers=True,
    other_layers=True,
    recomputes_parts=True,
    overlaps=True,
    copies_experts=True,
    runs_here=False,
)
TORCH_EAGER = SoftwareFacts(
    name="torch_eager",
    about="those of a plain torch trainer",
    listed="kernel by kernel from the project's own torch trainer, which moesim validate runs",
    checked="measured steps on one and two H200 and H100 (moesim validate --report); no other GPU, no more ranks",
    kernels="torch_eager",
    exchanges_counts=True,
    bf16_optimizer=True,
    keeps_fp8_inputs=False,
    repeats_keys=True,
    attention_outputs=2,
    splits_keys=True,
    keeps_activation=True,
    fp32_logits=True,
    gates_inside=False,
    drops_gradients=True,
    shards_gradients=False,
    shares_layers=False,
    other_layers=False,
    recomputes_parts=False,
    overlaps=False,
    copies_experts=False,
    runs_here=True,
)
SOFTWARE = {facts.name: facts for facts in (FUSED, TORCH_EAGER)}
