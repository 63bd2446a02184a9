"""What the step, its memory and the checks of a scenario ask of a software, as data: one entry per software."""

from dataclasses import dataclass, replace
from typing import Literal

from moesim.scenario.switches import Switches


@dataclass(frozen=True, kw_only=True)
class SoftwareFacts:
    """The facts of one software.

    listed: how its list of kernels was obtained; checked: what steps of it were set beside measured ones. Both end up
    in every result, beside the sources of its kernels. switches: the settings that its list is written with. kernels:
    which writer writes it. bound: an ideal that no program reaches.
    By itself, where a scenario says nothing: shared_beside, whether shared experts run beside the dispatch;
    reduces_beside, whether gradients are reduced beside the last backward pass.
    Of what it can do: shards_gradients (ZeRO 2 and 3), shares_layers (tensor, context and expert-tensor ranks;
    whole_layers: what to do where it cannot), other_layers (dense layers anywhere, windows in some layers, networks
    that are not gated, experts of another width), recomputes_parts, overlaps, copies_experts (an expert in more than
    one slot), deduplicates (a token goes once to a
    rank for several experts), casts_fp8 (products of FP8 with casts of their own), plain_queries (latent attention
    without compressed queries), query_key_norms (where a model has them), expert_ranks (experts on several ranks), and
    runs_here: whether it is what `moesim validate` runs. bf16_optimizer: states in bf16 are updated by a kernel for
    them, else by that for fp32.
    """

    name: str
    about: str
    listed: str
    checked: str
    switches: Switches
    kernels: Literal["switched", "own_program"] = "switched"
    bound: bool = False
    shared_beside: bool = False
    reduces_beside: bool = False
    bf16_optimizer: bool = False
    shards_gradients: bool = True
    shares_layers: bool = True
    whole_layers: str = ""
    other_layers: bool = True
    recomputes_parts: bool = True
    overlaps: bool = True
    copies_experts: bool = True
    casts_fp8: bool = True
    deduplicates: bool = True
    plain_queries: bool = True
    query_key_norms: bool = True
    expert_ranks: bool = True
    runs_here: bool = False


