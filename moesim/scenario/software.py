"""The `implementation` section: which software is simulated, what of it is set otherwise, and the table of software.

A software is data: what the kernels of a step, its memory and the checks of a scenario ask of it, one row each.
What differs in the kernels of a step is named switches (`Switches`): a software is one row of settings, and a scenario
may set any of them anew, by the same name. The writers of kernels (`moesim.program`) and of memory (`moesim.parallel`)
ask for settings and for no software. How GEMMs of operands of a byte or less are scaled is a table of its own
(`RECIPES`), read by checks, memory, kernels and flags:

per_tensor  one scale an operand, found in a pass of its own (TransformerEngine's current scaling)
blockwise   1 x 128 activations and gradients, 128 x 128 weights (DeepSeek-V3, arXiv 2412.19437 section 3.3)
mxfp8       one exponent for 32 values (OCP microscaling), applied by the tensor cores
nvfp4       4 bits with one FP8 scale for 16 values, applied by the tensor cores
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, WithJsonSchema, create_model

from moesim.scenario.base import DType, Flag, Section, one_of

Gemms = Literal["joined", "separate"]
Kernels = Literal["fused", "unfused"]
Chunks = Annotated[int, Field(strict=True, gt=0, le=1_024)]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """One setting of everything; the text of a switch describes the key of `implementation` that sets it anew."""

    norm: Annotated[
        Literal["fused", "kernel", "unfused"],
        "Norms: fused with the residual sum; a kernel beside a sum (and a sum of gradients where a branch leaves); or "
        "unfused, in eight elementwise kernels of fp32",
    ] = "fused"
    qkv: Annotated[Gemms, "GEMMs of queries, keys and values: joined in one, or separate"] = "joined"
    rotary: Annotated[
        Literal["fused", "cached", "remade", "complex", "unfused"],
        "Rotary embedding: one kernel; five kernels over cached tables of the step; by tables remade for each tensor, "
        "with a copy behind it; by products of complex fp32 numbers; or unfused, with tables made in every layer and "
        "products of halves",
    ] = "fused"
    repeat_keys: Annotated[Flag, "Whether keys and values of grouped queries are repeated to all heads"] = False
    attention: Annotated[
        Literal["fused", "unfused", "fp32"],
        "Attention: one fused kernel, or GEMMs, mask and softmax over all pairs, these in bf16 (unfused) or, with "
        "casts, in fp32",
    ] = "fused"
    dropout: Annotated[Flag, "Whether attention drops scores at random"] = False
    layout_copies: Annotated[
        Literal["none", "single", "double"],
        "Copies of attention's output, and of latent queries and keys, between orders of heads and tokens: none, "
        "single, or double where autograd copies gradients once more",
    ] = "none"
    router: Annotated[Kernels, "Selection of experts behind the gate: one fused kernel, or one a step"] = "fused"
    router_dtype: Annotated[Literal["bf16", "fp32"], "Format of the gate's GEMM"] = "bf16"
    permute: Annotated[
        Literal["fused", "sort", "mask", "sentinels"],
        "Rows to the order of experts: a fused gather, by a sort of ids, by a mask of tokens by experts, or by a sort "
        "with fills (sentinels) of rows that have no expert",
    ] = "fused"
    gather_backward: Annotated[
        Literal["fused", "index_add", "index_put"],
        "Gradients of gathered rows: a fused sum, index_add, or index_put",
    ] = "fused"
    combine: Annotated[
        Literal["fused", "index_add", "sum"],
        "Sum of a token's results: fused, by index_add, or by a gather and a sum",
    ] = "fused"
    gates: Annotated[
        Literal["inside", "bf16", "fp32"],
        "Gates: inside of the activation, or on results in bf16 or fp32",
    ] = "inside"
    expert_gemms: Annotated[
        Literal["grouped", "each"],
        "GEMMs of routed experts: grouped in one launch, or each by itself",
    ] = "grouped"
    expert_inputs: Annotated[Gemms, "W1 and W3 of routed experts: joined in one GEMM, or separate"] = "joined"
    ffn_inputs: Annotated[Gemms, "W1 and W3 of dense networks and shared experts: joined, or separate"] = "joined"
    activation: Annotated[
        Literal["fused", "compiled", "unfused"],
        "Activation times gate: one fused kernel, one compiled by torch, or two and backward four",
    ] = "fused"
    loss: Annotated[
        Literal["fused", "fp32", "parallel"],
        "Cross entropy: fused, in place of the logits; of fp32 logits by torch; or parallel, step by step in fp32 "
        "over shares of the vocabulary, as Megatron-Core's",
    ] = "fused"
    loss_chunks: Annotated[Chunks, "Parts in which head and loss run, one behind the other"] = 1
    embedding: Annotated[
        Literal["gather", "torch"],
        "Gradient of the embedding: a gather's bytes, or torch's kernel",
    ] = "gather"
    optimizer: Annotated[
        Literal["flat", "fused", "foreach", "loop"],
        "Adam: one kernel over flat tensors, as fast as its bytes pass; torch's fused one; foreach over lists of "
        "tensors, or a loop over them",
    ] = "flat"
    gradient_norm: Annotated[
        Literal["free", "kernel", "foreach", "loop"],
        "What clipping costs on the GPU: free, a kernel over all gradients, foreach, that and a scaling of all, or "
        "loop, the same tensor by tensor with a copy",
    ] = "free"
    weight_copy: Annotated[Flag, "Whether weights are cast from their master copy behind the optimizer"] = False
    accumulation: Annotated[
        Literal["gemm", "buffer", "autograd"],
        "Sum of gradients over micro-batches: in the gemm that makes them, into a buffer in each, or by autograd from "
        "the second on",
    ] = "gemm"
    flat_gradients: Annotated[Flag, "Whether gradients are copied into one buffer to be reduced, and back"] = False
    zeroed_gradients: Annotated[Flag, "Whether the buffer of gradients is filled with zeros before every step"] = False
    fresh_gradients: Annotated[Flag, "Whether gradients are dropped after every step"] = False
    reduce_dtype: Annotated[
        DType | None,
        "Format in which gradients are reduced, by default that they are kept in",
    ] = None
    sequence_parallel: Annotated[Flag, "Whether tensor ranks share the tokens between GEMMs, too"] = True
    host: Annotated[Literal["free", "launches"], "The host: free of cost, or launches, one for each kernel"] = "free"
    counts: Annotated[
        Flag,
        "Whether ranks exchange and read back how many rows they will send, so that nobody sends before the last has "
        "come",
    ] = False
    cuda_graphs: Annotated[
        Literal["none", "attention", "step"],
        "What CUDA graphs hold, launched at no cost: none, attention and all else of fixed shapes in a layer, or the "
        "step",
    ] = "none"

    @property
    def host_is_free(self) -> bool:
        """Whether no step waits for a launch, however slow the host is."""
        return self.host == "free" or self.cuda_graphs == "step"

    @property
    def updates_in_one(self) -> bool:
        """Whether a kernel reads and writes all of a weight and its states at once."""
        return self.optimizer in ("flat", "fused")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The facts of one recipe.

    gemm: the format of workload.precision.gemm that it belongs to; kernels: what kernel models call its GEMMs; peak:
    what a GPU must have a peak of; value_bytes: bytes of an element with its share of the scales.
    fuses: the kernel before a GEMM writes its input scaled; searches: a cast comes behind a pass that finds the
    largest magnitude of the whole operand; turns: the copy kept for the weight's gradient is turned then, else it was
    made with the first one; both_kind: memory-bound kind of the cast both ways. megatron: word of its --fp8-recipe.
    """

    name: str
    gemm: str
    kernels: str
    peak: str
    value_bytes: float
    fuses: bool
    searches: bool
    turns: bool
    both_kind: str
    megatron: str


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="per_tensor", gemm="fp8", kernels="fp8", peak="fp8", value_bytes=1.0, fuses=False, searches=True,
            turns=False, both_kind="scaled_cast_both", megatron="tensorwise",
        ),
        Recipe(
            name="blockwise", gemm="fp8", kernels="fp8_block", peak="fp8", value_bytes=1.0 + 4 / 128, fuses=True,
            searches=False, turns=True, both_kind="fp8_cast_both", megatron="blockwise",
        ),
        Recipe(
            name="mxfp8", gemm="fp8", kernels="mxfp8", peak="mxfp8", value_bytes=1.0 + 1 / 32, fuses=False,
            searches=False, turns=False, both_kind="fp8_cast_both", megatron="mxfp8",
        ),
        Recipe(
            name="nvfp4", gemm="fp4", kernels="nvfp4", peak="fp4", value_bytes=0.5 + 1 / 16, fuses=False, searches=True,
            turns=False, both_kind="fp8_cast_both", megatron="nvfp4",
        ),
    )
})  # fmt: skip
RECIPE_OF_KERNELS = {recipe.kernels: recipe for recipe in RECIPES.values()}
DEFAULT = {"fp8": "blockwise", "fp4": "nvfp4"}  # by the format of the GEMMs


