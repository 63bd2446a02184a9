"""The `routing`, `capacity` and `workload` sections of a scenario from flags of Megatron-LM."""

from typing import Any

from moesim.flags.arguments import Arguments
from moesim.flags.flag_table import RECOMPUTED
from moesim.scenario.schema import PART_NEEDS
from moesim.scenario.software import RECIPES

Fields = dict[str, Any]

_NOT_REPEATED = {"gdn_norm_out": "no layer has one"}
_SCOPES = {"aux_loss": ("expert", "micro_batch"), "seq_aux_loss": ("sequence", "micro_batch"),
           "global_aux_loss": ("expert", "global_batch")}  # fmt: skip


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
    return {"routing": {"kind": "train", "router": _router(args), "balance": balance}}


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


def _router(args: Arguments) -> Fields:
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


def workload_fields(args: Arguments, model: Fields, *, data: int, stages: list[int]) -> Fields:
    """The fields of `workload`; `model` has those of that section, `stages` the layers of every pipeline stage."""
    length = "--seq-length" if args.has("--seq-length") else "--encoder-seq-length"
    if not args.has(length):
        raise args.missing("--seq-length")
    micro_batch = args.positive("--micro-batch-size")
    fields: Fields = {
        "sequence_length": args.positive(length),
        "micro_batch": micro_batch,
        "global_batch": args.positive("--global-batch-size", micro_batch * data),
        "precision": _precision(args),
        "recompute": _recompute(args, model, stages),
    }
    if not args.has("--global-batch-size"):
        args.take(f"--global-batch-size {micro_batch * data}, one micro-batch on each data-parallel rank")
    sequences = args.count("--train-samples", 0) or args.count("--train-iters", 0) * fields["global_batch"]
    if sequences:
        fields["train_tokens"] = float(sequences * fields["sequence_length"])
    if clip := args.number("--clip-grad", 1.0):
        fields["gradient_clipping"] = clip
    return fields


def _precision(args: Arguments) -> Fields:
    if args.has("--bf16") and args.has("--fp16"):
        raise args.refuse("--fp16", "is set beside --bf16; Megatron-LM takes one of them")
    half = "bf16" if args.has("--bf16") else "fp16" if args.has("--fp16") else None
    if half is None:
        args.take("neither --bf16 nor --fp16: everything is fp32, as Megatron-LM has it without a word")
        return {"gemm": "fp32", "weights": "fp32", "gradients": "fp32", "master": "none", "optimizer": "fp32"}
    fields: Fields = {"gemm": half, "weights": half, "gradients": _gradients(args, half), "master": "fp32"}
    if args.has("--fp4-format"):
        fields["gemm"] = "fp4"
    elif args.has("--fp8-format"):
        fields["gemm"] = "fp8"
        word = args.word("--fp8-recipe", "delayed")
        known = {recipe.megatron: recipe.name for recipe in RECIPES.values() if recipe.gemm == "fp8"}
        fields["recipe"] = known.get(word, "per_tensor")
        if word not in known:
            what = "casts to FP8 are priced as those of scales found in the step (tensorwise)"
            args.note("--fp8-recipe" if args.has("--fp8-recipe") else "--fp8-format", what)
        if args.has("--fp8-param-gather"):
            fields["weights"] = "fp8"
    return fields | {"optimizer": _moments(args)}


def _gradients(args: Arguments, half: str) -> str:
    if args.has("--use-precision-aware-optimizer") and args.has("--main-grads-dtype"):
        return args.word("--main-grads-dtype", "fp32")
    if args.has("--grad-reduce-in-bf16"):
        return "bf16"
    return "fp32" if half == "bf16" or args.has("--accumulate-allreduce-grads-in-fp32") else half


def _moments(args: Arguments) -> str:
    if not args.has("--use-precision-aware-optimizer"):
        return "fp32"
    if args.word("--main-params-dtype", "fp32") != "fp32":
        args.note("--main-params-dtype", "master weights are fp32")
    first, second = args.word("--exp-avg-dtype", "fp32"), args.word("--exp-avg-sq-dtype", "fp32")
    if first == second:
        return first
    order = ("fp32", "bf16", "fp16", "fp8")
    wider = min(first, second, key=order.index)
    args.note("--exp-avg-dtype", f"both moments are {wider}")
    return wider


def _recompute(args: Arguments, model: Fields, stages: list[int]) -> str | list[str]:
    granularity = args.word("--recompute-granularity", "")
    if args.has("--recompute-activations"):
        granularity = "selective"
    if granularity == "full":
        return _full(args, stages)
    modules = list(args.words("--recompute-modules", ("core_attn",) if granularity == "selective" else ()))
    if args.has("--moe-layer-recompute"):
        modules.append("moe")
    elif granularity != "selective":
        return "none"
    parts = []
    for module in modules:
        if module in _NOT_REPEATED:
            named = ("--recompute-modules", "--recompute-granularity", "--recompute-activations")
            args.note(next(name for name in named if args.has(name)), f"{module}: {_NOT_REPEATED[module]}")
        elif module in RECOMPUTED:
            parts.append(RECOMPUTED[module])
        else:
            raise args.refuse("--recompute-modules", f"{module} is none of {', '.join([*RECOMPUTED, *_NOT_REPEATED])}")
    absent = {part for part, key in PART_NEEDS.items() if not model.get(key)}
    if not args.has("--multi-latent-attention"):
        absent.add("mla_up_projection")
    for part in sorted(absent.intersection(parts)):
        args.take(f"{part}: the model has none to compute again")
    return [part for part in dict.fromkeys(parts) if part not in absent] or "none"


def _full(args: Arguments, stages: list[int]) -> str:
    count = args.count("--recompute-num-layers", 1)
    method = args.word("--recompute-method", "uniform")
    if method == "block" and count < max(stages):
        what = f"the other layers of a stage of {max(stages)} keep their activations, which no scenario expresses"
        raise args.refuse(
            "--recompute-num-layers", f"{what}; use at least {max(stages)}, or --recompute-method uniform"
        )
    if method == "uniform" and count > 1:
        args.note("--recompute-num-layers", "the input of every layer is kept, not of every group")
    return "full"
