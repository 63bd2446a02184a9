"""The flags of Megatron-LM for a scenario's model, router and capacity."""

from moesim.flags.commands import Draft, runs
from moesim.flags.read_model import VOCAB_UNIT
from moesim.scenario import (
    DeviceCapacity,
    ExpertCapacity,
    LocalGlobal,
    LossFree,
    Mla,
    Scenario,
    TrainRouting,
)
from moesim.scenario.routers import ROUTERS


def write_model(draft: Draft, scenario: Scenario) -> None:
    """Add the flags of the architecture."""
    model, tensor = scenario.model, scenario.parallelism.tensor
    draft.say_all(
        {
            "--num-layers": model.layers,
            "--hidden-size": model.hidden,
            "--ffn-hidden-size": model.dense_intermediate or model.expert_intermediate,
            "--num-attention-heads": model.heads,
        }
    )
    _attention(draft, scenario)
    draft.say("--swiglu", when=model.gated)
    draft.say("--untie-embeddings-and-output-weights", when=not model.tied_embeddings)
    draft.say_all({"--normalization": "RMSNorm", "--position-embedding-type": "rope"})
    draft.say("--max-position-embeddings", scenario.workload.sequence_length)
    draft.say("--vocab-size", model.vocab)
    if model.vocab % (VOCAB_UNIT * tensor):
        draft.say("--make-vocab-size-divisible-by", 1)
        draft.leave("model.vocab", f"padded to a multiple of {tensor}", when=model.vocab % tensor > 0)
    draft.say("--mtp-num-layers", model.mtp_layers, when=model.mtp_layers > 0)
    if model.experts:
        _experts(draft, scenario)
        _router(draft, scenario)
        _capacity(draft, scenario)


def _attention(draft: Draft, scenario: Scenario) -> None:
    model = scenario.model
    attention = model.attention
    if isinstance(attention, Mla):
        draft.say("--multi-latent-attention")
        draft.say("--q-lora-rank", attention.q_lora_rank, when=attention.q_lora_rank is not None)
        draft.say_all(
            {
                "--kv-lora-rank": attention.kv_lora_rank,
                "--qk-head-dim": model.head_dim,
                "--qk-pos-emb-head-dim": attention.rope_head_dim,
                "--v-head-dim": attention.value_head_dim or model.head_dim,
            }
        )
        draft.leave("model.attention.indexer", "full attention", when=attention.indexer is not None)
    else:
        if model.kv_heads != model.heads:
            draft.say("--group-query-attention")
            draft.say("--num-query-groups", model.kv_heads)
        draft.say("--kv-channels", model.head_dim)
    if isinstance(attention, LocalGlobal):
        draft.say("--window-size", f"{attention.window - 1},0")
        draft.leave("model.attention.global_every", "no global tokens", when=attention.global_every is not None)
    if model.local is not None:
        draft.say("--window-size", f"{model.local.window - 1},0")
        draft.say("--window-attn-skip-freq", runs(int(model.is_local(layer)) for layer in range(model.layers)))
        draft.leave("model.local.chunked", "a window of as many tokens", when=model.local.chunked)
    draft.say("--qk-layernorm", when=model.query_key_norms and not isinstance(attention, Mla))
    draft.say("--softmax-type", "learnable", when=model.attention_sinks)
    _biases(draft, scenario)


def _biases(draft: Draft, scenario: Scenario) -> None:
    """All linear layers have biases without a flag, or none has; those of queries, keys and values apart."""
    model = scenario.model
    everywhere = model.attention_bias == "all" and (model.expert_bias or not model.experts)
    draft.say("--disable-bias-linear", when=not everywhere)
    if not everywhere:
        draft.say("--add-qkv-bias", when=model.attention_bias != "none")
        draft.leave(
            "model.attention_bias", "biases of queries, keys and values alone", when=model.attention_bias == "all"
        )
        draft.leave("model.expert_bias", "experts without biases", when=model.expert_bias)


def _experts(draft: Draft, scenario: Scenario) -> None:
    model = scenario.model
    draft.say_all({"--num-experts": model.experts, "--moe-ffn-hidden-size": model.expert_intermediate})
    draft.say("--moe-router-topk", model.top_k)
    if model.dense_layers:
        draft.say("--moe-layer-freq", runs(int(not model.is_dense(layer)) for layer in range(model.layers)))
    draft.say("--moe-shared-expert-intermediate-size", model.shared_width, when=model.shared_width > 0)
    draft.say("--moe-shared-expert-gate", when=model.shared_gate)
    draft.say("--moe-latent-size", model.expert_hidden, when=model.expert_hidden > 0)
    draft.say("--moe-router-topk-scaling-factor", model.routed_scaling_factor, when=model.routed_scaling_factor != 1)


def _router(draft: Draft, scenario: Scenario) -> None:
    routing, shape = scenario.routing, scenario.router_shape()
    if shape.num_groups > 1:
        draft.say("--moe-router-num-groups", shape.num_groups)
        draft.say("--moe-router-group-topk", shape.group_limit)
    router = routing.router
    facts = ROUTERS[router.kind] if router is not None else None
    if facts is None or not facts.learned:
        draft.leave("routing", "a router of softmax scores; its scores and its balance are yours to choose")
    elif facts.by_experts:
        draft.leave("routing.router", "tokens choose experts")
    elif facts.affinity == "sigmoid":
        draft.say("--moe-router-score-function", "sigmoid")
    draft.leave("routing.router.random_second", "the second expert is always taken", when=shape.random_second)
    draft.say("--moe-router-pre-softmax", when=shape.num_groups > 1 or shape.top_k == 1 or _before(facts))
    if not isinstance(routing, TrainRouting):
        draft.leave("routing", "the router is trained; its load balance is that of its loss")
        draft.say("--moe-router-load-balancing-type", "aux_loss")
        return
    _balance(draft, routing)


def _before(facts: object) -> bool:
    """Whether the softmax is taken of all experts, before the choice."""
    return getattr(facts, "affinity", None) == "softmax" and not getattr(facts, "normalised", False)


def _balance(draft: Draft, routing: TrainRouting) -> None:
    balance = routing.balance
    losses = {
        "seq_aux_loss": balance.sequence,
        "aux_loss" if balance.scope == "micro_batch" else "global_aux_loss": balance.expert,
    }
    given = {kind: coefficient for kind, coefficient in losses.items() if coefficient}
    draft.say("--moe-router-load-balancing-type", *(given or ["none"]))
    draft.say("--moe-aux-loss-coeff", *given.values(), when=bool(given))
    for name in ("device", "communication", "variance"):
        draft.leave(f"routing.balance.{name}", "no such loss", when=getattr(balance, name) > 0)
    if isinstance(balance.loss_free, LossFree):
        draft.say("--moe-router-enable-expert-bias")
        draft.say("--moe-router-bias-update-rate", balance.loss_free.gamma)


def _capacity(draft: Draft, scenario: Scenario) -> None:
    capacity = scenario.capacity
    if isinstance(capacity, ExpertCapacity):
        draft.say("--moe-expert-capacity-factor", capacity.factor)
        draft.say("--moe-token-drop-policy", "probs" if capacity.by == "score" else "position")
        draft.say("--moe-pad-expert-input-to-capacity", when=capacity.pad)
    draft.leave("capacity", "no row is dropped", when=isinstance(capacity, DeviceCapacity))
