"""The flags of Megatron-LM for model, router and capacity, both ways: read with its own defaults, and written.

Flags state the router and its balance, not how it routes: what a launch is simulated with is a choice.
"""

from typing import Any, Literal

from moesim.flags.arguments import Arguments
from moesim.flags.commands import Draft
from moesim.flags.expressions import Pattern, runs
from moesim.scenario import (
    DeviceCapacity,
    ExpertCapacity,
    LocalGlobal,
    LossFree,
    Mla,
    Scenario,
    TrainRouting,
)
from moesim.scenario.base import MOST_LAYERS
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import LIBRARY_PREFIX
from moesim.trace.library import LibraryEntry, library_entries

Fields = dict[str, Any]

VOCAB_UNIT = 128  # what the vocabulary is padded to a multiple of, times the tensor ranks, without a flag


def model_fields(args: Arguments) -> Fields:
    """The fields of `model`. Raises UserError for a flag that is missing or of a value that no scenario expresses."""
    layers = args.positive("--num-layers")
    if layers > MOST_LAYERS:
        raise args.refuse("--num-layers", f"at most {MOST_LAYERS:,} layers are simulated")
    fields: Fields = {"layers": layers, "hidden": args.positive("--hidden-size"), "vocab": _vocab(args)}
    fields |= _attention_fields(args, fields) | _bias_fields(args) | _windows(args, layers)
    fields["tied_embeddings"] = not args.has("--untie-embeddings-and-output-weights")
    fields["gated"] = args.has("--swiglu") or args.has("--quick-geglu")
    fields["mtp_layers"] = args.count("--mtp-num-layers", 0)
    return fields | _networks(args, fields)


