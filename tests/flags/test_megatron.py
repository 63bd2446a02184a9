"""What flags of Megatron-LM become, with Megatron-LM's own defaults; what no scenario expresses is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.flags.expressions import stages_of, text_of
from moesim.flags.megatron import Reading, read_megatron, scenario_text
from moesim.flags.software_flags import KERNELS
from moesim.scenario import Implementation, Scenario, load_scenario_text
from moesim.scenario.catalogue import model_preset
from moesim.scenario.flops import parameters

Write = Callable[..., Path]
LAUNCH = Path(__file__).with_name("launch")
SMALL = """torchrun --nproc_per_node {per_node} --nnodes {nodes} pretrain_gpt.py --num-layers 24 --hidden-size 1024 \\
  --num-attention-heads 16 --seq-length 1024 --vocab-size 32000 --micro-batch-size 1 --global-batch-size 64 --swiglu \\
  --num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --disable-bias-linear --bf16 \\
  --position-embedding-type rope {more}"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(
        more: str = "", *, nodes: int = 1, per_node: int = 8, text: str | None = None, name: str = "run.sh"
    ) -> Path:
        path = tmp_path / name
        path.write_text(SMALL.format(more=more, nodes=nodes, per_node=per_node) if text is None else text)
        return path

    return written


def of(path: Path, **more: object) -> Reading:
    return read_megatron(path, **{"gpu": "h100", **more})  # type: ignore[arg-type]


def scenario(path: Path) -> Scenario:
    return of(path).scenario


@pytest.mark.parametrize(
    ("name", "preset", "gpus"),
    [
        ("mixtral_8x7b.sh", "mixtral-8x7b", 32),
        ("deepseek_v3.sh", "deepseek-v3", 1024),
        ("qwen3_30b.yaml", "qwen3-30b-a3b", 32),
    ],
)
def test_launch_scripts_give_the_published_models(name: str, preset: str, gpus: int) -> None:
    found = scenario(LAUNCH / name)
    published = load_scenario_text(
        f"name: a\nmodel: {{preset: {preset}}}\nrouting: {{kind: uniform}}\ncluster: {{gpu: h100, nodes: 1}}\n"
        "workload: {sequence_length: 4096, global_batch: 8}"
    ).model
    skipped = {"source", "preset", "left_out", "routing"}
    assert found.model.model_dump(exclude=skipped) == published.model_dump(exclude=skipped)
    assert parameters(found.model) == parameters(published)
    assert found.cluster.num_gpus == found.parallelism.world_size == gpus
    assert model_preset(preset)["layers"] == found.model.layers


def test_the_layouts_of_the_launch_scripts() -> None:
    mixtral, deepseek = scenario(LAUNCH / "mixtral_8x7b.sh"), scenario(LAUNCH / "deepseek_v3.sh")
    assert (mixtral.parallelism.expert, mixtral.parallelism.pipeline, mixtral.parallelism.data) == (8, 4, 8)
    assert (mixtral.parallelism.schedule.kind, mixtral.parallelism.stages) == ("interleaved", (4,) * 8)
    assert deepseek.parallelism.stages == (3, *(2,) * 29, 0, 0)
    assert deepseek.workload.precision.gemm == "fp8" and deepseek.workload.precision.optimizer == "bf16"
    assert deepseek.workload.recomputed_parts == {"rms_norm", "swiglu", "mla_up_projection", "dense_ffn"}
    assert deepseek.dispatch.algorithm == "hierarchical" and deepseek.dispatch.sm_share == 20 / 132
    assert deepseek.workload.train_tokens == 585937500 * 4096
    qwen = of(LAUNCH / "qwen3_30b.yaml", variables={"TP": "4", "PP": "2"}).scenario
    assert (qwen.parallelism.tensor, qwen.parallelism.pipeline, qwen.parallelism.data) == (4, 2, 4)