@dataclass(frozen=True, kw_only=True)
class SoftwareFacts:
    """The facts of one software.

    listed: how its list of kernels was obtained; checked: what steps of it were set beside measured ones. Both end up
    in every result, beside the sources of its kernels. switches: the settings that its list is written with. kernels:
    which writer writes it. bound: an ideal that no program reaches.
    By itself, where a scenario says nothing: shared_beside, whether shared experts run beside the dispatch;
    reduces_beside, whether gradients are reduced beside the last backward pass.
    Of what it can do: shards_gradients (ZeRO 2 and 3), shares_layers (tensor, context and expert-tensor
    ranks), other_layers (dense layers anywhere, windows in some layers, networks that are not gated, experts of another
    width), recomputes_parts, overlaps, copies_experts (an expert in more than one slot), deduplicates (a token goes
    once to a rank for several experts), casts_fp8 (GEMMs of FP8 with casts of their own), plain_queries (latent
    attention without compressed queries), query_key_norms (where a model has them), expert_ranks (experts on several
    ranks), buffers_scores (unfused attention has a buffer for scores that stays), stores_narrow_inputs (inputs of
    activations are kept in the format of the GEMMs), and runs_here: whether it is what `moesim validate` runs.
    bf16_optimizer: states in bf16 are updated by a kernel for them, else by that for fp32.
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
    other_layers: bool = True
    recomputes_parts: bool = True
    overlaps: bool = True
    copies_experts: bool = True
    casts_fp8: bool = True
    deduplicates: bool = True
    plain_queries: bool = True
    query_key_norms: bool = True
    expert_ranks: bool = True
    buffers_scores: bool = False
    stores_narrow_inputs: bool = False
    runs_here: bool = False


FUSED = SoftwareFacts(
    name="fused",
    about="kernels of an ideal trainer whose host never limits: a bound",
    listed="drawn up as the kernels of a well-tuned stack whose host never limits: a bound, not any one program",
    checked="54 steps of a trainer written like it, in bf16 and FP8 on one H100 (docs/software.md); its kernels by "
    "themselves (moesim calibrate --report)",
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
        optimizer="fused",
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
    about="Megatron-Core without Transformer Engine: its local layers, unfused attention, one GEMM an expert",
    listed="kernel by kernel from traces of Megatron-Core 0.19.2 on one and two H100",
    checked="28 measured steps on one and two H100, 15 of them in no choice (docs/software.md); not on more ranks",
    switches=replace(
        MEGATRON.switches,
        rotary="remade",
        repeat_keys=True,
        attention="fp32",
        layout_copies="single",
        expert_gemms="each",
        optimizer="foreach",
        gradient_norm="loop",
        accumulation="buffer",
    ),
    casts_fp8=False,
    buffers_scores=True,
)
DEEPSEEK = SoftwareFacts(
    name="deepseek",
    about="the stack that DeepSeek-V3 was trained with, as it is published",
    listed="from the DeepSeek-V3 report (fused casts, overlapped pairs, bf16 moments) and its libraries DeepEP and "
    "DeepGEMM; the trainer itself is not public: what is not told is taken as fused, its host as ahead",
    checked="no measured step of it, nor can there be: its trainer is not public; the exchange beside DeepEP's "
    "published bandwidths, its FP8 GEMMs beside DeepGEMM's",
    switches=Switches(gradient_norm="kernel", weight_copy=True, embedding="torch", counts=True),
    shared_beside=True,
    stores_narrow_inputs=True,
)
TRANSFORMERS = SoftwareFacts(
    name="transformers",
    about="Hugging Face transformers 5, grouped_mm experts, SDPA, one fused AdamW",
    listed="operation by operation from modeling code of transformers 5.17, as recorded on the meta device",
    checked="recorded steps of Qwen3-MoE, Mixtral, OLMoE and DeepSeek-V3 (docs/software.md); on one H100 such "
    "recordings were within 4.3 % of measured steps; not on more ranks",
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
        optimizer="fused",
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
        optimizer="fused",
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
        optimizer="fused",
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
    checked="torch programs of transformers and torchtitan on one and two H100s, at other sizes than the recorded: 62 "
    "steps kept out of every choice, 1.4 % off in the median and all but one within 4.7 %, where the host was not the "
    "bound (docs/imported-steps.md); no step with tensor or context ranks was measured",
    switches=replace(
        TRANSFORMERS.switches, permute="sort", gather_backward="index_put", combine="index_add", gradient_norm="free"
    ),
    kernels="own_program",
    bf16_optimizer=True,
    recomputes_parts=False,
    reduces_beside=True,
    casts_fp8=False,
)
SOFTWARE = {
    facts.name: facts
    for facts in (FUSED, MEGATRON, MEGATRON_LOCAL, DEEPSEEK, TRANSFORMERS, TORCHTITAN, TORCH_EAGER, IMPORTED)
}


SoftwareName = Annotated[str, one_of(SOFTWARE), WithJsonSchema({"enum": list(SOFTWARE), "type": "string"})]


class _Named(Section):
    model_config = ConfigDict(defer_build=True)  # until Implementation, once

    kind: SoftwareName = Field(
        default=FUSED.name,
        description="; ".join(f"{facts.name}: {facts.about}" for facts in SOFTWARE.values()) + ".",
    )
    file: str | None = Field(
        default=None,
        description="Of kind imported: the step that `moesim import-step STEP --out FILE` recorded on one GPU.",
    )


_KEYS: dict[str, Any] = {
    name: (hint | None, Field(default=None, description=f"{hint.__metadata__[-1]}; absent: as the software has it."))
    for name, hint in get_type_hints(Switches, include_extras=True).items()
}


class Implementation(create_model("_Switched", __base__=_Named, **_KEYS)):  # type: ignore[misc]
    """Which software is simulated: one of the table `moesim.scenario.software.SOFTWARE`, and switches set anew.

    A switch that is absent is as the software has it.
    """

    model_config = ConfigDict(defer_build=False)

    @property
    def software(self) -> SoftwareFacts:
        """The facts of the software."""
        return SOFTWARE[self.kind]

    @property
    def overridden(self) -> dict[str, object]:
        """The switches that are not as the software has them."""
        own = self.software.switches
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kind", "file")}
        return {name: value for name, value in given.items() if value is not None and value != getattr(own, name)}

    @property
    def switches(self) -> Switches:
        """The settings of the software, with those of the scenario."""
        return _switches(self, self.software.switches)


@lru_cache(maxsize=64)
def _switches(implementation: Implementation, own: Switches) -> Switches:
    """Asked for by every operation that is written."""
    return replace(own, **implementation.overridden)  # type: ignore[arg-type]
