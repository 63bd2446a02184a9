"""The flags of Megatron-LM that become part of a scenario: ONE table, an entry each. Names as of megatron-core 0.19.

Readers and writer ask the table how a flag's words are read; what a flag means together with others is theirs to say.
`unread_flags` has all other flags, with what becomes of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["bare", "count", "number", "word", "words", "pattern"]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The facts of one flag.

    kind: a bare flag has no words behind it, a pattern is a number or a list of them as an expression, words are one or
    more. key: what it becomes in a scenario. choices: the words that Megatron-LM takes.
    """

    name: str
    kind: Kind
    key: str
    choices: tuple[str, ...] = ()


# Modules of --recompute-modules, and their words in workload.recompute.
RECOMPUTED: Mapping[str, str] = MappingProxyType(
    {
        "layernorm": "rms_norm",
        "moe_act": "swiglu",
        "mla_up_proj": "mla_up_projection",
        "core_attn": "core_attention",
        "mlp": "dense_ffn",
        "shared_experts": "shared_experts",
        "moe": "moe",
    }
)
_FORMATS = ("fp32", "bf16", "fp16", "fp8")

_MODEL = {
    "--num-layers": ("count", "model.layers"),
    "--hidden-size": ("count", "model.hidden"),
    "--num-attention-heads": ("count", "model.heads"),
    "--group-query-attention": ("bare", "model.attention"),
    "--num-query-groups": ("count", "model.kv_heads"),
    "--kv-channels": ("count", "model.head_dim"),
    "--multi-latent-attention": ("bare", "model.attention"),
    "--q-lora-rank": ("count", "model.attention.q_lora_rank"),
    "--kv-lora-rank": ("count", "model.attention.kv_lora_rank"),
    "--qk-head-dim": ("count", "model.head_dim"),
    "--qk-pos-emb-head-dim": ("count", "model.attention.rope_head_dim"),
    "--v-head-dim": ("count", "model.attention.value_head_dim"),
    "--dsa-indexer-n-heads": ("count", "model.attention.indexer.heads"),
    "--dsa-indexer-head-dim": ("count", "model.attention.indexer.head_dim"),
    "--dsa-indexer-topk": ("count", "model.attention.indexer.top_k"),
    "--window-size": ("word", "model.local.window"),
    "--window-attn-skip-freq": ("pattern", "model.local.layers"),
    "--softmax-type": ("word", "model.attention_sinks"),
    "--qk-layernorm": ("bare", "model.query_key_norms"),
    "--add-qkv-bias": ("bare", "model.attention_bias"),
    "--disable-bias-linear": ("bare", "model.attention_bias, model.expert_bias"),
    "--ffn-hidden-size": ("count", "model.dense_intermediate"),
    "--swiglu": ("bare", "model.gated"),
    "--quick-geglu": ("bare", "model.gated"),
    "--untie-embeddings-and-output-weights": ("bare", "model.tied_embeddings"),
    "--vocab-size": ("count", "model.vocab"),
    "--padded-vocab-size": ("count", "model.vocab"),
    "--make-vocab-size-divisible-by": ("count", "model.vocab"),
    "--no-pad-vocab-size": ("bare", "model.vocab"),
    "--mtp-num-layers": ("count", "model.mtp_layers"),
    "--num-experts": ("count", "model.experts"),
    "--moe-layer-freq": ("pattern", "model.dense_layers, model.dense_at"),
    "--moe-ffn-hidden-size": ("count", "model.expert_intermediate"),
    "--moe-router-topk": ("count", "model.top_k"),
    "--moe-shared-expert-intermediate-size": ("count", "model.shared_experts"),
    "--moe-shared-expert-gate": ("bare", "model.shared_gate"),
    "--moe-latent-size": ("count", "model.expert_hidden"),
    "--moe-router-topk-scaling-factor": ("number", "model.routed_scaling_factor"),
    "--moe-router-num-groups": ("count", "model.router_groups"),
    "--moe-router-group-topk": ("count", "model.router_group_limit"),
}
_ROUTING = {
    "--moe-router-score-function": ("word", "routing.router.kind"),
    "--moe-router-pre-softmax": ("bare", "routing.router.kind"),
    "--moe-router-load-balancing-type": ("words", "routing.balance"),
    "--moe-aux-loss-coeff": ("words", "routing.balance"),
    "--moe-router-enable-expert-bias": ("bare", "routing.balance.loss_free"),
    "--moe-router-bias-update-rate": ("number", "routing.balance.loss_free.gamma"),
    "--moe-router-force-load-balancing": ("bare", "routing.kind"),
    "--moe-expert-capacity-factor": ("number", "capacity.factor"),
    "--moe-token-drop-policy": ("word", "capacity.by"),
    "--moe-pad-expert-input-to-capacity": ("bare", "capacity.pad"),
}
_LAYOUT = {
    "--tensor-model-parallel-size": ("count", "parallelism.tensor"),
    "--pipeline-model-parallel-size": ("count", "parallelism.pipeline"),
    "--context-parallel-size": ("count", "parallelism.context"),
    "--expert-model-parallel-size": ("count", "parallelism.expert"),
    "--expert-tensor-parallel-size": ("count", "parallelism.expert_tensor"),
    "--sequence-parallel": ("bare", "implementation.sequence_parallel"),
    "--num-layers-per-virtual-pipeline-stage": ("count", "parallelism.schedule"),
    "--num-virtual-stages-per-pipeline-rank": ("count", "parallelism.schedule"),
    "--pipeline-model-parallel-layout": ("word", "parallelism.stages"),
    "--decoder-first-pipeline-num-layers": ("count", "parallelism.stages"),
    "--decoder-last-pipeline-num-layers": ("count", "parallelism.stages"),
    "--account-for-embedding-in-pipeline-split": ("bare", "parallelism.stages"),
    "--account-for-loss-in-pipeline-split": ("bare", "parallelism.stages"),
    "--use-distributed-optimizer": ("bare", "parallelism.zero"),
    "--use-megatron-fsdp": ("bare", "parallelism.zero"),
    "--use-custom-fsdp": ("bare", "parallelism.zero"),  # its name before
    "--use-torch-fsdp2": ("bare", "parallelism.zero"),
    "--data-parallel-sharding-strategy": ("word", "parallelism.zero"),
    "--moe-token-dispatcher-type": ("word", "dispatch.algorithm"),
    "--moe-enable-deepep": ("bare", "dispatch.algorithm"),
    "--moe-flex-dispatcher-backend": ("word", "dispatch.algorithm"),
    "--moe-flex-dispatcher-num-sms": ("count", "dispatch.sm_share"),
    "--moe-deepep-num-sms": ("count", "dispatch.sm_share"),
    "--moe-hybridep-num-sms": ("count", "dispatch.sm_share"),
    "--moe-shared-expert-overlap": ("bare", "overlap.shared_experts"),
    "--overlap-grad-reduce": ("bare", "overlap.gradient_reduction"),
    "--overlap-param-gather": ("bare", "overlap.parameter_gather"),
    "--overlap-moe-expert-parallel-comm": ("bare", "parallelism.schedule"),
    "--delay-wgrad-compute": ("bare", "overlap.weight_gradients"),
    "--overlap-dispatch-backward-with-experts-wgrad": ("bare", "overlap.weight_gradients"),
}
_TRAINING = {
    "--seq-length": ("count", "workload.sequence_length"),
    "--encoder-seq-length": ("count", "workload.sequence_length"),
    "--micro-batch-size": ("count", "workload.micro_batch"),
    "--global-batch-size": ("count", "workload.global_batch"),
    "--train-iters": ("count", "workload.train_tokens"),
    "--train-samples": ("count", "workload.train_tokens"),
    "--clip-grad": ("number", "workload.gradient_clipping"),
    "--recompute-activations": ("bare", "workload.recompute"),
    "--recompute-granularity": ("word", "workload.recompute"),
    "--recompute-method": ("word", "workload.recompute"),
    "--recompute-num-layers": ("count", "workload.recompute"),
    "--recompute-modules": ("words", "workload.recompute"),
    "--moe-layer-recompute": ("bare", "workload.recompute"),
    "--bf16": ("bare", "workload.precision"),
    "--fp16": ("bare", "workload.precision"),
    "--fp8-format": ("word", "workload.precision.gemm"),
    "--fp8-recipe": ("word", "workload.precision.recipe"),
    "--fp4-format": ("word", "workload.precision.gemm"),
    "--fp8-param-gather": ("bare", "workload.precision.weights"),
    "--grad-reduce-in-bf16": ("bare", "workload.precision.gradients"),
    "--accumulate-allreduce-grads-in-fp32": ("bare", "workload.precision.gradients"),
    "--use-precision-aware-optimizer": ("bare", "workload.precision.optimizer"),
    "--main-grads-dtype": ("word", "workload.precision.gradients"),
    "--main-params-dtype": ("word", "workload.precision.master"),
    "--exp-avg-dtype": ("word", "workload.precision.optimizer"),
    "--exp-avg-sq-dtype": ("word", "workload.precision.optimizer"),
}
_KERNELS = {
    "--moe-permute-fusion": ("bare", "implementation.permute"),
    "--moe-router-fusion": ("bare", "implementation.router"),
    "--moe-grouped-gemm": ("bare", "implementation.expert_gemms"),
    "--cross-entropy-loss-fusion": ("bare", "implementation.loss"),
    "--fused-residual-rmsnorm": ("bare", "implementation.norm"),
    "--no-gradient-accumulation-fusion": ("bare", "implementation.accumulation"),
    "--no-rope-fusion": ("bare", "implementation.rotary"),
    "--no-bias-swiglu-fusion": ("bare", "implementation.activation"),
    "--no-bias-gelu-fusion": ("bare", "implementation.activation"),
    "--enable-cuda-graph": ("bare", "implementation.cuda_graphs"),
    "--external-cuda-graph": ("bare", "implementation.cuda_graphs"),
    "--attention-backend": ("word", "implementation.attention"),
    "--transformer-impl": ("word", "implementation.kind"),
    "--attention-dropout": ("number", "implementation.dropout"),
    "--moe-router-dtype": ("word", "implementation.router_dtype"),
}
_LAUNCHER = {
    "--nproc-per-node": ("word", "cluster.gpus_per_node"),
    "--nnodes": ("word", "cluster.nodes"),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "--moe-router-score-function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "--moe-token-dispatcher-type": ("allgather", "alltoall", "flex", "alltoall_seq"),
    "--moe-flex-dispatcher-backend": ("deepep", "hybridep", "ncclep"),
    "--moe-token-drop-policy": ("probs", "position"),
    "--transformer-impl": ("local", "transformer_engine", "inference_optimized"),
    "--attention-backend": ("flash", "fused", "unfused", "local", "auto"),
    "--softmax-type": ("vanilla", "off-by-one", "learnable"),
    "--data-parallel-sharding-strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "--recompute-granularity": ("full", "selective"),
    "--recompute-method": ("uniform", "block"),
    "--fp8-format": ("e4m3", "hybrid"),
    "--fp4-format": ("e2m1",),
    "--main-grads-dtype": _FORMATS,
    "--main-params-dtype": _FORMATS,
    "--exp-avg-dtype": _FORMATS,
    "--exp-avg-sq-dtype": _FORMATS,
}

READ: Mapping[str, Flag] = MappingProxyType(
    {
        name: Flag(name=name, kind=kind, key=key, choices=_CHOICES.get(name, ()))  # type: ignore[arg-type]
        for part in (_MODEL, _ROUTING, _LAYOUT, _TRAINING, _KERNELS, _LAUNCHER)
        for name, (kind, key) in part.items()
    }
)
LAUNCHER = tuple(_LAUNCHER)
