"""The flags of Megatron-LM for parallel sizes, batch, formats, recomputation, dispatch and overlap, both ways."""

from typing import Any

from moesim.flags.arguments import Arguments
from moesim.flags.commands import Draft
from moesim.flags.expressions import stages_of, text_of
from moesim.flags.flag_table import RECOMPUTED
from moesim.flags.software_flags import write_implementation
from moesim.scenario import Contiguous, Mla, Scenario
from moesim.scenario.dispatch import DIRECT, DISPATCH, HIERARCHICAL
from moesim.scenario.schema import PART_NEEDS
from moesim.scenario.software import RECIPES
from moesim.scenario.stages import stage_lengths
from moesim.schedules import COMBINED, INTERLEAVED, PLAIN

Fields = dict[str, Any]

_SHARDS = ("no_shard", "optim", "optim_grads", "optim_grads_params")  # by the stage of ZeRO
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT, _PER_STAGE = "--pipeline-model-parallel-layout", "--num-layers-per-virtual-pipeline-stage"
_PER_RANK = "--num-virtual-stages-per-pipeline-rank"
_COMBINED, _GATHER = "--overlap-moe-expert-parallel-comm", "--overlap-param-gather"
_WEIGHTS = ("--delay-wgrad-compute", "--overlap-dispatch-backward-with-experts-wgrad")
_SMS = ("--moe-flex-dispatcher-num-sms", "--moe-deepep-num-sms", "--moe-hybridep-num-sms")


