"""Names that YAML files use for Megatron-LM's flags: fields of Megatron-Core and of Megatron-Bridge that differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """A key under another name. flag: its flag, None where it says nothing. when: the truth value that sets a switch.

    words: flags with their words for each value of a key that stands for several; other values say nothing.
    """

    flag: str | None = None
    when: bool = True
    words: Mapping[str, tuple[tuple[str, ...], ...]] | None = None


_NOTHING = Meaning()
_RECIPES = {"delayed_scaling": "delayed", "current_scaling": "tensorwise", "subchannel_scaling": "blockwise"}
_MIXED = {
    "bf16_mixed": (("--bf16",),),
    "bf16-mixed": (("--bf16",),),
    "fp16_mixed": (("--fp16",),),
    "fp16-mixed": (("--fp16",),),
    "bf16_with_mxfp8_mixed": (("--bf16",), ("--fp8-format", "e4m3"), ("--fp8-recipe", "mxfp8")),
    "bf16_with_nvfp4_mixed": (("--bf16",), ("--fp4-format", "e2m1")),
} | {
    f"bf16_with_fp8_{name}_mixed": (("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", recipe))
    for name, recipe in _RECIPES.items()
}

OTHER_NAMES: Mapping[str, Meaning] = MappingProxyType(
    {
        "num_moe_experts": Meaning(flag="--num-experts"),
        "gated_linear_unit": Meaning(flag="--swiglu"),
        "add_bias_linear": Meaning(flag="--disable-bias-linear", when=False),
        "share_embeddings_and_output_weights": Meaning(flag="--untie-embeddings-and-output-weights", when=False),
        "should_pad_vocab": Meaning(flag="--no-pad-vocab-size", when=False),
        "num_layers_in_first_pipeline_stage": Meaning(flag="--decoder-first-pipeline-num-layers"),
        "num_layers_in_last_pipeline_stage": Meaning(flag="--decoder-last-pipeline-num-layers"),
        "virtual_pipeline_model_parallel_size": Meaning(flag="--num-virtual-stages-per-pipeline-rank"),
        "sequence_length": Meaning(flag="--seq-length"),
        "fp8": Meaning(flag="--fp8-format"),
        "fp8_param": Meaning(flag="--fp8-param-gather"),
        "fp4": Meaning(flag="--fp4-format"),
        "grad_reduce_in_fp32": Meaning(flag="--grad-reduce-in-bf16", when=False),
        "layernorm_epsilon": Meaning(flag="--norm-epsilon"),
        "mixed_precision": Meaning(flag="--bf16", words=MappingProxyType(_MIXED)),
        "params_dtype": _NOTHING,
        "pipeline_dtype": _NOTHING,
        "autocast_dtype": _NOTHING,
        "activation_func": _NOTHING,
    }
)
# Sections and keys without flags that matter: upper and lower case are alike.
NO_FLAGS = frozenset(
    {
        "env_vars", "checkpoint", "logger", "scheduler", "rng", "profiling", "tokenizer", "dist", "ft", "straggler",
        "nvrx_straggler", "tensor_inspect", "inprocess_restart", "rerun_state_machine", "validation", "test_type",
        "before_script", "after_script", "metrics", "mode", "optimizer_config_override_provider", "data_path",
        "blend", "blend_per_split", "generation_config", "hf_model_id", "rope_scaling", "transformer_layer_spec",
        "perform_initialization", "init_method", "output_layer_init_method", "tp_comm_overlap_cfg",
        # fields of configurations that are no flags, and change numbers, kernels or the processes' bookkeeping
        "timers", "enable_autocast", "autocast_enabled", "use_te_rng_tracker", "variable_seq_lengths",
        "overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs",
        "overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage", "barrier_with_l1_time",
        "softmax_scale", "layernorm_zero_centered_gamma", "activation_func_fp8_input_store",
        "embedding_init_method", "bias_activation_fusion", "memory_efficient_layer_norm", "apply_rope_fusion",
        "fused_single_qkv_rope", "tp_only_amax_red", "moe_token_dropping", "disable_parameter_transpose_cache",
        "use_mamba_mem_eff_path", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "check_for_nan_in_grad", "bucket_size", "num_buckets", "pad_buckets_for_high_nccl_busbw",
        "reduce_scatter_with_fp32_accumulation", "param_name_patterns_for_fp32_local_accumulation",
        "average_in_collective", "nccl_ub", "fsdp_all_gather_in_start_param_sync", "store_param_remainders",
        "decoupled_weight_decay", "soap_shampoo_beta", "soap_precondition_frequency", "soap_use_kl_shampoo",
        "adaptive_muon_moment2_method", "adaptive_muon_beta2", "adaptive_muon_eps", "grad_norm_skip_threshold",
        "check_optimizer_step_success", "skip_sync_grad_norm_across_mp", "parallel_output",
        "seq_len_interpolation_factor", "scatter_embedding_sequence_parallel", "model_type", "wrap_with_ddp",
        "use_transformer_engine_full_layer_spec", "hf_model_revision", "cpu_offloading_activations",
        "gtp_weight_remat_size", "expert_gtp_weight_remat_size", "data_parallel_size",
    }
)  # fmt: skip