FUSED = SoftwareFacts(
    name="fused",
    about="kernels of an ideal trainer whose host never limits: a bound",
    listed="drawn up as the kernels of a well-tuned stack whose host never limits: a bound, not any one program",
    checked="no measured step of it; its kernels by themselves (moesim calibrate --report)",
    switches=Switches(),
    bound=True,
    shared_beside=True,
)
MEGATRON = SoftwareFacts(
    name="megatron",
    about="Megatron-Core with Transformer Engine, at the defaults of its flags",
    listed="from Megatron-Core's source, layers of its Transformer Engine specification, defaults of its arguments; "
    "what these share with its local layers from traces of those",
    checked="no step with Transformer Engine; 28 steps of megatron_local, which shares rows, loss, router, activation "
    "and buffers (docs/software.md)",
    switches=Switches(
        norm="kernel",
        router="unfused",
        permute="mask",
        gather_backward="index_add",
        combine="index_add",
        loss="parallel",
        embedding="torch",
        activation="compiled",
        gradient_norm="kernel",
        weight_copy=True,
        zeroed_gradients=True,
        host="launches",
        counts=True,
    ),
    deduplicates=False,
)
MEGATRON_LOCAL = replace(
    MEGATRON,
    name="megatron_local",
    about="Megatron-Core without Transformer Engine: its local layers, unfused attention, one product an expert",
    listed="kernel by kernel from traces of Megatron-Core 0.19.2 on one and two H100",
    checked="28 measured steps on one and two H100, 15 of them in no choice (docs/software.md); not on more ranks",
    switches=replace(
        MEGATRON.switches,
        rotary="remade",
        repeat_keys=True,
        attention="fp32",
        layout_copies="single",
        expert_products="each",
        optimizer="foreach",
        gradient_norm="loop",
        accumulation="buffer",
    ),
    casts_fp8=False,
)
DEEPSEEK = SoftwareFacts(
    name="deepseek",
    about="the stack that DeepSeek-V3 was trained with, as it is published",
    listed="from the DeepSeek-V3 report (fused casts, overlapped pairs, bf16 moments) and its libraries DeepEP and "
    "DeepGEMM; the trainer itself is not public: what is not told is taken as fused, its host as ahead",
    checked="no measured step of it, nor can there be: its trainer is not public; the exchange beside DeepEP's "
    "published bandwidths, its FP8 products beside DeepGEMM's",
    switches=Switches(gradient_norm="kernel", weight_copy=True, embedding="torch", counts=True),
    shared_beside=True,
)
TRANSFORMERS = SoftwareFacts(
    name="transformers",
    about="Hugging Face transformers 5, grouped_mm experts, SDPA, one fused AdamW",
    listed="operation by operation from modeling code of transformers 5.17, as recorded on the meta device",
    checked="recorded steps of Qwen3-MoE, Mixtral, OLMoE and DeepSeek-V3 (docs/software.md); on one H100 such "
    "recordings were within 4.1 % of measured steps; not on more ranks",
    switches=Switches(
        norm="unfused",
        qkv="separate",
        rotary="cached",
        layout_copies="double",
        router="unfused",
        permute="sentinels",
        gather_backward="index_put",
        combine="sum",
        gates="fp32",
        ffn_inputs="separate",
        activation="unfused",
        loss="fp32",
        embedding="torch",
        gradient_norm="foreach",
        accumulation="autograd",
        fresh_gradients=True,
        host="launches",
        counts=True,
    ),
    bf16_optimizer=True,
    shares_layers=False,
    other_layers=True,
    recomputes_parts=False,
    overlaps=True,
    reduces_beside=True,
    copies_experts=False,
    casts_fp8=False,
    expert_ranks=False,
)
TORCHTITAN = SoftwareFacts(
    name="torchtitan",
    about="torchtitan 0.3 without torch.compile",
    listed="from torchtitan 0.3's model code (common/moe.py, rope.py, attention.py, loss.py), eager mode",
    checked="6 measured steps of 0.2.2's DeepSeek model on one and two H100 (docs/software.md); not with FSDP2",
    switches=Switches(
        norm="kernel",
        qkv="separate",
        rotary="complex",
        layout_copies="single",
        router="unfused",
        router_dtype="fp32",
        permute="sort",
        gather_backward="index_put",
        combine="index_add",
        gates="fp32",
        expert_inputs="separate",
        ffn_inputs="separate",
        activation="unfused",
        loss="fp32",
        loss_chunks=8,
        embedding="torch",
        gradient_norm="foreach",
        accumulation="autograd",
        reduce_dtype="fp32",
        host="launches",
        counts=True,
    ),
    bf16_optimizer=True,
    reduces_beside=True,
    recomputes_parts=False,
    copies_experts=False,
    deduplicates=False,
    casts_fp8=False,
)
TORCH_EAGER = SoftwareFacts(
    name="torch_eager",
    about="those of a plain torch trainer",
    listed="kernel by kernel from the project's own torch trainer, which moesim validate runs",
    checked="measured steps on one and two H200 and H100 (moesim validate --report); no other GPU, no more ranks",
    switches=Switches(
        norm="kernel",
        qkv="separate",
        rotary="unfused",
        repeat_keys=True,
        layout_copies="single",
        router="unfused",
        permute="sort",
        gather_backward="index_add",
        combine="index_add",
        gates="bf16",
        activation="unfused",
        loss="fp32",
        embedding="torch",
        accumulation="autograd",
        flat_gradients=True,
        fresh_gradients=True,
        host="launches",
        counts=True,
    ),
    bf16_optimizer=True,
    other_layers=False,
    recomputes_parts=False,
    overlaps=False,
    copies_experts=False,
    deduplicates=False,
    casts_fp8=False,
    plain_queries=False,
    query_key_norms=False,
    runs_here=True,
)
IMPORTED = SoftwareFacts(
    name="imported",
    about="your own program, from the file of moesim import-step",
    listed="operation by operation from the program itself, recorded on the meta device or traced on a GPU",
    checked="torch programs of transformers and torchtitan on one and two H100s, at other sizes than the recorded: 26 "
    "steps kept out of every choice, 1.0 % off in the median and 5.0 % at worst, where the host was not the bound "
    "(docs/imported-steps.md)",
    switches=replace(
        TRANSFORMERS.switches, permute="sort", gather_backward="index_put", combine="index_add", gradient_norm="free"
    ),
    kernels="own_program",
    bf16_optimizer=True,
    shares_layers=False,
    whole_layers="a recorded step has whole layers: spread it by data, expert and pipeline ranks and zero: 3, or ",
    recomputes_parts=False,
    reduces_beside=True,
    casts_fp8=False,
)
SOFTWARE = {
    facts.name: facts
    for facts in (FUSED, MEGATRON, MEGATRON_LOCAL, DEEPSEEK, TRANSFORMERS, TORCHTITAN, TORCH_EAGER, IMPORTED)
}