def _vocab(args: Arguments) -> int:
    """Entries of the embedding as it is built: padded."""
    if args.has("--padded-vocab-size"):
        return args.positive("--padded-vocab-size")
    if not args.has("--vocab-size"):
        if "model.vocab" in args.overridden:
            return VOCAB_UNIT  # replaced
        raise args.missing("--vocab-size", " (the tokenizer is not read), or pass --set model.vocab=N")
    size = args.positive("--vocab-size")
    if args.has("--no-pad-vocab-size"):
        return size
    unit = args.positive("--make-vocab-size-divisible-by", VOCAB_UNIT) * args.positive(
        "--tensor-model-parallel-size", 1
    )
    padded = -(-size // unit) * unit
    if padded != size:
        args.take(f"vocabulary padded from {size:,} to {padded:,} entries, a multiple of {unit:,}")
    return padded


def _attention_fields(args: Arguments, fields: Fields) -> Fields:
    heads = args.positive("--num-attention-heads")
    if args.has("--multi-latent-attention"):
        return {"heads": heads, "kv_heads": heads} | _latent(args)
    kv_heads = args.positive("--num-query-groups", 1) if args.has("--group-query-attention") else heads
    if args.has("--num-query-groups") and not args.has("--group-query-attention"):
        args.note("--num-query-groups", "without --group-query-attention every head has keys and values")
    head_dim = args.positive("--kv-channels", max(1, fields["hidden"] // heads))
    kind = "mha" if kv_heads == heads else "gqa"
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "attention": {"kind": kind}}


def _latent(args: Arguments) -> Fields:
    head_dim, value_dim = args.positive("--qk-head-dim", 128), args.positive("--v-head-dim", 128)
    if not args.has("--kv-lora-rank"):
        args.take("--kv-lora-rank 32, as Megatron-LM has it without a word")
    attention: Fields = {
        "kind": "mla",
        "kv_lora_rank": args.positive("--kv-lora-rank", 32),
        "rope_head_dim": args.positive("--qk-pos-emb-head-dim", 64),
    }
    if args.has("--q-lora-rank"):
        attention["q_lora_rank"] = args.positive("--q-lora-rank")
    if value_dim != head_dim:
        attention["value_head_dim"] = value_dim
    if args.has("--dsa-indexer-n-heads"):
        attention["indexer"] = {
            "heads": args.positive("--dsa-indexer-n-heads"),
            "head_dim": args.positive("--dsa-indexer-head-dim"),
            "top_k": args.positive("--dsa-indexer-topk"),
        }
    return {"head_dim": head_dim, "attention": attention}


def _bias_fields(args: Arguments) -> Fields:
    fields: Fields = {}
    if args.word("--softmax-type", "vanilla") == "learnable":
        fields["attention_sinks"] = True
    if args.has("--qk-layernorm") and not args.has("--multi-latent-attention"):
        fields["query_key_norms"] = True  # latent attention norms what it compresses, with the flag or without
    if args.has("--disable-bias-linear"):
        return fields | ({"attention_bias": "qkv"} if args.has("--add-qkv-bias") else {})
    args.note("--disable-bias-linear", "biases of dense feed-forward networks are not counted, those of others are")
    return fields | {"attention_bias": "all", "expert_bias": args.count("--num-experts", 0) > 0}


def _windows(args: Arguments, layers: int) -> Fields:
    """Layers with a window: all, every layer but each N-th, or those of a list."""
    if not args.has("--window-size"):
        return {}
    words = args.words("--window-size")
    left = "".join(words[:1]).strip("()")
    if left == "-1":
        return {}
    if not left.isdecimal():
        raise args.refuse("--window-size", "must be tokens to the left and to the right, such as 127,0")
    window = int(left) + 1  # and the token itself
    skip = args.pattern("--window-attn-skip-freq")
    if skip is None:
        return {"attention": {"kind": "local_global", "window": window, "global_every": None}}
    marks = _marks(args, "--window-attn-skip-freq", skip, layers, lambda number, step: (number + 1) % step != 0)
    numbers = [number for number, mark in enumerate(marks) if mark]
    return {"local": {"window": window, "layers": numbers}} if numbers else {}


def _networks(args: Arguments, fields: Fields) -> Fields:
    hidden, layers = fields["hidden"], fields["layers"]
    default = int(4 * hidden * 2 / 3 / 64) * 64 if args.has("--swiglu") else 4 * hidden
    width = args.positive("--ffn-hidden-size", default)
    experts = args.count("--num-experts", 0)
    if not experts:
        return {"dense_layers": layers, "dense_intermediate": width}
    found: Fields = {"experts": experts, "top_k": args.positive("--moe-router-topk", 2)}
    if not args.has("--moe-router-topk"):
        args.take("--moe-router-topk 2, as Megatron-LM has it without a word")
    found["expert_intermediate"] = args.positive("--moe-ffn-hidden-size", width)
    freq = args.pattern("--moe-layer-freq")
    marks = _marks(
        args, "--moe-layer-freq", 1 if freq is None else freq, layers, lambda number, step: number % step == 0
    )
    dense = [number for number, mark in enumerate(marks) if not mark]
    if len(dense) == layers:
        raise args.refuse("--moe-layer-freq", "no layer has experts; leave --num-experts out instead")
    if dense:
        found |= {"dense_layers": len(dense), "dense_intermediate": width}
    if dense and dense != list(range(len(dense))):
        found["dense_at"] = dense
    return found | _shared(args, found["expert_intermediate"]) | _group_fields(args)


def _marks(args: Arguments, name: str, given: Pattern, layers: int, of_step: Any) -> list[bool]:
    """For every layer whether it is marked, by a list of 0 and 1 or by a step."""
    if isinstance(given, list):
        if len(given) != layers or set(given) - {0, 1}:
            raise args.refuse(name, f"must have 0 or 1 for each of {layers} layers, has {len(given)} entries")
        return [bool(mark) for mark in given]
    if given < 1:
        raise args.refuse(name, "must be at least 1")
    return [of_step(number, given) for number in range(layers)]


def _shared(args: Arguments, width: int) -> Fields:
    """Shared experts: as many as fit the width of a routed one, or one of another width."""
    total = args.count("--moe-shared-expert-intermediate-size", 0)
    if not total:
        return {}
    even = total % width == 0
    found: Fields = {"shared_experts": total // width} if even else {"shared_experts": 1, "shared_intermediate": total}
    return found | ({"shared_gate": True} if args.has("--moe-shared-expert-gate") else {})


def _group_fields(args: Arguments) -> Fields:
    found: Fields = {"routed_scaling_factor": args.number("--moe-router-topk-scaling-factor", 1.0)}
    if args.has("--moe-router-num-groups"):
        found["router_groups"] = args.positive("--moe-router-num-groups")
        found["router_group_limit"] = args.positive("--moe-router-group-topk", found["router_groups"])
    if args.has("--moe-latent-size"):
        found["expert_hidden"] = args.positive("--moe-latent-size")
    return found


Choice = Literal["library", "train", "uniform"]
_SCOPES = {"aux_loss": ("expert", "micro_batch"), "seq_aux_loss": ("sequence", "micro_batch"),
           "global_aux_loss": ("expert", "global_batch")}  # fmt: skip
_POINT = "published"  # of a layout in the library: the balance that was published for it


def routing_section(args: Arguments, model: dict[str, Any], choice: Choice | None) -> dict[str, Any]:
    """The `routing` section, in a mapping of its own; empty for a dense model.

    Without a `choice` it is a router of the library, where one ships that routes and is laid out as the flags say, else
    one that is trained with the balance of the flags. Raises UserError where the library has none and is asked for.
    """
    stated = routing_fields(args)
    if not stated or stated["routing"]["kind"] == "uniform":
        return stated
    router = stated["routing"]["router"]
    if choice == "uniform":
        return {"routing": {"kind": "uniform", "router": router}}
    entry = None if choice == "train" else _shipped(model, router["kind"])
    if entry is None:
        if choice == "library":
            what = f"the library has no router {router['kind']} of {model['experts']} experts, {model['top_k']} a token"
            raise args.refuse("--num-experts", f"{what}; use --routing train")
        args.take("routing: a small model is trained with the router and the balance of the flags (--routing uniform)")
        return stated
    name = f"{LIBRARY_PREFIX}{entry.layout}/{_POINT}"
    steps = _request(entry)["steps"]
    args.take(f"routing: {name}, {steps} steps with a balance of its own (--routing train: with that of the flags)")
    return {"routing": {"kind": "trace", "file": name, "router": router}}


def _shipped(model: dict[str, Any], kind: str) -> LibraryEntry | None:
    """The published router of the library with the experts, groups and kind of the flags."""
    wanted = {
        "kind": kind,
        "num_experts": model["experts"],
        "top_k": model["top_k"],
        "num_groups": model.get("router_groups", 1),
        "group_limit": model.get("router_group_limit", 1),
    }
    for entry in library_entries():
        router = _request(entry).get("router")
        published = entry.axis == _POINT and entry.seed == 0
        if published and isinstance(router, dict) and wanted.items() <= router.items():
            return entry
    return None


def _request(entry: LibraryEntry) -> dict[str, Any]:
    """What the entry was trained as."""
    request = entry.provenance["request"]
    return request if isinstance(request, dict) else {}


def routing_fields(args: Arguments) -> Fields:
    """The router and its balance, to be trained; uniform where Megatron-LM forces the balance itself."""
    if not args.count("--num-experts", 0):
        return {}
    if args.has("--moe-router-force-load-balancing"):
        return {"routing": {"kind": "uniform"}}
    kinds, coefficients = _losses(args)
    if "sinkhorn" in kinds:
        args.note("--moe-router-load-balancing-type", "Sinkhorn's balance is simulated as uniform routing")
        return {"routing": {"kind": "uniform"}}
    balance: Fields = {}
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if kind == "none" or not coefficient:
            continue
        if kind not in _SCOPES:
            args.note("--moe-router-load-balancing-type", f"{kind} is not known; the router trains without it")
            continue
        name, scope = _SCOPES[kind]
        balance |= {name: coefficient, "scope": scope}
    rate = args.number("--moe-router-bias-update-rate", 1e-3)
    if args.has("--moe-router-enable-expert-bias") and rate:
        balance["loss_free"] = {"gamma": rate}
    return {"routing": {"kind": "train", "router": _router_fields(args), "balance": balance}}


def _losses(args: Arguments) -> tuple[tuple[str, ...], list[float]]:
    name = "--moe-aux-loss-coeff"
    kinds = args.words("--moe-router-load-balancing-type", ("aux_loss",))
    coefficients = [args.finite(name, text) for text in args.words(name, ("0",))]
    if any(coefficient < 0 for coefficient in coefficients):
        raise args.refuse(name, "must not be negative")
    if len(coefficients) == 1:
        coefficients *= len(kinds)
    if len(coefficients) != len(kinds):
        raise args.refuse(name, f"has {len(coefficients)} values for {len(kinds)} kinds of balance")
    return kinds, coefficients


def _router_fields(args: Arguments) -> Fields:
    """The router of a scenario that scores as the flags say."""
    score = args.word("--moe-router-score-function", "softmax")
    grouped = args.count("--moe-router-num-groups", 0) > 1
    if score == "sqrtsoftplus":
        args.note("--moe-router-score-function", "scores are trained as sigmoids")
    if score != "softmax":
        return {"kind": "deepseek_v3"}
    if grouped:
        return {"kind": "deepseek_v2"}
    if args.positive("--moe-router-topk", 2) == 1:
        return {"kind": "switch"}
    return {"kind": "deepseek_moe" if args.has("--moe-router-pre-softmax") else "topk_softmax"}


def capacity_fields(args: Arguments) -> Fields:
    """The limit on the rows of an expert; a negative factor is none, as in Megatron-LM."""
    factor = args.number("--moe-expert-capacity-factor", -1.0)
    if factor < 0 or not args.count("--num-experts", 0):
        return {"kind": "none"}
    by = {"probs": "score", "position": "position"}[args.word("--moe-token-drop-policy", "probs")]
    return {"kind": "expert", "factor": factor, "by": by, "pad": args.has("--moe-pad-expert-input-to-capacity")}


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
    _write_attention(draft, scenario)
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
        _write_experts(draft, scenario)
        _write_router(draft, scenario)
        _write_capacity(draft, scenario)


def _write_attention(draft: Draft, scenario: Scenario) -> None:
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
    _write_biases(draft, scenario)


def _write_biases(draft: Draft, scenario: Scenario) -> None:
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


def _write_experts(draft: Draft, scenario: Scenario) -> None:
    model = scenario.model
    draft.say_all({"--num-experts": model.experts, "--moe-ffn-hidden-size": model.expert_intermediate})
    draft.say("--moe-router-topk", model.top_k)
    if model.dense_layers:
        draft.say("--moe-layer-freq", runs(int(not model.is_dense(layer)) for layer in range(model.layers)))
    draft.say("--moe-shared-expert-intermediate-size", model.shared_width, when=model.shared_width > 0)
    draft.say("--moe-shared-expert-gate", when=model.shared_gate)
    draft.say("--moe-latent-size", model.expert_hidden, when=model.expert_hidden > 0)
    draft.say("--moe-router-topk-scaling-factor", model.routed_scaling_factor, when=model.routed_scaling_factor != 1)


def _write_router(draft: Draft, scenario: Scenario) -> None:
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
    _write_balance(draft, routing)


def _before(facts: object) -> bool:
    """Whether the softmax is taken of all experts, before the choice."""
    return getattr(facts, "affinity", None) == "softmax" and not getattr(facts, "normalised", False)


def _write_balance(draft: Draft, routing: TrainRouting) -> None:
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


def _write_capacity(draft: Draft, scenario: Scenario) -> None:
    capacity = scenario.capacity
    if isinstance(capacity, ExpertCapacity):
        draft.say("--moe-expert-capacity-factor", capacity.factor)
        draft.say("--moe-token-drop-policy", "probs" if capacity.by == "score" else "position")
        draft.say("--moe-pad-expert-input-to-capacity", when=capacity.pad)
    draft.leave("capacity", "no row is dropped", when=isinstance(capacity, DeviceCapacity))
