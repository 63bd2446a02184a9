"""The command line of a scenario for torchtitan 0.3, and what its flags cannot say.

torchtitan takes a model, its router and its dispatch from a Python config (`--module`, `--config`); flags say the
rest. Up to 0.2 the same keys stood in TOML sections: `--parallelism.tensor_parallel_degree 2` was
`tensor_parallel_degree = 2` below `[parallelism]`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from moesim.flags.commands import Command, Draft, launch_words
from moesim.scenario import NoCapacity, Precision, Scenario
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.software import TORCHTITAN
from moesim.scenario.stages import stage_lengths
from moesim.schedules import GPIPE, INTERLEAVED, PLAIN

# (layers, hidden, experts) of models that have a config: its module and its name.
CONFIGS: Mapping[tuple[int, int, int], tuple[str, str]] = MappingProxyType(
    {
        (48, 2048, 128): ("qwen3", "qwen3_30b_a3b"),
        (27, 2048, 64): ("deepseek_v3", "deepseek_v3_16b"),
        (61, 7168, 256): ("deepseek_v3", "deepseek_v3_671b"),
        (24, 2880, 32): ("gpt_oss", "gpt_oss_20b"),
        (36, 2880, 128): ("gpt_oss", "gpt_oss_120b"),
    }
)
_SCHEDULES = {GPIPE.name: "GPipe", PLAIN.name: "1F1B", INTERLEAVED.name: "Interleaved1F1B"}
_MIXED = Precision(gemm="bf16", weights="bf16", gradients="fp32", master="fp32", optimizer="fp32")
_HALF = Precision(gemm="bf16", weights="bf16", gradients="bf16", master="none", optimizer="bf16")


def torchtitan_command(scenario: Scenario) -> Command:
    """The flags of the scenario's layout, batch, sharding and recomputation."""
    model = scenario.model
    draft = Draft()
    module, config = CONFIGS.get((model.layers, model.hidden, model.experts), ("MODULE", "CONFIG"))
    draft.say("--module", module)
    draft.say("--config", config)
    named = f"the architecture of --config {config}"
    draft.leave("model", named if config != "CONFIG" else "no config of this model ships: write one, and name it")
    if model.experts:
        draft.leave("routing", "the router and its balance are those of the config")
        draft.leave("capacity", "no row is dropped", when=not isinstance(scenario.capacity, NoCapacity))
    _sharding(draft, scenario)
    _pipeline(draft, scenario)
    _batch(draft, scenario)
    _dispatch(draft, scenario)
    _recompute(draft, scenario)
    launcher = ("torchrun", *launch_words(scenario), "-m", "torchtitan.train")
    return Command(software="torchtitan", launcher=launcher, flags=tuple(draft.flags), unsaid=tuple(draft.unsaid))


def _sharding(draft: Draft, scenario: Scenario) -> None:
    """All states in shards, weights gathered again behind the forward pass or not; or all of them whole."""
    mesh = scenario.parallelism
    zero, borrowed = mesh.zero.dense, mesh.expert * mesh.expert_tensor
    sharded = zero > 0 or borrowed > mesh.context * mesh.tensor
    draft.say("--parallelism.data_parallel_replicate_degree", 1 if sharded else mesh.data)
    draft.say("--parallelism.data_parallel_shard_degree", mesh.data if sharded else 1)
    if sharded:
        draft.say("--parallelism.fsdp_reshard_after_forward", "always" if zero == 3 else "never")
    stage = (3 if zero == 3 else 2) if sharded else 0
    told = f"stage {stage} of all weights" if stage else "no shards"
    draft.leave("parallelism.zero", told, when=(zero, mesh.zero.expert) != (stage, stage))
    draft.say("--parallelism.tensor_parallel_degree", mesh.tensor)
    draft.say("--parallelism.context_parallel_degree", mesh.context)
    draft.say("--parallelism.expert_parallel_degree", mesh.expert)
    whole = "experts are not cut"
    draft.leave("parallelism.expert_tensor", whole, when=mesh.expert_tensor > 1)


