"""The flags of a launch script or of a YAML file, as they were given: names, words behind them, places.

YAML files also use the names of Megatron-Core's and of Megatron-Bridge's fields, where these differ from flags.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moesim.errors import UserError
from moesim.flags.arguments import Given, is_known
from moesim.flags.flag_table import READ
from moesim.flags.launch_script import SpokenWord, read_launch
from moesim.flags.shell_values import Variables, is_unset, marks
from moesim.flags.shell_words import Piece, Word
from moesim.scenario.document import Node, parse_yaml

MOST_BYTES = 2_000_000
_PER_NODE = ("--nproc-per-node", "--gpus-per-node", "--gres", "--ntasks-per-node")  # torchrun's, then Slurm's
_NODES = ("--nnodes", "--nodes")
_VARIABLES = (("GPUS_PER_NODE", "NPROC_PER_NODE", "NGPUS_PER_NODE"), ("NNODES", "NUM_NODES", "SLURM_NNODES"))
_GROUPS, _GROUPED = "--num-query-groups", "--group-query-attention"


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


@dataclass(frozen=True)
class Launched:
    """What a file gives: flags of the program, GPUs by how it is started, and remarks for the user."""

    flags: tuple[Given, ...]
    gpus_per_node: str | None
    nodes: str | None
    world_size: str | None
    remarks: tuple[str, ...] = ()


def read_file(path: Path, *, variables: Mapping[str, str]) -> Launched:
    """The flags of the file at `path`: a YAML file by its ending, else a shell script. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the launch script: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: {len(content):,} bytes; a launch script has at most {MOST_BYTES:,}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if path.suffix in (".yaml", ".yml"):
        return from_yaml(text, source=path.name, variables=variables)
    return from_script(text, source=path.name, variables=variables)


def from_script(text: str, *, source: str, variables: Mapping[str, str]) -> Launched:
    """The flags behind the program of the launch command, and the launcher's before it."""
    launch = read_launch(text, source=source, given=variables)
    program = next((i for i, word in enumerate(launch.words) if word.text.endswith(".py")), -1)
    remarks: list[str] = []
    flags = tuple(_flags(launch.words[program + 1 :], source, remarks))
    before = [SpokenWord("--nodes", word.line) if word.text == "-N" else word for word in launch.words[: program + 1]]
    launcher = {flag.name.replace("_", "-"): flag.words for flag in _flags(before, source, [])}
    launcher |= {flag.name: flag.words for flag in flags if flag.name in (*_PER_NODE, *_NODES)}
    batch = {flag.name: flag.words for flag in _flags(launch.batch_words, source, [])}
    named = [next((launch.variables[name] for name in names if name in launch.variables), None) for names in _VARIABLES]
    return Launched(
        flags=flags,
        gpus_per_node=_first(_PER_NODE, launcher, batch) or named[0],
        nodes=_first(_NODES, launcher, batch) or named[1],
        world_size=launch.variables.get("WORLD_SIZE"),
        remarks=tuple(remarks),
    )


def _first(names: Sequence[str], *places: Mapping[str, tuple[str, ...]]) -> str | None:
    for place in places:
        for name in names:
            words = place.get(name)
            if words and not marks(words[0]):
                return words[0].rpartition(":")[2]  # Slurm's gpu:8, h100:8
    return None


def _flags(words: Sequence[SpokenWord], source: str, remarks: list[str]) -> Iterator[Given]:
    name, behind, line = "", list[str](), 0
    for word in words:
        if word.text.startswith("--") and len(word.text) > 2 and not marks(word.text.partition("=")[0]):
            if name:
                yield Given(name, tuple(behind), f"{source}:{line}")
            name, equals, value = word.text.partition("=")
            behind, line = [value] if equals else [], word.line
        elif _stands_alone(word, name, behind):
            if not is_unset(word.text):
                raise UserError(
                    f"{source}:{word.line}: {marks(word.text)[0]}; it may hold flags: write them out in a copy"
                )
            remarks.append(f"{source}:{word.line}: ${marks(word.text)[0][1:]} is not set in the script: taken as empty")
        elif name:
            behind.append(word.text)
    if name:
        yield Given(name, tuple(behind), f"{source}:{line}")


