"""The flags of Megatron-LM for a scenario's parallel sizes, batch, precision, recomputation and dispatch."""

from moesim.flags.commands import Draft
from moesim.flags.flag_table import RECOMPUTED
from moesim.flags.software_flags import write_implementation
from moesim.flags.stage_layouts import text_of
from moesim.scenario import Contiguous, Mla, Scenario
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.stages import stage_lengths
from moesim.schedules import COMBINED, INTERLEAVED, PLAIN

_SHARDS = ("no_shard", "optim", "optim_grads", "optim_grads_params")
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
    _stages(draft, scenario)
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


def _stages(draft: Draft, scenario: Scenario) -> None:
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
    _precision(draft, scenario)
    _recompute(draft, scenario)
    _dispatch(draft, scenario)
    _overlap(draft, scenario)
    write_implementation(draft, scenario)


def _precision(draft: Draft, scenario: Scenario) -> None:
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
    _states(draft, scenario, half=half, sharded=sharded)


def _states(draft: Draft, scenario: Scenario, *, half: str | None, sharded: bool) -> None:
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


def _recompute(draft: Draft, scenario: Scenario) -> None:
    work = scenario.workload
    if work.recompute == "full":
        draft.say_all({"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1})
        return
    latent = isinstance(scenario.model.attention, Mla)
    parts = [part for part in _MODULES if part in work.recomputed_parts and (latent or part != "mla_up_projection")]
    if parts:
        draft.say("--recompute-granularity", "selective")
        draft.say("--recompute-modules", *(_MODULES[part] for part in parts))


def _dispatch(draft: Draft, scenario: Scenario) -> None:
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


def _overlap(draft: Draft, scenario: Scenario) -> None:
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
