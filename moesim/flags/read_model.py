"""The `model` section of a scenario from flags of Megatron-LM, with Megatron-LM's own defaults."""

from typing import Any

from moesim.flags.arguments import Arguments
from moesim.flags.expressions import Pattern
from moesim.scenario.base import MOST_LAYERS

Fields = dict[str, Any]

VOCAB_UNIT = 128  # what the vocabulary is padded to a multiple of, times the tensor ranks, without a flag


def model_fields(args: Arguments) -> Fields:
    """The fields of `model`. Raises UserError for a flag that is missing or of a value that no scenario expresses."""
    layers = args.positive("--num-layers")
    if layers > MOST_LAYERS:
        raise args.refuse("--num-layers", f"at most {MOST_LAYERS:,} layers are simulated")
    fields: Fields = {"layers": layers, "hidden": args.positive("--hidden-size"), "vocab": _vocab(args)}
    fields |= _attention(args, fields) | _biases(args) | _windows(args, layers)
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


def _attention(args: Arguments, fields: Fields) -> Fields:
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


def _biases(args: Arguments) -> Fields:
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
    return found | _shared(args, found["expert_intermediate"]) | _router(args)


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


def _router(args: Arguments) -> Fields:
    found: Fields = {"routed_scaling_factor": args.number("--moe-router-topk-scaling-factor", 1.0)}
    if args.has("--moe-router-num-groups"):
        found["router_groups"] = args.positive("--moe-router-num-groups")
        found["router_group_limit"] = args.positive("--moe-router-group-topk", found["router_groups"])
    if args.has("--moe-latent-size"):
        found["expert_hidden"] = args.positive("--moe-latent-size")
    return found
