"""The `parallelism`, `dispatch` and `overlap` sections of a scenario from flags of Megatron-LM."""

from typing import Any

from moesim.flags.arguments import Arguments
from moesim.flags.stage_layouts import stages_of
from moesim.scenario.dispatch import DIRECT, DISPATCH, HIERARCHICAL
from moesim.schedules import COMBINED, INTERLEAVED, PLAIN

Fields = dict[str, Any]

_SHARDS = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
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
        "zero": _zero(args),
    }
    if args.count("--num-experts", 0):
        fields["expert"] = args.positive("--expert-model-parallel-size", 1)
        fields["expert_tensor"] = args.positive("--expert-tensor-parallel-size", tensor)
        if tensor > 1 and not args.has("--expert-tensor-parallel-size"):
            args.take(
                f"--expert-tensor-parallel-size {tensor}, that of attention, as Megatron-LM has it without a word"
            )
    return fields | _stages(args, pipeline, num_gpus // model_ranks)


def _zero(args: Arguments) -> Fields:
    shards = int(args.has("--use-distributed-optimizer"))
    if args.has("--use-megatron-fsdp") or args.has("--use-custom-fsdp"):
        shards = _SHARDS[args.word("--data-parallel-sharding-strategy", "optim_grads_params")]
    if args.has("--use-torch-fsdp2"):
        shards = 3
    return {"dense": shards, "expert": shards}


def _stages(args: Arguments, pipeline: int, data: int) -> Fields:
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
    shards = _zero(args)["dense"]
    if args.has(_GATHER) and shards == 2:
        args.note(_GATHER, "with gradients in shards, updated weights are gathered behind the optimizer")
    elif args.has(_GATHER) and shards:
        fields["parameter_gather"] = True
    if any(map(args.has, _WEIGHTS)):
        fields["weight_gradients"] = True
    return fields