@pytest.mark.parametrize("name", ["mixtral_8x7b.sh", "deepseek_v3.sh", "qwen3_30b.yaml"])
def test_every_flag_of_a_launch_is_accounted_for_and_the_written_scenario_is_the_same(name: str) -> None:
    reading = of(LAUNCH / name)
    assert load_scenario_text(scenario_text(reading)) == reading.scenario
    assert reading.scenario.model.left_out == reading.left_out
    fates = [entry.flag.split()[0] for entry in (*reading.read, *reading.harmless)]
    assert len(set(fates)) == len(fates) and all(entry.becomes for entry in (*reading.read, *reading.harmless))
    text = (LAUNCH / name).read_text()
    told = "".join(reading.left_out) + "".join(fates)
    program = [word.strip('":') for word in text.split() if word.startswith("--")]
    launcher = ("--nproc", "--nnodes", "--node", "--master", "--job", "--ntasks", "--gpus", "--exclusive",
                "--container", "--wandb")  # fmt: skip
    assert [word for word in program if word not in told and not word.startswith(launcher)] == []


# What megatron-core 0.19.2 builds on each stage (get_num_layers_to_build, virtual stages in turn), by its own code.
BUILT = {
    "--num-layers 24": [6, 6, 6, 6],
    "--num-layers 24 --num-layers-per-virtual-pipeline-stage 2": [2] * 12,
    "--num-layers 24 --num-virtual-stages-per-pipeline-rank 3": [2] * 12,
    "--num-layers 22 --decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 6": [4, 6, 6, 6],
    "--num-layers 21 --decoder-last-pipeline-num-layers 3": [6, 6, 6, 3],
    "--num-layers 28 --decoder-first-pipeline-num-layers 4 --num-virtual-stages-per-pipeline-rank 2": [2, 4, 4, 4] * 2,
    "--num-layers 22 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split": [5, 6, 6, 5],
    "--num-layers 13 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et*3|(tt|)*4,ttL'": [
        3,
        *[2] * 5,
    ],
    "--num-layers 23 --account-for-embedding-in-pipeline-split --num-layers-per-virtual-pipeline-stage 3": [
        2,
        *[3] * 7,
    ],
}


@pytest.mark.parametrize(("flags", "built"), BUILT.items())
def test_stages_are_those_that_megatron_builds(write: Write, flags: str, built: list[int]) -> None:
    pipeline = "" if "--pipeline-model-parallel-size" in flags else "--pipeline-model-parallel-size 4"
    assert list(scenario(write(f"{flags} {pipeline}")).parallelism.stages or ()) == built


V3 = "--num-experts 256 --moe-router-topk 8 --moe-router-score-function sigmoid"


@pytest.mark.parametrize(
    ("more", "choice", "kind", "router", "file"),
    [
        ("", None, "trace", "topk_softmax", "library:8x2/published"),
        ("", "train", "train", "topk_softmax", None),
        ("", "uniform", "uniform", "topk_softmax", None),
        ("--moe-router-pre-softmax", None, "train", "deepseek_moe", None),  # none ships that routes so
        (V3, None, "train", "deepseek_v3", None),
        (
            f"{V3} --moe-router-num-groups 8 --moe-router-group-topk 4",
            None,
            "trace",
            "deepseek_v3",
            "library:256x8/published",
        ),
        ("--moe-router-force-load-balancing", "train", "uniform", None, None),
    ],
)
def test_routing_is_a_shipped_router_of_the_layout_or_as_asked_for(
    write: Write, more: str, choice: str | None, kind: str, router: str | None, file: str | None
) -> None:
    reading = of(write(more), routing=choice)
    routing = reading.scenario.routing
    assert (routing.kind, routing.router and routing.router.kind) == (kind, router)
    assert getattr(routing, "file", None) == file
    assert choice is not None or any(line.startswith("routing: ") for line in reading.taken)
    assert load_scenario_text(scenario_text(reading)) == reading.scenario


def test_a_library_without_the_layout_is_one_line(write: Write) -> None:
    with pytest.raises(UserError, match="the library has no router deepseek_v3 of 256 experts, 8 a token"):
        of(write(V3), routing="library")


