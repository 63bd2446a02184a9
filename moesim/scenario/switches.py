"""What differs from software to software in the kernels of a step, as named switches.

A software is one row of settings (`moesim.scenario.software`); a scenario may set any of them anew, by the same name.
The writers of kernels (`moesim.program`) and of memory (`moesim.parallel`) ask for settings and for no software.
"""

from dataclasses import dataclass
from typing import Literal

from moesim.scenario.base import DType

Norm = Literal["fused", "kernel", "unfused"]
Products = Literal["joined", "separate"]
Rotary = Literal["fused", "cached", "remade", "complex", "unfused"]
Kernels = Literal["fused", "unfused"]
Attention = Literal["fused", "unfused", "fp32"]
Activation = Literal["fused", "compiled", "unfused"]
ExpertProducts = Literal["grouped", "each"]
LayoutCopies = Literal["none", "single", "double"]
RouterDtype = Literal["bf16", "fp32"]
Permute = Literal["fused", "sort", "mask", "sentinels"]
GatherBackward = Literal["fused", "index_add", "index_put"]
Combine = Literal["fused", "index_add", "sum"]
Gates = Literal["inside", "bf16", "fp32"]
Loss = Literal["fused", "fp32", "parallel"]
Embedding = Literal["gather", "torch"]
Optimizer = Literal["fused", "foreach", "loop"]
GradientNorm = Literal["free", "kernel", "foreach", "loop"]
Accumulation = Literal["gemm", "buffer", "autograd"]
Host = Literal["free", "launches"]
Graphs = Literal["none", "attention", "step"]


@dataclass(frozen=True, kw_only=True)
class Switches:
    """One setting of everything.

    norm: fused with the sum of the residual; a kernel of its own beside a sum (and a sum of gradients where a branch
    leaves); unfused, eight elementwise kernels in fp32. qkv, ffn_inputs, expert_inputs: the products that share an
    input in one or each by itself. rotary: one kernel; cached, five kernels over tables of the step; complex, products
    of complex fp32 numbers; remade, as cached, with tables made for each tensor and a copy behind it; unfused, tables
    made in every layer and products of halves. repeat_keys: keys and values of grouped queries are repeated to the
    number of heads. attention: one kernel, or products, mask and softmax over all pairs, these in bf16 or, with casts,
    in fp32; dropout: of its scores. layout_copies: attention's output, and the pieces of latent queries and keys, are
    copied between the orders of heads and of tokens; double: their gradients once more. router: one kernel behind the
    gate, or one for each step of it. router_dtype: of the gate's product. permute: how rows get in the order of
    experts: one gather; a sort of ids; a mask of tokens by experts; a sort and fills of rows that belong to no expert.
    gather_backward: how the gradients of a token's rows are summed. combine: how the results of a token's experts are.
    gates: inside of the activation, or on the results, in bf16 or fp32. expert_products: grouped in one launch, or each
    expert's by itself. activation: one kernel, one that torch compiled, or several. loss: in place of the logits; in
    fp32, by torch; in fp32 step by step over shares of the vocabulary, as Megatron-Core's. loss_chunks: in so many
    parts, head included. embedding: how its gradient is made. optimizer: one kernel, one for each step of Adam's over
    lists of tensors, or over every tensor. gradient_norm: what clipping costs on the GPU: nothing, a pass over all
    gradients, torch's two, or a pass over each tensor and its scaling by a copy. weight_copy: weights are cast from
    their master copy behind the optimizer. accumulation: gradients are added by the product itself; by a kernel to a
    buffer, in every micro-batch; by autograd, from the second one on. flat_gradients: gradients are copied into one
    buffer to be reduced, and back. zeroed_gradients: their buffer is filled with zeros before every step.
    fresh_gradients: they are dropped after it. reduce_dtype: format in which gradients are reduced; None: as they are
    kept. sequence_parallel: tensor ranks share the tokens between products, too. host: free of cost, or a launch for
    each kernel. counts: ranks exchange and read back how many rows they will send, so that nobody sends before the last
    has come. cuda_graphs: launched at no cost: nothing, all but the experts and what moves rows, the whole step.
    """

    norm: Norm = "fused"
    qkv: Products = "joined"
    rotary: Rotary = "fused"
    repeat_keys: bool = False
    attention: Attention = "fused"
    dropout: bool = False
    layout_copies: LayoutCopies = "none"
    router: Kernels = "fused"
    router_dtype: RouterDtype = "bf16"
    permute: Permute = "fused"
    gather_backward: GatherBackward = "fused"
    combine: Combine = "fused"
    gates: Gates = "inside"
    expert_products: ExpertProducts = "grouped"
    expert_inputs: Products = "joined"
    ffn_inputs: Products = "joined"
    activation: Activation = "fused"
    loss: Loss = "fused"
    loss_chunks: int = 1
    embedding: Embedding = "gather"
    optimizer: Optimizer = "fused"
    gradient_norm: GradientNorm = "free"
    weight_copy: bool = False
    accumulation: Accumulation = "gemm"
    flat_gradients: bool = False
    zeroed_gradients: bool = False
    fresh_gradients: bool = False
    reduce_dtype: DType | None = None
    sequence_parallel: bool = True
    host: Host = "free"
    counts: bool = False
    cuda_graphs: Graphs = "none"
