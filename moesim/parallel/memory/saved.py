"""What the forward pass keeps for the backward pass, tensor by tensor.

Sizes are bytes per token, per computed row (token and expert), or per copy of a token that a rank sends. Tokens are
those of one rank: tensor parallelism with sequence parallelism and context parallelism divide the tokens, and either
form keeps a rank's share of every tensor (arXiv 2205.05198), so no width below is divided by the tensor ranks.

Between kernels lies bf16 (2 bytes). Inputs of GEMMs are kept in the GEMM's format with its scales (blockwise
fp8: 1 byte and 4 per 128 values, as DeepSeek-V3 caches them), but the router's input and the attention's output in
bf16; inputs of SwiGLU in bf16, as its kernel reads them, but where a software stores them as narrow (DeepSeek-V3's,
arXiv 2412.19437 section 3.3.3). What else is kept follows from the switches of the
software (`moesim.scenario.software`), as autograd keeps it: an unfused norm its input in fp32 and its result before the
weight; an unfused activation silu's output beside its inputs; repeated keys and values; attention's output in two
orders where it is copied, and the scores of an unfused one; logits in fp32, of one chunk; gates inside of an expert no
result of it, gates on results these.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from moesim.scenario import Model, Scenario
from moesim.scenario.model import Mla
from moesim.scenario.software import Switches

FP32, INT64 = 4.0, 8.0  # bytes

Part = Literal["attention", "router", "permuted_rows", "experts", "shared_experts", "dense_ffn", "embedding_head"]
Unit = Literal["token", "row", "copy"]


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor kept for the backward pass; `again`: the words of workload.recompute that stop it from being kept."""

    part: Part
    bytes: float
    unit: Unit = "token"
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedTensors:
    """The tensors kept by each kind of layer and by the two ends of the model.

    `kept` drops what the scenario computes again; `repeated` is the rest, which exists for one layer at a time.
    """

    scenario: Scenario
    activation_bytes: float = 2.0  # per element between kernels

    @cached_property
    def _switches(self) -> Switches:
        return self.scenario.implementation.switches

    @property
    def _whole(self) -> int:
        """How often tensor ranks keep what lies between GEMMs: each its share, or everything."""
        return 1 if self._switches.sequence_parallel else self.scenario.parallelism.tensor

    @property
    def _gemm_input(self) -> float:
        """Bytes per element of a GEMM's input."""
        recipe = self.scenario.workload.precision.scaling
        keeps = recipe is not None and self.scenario.implementation.software.casts_fp8
        return recipe.value_bytes if recipe and keeps else self.activation_bytes

    def kept(self, *, moe: bool) -> list[Saved]:
        """What one layer keeps under the scenario's recomputation."""
        everything = self.layer(moe=moe)
        if self.scenario.workload.recompute == "full":
            return [Saved("attention", self.scenario.model.hidden * self.activation_bytes)]
        return [saved for saved in everything if not self._words.intersection(saved.again)]

    def repeated(self, *, moe: bool) -> list[Saved]:
        """What one layer's backward pass first computes again."""
        everything = self.layer(moe=moe)
        if self.scenario.workload.recompute == "full":
            return everything
        return [saved for saved in everything if self._words.intersection(saved.again)]

    @property
    def _words(self) -> frozenset[str]:
        return self.scenario.workload.recomputed_parts

    def layer(self, *, moe: bool) -> list[Saved]:
        """All that one layer keeps without recomputation."""
        model = self.scenario.model
        ffn = self._routed() if moe else self._gated("dense_ffn", model.dense_intermediate, again=("dense_ffn",))
        norm = self._norm("router" if moe else "dense_ffn", model.hidden, full=moe)
        return [*self._attention(), *norm, *ffn]

    def head(self) -> list[Saved]:
        """Final norm, and the logits: in place in bf16 when fused, else float32 log-probabilities; of one chunk."""
        vocab = self.scenario.model.vocab
        logits = (self.activation_bytes if self._switches.loss == "fused" else FP32) / self._switches.loss_chunks
        return [
            *self._norm("embedding_head", self.scenario.model.hidden, full=True),
            Saved("embedding_head", vocab * logits),
        ]

    def embedding(self) -> list[Saved]:
        """Token ids."""
        return [Saved("embedding_head", INT64)]

    def prediction_join(self) -> list[Saved]:
        """A layer of multi-token prediction joins two normed inputs: both, and the input of their GEMM."""
        h = self.scenario.model.hidden
        return [Saved("embedding_head", 2 * h * (self.activation_bytes + self._gemm_input))]

    def _norm(self, part: Part, width: int, *, full: bool = False) -> Iterator[Saved]:
        """Input and root mean square of a norm, and its output, which feeds a GEMM (`full`: also unquantised)."""
        each = self.activation_bytes + (FP32 if self._switches.norm == "unfused" else 0.0)
        kept = self.activation_bytes if full else self._gemm_input
        yield Saved(part, self._whole * (width * each + FP32))
        yield Saved(part, self._whole * (width * kept), again=("rms_norm",))

    def _attention(self) -> Iterator[Saved]:
        model, a = self.scenario.model, self.activation_bytes
        yield from self._norm("attention", model.hidden)
        value = (
            (model.attention.value_head_dim or model.head_dim) if isinstance(model.attention, Mla) else model.head_dim
        )
        if isinstance(model.attention, Mla):
            yield from self._latent(model, model.attention, value)
        else:
            yield Saved("attention", self._heads * model.head_dim * a)
            has_norms = model.query_key_norms and self.scenario.implementation.software.query_key_norms
            if has_norms and self._switches.norm != "fused":  # what they norm
                each = a + (FP32 if self._switches.norm == "unfused" else 0.0)
                yield Saved("attention", (model.heads + model.kv_heads) * (model.head_dim * each + FP32))
        yield Saved("attention", model.heads * self.per_query, again=("core_attention",))
        # An unfused one keeps no result of its own: only the copy that the output projection reads.
        copied = self._switches.layout_copies != "none" and self._switches.attention == "fused"
        yield Saved("attention", model.heads * value * a * (2 if copied else 1))

    @property
    def _heads(self) -> float:
        """Heads whose queries, keys or values are kept.

        Values that are a view of a joined GEMM keep all of it alive beside the queries and keys turned out of place.
        """
        model, switches = self.scenario.model, self._switches
        repeats = switches.repeat_keys and model.kv_heads < model.heads
        kv_heads = model.heads if switches.repeat_keys else model.kv_heads
        is_view = switches.qkv == "joined" and switches.rotary != "fused" and not repeats
        return model.heads + 2 * kv_heads + (model.heads + model.kv_heads) * is_view

    @property
    def per_query(self) -> float:
        """Bytes of a head for one query: a log-sum-exp, or its scores, and where some are dropped those and a mask."""
        if self._switches.attention == "fused":
            return FP32
        keys = self.scenario.workload.sequence_length
        if self._switches.attention == "fp32":  # the softmax and its copy in bf16
            return keys * (FP32 + self.activation_bytes + self._switches.dropout)
        return keys * (self.activation_bytes + self._switches.dropout * (self.activation_bytes + 1.0))

    def _latent(self, model: Model, mla: Mla, value: int) -> Iterator[Saved]:
        a, query = self.activation_bytes, model.heads * (model.head_dim + mla.rope_head_dim)
        if mla.q_lora_rank is not None:
            yield from self._norm("attention", mla.q_lora_rank)
        yield Saved("attention", query * a, again=("mla_up_projection",) if mla.q_lora_rank is not None else ())
        yield from self._norm("attention", mla.kv_lora_rank)
        yield Saved("attention", mla.rope_head_dim * a)
        unsplit = (
            model.heads * model.head_dim * a * (self._switches.layout_copies != "none")
        )  # values are a view of keys and values
        yield Saved("attention", query * a + model.heads * value * a + unsplit, again=("mla_up_projection",))

    def _gated(self, part: Part, width: float, unit: Unit = "token", *, again: tuple[str, ...] = ()) -> Iterator[Saved]:
        """W1 x and W3 x, and silu(W1 x) * W3 x, the input of W2; eager keeps silu(W1 x) too."""
        stores_narrow = self.scenario.implementation.software.stores_narrow_inputs
        each = self._gemm_input if stores_narrow else self.activation_bytes
        inputs = (self.scenario.model.ffn_matrices - 1) * each
        unfused = self._switches.activation == "unfused"
        kept = (2 * self.scenario.model.ffn_matrices - 3) * self.activation_bytes if unfused else inputs
        yield Saved(part, width * kept, unit, again)
        yield Saved(part, width * self._gemm_input, unit, (*again, "swiglu"))

    @property
    def _per_expert(self) -> float:
        """Bytes of a token for each expert: affinities in fp32, or gates in bf16, a mask and its sorted places."""
        return FP32 if self._switches.permute != "mask" else self.activation_bytes + 1.0 + INT64

    def _routed(self) -> Iterator[Saved]:
        """What lies behind the norm of a layer with experts, which recomputation may take as a whole."""
        return (replace(saved, again=(*saved.again, "moe")) for saved in self._moe())

    def _moe(self) -> Iterator[Saved]:
        model, mesh = self.scenario.model, self.scenario.parallelism
        yield Saved("router", model.experts * self._per_expert)
        if self._switches.router_dtype == "fp32":  # what the gate's GEMM reads
            yield Saved("router", model.hidden * FP32)
        yield Saved("router", model.top_k * (INT64 + FP32 * (self._switches.gates == "inside")))  # ids, and gates
        if model.shared_experts:
            yield from self._gated("shared_experts", model.shared_width, again=("shared_experts",))
        if model.expert_hidden:  # inputs of the projections down and back
            yield Saved("router", (model.hidden + model.row_width) * self._gemm_input)
        yield Saved("permuted_rows", model.row_width * self._gemm_input, "row")
        yield from self._gated("experts", model.expert_intermediate / mesh.expert_tensor, "row")
        if self._switches.gates == "inside":
            if self._switches.activation == "unfused":  # what the gates multiply
                yield Saved("experts", model.expert_intermediate / mesh.expert_tensor * self.activation_bytes, "row")
            yield Saved("permuted_rows", INT64 + FP32, "row")  # where it came from, and its gate
            return
        if mesh.expert > 1:
            yield Saved("permuted_rows", 2 * INT64, "row")  # the order of arrived rows, and its inverse
        # A rank's own rows: results without their gates, in the format of these, and with them where they are added in
        # bf16; the gates, and two indices.
        if self._switches.gates == "bf16":
            results = (1 + (self._switches.combine == "index_add")) * model.hidden + 1
            yield Saved("permuted_rows", results * self.activation_bytes + 2 * INT64, "copy")
        else:
            each = FP32 if self._switches.combine == "index_add" else self.activation_bytes
            yield Saved("permuted_rows", model.hidden * each + FP32 + 2 * INT64, "copy")