def _stands_alone(word: SpokenWord, name: str, behind: Sequence[str]) -> bool:
    """Whether a value that is not known is no flag's value, so that it may be flags itself."""
    text = word.text
    if not marks(text) or text != "".join(f"\x00{mark}\x00" for mark in marks(text)):
        return False
    bare = name in READ and READ[name].kind == "bare"
    return not name or bool(behind) or bare


def from_yaml(text: str, *, source: str, variables: Mapping[str, str]) -> Launched:
    """The flags that the keys of a YAML file stand for, sections and all.

    Keys are flags (`--num-layers`), names of arguments (`num_layers`) or of fields of Megatron-Core's configurations
    (`num_moe_experts`), which Megatron-Bridge writes. Sections that hold no flags are left out.
    """
    root = parse_yaml(text, source=source)
    if not isinstance(root.value, dict):
        raise UserError(f"{source}: expected a mapping of flags, such as tensor_model_parallel_size: 2")
    found: list[Given] = []
    found += _YamlReader(Variables.given(variables)).flags(root)
    names = {flag.name for flag in found}
    if _GROUPS in names and _GROUPED not in names and f"{_GROUPS}:" not in text:  # a field of a configuration, no flag
        found.append(Given(_GROUPED, (), source))
    launcher = {flag.name.replace("_", "-"): flag.words for flag in found}
    return Launched(
        flags=tuple(flag for flag in found if flag.name.replace("_", "-") not in (*_PER_NODE, *_NODES)),
        gpus_per_node=_first(_PER_NODE, launcher),
        nodes=_first(_NODES, launcher),
        world_size=_first(("--world-size",), launcher),
        remarks=(),
    )


@dataclass
class _YamlReader:
    variables: Variables

    def flags(self, node: Node) -> Iterator[Given]:
        for key, child in node.value.items():
            name = key.lstrip("-").replace("-", "_")
            if name.lower() in NO_FLAGS or name.startswith("_"):
                continue
            if isinstance(child.value, dict):
                yield from self.flags(child)
                continue
            yield from self._flag(key, name, child)

    def _flag(self, key: str, name: str, child: Node) -> Iterator[Given]:
        value = child.plain
        if value is None or value == "None":
            return
        meaning = OTHER_NAMES.get(name)
        if meaning is not None:
            yield from self._renamed(meaning, value, child)
            return
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            off = [f"--no-{flag[2:]}", f"--disable-{flag[2:]}"]
            negated = next((other for other in off if is_known(other)), None)
            if value and (negated is None or is_known(flag)):
                yield Given(flag, (), child.key_where)
            elif not value and negated is not None:
                yield Given(negated, (), child.key_where)
            return
        yield Given(flag, self._texts(value), child.key_where)

    def _renamed(self, meaning: Meaning, value: Any, child: Node) -> Iterator[Given]:
        if meaning.flag is None or (isinstance(value, bool) and value != meaning.when):
            return
        words = () if isinstance(value, bool) else self._texts(value)
        if meaning.words is not None:
            found = meaning.words.get(str(value))
            if found is None:
                return
            for flag in found:
                yield Given(flag[0], tuple(flag[1:]), child.key_where)
            return
        yield Given(meaning.flag, words, child.key_where)

    def _texts(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, list):
            if value and all(isinstance(entry, list) for entry in value):
                return ("|".join(",".join(str(part) for part in entry) for entry in value),)
            if all(type(entry) is int for entry in value):
                return (str(value).replace(" ", ""),)
            return tuple(text for entry in value for text in self._texts(entry))
        text = str(value)
        return tuple(self.variables.fields(Word((Piece(text, '"'),), 0))) if "$" in text else (text,)
