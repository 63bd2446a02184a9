"""Published architectures whose layers are measured, as keys of transformers' configurations, and the models of them.

Needs torch and transformers, and nothing of moesim.
"""

from typing import Any

import torch

QWEN3 = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}
QWEN3_SMALL = QWEN3 | {"hidden_size": 1024, "num_attention_heads": 16, "num_experts": 64, "vocab_size": 32000}
QWEN3_235 = QWEN3 | {"hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536}
MIXTRAL = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
MIXTRAL_SMALL = MIXTRAL | {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 7168}
OLMOE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
}
DEEPSEEK_V2_LITE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V3_LIKE = {  # blocks of DeepSeek-V3 at a quarter of its hidden size
    "hidden_size": 1792,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 4608,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 32000,
}
GLM_AIR = {
    "hidden_size": 4096,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 151552,
    "use_qk_norm": False,
}
GLM_SMALL = GLM_AIR | {"hidden_size": 2048, "num_attention_heads": 32, "n_routed_experts": 64, "vocab_size": 32000}
GPT_OSS = {"num_local_experts": 32, "vocab_size": 201088}
# Of none of the sizes above, and four families more.
QWEN3_WIDE = QWEN3 | {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "moe_intermediate_size": 1024,
    "num_experts": 96,
    "num_experts_per_tok": 6,
    "vocab_size": 64000,
}
OLMOE_NARROW = OLMOE | {
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 768,
    "num_experts": 96,
    "num_experts_per_tok": 6,
}
DEEPSEEK_V3_OTHER = DEEPSEEK_V3_LIKE | {
    "hidden_size": 2560,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "q_lora_rank": 1024,
    "kv_lora_rank": 384,
    "n_routed_experts": 96,
    "num_experts_per_tok": 6,
}
GLM_WIDE = GLM_AIR | {
    "hidden_size": 3072,
    "num_attention_heads": 48,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 80,
    "num_experts_per_tok": 6,
    "vocab_size": 65536,
}
GPT_OSS_NARROW = GPT_OSS | {
    "hidden_size": 2304,
    "num_attention_heads": 48,
    "intermediate_size": 2304,
    "num_local_experts": 24,
    "vocab_size": 64000,
}
QWEN2 = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 64000,
}
ERNIE = {
    "hidden_size": 2560,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "vocab_size": 103424,
}
DOTS = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": 96000,
}
GRANITE = {
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "num_local_experts": 40,
    "num_experts_per_tok": 8,
    "vocab_size": 49152,
}


def transformers_model(
    family: str,
    sizes: dict[str, Any],
    *,
    layers: int,
    length: int,
    attention: str = "sdpa",
    experts: str = "grouped_mm",
    caches: bool = False,
) -> Any:
    """So many layers of `family`, a configuration class, in bf16 on torch's default device, for `length` tokens."""
    import transformers

    config = getattr(transformers, family)(
        num_hidden_layers=layers,
        **sizes,
        max_position_embeddings=max(4096, length),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=caches,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention, experts_implementation=experts
    )


def dense_model(family: str, sizes: dict[str, Any]) -> Any:
    """The model of a configuration class without experts, in bf16 on torch's default device."""
    import transformers

    config = getattr(transformers, family)(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
