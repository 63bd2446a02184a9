"""The `implementation` section: which software is simulated, and what of it is set otherwise."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field, WithJsonSchema

from moesim.scenario import software as of
from moesim.scenario.base import DType, Flag, Section, one_of
from moesim.scenario.software import FUSED, SOFTWARE, SoftwareFacts

SoftwareName = Annotated[str, one_of(SOFTWARE), WithJsonSchema({"enum": list(SOFTWARE), "type": "string"})]
Chunks = Annotated[int, Field(strict=True, gt=0, le=1_024)]
_OWN = "absent: as the software has it."


class Implementation(Section):
    """Which software is simulated: one of the table `moesim.scenario.software.SOFTWARE`, and switches set anew.

    A switch that is absent is as the software has it; `moesim.scenario.software` says what each setting stands for.
    """

    kind: SoftwareName = Field(
        default=FUSED.name,
        description="; ".join(f"{facts.name}: {facts.about}" for facts in SOFTWARE.values()) + ".",
    )
    file: str | None = Field(
        default=None,
        description="Of kind imported: the step that `moesim import-step STEP --out FILE` recorded on one GPU.",
    )
    norm: of.Norm | None = Field(
        default=None,
        description="Norms: fused with the residual sum, a kernel beside a sum, or unfused in eight; " + _OWN,
    )
    qkv: of.Products | None = Field(
        default=None, description="Products of queries, keys and values: joined in one, or separate; " + _OWN
    )
    rotary: of.Rotary | None = Field(
        default=None,
        description="Rotary embedding: fused, by cached tables, by tables remade for each tensor, by complex numbers, "
        "or unfused with tables made in every layer; " + _OWN,
    )
    repeat_keys: Flag | None = Field(
        default=None, description="Whether keys and values of grouped queries are repeated to all heads; " + _OWN
    )
    attention: of.Attention | None = Field(
        default=None,
        description="Attention: one fused kernel, or products and softmax over all pairs, this in bf16 (unfused) or "
        "fp32; " + _OWN,
    )
    dropout: Flag | None = Field(default=None, description="Whether attention drops scores at random; " + _OWN)
    layout_copies: of.LayoutCopies | None = Field(
        default=None,
        description="Copies of attention's output, and of latent queries and keys, between orders of heads and tokens: "
        "none, single, or double where autograd copies gradients once more; " + _OWN,
    )
    router: of.Kernels | None = Field(
        default=None, description="Selection of experts behind the gate: one fused kernel, or one a step; " + _OWN
    )
    router_dtype: of.RouterDtype | None = Field(default=None, description="Format of the gate's product; " + _OWN)
    permute: of.Permute | None = Field(
        default=None,
        description="Rows to the order of experts: a fused gather, by a sort of ids, by a mask of tokens by experts, "
        "or by a sort with fills of rows that have no expert; " + _OWN,
    )
    gather_backward: of.GatherBackward | None = Field(
        default=None, description="Gradients of gathered rows: a fused sum, index_add, or index_put; " + _OWN
    )
    combine: of.Combine | None = Field(
        default=None,
        description="Sum of a token's results: fused, by index_add, or by a gather and a sum; " + _OWN,
    )
    gates: of.Gates | None = Field(
        default=None, description="Gates: inside of the activation, or on results in bf16 or fp32; " + _OWN
    )
    expert_products: of.ExpertProducts | None = Field(
        default=None, description="Products of routed experts: grouped in one launch, or each by itself; " + _OWN
    )
    expert_inputs: of.Products | None = Field(
        default=None, description="W1 and W3 of routed experts: joined in one product, or separate; " + _OWN
    )
    ffn_inputs: of.Products | None = Field(
        default=None, description="W1 and W3 of dense networks and shared experts: joined, or separate; " + _OWN
    )
    activation: of.Activation | None = Field(
        default=None,
        description="Activation times gate: one fused kernel, one compiled by torch, or two and backward four; " + _OWN,
    )
    loss: of.Loss | None = Field(
        default=None,
        description="Cross entropy: fused, in place of the logits; of fp32 logits by torch; or parallel, step by step "
        "in fp32 over shares of the vocabulary; " + _OWN,
    )
    loss_chunks: Chunks | None = Field(
        default=None, description="Parts in which head and loss run, one behind the other; " + _OWN
    )
    embedding: of.Embedding | None = Field(
        default=None, description="Gradient of the embedding: a gather's bytes, or torch's kernel; " + _OWN
    )
    optimizer: of.Optimizer | None = Field(
        default=None, description="Adam: one fused kernel, foreach over lists of tensors, or a loop over them; " + _OWN
    )
    gradient_norm: of.GradientNorm | None = Field(
        default=None,
        description="What clipping costs on the GPU: free, a kernel over all gradients, foreach, that and a scaling of "
        "all, or loop, the same tensor by tensor with a copy; " + _OWN,
    )
    weight_copy: Flag | None = Field(
        default=None, description="Whether weights are cast from their master copy behind the optimizer; " + _OWN
    )
    accumulation: of.Accumulation | None = Field(
        default=None,
        description="Sum of gradients over micro-batches: in the gemm that makes them, into a buffer in each, or by "
        "autograd from the second on; " + _OWN,
    )
    flat_gradients: Flag | None = Field(
        default=None, description="Whether gradients are copied into one buffer to be reduced, and back; " + _OWN
    )
    zeroed_gradients: Flag | None = Field(
        default=None, description="Whether the buffer of gradients is filled with zeros before every step; " + _OWN
    )
    fresh_gradients: Flag | None = Field(
        default=None, description="Whether gradients are dropped after every step; " + _OWN
    )
    reduce_dtype: DType | None = Field(
        default=None,
        description="Format in which gradients are reduced; absent: the software's, or that they are kept in.",
    )
    sequence_parallel: Flag | None = Field(
        default=None, description="Whether tensor ranks share the tokens between products, too; " + _OWN
    )
    host: of.Host | None = Field(
        default=None, description="The host: free of cost, or launches, one for each kernel; " + _OWN
    )
    counts: Flag | None = Field(
        default=None, description="Whether ranks exchange and read back how many rows they will send; " + _OWN
    )
    cuda_graphs: of.Graphs | None = Field(
        default=None,
        description="What CUDA graphs hold: none, attention and all else of fixed shapes in a layer, or the step; "
        + _OWN,
    )

    @property
    def software(self) -> SoftwareFacts:
        """The facts of the software."""
        return SOFTWARE[self.kind]

    @property
    def set_anew(self) -> dict[str, object]:
        """The switches that are not as the software has them."""
        own = self.software.switches
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kind", "file")}
        return {name: value for name, value in given.items() if value is not None and value != getattr(own, name)}

    @property
    def switches(self) -> of.Switches:
        """The settings of the software, with those of the scenario."""
        return replace(self.software.switches, **self.set_anew)  # type: ignore[arg-type]


AnyImplementation = Implementation  # what the key takes; forms of another kind join here as a union