def test_stage_layouts_are_read_as_they_are_written() -> None:
    assert stages_of("Et*3|(tt|)*29|mL")[-3:] == ("tt", "", "mL")
    assert stages_of("embedding,decoder|decoder,decoder,loss") == ("Et", "ttL")
    for lengths in ([3, 2, 0], [1, 1], [12, 0, 4, 9]):
        for predicted in (0, 1, 2):
            stages = stages_of(text_of(lengths, prediction_layers=predicted))
            assert [stage.count("t") for stage in stages] == lengths and stages[-1].count("m") == predicted


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("", "parallelism.tensor", 1),
        ("--tensor-model-parallel-size 2 --sequence-parallel", "parallelism.expert_tensor", 2),
        ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1", "parallelism.expert_tensor", 1),
        ("--context-parallel-size 2", "parallelism.data", 4),
        ("--use-distributed-optimizer", "parallelism.zero.dense", 1),
        ("--use-megatron-fsdp", "parallelism.zero.expert", 3),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "parallelism.zero.dense", 2),
        ("", "workload.gradient_clipping", 1.0),
        ("--clip-grad 0.0", "workload.gradient_clipping", None),
        ("", "workload.precision.gradients", "fp32"),
        ("--grad-reduce-in-bf16", "workload.precision.gradients", "bf16"),
        ("--recompute-granularity full --recompute-method uniform", "workload.recompute", "full"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 24",
         "workload.recompute", "full"),
        ("--recompute-activations", "workload.recompute", ("core_attention",)),
        ("--recompute-granularity selective --recompute-modules moe_act", "workload.recompute", ("swiglu",)),
        ("--recompute-granularity selective --recompute-modules moe shared_experts mlp core_attn "
            "--moe-shared-expert-intermediate-size 512 --moe-layer-freq [0]*1+[1]*23", "workload.recompute",
         ("moe", "shared_experts", "dense_ffn", "core_attention")),
        ("--moe-layer-recompute", "workload.recompute", ("moe",)),
        ("--moe-expert-capacity-factor 1.5 --moe-token-drop-policy position", "capacity.by", "position"),
        ("--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity", "capacity.pad", True),
        ("--moe-expert-capacity-factor -1", "capacity.kind", "none"),
        ("--moe-layer-freq 2", "model.dense_at", tuple(range(1, 24, 2))),
        ("--moe-layer-freq [0]*2+[1]*22", "model.dense_layers", 2),
        ("--moe-layer-freq '([1]+[0])*12'", "model.dense_layers", 12),
        ("", "model.expert_intermediate", 2688),  # int(4 * 1024 * 2 / 3 / 64) * 64
        ("--ffn-hidden-size 4096", "model.expert_intermediate", 4096),
        ("", "model.tied_embeddings", True),
        ("--vocab-size 50257", "model.vocab", 50304),
        ("--vocab-size 50257 --make-vocab-size-divisible-by 1", "model.vocab", 50257),
        ("--group-query-attention --num-query-groups 4", "model.kv_heads", 4),
        ("--num-query-groups 4", "model.kv_heads", 16),
        ("--moe-shared-expert-intermediate-size 5376", "model.shared_experts", 2),
        ("--moe-shared-expert-intermediate-size 1000", "model.shared_intermediate", 1000),
        ("--moe-shared-expert-intermediate-size 5376", "overlap.shared_experts", False),
        ("--window-size 127,0 --window-attn-skip-freq 4", "model.local.window", 128),
        ("--moe-router-score-function sigmoid --moe-router-num-groups 4 --moe-router-group-topk 2",
         "routing.router.kind", "deepseek_v3"),
        ("--moe-router-pre-softmax", "routing.router.kind", "deepseek_moe"),
        ("", "routing.router.kind", "topk_softmax"),
        ("--moe-aux-loss-coeff 1e-2", "routing.balance.expert", 0.01),
        ("--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type seq_aux_loss", "routing.balance.sequence", 0.01),
        ("--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type global_aux_loss",
         "routing.balance.scope", "global_batch"),
        ("--moe-router-force-load-balancing", "routing.kind", "uniform"),
        ("--train-iters 100", "workload.train_tokens", 100 * 64 * 1024.0),
        ("--train-iters=100", "workload.train_tokens", 100 * 64 * 1024.0),
        ("--overlap-grad-reduce", "overlap.gradient_reduction", True),
        ("", "overlap.gradient_reduction", False),
        ("--use-distributed-optimizer --overlap-param-gather", "overlap.parameter_gather", True),
        ("--overlap-param-gather", "overlap.parameter_gather", False),  # nothing is in shards
        ("--use-distributed-optimizer", "overlap.parameter_gather", False),
        ("--overlap-moe-expert-parallel-comm", "parallelism.schedule.kind", "combined_1f1b"),
        ("--overlap-moe-expert-parallel-comm --global-batch-size 8", "parallelism.schedule.kind", "1f1b"),
        ("", "parallelism.schedule.kind", "1f1b"),
        ("--overlap-moe-expert-parallel-comm --delay-wgrad-compute", "overlap.weight_gradients", True),
        ("--overlap-dispatch-backward-with-experts-wgrad", "overlap.weight_gradients", True),
        ("", "overlap.weight_gradients", False),
    ],
)  # fmt: skip
def test_a_flag_and_its_absence(write: Write, more: str, key: str, value: object) -> None:
    found: object = of(write(more), routing="train").scenario
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--tensor-model-parallel-size 3", "8 GPUs do not divide by tensor 3 * pipeline 1 * context 1 = 3"),
        ("--pipeline-model-parallel-size 8 --num-layers 25", "25 layers do not go evenly into 8 pipeline ranks"),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et*12|t*11L'",
            "23 layers of --num-layers 24",
        ),
        (
            "--pipeline-model-parallel-size 2 --mtp-num-layers 1 --pipeline-model-parallel-layout 'Et*12|t*12m|L|L'",
            "must begin",
        ),
        (
            "--pipeline-model-parallel-size 2 --mtp-num-layers 1 --pipeline-model-parallel-layout 'Et*12|t*12|m|L'",
            "write ...mL",
        ),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Ex*12|L'", "'*12x' is none of"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 4", "use at least 24"),
        ("--recompute-granularity selective --recompute-modules mo_act", "mo_act is none of"),
        ("--moe-layer-freq [0]*2+[1]*2", "0 or 1 for each of 24 layers, has 4 entries"),
        ("--moe-layer-freq 'exit()'", "must be a number or a list"),
        ("--moe-token-dispatcher-type alltoal", "must be one of allgather, alltoall, flex"),
        ("--expert-model-paralel-size 8", "did you mean '--expert-model-parallel-size'?"),
        ("--hidden-size ten", "must be a whole number"),
        ("--hidden-size", "has no value behind it"),
        ("--hidden-size $WIDTH", "takes $WIDTH, which the script does not set; add --var WIDTH=VALUE"),
        ("--hidden-size ${11}", "takes $11, which the script does not set; give the arguments with --args"),
        ("--hidden-size $(cat width)", "the output of a command is not known without running the script"),
        ("$(cat more_flags)", "it may hold flags"),
        (
            "--expert-model-parallel-size 3",
            "parallelism.expert (--expert-model-parallel-size): 3 does not divide experts",
        ),
        ("--optimizer-cpu-offload", "in the host's memory"),
        ("--num-distributed-optimizer-instances 2", "a part of the data-parallel ranks"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_place(write: Write, more: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^run\.sh[^\n]*$") as caught:
        of(write(more))
    assert message in str(caught.value)


def test_more_ranks_than_gpus_is_a_mistake_of_the_flags_not_an_infeasible_layout(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        of(write("--tensor-model-parallel-size 16"))
    assert not isinstance(caught.value, InfeasibleError)


@pytest.mark.parametrize("missing", ["--num-layers 24", "--hidden-size 1024", "--seq-length 1024", "--vocab-size 32000",
                                     "--micro-batch-size 1", "--num-attention-heads 16"])  # fmt: skip
def test_a_missing_flag_is_named(write: Write, missing: str) -> None:
    text = SMALL.format(per_node=8, nodes=1, more="").replace(missing, "")
    with pytest.raises(UserError, match=f"run.sh has no {missing.split()[0]}; add it"):
        of(write(text=text))


NOT_MODELLED = {
    "--tp-comm-overlap": "--tp-comm-overlap",
    "--rampup-batch-size 8 8 100": "--rampup-batch-size",
    "--fp8-format hybrid --fp8-recipe delayed": "--fp8-recipe",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep --expert-model-parallel-size 8": (
        "--moe-flex-dispatcher-backend"
    ),
    "--tensor-model-parallel-size 2": "--sequence-parallel",
    "--transformer-impl inference_optimized": "--transformer-impl",
    "--frobnicate 3": "--frobnicate",
}


@pytest.mark.parametrize(("more", "named"), NOT_MODELLED.items())
def test_what_is_not_modelled_is_told_by_the_flag_and_by_every_run(write: Write, more: str, named: str) -> None:
    reading = of(write(more))
    assert any(named in line for line in reading.left_out)
    assert reading.scenario.model.left_out == reading.left_out


WAYS = {
    "torchrun": ("", "torchrun --nproc-per-node=8 --nnodes=2"),
    "variables": ("GPUS_PER_NODE=8\nNNODES=2\n", "python"),
    "slurm": ("#SBATCH --nodes=2 --ntasks-per-node=8\n", "srun python"),
    "slurm with one task": (
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gres=gpu:h100:8 # all\n",
        "srun python",
    ),
    "world size": ("WORLD_SIZE=16\n", "python"),
    "srun": ("", "srun -N 2 --ntasks-per-node 8 python"),
}


@pytest.mark.parametrize(("head", "launcher"), WAYS.values(), ids=WAYS)
def test_gpus_come_from_the_launcher_variables_or_slurm(write: Write, head: str, launcher: str) -> None:
    body = SMALL.format(per_node=8, nodes=1, more="").replace("torchrun --nproc_per_node 8 --nnodes 1", launcher)
    assert scenario(write(text=head + body)).cluster.num_gpus == 16


def test_forks_write_what_is_on_and_off_and_need_no_python_file(write: Write) -> None:
    text = SMALL.format(per_node=8, nodes=1, more="--sequence_parallel false --tensor_model_parallel_size 2")
    text = text.replace(
        "torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py", "NPROC_PER_NODE=8 NNODES=1 megatron pt"
    )
    reading = of(write(text=text.replace("--swiglu", "--swiglu true").replace("--num-layers", "--num_layers")))
    assert reading.scenario.model.gated and reading.scenario.model.layers == 24
    assert any("without --sequence-parallel" in line for line in reading.left_out)


def test_gpus_come_from_the_user_or_are_asked_for(write: Write) -> None:
    body = SMALL.format(per_node=8, nodes=1, more="").replace("torchrun --nproc_per_node 8 --nnodes 1", "python")
    with pytest.raises(UserError, match="pass --gpus N"):
        of(write(text=body))
    assert of(write(text=body), gpus=32).scenario.parallelism.data == 32


FLAT = """
tensor_model_parallel_size: 2
pipeline_model_parallel_size: 2
sequence_parallel: true
num_layers: 24
hidden_size: 1024
num_attention_heads: 16
num_query_groups: 4
num_moe_experts: 8
moe_router_topk: 2
moe_token_dispatcher_type: alltoall
moe_ffn_hidden_size: 2688
moe_layer_freq: [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
gated_linear_unit: true
add_bias_linear: false
share_embeddings_and_output_weights: false
micro_batch_size: 1
global_batch_size: 64
seq_length: 1024
vocab_size: 32000
bf16: true
fp8: null
recompute_granularity: null
"""
BRIDGE = """
_target_: megatron.bridge.training.config.ConfigContainer
checkpoint: {save: /a, load: /b}
logger: {log_interval: 1}
train: {micro_batch_size: 1, global_batch_size: 64, train_iters: 100}
ddp: {use_distributed_optimizer: true, overlap_grad_reduce: true, grad_reduce_in_fp32: false}
dataset: {sequence_length: 1024, num_workers: 8}
mixed_precision: bf16_mixed
optimizer: {optimizer: adam, lr: 1.0e-4, use_distributed_optimizer: true, store_param_remainders: true}
scheduler: {lr_decay_style: cosine}
comm_overlap: {tp_comm_overlap: false, tp_comm_overlap_cfg: {qkv_dgrad: {method: bulk}}}
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  attention_backend: {_target_: megatron.core.transformer.enums.AttnBackend, _args_: [5]}
  masked_softmax_fusion: true
  batch_p2p_comm: true
  params_dtype: {_target_: torch.bfloat16}
  recompute_modules: [core_attn]
  recompute_granularity: null
  num_layers: 24
  hidden_size: 1024
  ffn_hidden_size: 2688
  num_attention_heads: 16
  num_query_groups: 4
  num_moe_experts: 8
  moe_router_topk: 2
  gated_linear_unit: true
  add_bias_linear: false
  vocab_size: 32000
  share_embeddings_and_output_weights: false
  pipeline_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: null
  pipeline_model_parallel_layout: [[embedding, decoder, decoder], [decoder, loss]]
  expert_model_parallel_size: 4
  moe_token_dispatcher_type: alltoall
"""


def test_yaml_by_arguments_and_by_the_fields_of_configurations(write: Write) -> None:
    flat = of(write(text=FLAT, name="a.yaml"), gpus=16).scenario
    assert (flat.parallelism.tensor, flat.parallelism.data, flat.model.kv_heads, flat.model.experts) == (2, 4, 4, 8)
    assert (flat.model.dense_layers, flat.model.gated, flat.model.attention_bias) == (1, True, "none")
    text = BRIDGE.replace("num_layers: 24", "num_layers: 3")
    bridge = of(write(text=text, name="b.yaml"), gpus=16)
    found = bridge.scenario
    assert found.parallelism.stages == (2, 1) and found.parallelism.zero.dense == 1
    assert found.workload.precision.gradients == "bf16" and found.workload.precision.weights == "bf16"
    assert found.workload.sequence_length == 1024 and found.overlap.gradient_reduction is True
    assert not bridge.left_out


def test_kernels_of_a_launch_are_those_of_its_flags(tmp_path: Path) -> None:
    script = (Path(__file__).parent / "launch" / "mixtral_8x7b.sh").read_text()

    def read(*flags: str) -> Implementation:
        place = tmp_path / "run.sh"
        place.write_text(script.replace("--bf16", " ".join(["--bf16", *flags])))
        return read_megatron(place, gpu="h100").scenario.implementation

    plain = read()
    assert plain.kind == "megatron"
    assert plain.overridden.keys() <= {"dropout", "permute", "gather_backward", "combine", "router"}
    for flag, settings in KERNELS.items():
        if "gelu" not in flag:  # of networks that are not gated
            assert vars(read(flag).switches).items() >= settings.items(), flag
    assert read("--attention-backend unfused").switches.attention == "unfused"
    assert not read("--attention-dropout 0").switches.dropout
    assert read("--moe-router-dtype fp32").switches.router_dtype == "fp32"


def test_modules_that_the_model_does_not_have_are_not_computed_again(write: Write) -> None:
    reading = of(write("--recompute-granularity selective --recompute-modules mlp moe mla_up_proj shared_experts"))
    assert reading.scenario.workload.recompute == ("moe",)
    told = [line.partition(":")[0] for line in reading.taken if "none to compute again" in line]
    assert told == ["dense_ffn", "mla_up_projection", "shared_experts"]


def test_no_flag_of_kernels_is_dropped_without_a_word(write: Write) -> None:
    """Local layers: those of megatron_local, changed by a flag, or told of it; grouped GEMMs are asked for."""
    backend, grouped = "--attention-backend flash", "--moe-grouped-gemm"
    for flag, settings in {**KERNELS, backend: {}, grouped: {}}.items():
        if "gelu" in flag:  # of networks that are not gated
            continue
        reading = of(write(f"--transformer-impl local {flag}"))
        switches = vars(reading.scenario.implementation.switches)
        told = any(line.startswith(f"{flag}: local layers") for line in reading.taken)
        assert told is not (bool(settings) and switches.items() >= settings.items()), flag
    assert scenario(write(f"--transformer-impl local {grouped}")).implementation.switches.expert_gemms == "each"
    plain = of(write())
    assert plain.scenario.implementation.switches.expert_gemms == "each"
    assert any("--moe-grouped-gemm" in line for line in plain.taken)
    assert scenario(write(grouped)).implementation.switches.expert_gemms == "grouped"


@pytest.mark.parametrize(
    ("flags", "algorithm", "deduplicate"),
    [
        ("--moe-token-dispatcher-type allgather", "allgather", "all_ranks"),
        ("--moe-token-dispatcher-type alltoall", "direct", "per_expert"),
        ("--moe-token-dispatcher-type flex", "hierarchical", "per_node"),
        ("--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep", "hybrid_ep", "per_node"),
    ],
)
def test_every_dispatcher_has_its_algorithm(write: Write, flags: str, algorithm: str, deduplicate: str) -> None:
    dispatch = of(write(f"{flags} --expert-model-parallel-size 8")).scenario.dispatch
    assert (dispatch.algorithm, dispatch.deduplicate) == (algorithm, deduplicate)