def _pipeline(draft: Draft, scenario: Scenario) -> None:
    mesh, name = scenario.parallelism, "--parallelism.pipeline_parallel"
    draft.say(f"{name}_degree", mesh.pipeline)
    in_turn = "one after the other"
    draft.leave("overlap.parameter_gather", "behind the optimizer", when=scenario.gathers_beside)
    draft.leave("overlap.weight_gradients", in_turn, when=scenario.overlap.weight_gradients)
    if mesh.pipeline == 1:
        draft.leave("parallelism.schedule", in_turn, when=mesh.schedule.facts.single)
        return
    schedule = _SCHEDULES.get(mesh.schedule.kind)
    instead = f"{_SCHEDULES[PLAIN.name]}; of its others ZBVZeroBubble and DualPipeV are nearest"
    draft.leave("parallelism.schedule", instead, when=schedule is None)
    draft.say(f"{name}_schedule", schedule or _SCHEDULES[PLAIN.name])
    draft.say(f"{name}_microbatch_size", scenario.workload.micro_batch)
    lengths = stage_lengths(scenario)
    ends = weights_of_ends(lengths)
    first, last = ends or (1, 1)
    draft.say(f"{name}_first_stage_less_layers", first)
    draft.say(f"{name}_last_stage_less_layers", last)
    per_stage, asked = _per_stage(scenario, sum(lengths) + first + last)
    draft.say(f"{name}_layers_per_stage", per_stage, when=asked)
    if ends is None or (asked and -(-(sum(lengths) + first + last) // per_stage) != len(lengths)):
        draft.leave("parallelism.stages", "as even as can be; module_fqns_per_model_part in a config says others")


def _per_stage(scenario: Scenario, layers: int) -> tuple[int, bool]:
    """Layers of a stage at most, and whether they must be said: else a rank has one stage, or two that it visits."""
    mesh = scenario.parallelism
    default = 2 if mesh.schedule.facts.virtual else 1
    return -(-layers // mesh.num_stages), mesh.schedule.virtual != default


def split(layers: int, stages: int, *, first: int, last: int) -> tuple[int, ...]:
    """Layers of every stage where the ends of the model count as `first` and `last` layers; earlier ones take more.

    >>> split(61, 8, first=1, last=1)
    (7, 8, 8, 8, 8, 8, 8, 6)
    """
    each, more = divmod(layers + first + last, stages)
    lengths = [each + (stage < more) for stage in range(stages)]
    lengths[0] -= first
    lengths[-1] -= last
    return tuple(lengths)


def weights_of_ends(lengths: tuple[int, ...]) -> tuple[int, int] | None:
    """The weights of embedding and head with which `split` gives these stages; None where none do."""
    layers, stages = sum(lengths), len(lengths)
    most = max(lengths) + 1
    tried = ((first, last) for first in range(most) for last in range(most))
    fitting = (ends for ends in tried if max(ends) <= (layers + sum(ends)) // stages)
    return next((ends for ends in fitting if split(layers, stages, first=ends[0], last=ends[1]) == lengths), None)


def _batch(draft: Draft, scenario: Scenario) -> None:
    work, mesh = scenario.workload, scenario.parallelism
    at_once = work.micro_batch if mesh.pipeline == 1 else work.global_batch // mesh.data
    draft.say("--training.local_batch_size", at_once)
    draft.say("--training.global_batch_size", work.global_batch)
    draft.say("--training.seq_len", work.sequence_length)
    if work.gradient_clipping is None:
        draft.leave("workload.gradient_clipping", "gradients are clipped at 1.0, a global sum before the optimizer")
    else:
        draft.say("--training.max_norm", work.gradient_clipping)
    if work.train_tokens is not None:
        draft.say("--training.steps", max(1, round(work.train_tokens / scenario.tokens_per_step)))
    draft.say("--training.dtype", "bfloat16", when=work.precision == _HALF)
    told = "bf16 GEMMs of fp32 weights in shards, fp32 gradients and moments"
    draft.leave("workload.precision", told, when=work.precision not in (_HALF, _MIXED))


def _dispatch(draft: Draft, scenario: Scenario) -> None:
    mesh, dispatch = scenario.parallelism, scenario.dispatch
    if mesh.expert > 1:
        plain = not DISPATCH[dispatch.algorithm].fans_out and dispatch.deduplicate == "per_expert"
        told = "one copy for each selected expert, unless the config names DeepEP or HybridEP"
        draft.leave("dispatch", told, when=not plain or dispatch.dtype != "bf16")
    draft.say("--training.disable_cuda_graphs", when=mesh.expert > 1 or mesh.pipeline > 1)
    own = scenario.implementation.software is TORCHTITAN and not scenario.implementation.overridden
    draft.leave("implementation", "its own kernels", when=not own)


def _recompute(draft: Draft, scenario: Scenario) -> None:
    """A word of its own, the last one."""
    recompute = scenario.workload.recompute
    if recompute in ("full", "none"):
        draft.say(f"activation-checkpoint:{recompute}")
    else:
        draft.leave("workload.recompute", "every other GEMM and all that is cheap is made again")
        draft.say("activation-checkpoint:selective")