def layout_fields(args: Arguments, *, num_gpus: int) -> Fields:
    """The fields of `parallelism` on `num_gpus` ranks. Raises UserError where they do not fit each other."""
    tensor = args.positive("--tensor-model-parallel-size", 1)
    pipeline = args.positive("--pipeline-model-parallel-size", 1)
    context = args.positive("--context-parallel-size", 1)
    model_ranks = tensor * pipeline * context
    if num_gpus % model_ranks:
        sizes = f"tensor {tensor} * pipeline {pipeline} * context {context} = {model_ranks}"
        raise args.refuse("--tensor-model-parallel-size", f"{num_gpus} GPUs do not divide by {sizes}")
    fields: Fields = {
        "data": num_gpus // model_ranks,
        "context": context,
        "tensor": tensor,
        "pipeline": pipeline,
        "zero": _zero_fields(args),
    }
    if args.count("--num-experts", 0):
        fields["expert"] = args.positive("--expert-model-parallel-size", 1)
        fields["expert_tensor"] = args.positive("--expert-tensor-parallel-size", tensor)
        if tensor > 1 and not args.has("--expert-tensor-parallel-size"):
            args.take(
                f"--expert-tensor-parallel-size {tensor}, that of attention, as Megatron-LM has it without a word"
            )
    return fields | _stage_fields(args, pipeline, num_gpus // model_ranks)


def _zero_fields(args: Arguments) -> Fields:
    shards = int(args.has("--use-distributed-optimizer"))
    if args.has("--use-megatron-fsdp") or args.has("--use-custom-fsdp"):
        shards = _SHARDS.index(args.word("--data-parallel-sharding-strategy", _SHARDS[-1]))
    if args.has("--use-torch-fsdp2"):
        shards = 3
    return {"dense": shards, "expert": shards}


def _stage_fields(args: Arguments, pipeline: int, data: int) -> Fields:
    """Schedule and stages: as a layout says, or evenly with the first and the last rank as their flags say."""
    given = [name for name in (_LAYOUT, _PER_STAGE, _PER_RANK) if args.has(name)]
    if len(given) > 1:
        raise args.refuse(given[1], f"is set beside {given[0]}; Megatron-LM takes one of them")
    lengths = _laid_out(args, pipeline) if args.has(_LAYOUT) else _even(args, pipeline)
    virtual = len(lengths) // pipeline
    combined = _is_combined(args, pipeline, virtual, data)
    if pipeline == 1:
        return {"schedule": {"kind": COMBINED.name}} if combined else {}
    if combined:
        schedule: Fields = {"kind": COMBINED.name, "virtual": virtual}
    else:
        schedule = {"kind": PLAIN.name} if virtual == 1 else {"kind": INTERLEAVED.name, "virtual": virtual}
    return {"schedule": schedule, "stages": lengths}


def _is_combined(args: Arguments, pipeline: int, virtual: int, data: int) -> bool:
    """Whether exchanges of a micro-batch lie beside the compute of another, where there are two."""
    if not args.has(_COMBINED):
        return False
    if pipeline > 1 and virtual == 1:
        raise args.refuse(_COMBINED, "needs several stages a pipeline rank, as Megatron-LM does; set their number")
    size = args.positive("--micro-batch-size", 1)
    if args.count("--global-batch-size", size * data) // (size * data) < COMBINED.least_rounds * pipeline:
        args.note(_COMBINED, "too few micro-batches for a pair of two")
        return False
    return True


def _laid_out(args: Arguments, pipeline: int) -> list[int]:
    try:
        stages = stages_of(args.word(_LAYOUT, ""))
    except ValueError as error:
        raise args.refuse(_LAYOUT, str(error)) from None
    if len(stages) % pipeline:
        raise args.refuse(_LAYOUT, f"has {len(stages)} stages, no multiple of {pipeline} pipeline ranks")
    layers, predicted = (sum(stage.count(letter) for stage in stages) for letter in "tm")
    for name, count in (("--num-layers", layers), ("--mtp-num-layers", predicted)):
        if count != args.count(name, 0):
            raise args.refuse(_LAYOUT, f"has {count} layers of {name} {args.count(name, 0)}")
    if predicted and stages[-1].count("m") != predicted:
        what = (
            "has prediction layers (m) before the last stage; a scenario has them on it, beside the loss: write ...mL"
        )
        raise args.refuse(_LAYOUT, what)
    return [stage.count("t") for stage in stages]


def _even(args: Arguments, pipeline: int) -> list[int]:
    of_rank = _layers_of_ranks(args, pipeline)
    virtual = args.positive(_PER_RANK, 1)
    name = _PER_RANK
    if args.has(_PER_STAGE):
        name, per_stage = _PER_STAGE, args.positive(_PER_STAGE)
        if args.has(_FIRST) or args.has(_LAST):
            raise args.refuse(_PER_STAGE, f"with uneven stages Megatron-LM takes {_PER_RANK}")
        if of_rank[0] % per_stage:
            raise args.refuse(_PER_STAGE, f"does not divide the {of_rank[0]} layers of a pipeline rank")
        virtual = of_rank[0] // per_stage
    if any(layers % virtual for layers in of_rank):
        raise args.refuse(name, f"{virtual} stages do not divide the layers of pipeline ranks {of_rank}")
    lengths = [layers // virtual for _ in range(virtual) for layers in of_rank]
    lengths[0] -= args.has("--account-for-embedding-in-pipeline-split")
    lengths[-1] -= args.has("--account-for-loss-in-pipeline-split")
    if min(lengths) < 0:
        raise args.refuse("--pipeline-model-parallel-size", "leaves the first or the last stage less than no layer")
    return lengths


def _layers_of_ranks(args: Arguments, pipeline: int) -> list[int]:
    """Layers of every pipeline rank, an embedding or a loss that counts as one included."""
    layers = args.positive("--num-layers")
    ends = {0: _FIRST, pipeline - 1: _LAST}
    set_ranks = {rank: args.count(name) for rank, name in ends.items() if args.has(name)} if pipeline > 1 else {}
    left, ranks = layers - sum(set_ranks.values()), pipeline - len(set_ranks)
    if not set_ranks:
        left += args.has("--account-for-embedding-in-pipeline-split") + args.has("--account-for-loss-in-pipeline-split")
    if left < 0 or (left % ranks if ranks else left):
        places = f"{ranks} pipeline ranks" if ranks == pipeline else f"the {ranks} pipeline ranks between"
        raise args.refuse("--pipeline-model-parallel-size", f"{left} layers do not go evenly into {places}")
    each = left // ranks if ranks else 0
    return [set_ranks.get(rank, each) for rank in range(pipeline)]


def dispatch_fields(args: Arguments, *, sm_count: int) -> Fields:
    """The fields of `dispatch`: NCCL's exchange of one copy for each expert, its gathers, or one copy for each node."""
    ranks = args.count("--expert-model-parallel-size", 1) * args.count("--num-experts", 0)
    kind = args.word("--moe-token-dispatcher-type", "allgather")
    if not ranks or args.count("--expert-model-parallel-size", 1) == 1:
        return {"algorithm": DIRECT.name, "deduplicate": "per_expert"}
    backend = args.word("--moe-flex-dispatcher-backend", "deepep") if kind == "flex" else None
    words = {facts.megatron: facts for facts in DISPATCH.values() if facts.megatron is not None}
    facts = words.get((kind, backend))
    if facts is None and backend is not None:
        args.note("--moe-flex-dispatcher-backend", "simulated as DeepEP, whose bandwidth was published")
    facts = facts or (DIRECT if backend is None else HIERARCHICAL)
    fields: Fields = {"algorithm": facts.name, "deduplicate": facts.deduplicate[0]}
    if not facts.owns_sms:
        return fields
    sms = next((args.positive(name) for name in _SMS if args.has(name)), None)
    if sms is not None:
        fields["sm_share"] = min(sms / sm_count, 0.99)
    return fields


def overlap_fields(args: Arguments) -> Fields:
    """The fields of `overlap`: Megatron-LM hides nothing without a flag."""
    fields: Fields = {"gradient_reduction": args.has("--overlap-grad-reduce")}
    if args.count("--moe-shared-expert-intermediate-size", 0):
        fields["shared_experts"] = args.has("--moe-shared-expert-overlap")
    shards = _zero_fields(args)["dense"]
    if args.has(_GATHER) and shards == 2:
        args.note(_GATHER, "with gradients in shards, updated weights are gathered behind the optimizer")
    elif args.has(_GATHER) and shards:
        fields["parameter_gather"] = True
    if any(map(args.has, _WEIGHTS)):
        fields["weight_gradients"] = True
    return fields


_NOT_REPEATED = {"gdn_norm_out": "no layer has one"}


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
        "precision": _precision_fields(args),
        "recompute": _recompute_field(args, model, stages),
    }
    if not args.has("--global-batch-size"):
        args.take(f"--global-batch-size {micro_batch * data}, one micro-batch on each data-parallel rank")
    sequences = args.count("--train-samples", 0) or args.count("--train-iters", 0) * fields["global_batch"]
    if sequences:
        fields["train_tokens"] = float(sequences * fields["sequence_length"])
    if clip := args.number("--clip-grad", 1.0):
        fields["gradient_clipping"] = clip
    return fields


def _precision_fields(args: Arguments) -> Fields:
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


def _recompute_field(args: Arguments, model: Fields, stages: list[int]) -> str | list[str]:
    granularity = args.word("--recompute-granularity", "")
    if args.has("--recompute-activations"):
        granularity = "selective"
    if granularity == "full":
        return _full_recompute(args, stages)
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


def _full_recompute(args: Arguments, stages: list[int]) -> str:
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


_MODULES = {part: module for module, part in RECOMPUTED.items()}


def write_layout(draft: Draft, scenario: Scenario) -> None:
    """Add the flags of parallel groups, pipeline stages and optimizer shards."""
    mesh = scenario.parallelism
    draft.say_all(
        {
            "--tensor-model-parallel-size": mesh.tensor,
            "--pipeline-model-parallel-size": mesh.pipeline,
            "--context-parallel-size": mesh.context,
        }
    )
    if scenario.model.experts:
        draft.say("--expert-model-parallel-size", mesh.expert)
        draft.say("--expert-tensor-parallel-size", mesh.expert_tensor)
    _write_stages(draft, scenario)
    zero = mesh.zero
    draft.leave("parallelism.zero", f"experts as all else: stage {zero.dense}", when=_shards_differ(scenario))
    draft.say("--use-distributed-optimizer", when=zero.dense > 0)
    if zero.dense > 1:
        draft.say("--use-megatron-fsdp")
        draft.say("--data-parallel-sharding-strategy", _SHARDS[zero.dense])
        draft.say("--ckpt-format", "fsdp_dtensor")  # the only one that it takes
    placed = isinstance(scenario.placement, Contiguous)
    draft.leave("placement", "neighbouring experts on each rank", when=scenario.model.experts > 0 and not placed)
    mixed = len(scenario.cluster.pools) > 1
    draft.leave("cluster.pools", "one kind of node", when=mixed)
    draft.leave("parallelism.across_pools", "one kind of node", when=mixed and mesh.across_pools is not None)
    draft.leave("parallelism.batch_share", "even shares", when=mixed and mesh.batch_share != "even")


def _shards_differ(scenario: Scenario) -> bool:
    zero = scenario.parallelism.zero
    return scenario.model.experts > 0 and zero.dense != zero.expert


def _write_stages(draft: Draft, scenario: Scenario) -> None:
    mesh = scenario.parallelism
    facts = mesh.schedule.facts
    draft.say("--overlap-moe-expert-parallel-comm", when=facts is COMBINED)
    if mesh.pipeline == 1:
        return
    if facts not in (PLAIN, INTERLEAVED, COMBINED):
        instead = f"{PLAIN.name}, so that stages wait longer for each other"
        draft.leave("parallelism.schedule", f"no {facts.name} in Megatron-LM: {instead}")
    lengths = stage_lengths(scenario)
    if len(set(lengths)) > 1:
        layout = text_of(lengths, prediction_layers=scenario.model.mtp_layers)
        draft.say("--pipeline-model-parallel-layout", layout)
    elif facts.virtual:
        draft.say("--num-layers-per-virtual-pipeline-stage", lengths[0])


def write_training(draft: Draft, scenario: Scenario) -> None:
    """Add the flags of batch, number formats, recomputation, dispatch and overlap."""
    work = scenario.workload
    draft.say_all(
        {
            "--seq-length": work.sequence_length,
            "--micro-batch-size": work.micro_batch,
            "--global-batch-size": work.global_batch,
        }
    )
    if work.train_tokens is not None:
        draft.say("--train-samples", round(work.train_tokens / work.sequence_length))
    draft.say("--clip-grad", 0.0 if work.gradient_clipping is None else work.gradient_clipping)
    _write_precision(draft, scenario)
    _write_recompute(draft, scenario)
    _write_dispatch(draft, scenario)
    _write_overlap(draft, scenario)
    write_implementation(draft, scenario)


def _write_precision(draft: Draft, scenario: Scenario) -> None:
    formats, key = scenario.workload.precision, "workload.precision"
    half = next((name for name in (formats.weights, formats.gemm) if name in ("bf16", "fp16")), None)
    half = half or ("bf16" if formats.scaling or formats.weights == "fp8" else None)
    if half is not None:
        draft.say(f"--{half}")
    full = half or "fp32"
    if formats.gemm == "fp4":
        draft.say("--fp4-format", "e2m1")
    elif formats.scaling:
        draft.say("--fp8-format", "e4m3")
        draft.say("--fp8-recipe", formats.scaling.megatron)
    elif formats.gemm != full:
        draft.leave(f"{key}.gemm", full)
    sharded = scenario.parallelism.zero.dense > 0
    if formats.weights == "fp8" and sharded and formats.gemm == "fp8":
        draft.say("--fp8-param-gather")
    elif formats.weights != full:
        draft.leave(f"{key}.weights", full)
    master = "none" if half is None else "fp32"
    draft.leave(f"{key}.master", f"{master} master weights", when=formats.master != master)
    _write_states(draft, scenario, half=half, sharded=sharded)


def _write_states(draft: Draft, scenario: Scenario, *, half: str | None, sharded: bool) -> None:
    """Gradients and moments: other formats need the distributed optimizer."""
    formats, key = scenario.workload.precision, "workload.precision"
    aware = half is not None and sharded and formats.optimizer != "fp32"
    draft.say("--use-precision-aware-optimizer", when=aware)
    draft.say("--exp-avg-dtype", formats.optimizer, when=aware)
    draft.say("--exp-avg-sq-dtype", formats.optimizer, when=aware)
    draft.leave(f"{key}.optimizer", "fp32 moments", when=formats.optimizer != "fp32" and not aware)
    if half == "bf16" and formats.gradients == "bf16":
        draft.say("--grad-reduce-in-bf16")
        draft.say("--main-grads-dtype", "bf16", when=aware)
    elif half == "fp16" and formats.gradients == "fp32":
        draft.say("--accumulate-allreduce-grads-in-fp32")
    elif formats.gradients != ("fp32" if half != "fp16" else "fp16"):
        draft.leave(f"{key}.gradients", "fp32 gradients" if half != "fp16" else "fp16 gradients")


def _write_recompute(draft: Draft, scenario: Scenario) -> None:
    work = scenario.workload
    if work.recompute == "full":
        draft.say_all({"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1})
        return
    latent = isinstance(scenario.model.attention, Mla)
    parts = [part for part in _MODULES if part in work.recomputed_parts and (latent or part != "mla_up_projection")]
    if parts:
        draft.say("--recompute-granularity", "selective")
        draft.say("--recompute-modules", *(_MODULES[part] for part in parts))


def _write_dispatch(draft: Draft, scenario: Scenario) -> None:
    if scenario.parallelism.expert == 1:
        return
    dispatch = scenario.dispatch
    facts = DISPATCH[dispatch.algorithm]
    kind, backend = facts.megatron or ("alltoall", None)
    draft.say("--moe-token-dispatcher-type", kind)
    if backend is not None:
        draft.say("--moe-flex-dispatcher-backend", backend)
        if dispatch.sm_share is not None:
            sms = round(dispatch.sm_share * scenario.cluster.main_pool.spec.sm_count)
            draft.say("--moe-flex-dispatcher-num-sms", max(1, sms))
    else:
        draft.leave("dispatch.algorithm", "NCCL's exchange", when=facts.megatron is None)
        copies = "one copy for each selected expert"
        draft.leave("dispatch.deduplicate", copies, when=dispatch.deduplicate in ("per_rank", "per_node"))
        draft.leave("dispatch.sm_share", "as NCCL chooses", when=dispatch.sm_share is not None)
    draft.leave("dispatch.dtype", "tokens travel in bf16", when=dispatch.dtype != "bf16")
    draft.leave("dispatch.combine_dtype", "outputs travel in bf16", when=dispatch.combine_dtype != "bf16")


def _write_overlap(draft: Draft, scenario: Scenario) -> None:
    overlap = scenario.overlap
    beside = overlap.gradient_reduction
    if beside is None:  # as the implementation does
        beside = scenario.reduces_beside or scenario.parallelism.zero.dense > 1
    draft.say("--overlap-grad-reduce", when=beside)
    shared = scenario.model.shared_width > 0 and scenario.shared_beside
    draft.say("--moe-shared-expert-overlap", when=shared and scenario.parallelism.expert > 1)
    shards = scenario.parallelism.zero.dense > 0
    draft.say("--overlap-param-gather", when=scenario.gathers_beside and shards)
    draft.leave("overlap.parameter_gather", "nothing in shards", when=scenario.gathers_beside and not shards)
    draft.say("--overlap-dispatch-backward-with-experts-wgrad", when=overlap.weight_gradients)
    combined, said = scenario.parallelism.schedule.facts is COMBINED, overlap.micro_batches
    draft.leave("overlap.micro_batches", "no overlapped pairs", when=said is True and not combined)
    draft.leave("overlap.micro_batches", "overlapped pairs", when=said is False and combined)
